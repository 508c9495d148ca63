//! The promise: a chain begins from a backup that exists, made before anybody tracked anything, without another copy of the
//! disk: the comparison's bitmap and an incremental on top make the chain equal to the disk byte by byte, although the guest
//! writes all the time, and the backup itself is a mixture that was copied beside those writes.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{Daemon, blkmark_binary};
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::random::Random;
use blkmark_tests::{images, tools};
use serde_json::{Value, json};

const SIZE: u64 = 96 * MIB;
const BLOCK: u64 = 4096;

/// Writes here and there, and now and then takes something back to zeroes, until told to stop.
fn write_on(guest: &mut Attached, stop: &Stop, seed: u64) -> Result<()> {
    let mut random = Random(seed);
    while !stop.is_due() {
        let blocks = 1 + random.below(16);
        let at = random.below(SIZE / BLOCK - blocks) * BLOCK;
        match random.below(8) {
            0 => guest.write_zeroes(at, blocks * BLOCK, true)?,
            1 => guest.write_at(&vec![0; (blocks * BLOCK) as usize], at)?,
            byte => guest.write_at(&vec![byte as u8; (blocks * BLOCK) as usize], at)?,
        }
    }
    Ok(())
}

fn convert(from: &Path, to: &Path, format: &str) -> Result<()> {
    let args = ["convert", "-U", "-f", "raw", "-O", format];
    tools::run(tools::command("qemu-img")?.args(args).arg(from).arg(to)).map(drop)
}

fn incremental(qmp: &mut Qmp, bitmap: &str, base: (&Path, &str), image: &Path) -> Result<()> {
    images::create_on_top(base.0, base.1, image)?;
    let arguments = json!({
        "job-id": "inc", "device": "drive0", "bitmap": bitmap, "sync": "incremental", "target": image,
        "format": "qcow2", "mode": "existing",
    });
    qmp.run("drive-backup", arguments)?;
    qmp.job_completed("inc")
}

fn count(qmp: &mut Qmp, bitmap: &str) -> Result<u64> {
    let shown = qmp.bitmap("drive0", bitmap)?;
    shown["count"].as_u64().with_context(|| shown.to_string())
}

#[test]
fn an_incremental_on_an_old_copy_is_the_disk_while_the_guest_writes_on() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    guest.write_at(&vec![9; 8 * MIB as usize], 0)?;

    // Three old copies, each a mixture; the last one is read over NBD.
    let (qcow2, raw, served) = (lab.path("old.qcow2"), lab.path("old.raw"), lab.path("served.raw"));
    let socket = lab.path("nbd.sock");
    let mut server = None;
    beside(vec![Box::new(|stop| write_on(&mut guest, stop, 77))], || {
        convert(&disk.path, &qcow2, "qcow2")?;
        convert(&disk.path, &raw, "raw")?;
        convert(&disk.path, &served, "raw")?;
        let mut command = tools::command("qemu-nbd")?;
        command.args(["-t", "-r", "-f", "raw", "-e", "2", "-k"]).arg(&socket).arg(&served);
        server = Some(lab.start("qemu-nbd", &mut command)?);
        let address = json!({ "type": "unix", "path": socket });
        let node = json!({ "driver": "nbd", "node-name": "old", "read-only": true, "server": address });
        let begun = std::time::Instant::now();
        while !socket.exists() {
            ensure!(begun.elapsed() < blkmark_tests::process::GIVE_UP, "qemu-nbd does not listen");
            std::thread::yield_now();
        }
        qmp.run("blockdev-add", node)?;
        // A bitmap that is made for it, over the command line and over the socket; one that is there already.
        let mut command = Command::new(blkmark_binary()?);
        command.arg("--control").arg(daemon.control());
        tools::run(command.args(["bitmap", "populate", "drive0", "a", "--format", "qcow2", "--image"]).arg(&qcow2))?;
        qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b", "granularity": 4096 }))?;
        let populate = |name: &str, more: Value| {
            let mut data = json!({ "job-id": name, "node": "drive0", "name": name, "pattern": "diff" });
            for (member, value) in more.as_object().into_iter().flatten() {
                data[member] = value.clone();
            }
            data
        };
        let with_raw = json!({ "image": raw, "format": "raw", "mode": "overwrite" });
        qmp.run("block-dirty-bitmap-populate", populate("b", with_raw))?;
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": { "node": "drive0", "name": "c" } },
            { "type": "block-dirty-bitmap-populate", "data": populate("c", json!({ "image-node": "old" })) },
        ]);
        qmp.run("transaction", json!({ "actions": actions }))?;
        qmp.job_completed("b")?;
        qmp.job_completed("c")?;
        // The first increment of each chain, while the guest still writes.
        incremental(&mut qmp, "a", (&qcow2, "qcow2"), &lab.path("a1.qcow2"))?;
        incremental(&mut qmp, "b", (&raw, "raw"), &lab.path("b1.qcow2"))?;
        incremental(&mut qmp, "c", (&served, "raw"), &lab.path("c1.qcow2"))
    })?;
    for name in ["a", "b", "c"] {
        let (first, last) = (lab.path(&format!("{name}1.qcow2")), lab.path(&format!("{name}2.qcow2")));
        incremental(&mut qmp, name, (&first, "qcow2"), &last)?;
        images::assert_equal(&last, &disk.path)?;
        ensure!(count(&mut qmp, name)? == 0, "nothing was written since");
    }
    drop(server);
    drop(qmp);
    daemon.stop()?;
    Ok(())
}

