//! The promise: every example of docs/bitmaps.md works as it is printed.
//!
//! The fenced blocks are taken out of the page and done in their order: `console` lines in a shell, the `daemon` started, what
//! is sent in `qmp` blocks sent through its socket, `guest` lines written over vhost-user. What the page shows as an answer is
//! compared, member by member but for `...`. At the end the disks hold what the guest blocks wrote, and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_backup::qmp::{Client, ClientError, Event};
use blkmark_tests::daemon::blkmark_binary;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::process::{GIVE_UP, Process};
use blkmark_tests::tools;
use serde_json::{Value, json};

const PAGE: &str = include_str!("../../docs/bitmaps.md");

#[test]
fn every_example_of_the_page_works_as_printed() -> Result<()> {
    let lab = Lab::new()?;
    let mut reader = Reader { lab: &lab, daemon: None, client: None, events: Vec::new(), guests: BTreeMap::new() };
    let mut done = BTreeMap::new();
    for block in blocks(PAGE)? {
        let place = || format!("docs/bitmaps.md, the {} block in line {}:\n{}", block.kind, block.line, block.text);
        reader.play(&block).with_context(place)?;
        *done.entry(block.kind).or_insert(0) += 1;
    }
    // A page whose blocks are not recognised would prove nothing.
    ensure!(done["qmp"] > 10 && done["guest"] > 5 && done["console"] > 5 && done["daemon"] == 1, "{done:?}");
    for (name, guest) in &reader.guests {
        let disk = fs::read(lab.path(&format!("{name}.raw")))?;
        let rest = disk.get(guest.written.len()..).with_context(|| format!("{name} is too short"))?;
        ensure!(
            rest.iter().all(|byte| *byte == 0) && disk.starts_with(&guest.written),
            "{name} is not what the guest wrote"
        );
    }
    Ok(())
}

struct Block {
    kind: &'static str,
    line: usize,
    text: String,
}

fn blocks(page: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in page.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(""), Some(_)) => blocks.extend(open.take()),
            (Some(kind), None) => {
                let kinds = ["console", "daemon", "qmp", "guest"];
                let known = kinds.into_iter().find(|known| *known == kind);
                let kind = known.with_context(|| format!("line {}: a block of kind {kind:?}", number + 1))?;
                open = Some(Block { kind, line: number + 1, text: String::new() });
            }
            (Some(_), Some(_)) => bail!("line {}: a block within a block", number + 1),
            (None, Some(block)) => block.text.extend([line, "\n"]),
            (None, None) => {}
        }
    }
    ensure!(open.is_none(), "the last block has no end");
    Ok(blocks)
}

/// A disk as its guest sees it, and what has to be on it.
struct GuestDisk {
    attached: Attached,
    written: Vec<u8>,
}

/// Who follows the page.
struct Reader<'a> {
    lab: &'a Lab,
    daemon: Option<Process>,
    client: Option<Client>,
    events: Vec<Event>,
    guests: BTreeMap<String, GuestDisk>,
}

