//! The promise: what a bitmap holds after its job is QEMU's table, for every sync mode, bitmap mode and end, bit for bit, and
//! nothing that a client was told is lost: a recovery backup equals the disk.
//!
//! The guest writes before, during and after each job over vhost-user; the same scenes are played to `qemu-storage-daemon`.
//! Bits are compared by their hash, which both daemons tell. Ends that fail in the middle with writes during the job are in
//! `backup/tests/control_bitmap_modes.rs`, where the moment can be chosen.

use std::fs;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_bitmap::{Bits, ByteRange, Granularity};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::qmp::{JobEnd, Qmp};
use serde_json::{Value, json};

const SIZE: u64 = 8 * MIB;
const CLUSTER: u64 = 65536;
/// Written before the job: 40 clusters. During it: some of them, and some others.
const OLD: std::ops::Range<u64> = 0..40;
const DURING: [u64; 4] = [3, 39, 45, 127];

/// Sync mode, bitmap mode (incremental has none), and which sets remain after success and after a cancel.
const TABLE: &[(&str, Option<&str>, &str, &str)] = &[
    ("incremental", None, "S", "old+S"),
    ("incremental", Some("on-success"), "S", "old+S"),
    ("bitmap", Some("on-success"), "S", "old+S"),
    ("bitmap", Some("never"), "old+S", "old+S"),
    ("bitmap", Some("always"), "S", "S+uncopied"),
    ("full", Some("on-success"), "S", "old+S"),
    ("full", Some("always"), "S", "S+uncopied"),
    ("top", Some("on-success"), "S", "old+S"),
    ("top", Some("always"), "S", "S+uncopied"),
];

#[test]
fn the_table_holds_for_blkmark() -> Result<()> {
    play_all(Kind::Blkmark)
}

#[test]
fn the_table_holds_for_qemu_storage_daemon() -> Result<()> {
    play_all(Kind::Qsd)
}

fn play_all(kind: Kind) -> Result<()> {
    for (sync, mode, after_success, after_cancel) in TABLE {
        for (end, wanted) in [("success", after_success), ("cancel", after_cancel)] {
            let row =
                || play(kind, sync, *mode, end, wanted).with_context(|| format!("{kind:?}: {sync} {mode:?}, {end}"));
            // QEMU's daemon may die of faults of its own, which say nothing of the table.
            let mut played = row();
            for _ in 0..2 {
                if !played.as_ref().is_err_and(|error| error.is::<OracleDied>()) {
                    break;
                }
                played = row();
            }
            played?;
        }
    }
    Ok(())
}

fn write(guest: &mut Attached, clusters: impl IntoIterator<Item = u64>, byte: u8) -> Result<()> {
    for cluster in clusters {
        guest.write_at(&vec![byte; CLUSTER as usize], cluster * CLUSTER)?;
    }
    Ok(())
}

/// The hash of a bitmap in which these clusters are dirty.
fn hash(clusters: impl IntoIterator<Item = u64>) -> Result<String> {
    let granularity = Granularity::new(CLUSTER).context("a granularity")?;
    let mut bits = Bits::new(granularity, SIZE);
    clusters.into_iter().for_each(|cluster| bits.set(ByteRange::new(cluster * CLUSTER, CLUSTER)));
    Ok(bits.sha256())
}

/// `qemu-storage-daemon` ended in the middle.
#[derive(Debug)]
struct OracleDied(String);

impl std::fmt::Display for OracleDied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "qemu-storage-daemon died: {}", self.0)
    }
}

impl std::error::Error for OracleDied {}

fn play(kind: Kind, sync: &str, mode: Option<&str>, end: &str, wanted: &str) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let mut daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    match play_on(&lab, &disk, &daemon, (sync, mode, end, wanted)) {
        Err(_) if kind == Kind::Qsd && !daemon.process().is_running() => {
            Err(OracleDied(daemon.process().log_tail()).into())
        }
        Err(error) => Err(error),
        Ok(()) => daemon.stop().map(drop),
    }
}

/// One row of the table.
type Row<'a> = (&'a str, Option<&'a str>, &'a str, &'a str);

