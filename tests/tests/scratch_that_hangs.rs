//! The promise: a scratch directory that does not answer, a network path that hangs for instance, holds up nobody but the
//! backup that wants it: other commands are answered, and a guest's write is held for `cbw-timeout` at most.
//!
//! The directory is on a file system that is frozen: whoever changes anything in it waits until it is thawed.

use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::daemon::{Daemon, Kind as Program, disk_option};
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_fs::{Kind, LoopFileSystem};
use blkmark_tests::qmp::{JobEnd, Qmp};
use serde_json::{Value, json};

/// More than scratch keeps in memory.
const SIZE: u64 = 96 * MIB;

/// A daemon over two disks, of which the first has its scratch in the file system.
fn serve(lab: &Lab, scratch: &LoopFileSystem, size: u64) -> Result<(Daemon, Disk, Disk)> {
    let (first, second) = (lab.filled_disk("drive0", size)?, lab.filled_disk("drive1", MIB)?);
    let option = format!("{},scratch={}", disk_option(&first), scratch.folder().display());
    let more = ["--disk", &option];
    let daemon = Daemon::start_with(Program::Blkmark, lab, std::slice::from_ref(&second), "control.sock", &more)?;
    Ok((daemon, first, second))
}

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(Guest::connect(&disk.socket, Options::default())?.into_disk()?)
}

/// What the first disk's scratch takes and holds.
fn scratch_of(qmp: &mut Qmp) -> Result<Value> {
    let disks = qmp.run("query-block", json!({}))?;
    let disk = disks.as_array().and_then(|disks| disks.iter().find(|disk| disk["device"] == "drive0"));
    Ok(disk.context("drive0")?["inserted"]["scratch"].clone())
}

#[test]
fn a_backup_that_waits_for_scratch_holds_up_no_other_command() -> Result<()> {
    let lab = Lab::new()?;
    let mut scratch = LoopFileSystem::mount(Kind::Ext4, 128 * MIB)?;
    let (daemon, first, second) = serve(&lab, &scratch, MIB)?;
    let (mut one, mut other) = (daemon.qmp()?, daemon.qmp()?);
    let mut guest = attach(&first)?;
    let backup = |disk: &Disk| {
        let target = lab.path(&format!("{}.backup", disk.id));
        json!({ "job-id": disk.id, "device": disk.id, "sync": "full", "format": "raw", "target": target })
    };
    scratch.freeze()?;
    let waits = std::thread::scope(|scope| -> Result<bool> {
        let stuck = scope.spawn(|| one.run("drive-backup", backup(&first)));
        let mut story = || -> Result<bool> {
            // All sorts of commands, about this disk and others, with commits and backups among them.
            for round in 0..3 {
                other.run("query-block", json!({}))?;
                other.run("query-jobs", json!({}))?;
                for disk in ["drive0", "drive1"] {
                    other.run("block-dirty-bitmap-add", json!({ "node": disk, "name": format!("b{round}") }))?;
                }
                guest.write_at(&[round; 4096], 0)?;
            }
            other.run("drive-backup", backup(&second))?;
            other.job_completed("drive1")?;
            Ok(!stuck.is_finished())
        };
        let waits = story();
        scratch.thaw()?;
        stuck.join().map_err(|_| anyhow!("the client's thread panicked"))??;
        waits
    })?;
    ensure!(waits, "it did not wait at all: the test has shown nothing");
    one.job_completed("drive0")
}

#[test]
fn a_guest_waits_for_its_time_limit_and_no_longer() -> Result<()> {
    let lab = Lab::new()?;
    let mut scratch = LoopFileSystem::mount(Kind::Ext4, 512 * MIB)?;
    let (daemon, disk, _) = serve(&lab, &scratch, SIZE)?;
    let (mut qmp, mut guest) = (daemon.qmp()?, attach(&disk)?);
    qmp.run(
        "drive-backup",
        json!({ "job-id": "j", "device": "drive0", "sync": "full", "format": "raw", "target": lab.path("backup.raw"),
                "speed": 1, "cbw-timeout": 1, "max-guest-latency": 0 }),
    )?;
    // Memory first, then the file.
    let part = 80 * MIB;
    for at in (0..part).step_by(MIB as usize) {
        guest.write_at(&vec![1; MIB as usize], at)?;
    }
    let shown = scratch_of(&mut qmp)?;
    ensure!(shown["file"].as_u64() > Some(0), "{shown}");
    scratch.freeze()?;
    let began = Instant::now();
    for at in (part..SIZE).step_by(MIB as usize) {
        guest.write_at(&vec![2; MIB as usize], at)?;
    }
    let waited = began.elapsed();
    let shown = scratch_of(&mut qmp)?;
    ensure!(shown["held-writes"] == 0, "{shown}");
    ensure!(waited.as_secs() >= 1, "nothing hung: the test has shown nothing");
    // The job says why, whoever has to wait for scratch to be given back.
    qmp.run("block-job-set-speed", json!({ "device": "j", "speed": 0 }))?;
    let error = qmp.event(|event| event.name == "BLOCK_JOB_COMPLETED")?.data["error"].clone();
    ensure!(error.as_str().is_some_and(|error| error.contains("held for 1 seconds")), "{error}");
    scratch.thaw()?;
    // And the next one succeeds.
    let target = lab.path("again.raw");
    qmp.run(
        "drive-backup",
        json!({ "job-id": "k", "device": "drive0", "sync": "full", "format": "raw", "target": target }),
    )?;
    ensure!(qmp.job_end("k")? == JobEnd::Completed);
    ensure!(std::fs::read(&target)? == disk.content()?, "the backup is not the disk");
    Ok(())
}
