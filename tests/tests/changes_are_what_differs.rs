//! The promise: the changes between two checkpoints of busy disks are just what the guest wrote in between, in images of the same
//! instants seen as what differs; also when checkpoints between them are deleted, and for several disks at one instant.
//!
//! Each checkpoint is made in one transaction with points of both disks, which are pulled over NBD. The guest's numbers say
//! what was written between two instants.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Disk, Lab};
use blkmark_tests::numbers::{Progress, SIZE, SLOTS, last_number, same_instant, write_numbers};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::tools;
use serde_json::json;

const CLUSTER: u64 = 64 * 1024;

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(Guest::connect(&disk.socket, Options::default())?.into_disk()?)
}

/// In pages of `limit` regions.
fn changes(qmp: &mut Qmp, disk: &str, from: &str, to: &str, limit: u64) -> Result<BTreeSet<u64>> {
    let (mut found, mut offset) = (BTreeSet::new(), json!(0));
    loop {
        let arguments = json!({ "node": disk, "from": from, "to": to, "offset": offset, "limit": limit });
        let page = qmp.run("query-changes", arguments)?;
        for region in page["dirty-regions"].as_array().context("regions")? {
            let start = region["start"].as_u64().context("start")?;
            let end = start + region["count"].as_u64().context("count")?;
            found.extend(start / CLUSTER..end.div_ceil(CLUSTER));
        }
        match page.get("next-offset") {
            Some(next) => offset = next.clone(),
            None => return Ok(found),
        }
    }
}

struct Instant {
    name: String,
    images: [Vec<u8>; 2],
}

#[test]
fn changes_between_checkpoints_of_busy_disks_are_what_was_written() -> Result<()> {
    let lab = Lab::new()?;
    let disks = [lab.disk("a", SIZE)?, lab.disk("b", SIZE)?];
    let daemon = Daemon::blkmark(&lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    let socket = lab.path("nbd.sock");
    qmp.run("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }))?;
    let mut attached = [attach(&disks[0])?, attach(&disks[1])?];
    let progress = Progress::default();
    let write = |stop: &Stop| write_numbers(&mut attached, &progress, stop);
    beside(vec![Box::new(write)], || {
        let mut instants: Vec<Instant> = Vec::new();
        for round in 0..6u64 {
            progress.await_writes(10 + round * 13)?;
            let name = format!("c{round}");
            let mut actions = vec![json!({ "type": "checkpoint-create", "data": { "name": name } })];
            for disk in ["a", "b"] {
                actions.push(json!({ "type": "point-add", "data": { "node": disk, "name": format!("p-{disk}") } }));
            }
            qmp.run("transaction", json!({ "actions": actions }))?;
            let mut images = Vec::new();
            for disk in ["a", "b"] {
                let point = format!("p-{disk}");
                qmp.run("block-export-add", json!({ "type": "nbd", "id": point, "node-name": point }))?;
                let (url, image) = (format!("nbd+unix:///{point}?socket={}", socket.display()), lab.path("image"));
                tools::run(tools::command("nbdcopy")?.arg(url).arg(&image))?;
                images.push(fs::read(&image)?);
                fs::remove_file(&image)?;
                qmp.run("block-export-del", json!({ "id": point, "mode": "hard" }))?;
                qmp.run("point-remove", json!({ "name": point }))?;
            }
            same_instant(&images[0], &images[1]).with_context(|| name.clone())?;
            let images = images.try_into().ok().context("two images")?;
            instants.push(Instant { name, images });
            // One in the middle goes: all that is asked about the others is as before.
            if round == 3 {
                let gone = instants.remove(1);
                qmp.run("checkpoint-delete", json!({ "name": gone.name }))?;
            }
        }
        for (at, from) in instants.iter().enumerate() {
            for to in &instants[at + 1..] {
                for (n, disk) in ["a", "b"].into_iter().enumerate() {
                    let found = changes(&mut qmp, disk, &from.name, &to.name, 1 + n as u64 * 999)?;
                    let differs = |cluster: &u64| {
                        let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
                        from.images[n][range.clone()] != to.images[n][range]
                    };
                    let differing: BTreeSet<u64> = (0..SIZE / CLUSTER).filter(differs).collect();
                    let what = format!("disk {disk}, {} to {}", from.name, to.name);
                    ensure!(found.is_superset(&differing), "{what}: {differing:?} differ, {found:?} is answered");
                    // No more than the numbers in between, and the one that was in flight at either instant.
                    let (first, last) = (last_number(&from.images[n])?, last_number(&to.images[n])?);
                    let slot = |number: u64| number % SLOTS * (SIZE / SLOTS) / CLUSTER;
                    let written: BTreeSet<u64> = (first..=last + 1).map(slot).collect();
                    ensure!(found.is_subset(&written), "{what}: {written:?} were written, {found:?} is answered");
                }
            }
        }
        Ok(())
    })?;
    drop(attached);
    daemon.stop()?;
    Ok(())
}