#[test]
fn a_quiet_disk_is_told_exactly_and_what_it_holds_too() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    guest.write_at(&vec![9; MIB as usize], 5 * MIB)?;
    let old = lab.path("old.qcow2");
    convert(&disk.path, &old, "qcow2")?;
    guest.write_at(&vec![9; MIB as usize], 5 * MIB)?;
    guest.write_at(&vec![8; BLOCK as usize], 5 * MIB)?;
    guest.write_at(&vec![8; BLOCK as usize], SIZE - BLOCK)?;
    guest.write_at(&vec![0; BLOCK as usize], 40 * MIB)?;
    guest.flush()?;
    let blkmark = |words: &[&str]| {
        let mut command = Command::new(blkmark_binary()?);
        tools::run(command.arg("--control").arg(daemon.control()).args(["bitmap", "populate", "drive0"]).args(words))
    };
    let name = old.display().to_string();
    blkmark(&["diff", "--image", &name, "--format", "qcow2"])?;
    ensure!(count(&mut qmp, "diff")? == 2 * 65536, "{}", count(&mut qmp, "diff")?);
    blkmark(&["fine", "--image", &name, "--format", "qcow2", "--granularity", "4K"])?;
    ensure!(count(&mut qmp, "fine")? == 2 * BLOCK, "{}", count(&mut qmp, "fine")?);
    blkmark(&["held", "--pattern", "allocation-top"])?;
    ensure!(count(&mut qmp, "held")? == MIB + 2 * 65536, "{}", count(&mut qmp, "held")?);
    blkmark(&["held", "--pattern", "all", "--mode", "overwrite"])?;
    ensure!(count(&mut qmp, "held")? == SIZE);
    blkmark(&["held", "--mode", "difference", "--image", &name, "--format", "qcow2"])?;
    ensure!(count(&mut qmp, "held")? == SIZE - 2 * 65536);
    // What fails leaves no bitmap that would say that nothing differs, and its text names the reason.
    let failed = blkmark(&["none", "--image", "nowhere", "--format", "raw"]).err().context("nothing is there")?;
    ensure!(format!("{failed:#}").contains("No such file or directory"), "{failed:#}");
    ensure!(qmp.bitmap("drive0", "none").is_err());
    drop(qmp);
    daemon.stop()?;
    Ok(())
}
