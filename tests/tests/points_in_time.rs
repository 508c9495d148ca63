//! The promise: a point in time is a disk as of one instant, for as long as it is there, whoever reads it and however busy the
//! guest is. Points of several disks, and the bitmaps that are frozen with them, are of the same instant; all of it comes
//! to be, or nothing.
//!
//! The readers are nbdcopy, nbdinfo, qemu-img and blkmark's own jobs; the guest writes over vhost-user all the time.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::numbers::{Progress, same_instant, write_numbers};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::tools;
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;
const CLUSTER: u64 = 64 * 1024;

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(Guest::connect(&disk.socket, Options::default())?.into_disk()?)
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn serve(qmp: &mut Qmp, lab: &Lab) -> Result<PathBuf> {
    let socket = lab.path("nbd.sock");
    qmp.run("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }))?;
    Ok(socket)
}

fn export(qmp: &mut Qmp, node: &str, bitmaps: &[&str]) -> Result<()> {
    let arguments = json!({ "type": "nbd", "id": format!("e-{node}"), "node-name": node, "bitmaps": bitmaps });
    qmp.run("block-export-add", arguments).map(drop)
}

fn withdraw(qmp: &mut Qmp, node: &str) -> Result<()> {
    qmp.run("block-export-del", json!({ "id": format!("e-{node}"), "mode": "hard" })).map(drop)
}

fn point(qmp: &mut Qmp, name: &str) -> Result<Value> {
    let nodes = qmp.run("query-named-block-nodes", json!({}))?;
    let found = nodes.as_array().into_iter().flatten().find(|node| node["node-name"] == name);
    found.cloned().with_context(|| format!("no node {name} in {nodes}"))
}

/// A map of an export, as `(offset, length, type)`.
fn map(uri: &str, context: &str) -> Result<Vec<(u64, u64, u64)>> {
    let map = tools::run(tools::command("nbdinfo")?.args(["--json", &format!("--map={context}"), uri]))?;
    let map: Value = serde_json::from_str(&map)?;
    let number = |extent: &Value, name: &str| extent[name].as_u64().with_context(|| format!("{name} in {extent}"));
    let extents = map.as_array().context("a map")?.iter();
    extents.map(|e| Ok((number(e, "offset")?, number(e, "length")?, number(e, "type")?))).collect()
}

fn dirty(uri: &str, bitmap: &str) -> Result<Vec<u64>> {
    let map = map(uri, &format!("qemu:dirty-bitmap:{bitmap}"))?;
    let dirty = map.into_iter().filter(|(.., kind)| *kind == 1);
    Ok(dirty.flat_map(|(offset, length, _)| offset / CLUSTER..(offset + length) / CLUSTER).collect())
}

/// A pull backup of two disks, full and then incremental, again and again: each is one instant, both are the same one, and what
/// the frozen bitmaps show is all that differs from the pull before.
#[test]
fn points_of_two_disks_and_their_bitmaps_are_one_instant() -> Result<()> {
    let lab = Lab::new()?;
    let disks = [lab.disk("a", SIZE)?, lab.disk("b", SIZE)?];
    let daemon = Daemon::blkmark(&lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    let socket = serve(&mut qmp, &lab)?;
    let mut attached = [attach(&disks[0])?, attach(&disks[1])?];
    let progress = Progress::default();
    let write = |stop: &Stop| write_numbers(&mut attached, &progress, stop);
    beside(vec![Box::new(write)], || {
        let mut before: Option<[Vec<u8>; 2]> = None;
        for round in 0..5u64 {
            progress.await_writes(50 + round * 97 % 400)?;
            let mut actions = Vec::new();
            for disk in ["a", "b"] {
                let of = json!({ "node": disk, "name": "pull" });
                match round {
                    0 => actions.push(json!({ "type": "block-dirty-bitmap-add", "data": of })),
                    _ => {
                        let copy = json!({ "node": disk, "name": format!("c{round}"), "disabled": true });
                        let merge = json!({ "node": disk, "target": format!("c{round}"), "bitmaps": ["pull"] });
                        actions.push(json!({ "type": "block-dirty-bitmap-add", "data": copy }));
                        actions.push(json!({ "type": "block-dirty-bitmap-merge", "data": merge }));
                        actions.push(json!({ "type": "block-dirty-bitmap-clear", "data": of }));
                    }
                }
                let name = format!("p-{disk}");
                actions.push(json!({ "type": "point-add", "data": { "node": disk, "name": name } }));
            }
            let acked_before = progress.acked();
            qmp.run("transaction", json!({ "actions": actions }))?;
            let issued_after = progress.issued();

            let bitmap = format!("c{round}");
            let mut pulled = Vec::new();
            for (n, disk) in ["a", "b"].into_iter().enumerate() {
                let node = format!("p-{disk}");
                let bitmaps = if round > 0 { vec![bitmap.as_str()] } else { Vec::new() };
                export(&mut qmp, &node, &bitmaps)?;
                let image = lab.path("pulled.raw");
                tools::run(tools::command("nbdcopy")?.args(["--connections=3", &uri(&socket, &node)]).arg(&image))?;
                let bytes = fs::read(&image)?;
                fs::remove_file(&image)?;
                if round == 0 {
                    let again = lab.path("again.raw");
                    let convert = ["convert", "-f", "raw", "-O", "raw", &uri(&socket, &node)];
                    tools::run(tools::command("qemu-img")?.args(convert).arg(&again))?;
                    ensure!(fs::read(&again)? == bytes, "two pulls of one point differ");
                }
                if let Some(before) = &before {
                    let dirty = dirty(&uri(&socket, &node), &bitmap)?;
                    let mut chain = before[n].clone();
                    for cluster in dirty {
                        let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
                        chain[range.clone()].copy_from_slice(&bytes[range]);
                    }
                    ensure!(chain == bytes, "round {round}: disk {disk} differs from its chain");
                }
                withdraw(&mut qmp, &node)?;
                pulled.push(bytes);
            }
            let (a, b) = same_instant(&pulled[0], &pulled[1]).with_context(|| format!("round {round}"))?;
            ensure!(b >= acked_before, "number {acked_before} was acknowledged before the order, B is of {b}");
            ensure!(a <= issued_after, "number {issued_after} was the last issued before the answer, A is of {a}");
            let mut actions = Vec::new();
            for disk in ["a", "b"] {
                actions.push(json!({ "type": "point-remove", "data": { "name": format!("p-{disk}") } }));
                if round > 0 {
                    let copy = json!({ "node": disk, "name": bitmap });
                    actions.push(json!({ "type": "block-dirty-bitmap-remove", "data": copy }));
                }
            }
            qmp.run("transaction", json!({ "actions": actions }))?;
            before = pulled.try_into().ok();
        }
        Ok(())
    })?;
    for disk in ["a", "b"] {
        let scratch = &point(&mut qmp, disk)?["scratch"];
        ensure!(scratch["memory"] == 0 && scratch["file"] == 0, "{scratch}");
    }
    drop(attached);
    daemon.stop()?;
    Ok(())
}

/// Jobs take a point as they take a disk, at the same time as exports, and leave it as it was.
#[test]
fn jobs_copy_points_while_others_read_them() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    // The guest may get over all of the disk meanwhile, and two points need more than one disk of scratch then.
    let option = format!("id=drive0,path={},socket={},scratch-size=64M", disk.path.display(), disk.socket.display());
    let daemon = Daemon::start_with(Kind::Blkmark, &lab, &[], "c.sock", &["--disk", &option])?;
    let mut qmp = daemon.qmp()?;
    let socket = serve(&mut qmp, &lab)?;
    let mut guest = attach(&disk)?;
    let first = disk.content()?;
    // Changed since the first instant: three clusters. The bitmap of them stands still from the second instant on.
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b", "granularity": 4096 }))?;
    qmp.run("point-add", json!({ "node": "drive0", "name": "p1" }))?;
    for cluster in [3, 4, 100] {
        guest.write_at(&vec![7; 4096], cluster * CLUSTER + 8192)?;
    }
    let second = disk.content()?;
    qmp.run(
        "transaction",
        json!({ "actions": [
            { "type": "block-dirty-bitmap-disable", "data": { "node": "drive0", "name": "b" } },
            { "type": "point-add", "data": { "node": "drive0", "name": "p2" } },
        ] }),
    )?;
    export(&mut qmp, "p1", &[])?;
    let full = lab.path("full.qcow2");
    let increment = lab.path("inc.qcow2");
    let mut number = 0u64;
    let write = |stop: &Stop| {
        while !stop.is_due() {
            number += 1;
            let at = number.wrapping_mul(0x9e37_79b9) % (SIZE / 4096) * 4096;
            guest.write_at(&vec![number as u8 | 1; 4096], at)?;
        }
        Ok(())
    };
    beside(vec![Box::new(write)], || {
        let backup = |node: &str, target: &Path, sync: Value| {
            let mut arguments = json!({ "job-id": node, "device": node, "target": target, "format": "qcow2" });
            for (name, value) in sync.as_object().into_iter().flatten() {
                arguments[name] = value.clone();
            }
            arguments
        };
        qmp.run("drive-backup", backup("p1", &full, json!({ "sync": "full" })))?;
        qmp.job_completed("p1")?;
        images::create_on_top(&full, "qcow2", &increment)?;
        let sync = json!({ "sync": "bitmap", "bitmap": "b", "bitmap-mode": "never", "mode": "existing" });
        qmp.run("drive-backup", backup("p2", &increment, sync))?;
        qmp.job_completed("p2")?;
        let image = lab.path("p1.raw");
        tools::run(tools::command("nbdcopy")?.arg(uri(&socket, "p1")).arg(&image))?;
        ensure!(fs::read(&image)? == first, "the first point is not the first instant");
        // A job that holds the point keeps it.
        let hung = json!({ "sync": "full", "speed": 4096, "job-id": "slow" });
        qmp.run("drive-backup", backup("p2", &lab.path("slow.qcow2"), hung))?;
        let error = qmp.refused("point-remove", json!({ "name": "p2" }))?;
        ensure!(error.desc == "Node 'p2' is busy: block device is in use by block job: backup", "{}", error.desc);
        qmp.run("job-cancel", json!({ "id": "slow" }))?;
        ensure!(qmp.job_end("slow")? == blkmark_tests::qmp::JobEnd::Cancelled);
        ensure!(point(&mut qmp, "p2")?["point"]["readers"] == 0);
        Ok(())
    })?;
    for (image, wanted) in [(&full, &first), (&increment, &second)] {
        images::assert_sound(image)?;
        images::assert_equal(image, &lab.write("wanted.raw", wanted)?)?;
    }
    // The increment holds what the bitmap held and no more: units of 64 KiB.
    let map = tools::run(tools::command("qemu-img")?.args(["map", "--output=json"]).arg(&increment))?;
    let map: Value = serde_json::from_str(&map)?;
    let top = map.as_array().into_iter().flatten().filter(|e| e["depth"] == 0 && e["data"] == true);
    let bytes: u64 = top.filter_map(|extent| extent["length"].as_u64()).sum();
    ensure!(bytes == 3 * CLUSTER, "the increment holds {bytes} bytes: {map}");
    withdraw(&mut qmp, "p1")?;
    for name in ["p1", "p2"] {
        qmp.run("point-remove", json!({ "name": name }))?;
    }
    drop(guest);
    daemon.stop()?;
    Ok(())
}

/// `base:allocation` of a point shows the holes of its instant, whatever was written or discarded since.
#[test]
fn holes_of_a_point_are_those_of_its_instant() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let socket = serve(&mut qmp, &lab)?;
    let mut guest = attach(&disk)?;
    guest.write_at(&vec![1; 4 * MIB as usize], 4 * MIB)?;
    qmp.run("point-add", json!({ "node": "drive0", "name": "p" }))?;
    export(&mut qmp, "p", &[])?;
    let (hole, data) = (3, 0);
    let wanted = [(0, 4 * MIB, hole), (4 * MIB, 4 * MIB, data), (8 * MIB, 8 * MIB, hole)];
    ensure!(map(&uri(&socket, "p"), "base:allocation")? == wanted);
    // Into holes, holes into data, zeroes into both.
    guest.write_at(&vec![2; 2 * MIB as usize], 3 * MIB)?;
    guest.discard(6 * MIB, MIB)?;
    guest.write_zeroes(7 * MIB, 4 * MIB, true)?;
    let shown = map(&uri(&socket, "p"), "base:allocation")?;
    ensure!(shown == wanted, "{shown:?}");
    let image = lab.path("p.raw");
    tools::run(tools::command("nbdcopy")?.arg(uri(&socket, "p")).arg(&image))?;
    let mut then = vec![0; SIZE as usize];
    then[4 * MIB as usize..8 * MIB as usize].fill(1);
    ensure!(fs::read(&image)? == then);
    drop(guest);
    daemon.stop()?;
    Ok(())
}

