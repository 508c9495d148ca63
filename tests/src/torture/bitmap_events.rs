//! Bitmaps are changed at random, by commands, transactions and clients that die; and looked at.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::marks::Op;
use super::orders::Answer;
use super::world::Torture;
use crate::daemon::blkmark_binary;
use crate::process::Process;
use crate::random::Random;
use crate::tools::{command, run};

impl Torture {
    /// One change, or several at one instant.
    pub fn change_bitmaps(&mut self, random: &mut Random) -> Result<()> {
        let ops = self.any_ops(random, 1 + random.0 % 3);
        self.catch_up()?;
        for (disk, ops) in &ops {
            self.served[*disk].marks.unsure(ops);
        }
        let flat: Vec<(usize, &Op)> = ops.iter().flat_map(|(disk, ops)| ops.iter().map(|op| (*disk, op))).collect();
        let alone = flat.len() == 1;
        let actions = flat.iter().map(|(disk, op)| op.action(&self.served[*disk].disk.id));
        let mut actions: Vec<Value> = actions.collect();
        let answer = match alone {
            true => {
                let action = actions.remove(0);
                self.order(action["type"].as_str().unwrap_or_default(), action["data"].clone())?
            }
            false => self.order("transaction", json!({ "actions": actions }))?,
        };
        match answer {
            Answer::Lost => {
                self.unsettled.push(ops);
                return Ok(());
            }
            Answer::Refused(error) => {
                ensure!(!alone || self.store_was_full, "{ops:?} was refused: {}", error.desc);
                ops.iter().for_each(|(disk, ops)| self.served[*disk].marks.refused(ops));
            }
            Answer::Done(_) => {
                self.log.count("bitmaps", "changes", flat.len() as u64);
                let now = self.now()?;
                ops.iter().for_each(|(disk, ops)| self.served[*disk].marks.done(ops, now));
            }
        }
        for (disk, _) in &ops {
            self.compare_hashes(*disk)?;
        }
        Ok(())
    }

    /// Changes, by disk.
    fn any_ops(&mut self, random: &mut Random, count: u64) -> Vec<(usize, Vec<Op>)> {
        let mut ops: Vec<(usize, Vec<Op>)> = Vec::new();
        for _ in 0..count {
            let disk = random.below(self.served.len() as u64) as usize;
            let op = self.served[disk].marks.any_op(random, !self.options.volatile);
            match ops.iter_mut().find(|(other, _)| *other == disk) {
                Some((_, ops)) => ops.push(op),
                None => ops.push((disk, vec![op])),
            }
        }
        ops
    }

    /// A client that sends many changes and is killed.
    pub fn kill_bitmap_client(&mut self, random: &mut Random, after: Duration) -> Result<()> {
        let ops = self.any_ops(random, 6);
        let mut text = String::new();
        for (disk, ops) in &ops {
            self.served[*disk].marks.unsure(ops);
            for op in ops {
                let action = op.action(&self.served[*disk].disk.id);
                text += &format!("{}\n", json!({ "execute": action["type"], "arguments": action["data"] }));
            }
        }
        let requests = self.place.path("requests");
        fs::write(&requests, text)?;
        let mut client = self.client(&["qmp"], Stdio::from(fs::File::open(&requests)?))?;
        std::thread::sleep(after);
        self.kill_client(&mut client, "client with bitmaps")?;
        let (shown, now) = (self.shown()?, self.now()?);
        self.settle(&ops, &shown, now)?;
        ops.iter().try_for_each(|(disk, _)| self.compare_hashes(*disk))
    }

    /// Starts blkmark's own client.
    pub fn client(&mut self, words: &[&str], input: Stdio) -> Result<Process> {
        let mut command = Command::new(blkmark_binary()?);
        command.arg("--control").arg(self.place.path("control.sock")).args(words).stdin(input);
        self.log.say(format_args!("client {}", words.join(" ")));
        Process::start("client", &mut command, &self.place.path("client.log"))
    }

    /// kill -9 of a client; returns when nothing comes of its commands any more.
    pub fn kill_client(&mut self, client: &mut Process, kind: &'static str) -> Result<()> {
        let status = client.kill()?;
        self.log.say(format_args!("kill -9 of the {kind}: {status}"));
        // One that was faster than the kill was not killed.
        let killed = status.code().is_none();
        self.log.count(if killed { "kills" } else { "ends" }, kind, 1);
        self.alone()
    }

    /// Compares some bitmap with what it must contain.
    pub fn look_at_bitmap(&mut self, disk: usize, random: &mut Random) -> Result<()> {
        let names: Vec<String> = self.served[disk].marks.0.keys().cloned().collect();
        if names.is_empty() {
            return Ok(());
        }
        let name = names[random.below(names.len() as u64) as usize].clone();
        self.look_at(disk, &name)
    }

    /// Compares a bitmap with what it must contain.
    pub fn look_at(&mut self, disk: usize, name: &str) -> Result<()> {
        self.catch_up()?;
        let mark = self.served[disk].marks.0[name].clone();
        let node = self.served[disk].disk.id.clone();
        // An export takes bitmaps that stand still.
        let copy = format!("look{}", self.name());
        let add = json!({ "node": node, "name": copy, "granularity": mark.granularity, "persistent": false, "disabled": true });
        let merge = json!({ "node": node, "target": copy, "bitmaps": [name] });
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": add },
            { "type": "block-dirty-bitmap-merge", "data": merge },
        ]);
        self.must("transaction", json!({ "actions": actions }))?.context("the daemon died")?;
        let socket = self.place.path("nbd.sock");
        let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        self.must("nbd-server-start", address)?;
        let export = json!({ "type": "nbd", "id": "look", "node-name": node, "name": "look", "bitmaps": [copy] });
        self.must("block-export-add", export)?;
        let map = run(command("nbdinfo")?
            .args(["--json", &format!("--map=qemu:dirty-bitmap:{copy}")])
            .arg(format!("nbd+unix:///look?socket={}", socket.display())))?;
        self.must("nbd-server-stop", json!({}))?;
        self.must("block-dirty-bitmap-remove", json!({ "node": node, "name": copy }))?;
        let dirty = dirty(&map, mark.granularity)?;
        let end = self.served[disk].bytes().div_ceil(mark.granularity);
        let missing = mark.must.iter().find(|granule| **granule < end && !dirty.contains(granule));
        if let Some(granule) = missing {
            bail!(
                "LOSS: bitmap {name} of disk {disk} lacks byte {}, which changed ({} granules of {}, {} needed)",
                granule * mark.granularity,
                dirty.len(),
                mark.granularity,
                mark.must.len()
            );
        }
        self.log.count("verified", "bitmaps", 1);
        Ok(())
    }
}

/// The dirty granules, as nbdinfo shows them.
fn dirty(map: &str, granularity: u64) -> Result<BTreeSet<u64>> {
    let map: Value = serde_json::from_str(map)?;
    let mut granules = BTreeSet::new();
    for extent in map.as_array().context("a map")?.iter().filter(|extent| extent["type"] == 1) {
        let (Some(offset), Some(length)) = (extent["offset"].as_u64(), extent["length"].as_u64()) else {
            bail!("an extent without a place: {extent}");
        };
        granules.extend(offset / granularity..(offset + length).div_ceil(granularity));
    }
    Ok(granules)
}