fn play_on(lab: &Lab, disk: &Disk, daemon: &Daemon, (sync, mode, end, wanted): Row<'_>) -> Result<()> {
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
    write(&mut guest, OLD, 2)?;
    ensure!(qmp.bitmap_hash("drive0", "b")? == hash(OLD)?);
    let instant = disk.content()?;

    let target = lab.path("target.raw");
    fs::write(&target, vec![0; SIZE as usize])?;
    let file = json!({ "driver": "file", "filename": target });
    qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": file }))?;
    let mut arguments = json!({
        "job-id": "j", "device": "drive0", "target": "t", "sync": sync, "bitmap": "b", "auto-finalize": false,
    });
    if let Some(mode) = mode {
        arguments["bitmap-mode"] = json!(mode);
    }
    if end == "cancel" {
        // One piece goes at once, the next would have to wait.
        arguments["speed"] = json!(1);
    }
    qmp.run("blockdev-backup", arguments)?;
    if end == "success" {
        qmp.event(|event| event.name == "BLOCK_JOB_PENDING")?;
    }
    write(&mut guest, DURING, 3)?;
    if end == "success" {
        qmp.run("job-finalize", json!({ "id": "j" }))?;
        qmp.job_completed("j")?;
    } else {
        qmp.run("block-job-cancel", json!({ "device": "j", "force": true }))?;
        ensure!(qmp.job_end("j")? == JobEnd::Cancelled);
    }

    let whole = matches!(sync, "full" | "top");
    let plan = if whole { 0..SIZE / CLUSTER } else { OLD };
    let copy = fs::read(&target)?;
    let has = |cluster: &u64| {
        let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
        copy[range.clone()] == instant[range]
    };
    let expected = match wanted {
        "S" => hash(DURING)?,
        "old+S" => hash(OLD.chain(DURING))?,
        _ => hash(plan.clone().filter(|cluster| !has(cluster)).chain(DURING))?,
    };
    let found = qmp.bitmap_hash("drive0", "b")?;
    ensure!(found == expected, "the bits are not {wanted}: {}", qmp.bitmap("drive0", "b")?);
    if end == "success" {
        ensure!(plan.clone().all(|cluster| has(&cluster)), "the image is not of the instant");
    }
    qmp.run("blockdev-del", json!({ "node-name": "t" }))?;
    write(&mut guest, [50], 4)?;
    recover(lab, &mut qmp, disk)?;
    drop(guest);
    Ok(())
}

/// A full backup with a fresh start of the bitmap, and an incremental on top of it, which is the disk.
fn recover(lab: &Lab, qmp: &mut Qmp, disk: &Disk) -> Result<()> {
    let backup = |job: &str, image: &std::path::Path, more: Value| {
        let mut data = json!({ "job-id": job, "device": "drive0", "target": image, "format": "qcow2" });
        for (name, value) in more.as_object().into_iter().flatten() {
            data[name] = value.clone();
        }
        data
    };
    let (full, top) = (lab.path("full.qcow2"), lab.path("top.qcow2"));
    let clear = json!({ "type": "block-dirty-bitmap-clear", "data": { "node": "drive0", "name": "b" } });
    let start = json!({ "type": "drive-backup", "data": backup("full", &full, json!({ "sync": "full" })) });
    qmp.run("transaction", json!({ "actions": [clear, start] }))?;
    qmp.job_completed("full")?;
    images::create_on_top(&full, "qcow2", &top)?;
    let more = json!({ "sync": "incremental", "bitmap": "b", "mode": "existing" });
    qmp.run("drive-backup", backup("inc", &top, more))?;
    qmp.job_completed("inc")?;
    images::assert_equal(&top, &disk.path)
}

/// A raw disk stands on nothing, so all of it is its top layer, holes included; in QEMU, too.
#[test]
fn top_of_a_sparse_raw_disk_is_all_of_it() -> Result<()> {
    for kind in [Kind::Blkmark, Kind::Qsd] {
        let lab = Lab::new()?;
        let disk = lab.disk("drive0", SIZE)?;
        let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        write(&mut guest, [7], 1)?;
        let target = lab.path("target.raw");
        // What was there before must not show through the holes.
        fs::write(&target, vec![9; SIZE as usize])?;
        let arguments = json!({
            "job-id": "j", "device": "drive0", "sync": "top", "target": target, "format": "raw", "mode": "existing",
        });
        qmp.run("drive-backup", arguments)?;
        let end = qmp.event(|event| event.name == "BLOCK_JOB_COMPLETED")?;
        ensure!(end.data["len"] == SIZE && end.data.get("error").is_none(), "{kind:?}: {}", end.data);
        drop(guest);
        daemon.stop()?;
        ensure!(fs::read(&target)? == disk.content()?, "{kind:?}: the copy is not the disk");
    }
    Ok(())
}