/// Scratch runs full: the guest goes on, the point is broken and says so, its readers get errors and never wrong bytes.
#[test]
fn a_broken_point_says_so_and_gives_errors() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let option = format!("id=drive0,path={},socket={},scratch-size=1M", disk.path.display(), disk.socket.display());
    let daemon = Daemon::start_with(Kind::Blkmark, &lab, &[], "c.sock", &["--disk", &option])?;
    let mut qmp = daemon.qmp()?;
    let socket = serve(&mut qmp, &lab)?;
    let mut guest = attach(&disk)?;
    qmp.run("point-add", json!({ "node": "drive0", "name": "p" }))?;
    export(&mut qmp, "p", &[])?;
    let whole = point(&mut qmp, "p")?;
    ensure!(whole["drv"] == "snapshot-access" && whole["ro"] == true, "{whole}");
    let told = json!({ "node": "drive0", "state": "whole", "overwritten": 0, "scratch": 0, "readers": 1 });
    ensure!(whole["point"] == told, "{whole}");
    for cluster in 0..16 {
        guest.write_at(&vec![7; 4096], cluster * CLUSTER)?;
    }
    ensure!(point(&mut qmp, "p")?["point"]["scratch"] == MIB);
    guest.write_at(&vec![7; 4096], 20 * CLUSTER)?;
    let broken = point(&mut qmp, "p")?;
    ensure!(broken["point"]["state"] == "broken" && broken["point"]["scratch"] == 0, "{broken}");
    let reason = broken["point"]["error"].as_str().unwrap_or_default();
    ensure!(reason.contains("its limit of 1048576 bytes is reached"), "{reason}");
    let image = lab.path("p.raw");
    let pull = tools::answer(tools::command("nbdcopy")?.arg(uri(&socket, "p")).arg(&image))?;
    ensure!(pull.code != 0, "a broken point was pulled");
    let map = tools::answer(tools::command("nbdinfo")?.args(["--map", &uri(&socket, "p")]))?;
    ensure!(map.code != 0, "{}", map.text);
    qmp.run("drive-backup", json!({ "job-id": "j", "device": "p", "target": lab.path("x.raw"), "sync": "full" }))?;
    let error = qmp.job_failed("j")?;
    ensure!(error.contains("the point in time is broken"), "{error}");
    // The next one starts afresh.
    withdraw(&mut qmp, "p")?;
    qmp.run("point-remove", json!({ "name": "p" }))?;
    qmp.run("point-add", json!({ "node": "drive0", "name": "p" }))?;
    let then = disk.content()?;
    guest.write_at(&vec![9; 4096], 0)?;
    export(&mut qmp, "p", &[])?;
    tools::run(tools::command("nbdcopy")?.arg(uri(&socket, "p")).arg(&image))?;
    ensure!(fs::read(&image)? == then);
    drop(guest);
    // The daemon ends with an export and a point in use.
    daemon.stop()?;
    Ok(())
}
