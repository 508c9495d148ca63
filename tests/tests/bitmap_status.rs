//! The promise: what `query-block` and `query-named-block-nodes` tell of bitmaps is what QEMU tells, member by member, in every
//! state; besides, there are `frozen` and `freeze-id` of the first series. A job's successor is no bitmap of its own.
//!
//! The oracle is QEMU's system emulator without a machine, since the storage daemon has no devices for `query-block`.

use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::process::{GIVE_UP, Process};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::tools;
use serde_json::{Map, Value, json};

/// One who can be told what a guest writes.
enum Writer {
    Guest(Box<Attached>),
    /// The emulator writes by itself.
    Monitor,
}

struct Subject {
    node: &'static str,
    qmp: Qmp,
    writer: Writer,
    /// How each state was told.
    told: Vec<(String, Value)>,
}

impl Subject {
    fn write(&mut self, offset: u64, len: u64) -> Result<()> {
        match &mut self.writer {
            Writer::Guest(guest) => Ok(guest.write_at(&vec![1; len as usize], offset)?),
            Writer::Monitor => {
                let line = format!("qemu-io drive0 \"write -P 1 {offset} {len}\"");
                self.qmp.run("human-monitor-command", json!({ "command-line": line })).map(|_| ())
            }
        }
    }

    fn look(&mut self, state: &str) -> Result<()> {
        let block = self.qmp.run("query-block", json!({}))?;
        let node = self.qmp.run("query-named-block-nodes", json!({}))?;
        let inserted = block[0]["inserted"].as_object().context("nothing inserted")?.clone();
        let nodes = node.as_array().context("nodes")?;
        let named = nodes.iter().find(|node| node["node-name"] == self.node).context("the node is not told")?;
        let mut bitmaps = named["dirty-bitmaps"].clone();
        // While a job runs, QEMU has a filter above the disk, whose nameless bitmaps are the job's own; nameless is a
        // successor, too.
        if matches!(self.writer, Writer::Guest(_)) || state != "frozen" {
            ensure!(inserted["dirty-bitmaps"] == bitmaps, "{state}: the two queries differ: {block} and {node}");
        } else {
            bitmaps.as_array_mut().context("bitmaps")?.retain(|bitmap| bitmap.get("name").is_some());
        }
        if state == "after" {
            // In QEMU what was the successor stands first from then on. Here a bitmap keeps its place.
            let by_name = |bitmap: &Value| bitmap["name"].as_str().map(str::to_owned);
            bitmaps.as_array_mut().context("bitmaps")?.sort_by_key(by_name);
        }
        self.told.push((state.to_owned(), bitmaps));
        if state == "new" {
            let members = |object: &Map<String, Value>| {
                let mut names: Vec<String> = object.keys().cloned().collect();
                names.retain(|name| name != "scratch");
                names.sort();
                json!(names)
            };
            self.told.push(("members of inserted".to_owned(), members(&inserted)));
            let image = inserted["image"].as_object().context("image")?;
            self.told.push(("members of image".to_owned(), members(image)));
            ensure!(block[0]["device"] == "drive0" && inserted["drv"] == "raw" && inserted["ro"] == false);
            ensure!(image["virtual-size"] == 8 * MIB);
        }
        Ok(())
    }

    fn story(mut self, target: &Path) -> Result<Vec<(String, Value)>> {
        let node = self.node;
        self.qmp.run("block-dirty-bitmap-add", json!({ "node": node, "name": "first", "persistent": false }))?;
        let more =
            json!({ "node": node, "name": "second", "granularity": 4096, "disabled": true, "persistent": false });
        self.qmp.run("block-dirty-bitmap-add", more)?;
        self.look("new")?;
        self.write(MIB, 4096)?;
        self.write(2 * MIB - 512, 1024)?;
        self.look("written")?;
        let enabled = json!({ "node": node, "name": "second" });
        self.qmp.run("block-dirty-bitmap-enable", enabled)?;
        self.write(3 * MIB, 8192)?;
        self.look("enabled")?;
        std::fs::write(target, vec![0; 8 * MIB as usize])?;
        let backup = json!({
            "job-id": "j", "device": "drive0", "target": target, "format": "raw", "mode": "existing", "sync": "incremental",
            "bitmap": "first", "auto-finalize": false,
        });
        self.qmp.run("drive-backup", backup)?;
        self.qmp.event(|event| event.name == "BLOCK_JOB_PENDING")?;
        self.write(4 * MIB, 4096)?;
        self.look("frozen")?;
        self.qmp.run("job-finalize", json!({ "id": "j" }))?;
        self.qmp.job_completed("j")?;
        self.look("after")?;
        self.qmp.run("block-dirty-bitmap-remove", json!({ "node": node, "name": "second" }))?;
        self.look("removed")?;
        Ok(self.told)
    }
}

fn emulator(lab: &Lab, disk: &Path) -> Result<(Process, Qmp)> {
    let socket = lab.path("emulator.sock");
    let mut command = tools::command("qemu-system-x86_64")?;
    command
        .args(["-machine", "none", "-nodefaults", "-nographic"])
        .arg("-drive")
        .arg(format!("if=none,id=drive0,format=raw,node-name=node0,file={}", disk.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", socket.display()))
        .stdin(Stdio::null());
    let process = lab.start("emulator", &mut command)?;
    let begun = Instant::now();
    loop {
        match Qmp::connect(&socket) {
            Ok(qmp) => return Ok((process, qmp)),
            Err(error) if begun.elapsed() > GIVE_UP => return Err(error),
            Err(_) => std::thread::yield_now(),
        }
    }
}

#[test]
fn bitmaps_are_told_as_by_qemu() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", 8 * MIB)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let here = Subject { node: "drive0", qmp: daemon.qmp()?, writer: Writer::Guest(Box::new(guest)), told: Vec::new() };
    let mut here = here.story(&lab.path("target.raw"))?;

    let other = lab.disk("other", 8 * MIB)?;
    let (_process, qmp) = emulator(&lab, &other.path)?;
    let there = Subject { node: "node0", qmp, writer: Writer::Monitor, told: Vec::new() };
    let there = there.story(&lab.path("other-target.raw"))?;

    // What the first series had, and QEMU has no more.
    for (state, told) in &mut here {
        for bitmap in told.as_array_mut().context("a list")?.iter_mut().filter_map(Value::as_object_mut) {
            let frozen = bitmap.shift_remove("frozen").context("frozen is not shown")?;
            let id = bitmap.shift_remove("freeze-id");
            let wanted = state == "frozen" && bitmap["name"] == "first";
            ensure!(frozen == wanted && id.is_some() == wanted && bitmap["busy"] == wanted, "{state}: {bitmap:?}");
        }
    }
    for (here, there) in here.iter().zip(&there) {
        ensure!(here == there, "{}:\nhere  {}\nthere {}", here.0, here.1, there.1);
    }
    ensure!(here.len() == there.len() && here.len() == 8);
    daemon.stop()?;
    Ok(())
}