impl Reader<'_> {
    fn play(&mut self, block: &Block) -> Result<()> {
        match block.kind {
            "console" => self.console(&block.text),
            "daemon" => self.start(&block.text),
            "qmp" => self.talk(&block.text),
            _ => block.text.lines().try_for_each(|line| self.write(line).with_context(|| line.to_owned())),
        }
    }

    /// `$ command`, and beneath it what it prints.
    fn console(&self, text: &str) -> Result<()> {
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            let command = line.strip_prefix("$ ").with_context(|| format!("{line:?} is no command"))?;
            let mut shown = String::new();
            while let Some(line) = lines.next_if(|line| !line.starts_with("$ ")) {
                shown.extend([line, "\n"]);
            }
            let said = tools::run(Command::new("sh").arg("-c").arg(command).current_dir(self.lab.folder()))?;
            ensure!(said == shown, "{command} printed:\n{said}");
        }
        Ok(())
    }

    fn start(&mut self, text: &str) -> Result<()> {
        let line = text.replace("\\\n", " ");
        let mut words = line.split_whitespace();
        ensure!(words.next() == Some("blkmark"), "not blkmark");
        let mut command = Command::new(blkmark_binary()?);
        let mut process = self.lab.start("blkmark", command.args(words).current_dir(self.lab.folder()))?;
        process.first_line()?;
        self.daemon = Some(process);
        Ok(())
    }

    fn talk(&mut self, text: &str) -> Result<()> {
        let mut reply = None;
        for (sent, value) in messages(text)? {
            if sent {
                ensure!(reply.is_none(), "a reply is not shown: {reply:?}");
                reply = Some(self.send(&value)?);
            } else if value.get("event").is_some() {
                self.hear(&value)?;
            } else {
                let got = reply.take().context("a reply to nothing")?;
                ensure!(matches(&value, &got), "the reply is\n{got:#}");
            }
        }
        ensure!(reply.is_none(), "a reply is not shown: {reply:?}");
        Ok(())
    }

    fn send(&mut self, message: &Value) -> Result<Value> {
        let command = message["execute"].as_str().context("no command")?;
        if command == "qmp_capabilities" {
            // What the client does when it connects.
            let mut client = Client::connect(self.lab.path("control.sock"))?;
            client.set_reply_limit(GIVE_UP);
            self.client = Some(client);
            return Ok(json!({ "return": {} }));
        }
        let client = self.client.as_mut().context("not connected")?;
        let arguments = message.get("arguments").cloned().unwrap_or_else(|| json!({}));
        match client.execute(command, arguments) {
            Ok(value) => Ok(json!({ "return": value })),
            Err(ClientError::Refused(error)) => {
                Ok(json!({ "error": { "class": error.class.as_str(), "desc": error.desc } }))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for an event like the shown one, and for its job to be gone, so that its name and its bitmap are free.
    fn hear(&mut self, shown: &Value) -> Result<()> {
        let tell = |event: &Event| json!({ "event": event.name, "data": event.data, "timestamp": {} });
        let about = |event: &Event| event.name == shown["event"] && event.data["device"] == shown["data"]["device"];
        let event = self.await_event(about)?;
        ensure!(matches(shown, &tell(&event)), "the event is\n{:#}", tell(&event));
        self.await_event(|event| {
            event.name == "JOB_STATUS_CHANGE"
                && event.data["id"] == shown["data"]["device"]
                && event.data["status"] == "null"
        })?;
        Ok(())
    }

    fn await_event(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        if let Some(at) = self.events.iter().position(&wanted) {
            return Ok(self.events.remove(at));
        }
        let client = self.client.as_mut().context("not connected")?;
        let kept = &mut self.events;
        let event = client.wait_event(GIVE_UP, |event| {
            let found = wanted(event);
            if !found {
                kept.push(event.clone());
            }
            found
        })?;
        event.with_context(|| format!("it does not come; there were {:?}", self.events))
    }

    /// `DISK: write OFFSET LENGTH BYTE`
    fn write(&mut self, line: &str) -> Result<()> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [disk, "write", offset, length, byte] = words[..] else { bail!("no such thing for a guest to do") };
        let name = disk.strip_suffix(':').context("which disk?")?;
        let (offset, length) = (size(offset)?, size(length)?);
        let guest = match self.guests.get_mut(name) {
            Some(guest) => guest,
            None => {
                let guest = attach(self.lab.folder(), name)?;
                self.guests.entry(name.to_owned()).or_insert(guest)
            }
        };
        let bytes = vec![byte.parse()?; length as usize];
        for (at, piece) in (offset..).step_by(MIB as usize).zip(bytes.chunks(MIB as usize)) {
            guest.attached.write_at(piece, at)?;
        }
        // The disk may have become larger.
        let end = offset as usize + bytes.len();
        guest.written.resize(guest.written.len().max(end), 0);
        guest.written[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }
}

fn attach(folder: &Path, name: &str) -> Result<GuestDisk> {
    let attached = Guest::connect(&folder.join(format!("{name}.sock")), Options::default())?.into_disk()?;
    let written = vec![0; attached.size() as usize];
    Ok(GuestDisk { attached, written })
}

fn size(text: &str) -> Result<u64> {
    let (digits, unit) = match text.strip_suffix(['K', 'M']) {
        Some(digits) => (digits, if text.ends_with('K') { 1 << 10 } else { MIB }),
        None => (text, 1),
    };
    Ok(digits.parse::<u64>()? * unit)
}

/// The messages of a block: whether each is sent, and what it says. `...` becomes a member of that name.
fn messages(text: &str) -> Result<Vec<(bool, Value)>> {
    let mut messages: Vec<(bool, String)> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("-> "), line.strip_prefix("<- "), messages.last_mut()) {
            (Some(sent), _, _) => messages.push((true, sent.to_owned())),
            (_, Some(received), _) => messages.push((false, received.to_owned())),
            (_, _, Some((_, message))) => message.extend(["\n", line]),
            (_, _, None) => bail!("{line:?} belongs to nothing"),
        }
    }
    let parse = |(sent, text): (bool, String)| {
        let value = serde_json::from_str(&text.replace("...", "\"...\": 0")).with_context(|| text.clone())?;
        Ok((sent, value))
    };
    messages.into_iter().map(parse).collect()
}

/// Whether `got` is what is shown: the same, but that an object shown with `...` may have more members.
fn matches(shown: &Value, got: &Value) -> bool {
    match (shown, got) {
        (Value::Object(shown), Value::Object(got)) => {
            let in_part = shown.contains_key("...");
            let members = shown.iter().filter(|(name, _)| *name != "...");
            members.clone().all(|(name, value)| got.get(name).is_some_and(|got| matches(value, got)))
                && (in_part || members.count() == got.len())
        }
        (Value::Array(shown), Value::Array(got)) => {
            shown.len() == got.len() && shown.iter().zip(got).all(|(shown, got)| matches(shown, got))
        }
        (shown, got) => shown == got,
    }
}
