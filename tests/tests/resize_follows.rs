//! The promise: `block_resize` gives a served disk another size while its guest runs. File, bitmaps and guest follow: what is
//! added or cut counts as changed, so that an incremental backup is the whole disk of the new size; no write goes beyond
//! the end; what is refused changes nothing.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, FrontendError, Guest as FrontEnd, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::guest::Guest;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_device::Loop;
use blkmark_tests::qmp::{JobEnd, Qmp};
use blkmark_tests::{images, tools};
use serde_json::{Value, json};

const KIB: u64 = 1024;

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(FrontEnd::connect(&disk.socket, Options::default())?.into_disk()?)
}

fn resize(qmp: &mut Qmp, size: u64) -> Result<()> {
    qmp.run("block_resize", json!({ "node-name": "drive0", "size": size })).map(|_| ())
}

fn shown_size(qmp: &mut Qmp) -> Result<u64> {
    let nodes = qmp.run("query-named-block-nodes", json!({}))?;
    nodes[0]["image"]["virtual-size"].as_u64().with_context(|| nodes.to_string())
}

fn count(qmp: &mut Qmp, bitmap: &str) -> Result<u64> {
    let shown = qmp.bitmap("drive0", bitmap)?;
    shown["count"].as_u64().with_context(|| shown.to_string())
}

/// An incremental of the disk's present size on top of `base`, which may have another.
fn incremental(qmp: &mut Qmp, base: &Path, base_format: &str, image: &Path, size: u64) -> Result<()> {
    let args = ["create", "-q", "-f", "qcow2", "-F", base_format, "-b"];
    tools::run(tools::command("qemu-img")?.args(args).arg(base).arg(image).arg(size.to_string()))?;
    let arguments = json!({
        "job-id": "inc", "device": "drive0", "sync": "incremental", "bitmap": "b", "target": image, "format": "qcow2",
        "mode": "existing",
    });
    qmp.run("drive-backup", arguments)?;
    qmp.job_completed("inc")
}

#[test]
fn bitmaps_follow_and_an_incremental_is_the_disk_of_the_new_size() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", 8 * MIB)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = attach(&disk)?;
    let full = lab.path("full.qcow2");
    let add = |name: &str, granularity: u64, disabled: bool| {
        let data = json!({ "node": "drive0", "name": name, "granularity": granularity, "disabled": disabled });
        json!({ "type": "block-dirty-bitmap-add", "data": data })
    };
    let backup = json!({ "job-id": "full", "device": "drive0", "sync": "full", "target": full, "format": "qcow2" });
    let actions = json!([
        add("b", 64 * KIB, false),
        add("fine", 512, false),
        add("off", 64 * KIB, true),
        { "type": "drive-backup", "data": backup },
    ]);
    qmp.run("transaction", json!({ "actions": actions }))?;
    qmp.job_completed("full")?;

    // Larger. The new end is in the middle of a granule.
    guest.write_at(&vec![1; 4096], MIB)?;
    let grown = 12 * MIB + 32 * KIB;
    resize(&mut qmp, grown)?;
    ensure!(fs::metadata(&disk.path)?.len() == grown && shown_size(&mut qmp)? == grown);
    ensure!(count(&mut qmp, "b")? == 64 * KIB + 4 * MIB + 64 * KIB, "{}", count(&mut qmp, "b")?);
    ensure!(count(&mut qmp, "fine")? == 4 * KIB + 4 * MIB + 32 * KIB);
    ensure!(count(&mut qmp, "off")? == 0, "a bitmap that does not record became wider");
    let config = guest.guest_mut().context("the front end")?.read_config()?;
    ensure!(config.size() == grown, "the guest sees {}", config.size());
    guest.write_at(&vec![2; 4096], grown - 4096)?;
    let larger = lab.path("larger.qcow2");
    incremental(&mut qmp, &full, "qcow2", &larger, grown)?;
    images::assert_equal(&larger, &disk.path)?;
    ensure!(count(&mut qmp, "b")? == 0);

    // Smaller, then larger again: what was cut is zeroes now, and the chain has to know.
    guest.write_at(&vec![3; 4096], 11 * MIB)?;
    let cut = 3 * MIB + 16 * KIB;
    resize(&mut qmp, cut)?;
    ensure!(fs::metadata(&disk.path)?.len() == cut && shown_size(&mut qmp)? == cut);
    ensure!(count(&mut qmp, "b")? == 64 * KIB, "the last granule is not whole any more: {}", count(&mut qmp, "b")?);
    let beyond = guest.write_at(&vec![4; 4096], 4 * MIB);
    ensure!(beyond.is_err(), "a write beyond the end was acknowledged");
    let mut buffer = vec![0; 4096];
    ensure!(guest.read_at(&mut buffer, 4 * MIB).is_err(), "a read beyond the end was answered");
    ensure!(fs::metadata(&disk.path)?.len() == cut);
    resize(&mut qmp, 8 * MIB)?;
    guest.read_at(&mut buffer, 4 * MIB)?;
    ensure!(buffer.iter().all(|byte| *byte == 0), "what was cut is back");
    let again = lab.path("again.qcow2");
    incremental(&mut qmp, &larger, "qcow2", &again, 8 * MIB)?;
    images::assert_equal(&again, &disk.path)?;
    images::assert_sound(&again)?;
    drop(guest);
    daemon.stop()?;
    Ok(())
}

/// A guest that writes everywhere, all the time, while the disk becomes smaller and larger.
#[test]
fn no_write_goes_beyond_the_end_and_none_is_lost() -> Result<()> {
    let lab = Lab::new()?;
    let (small, large) = (4 * MIB, 8 * MIB);
    let disk = lab.disk("drive0", large)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
    let base = lab.path("base.raw");
    fs::copy(&disk.path, &base)?;
    let mut guest = attach(&disk)?;
    let mut model = vec![0u8; small as usize];
    let (acked, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let write = |stop: &Stop| {
        for n in 1u64.. {
            if stop.is_due() {
                break;
            }
            // All of the disk in turns, in an order that is not the disk's.
            let at = n.wrapping_mul(0x9e37_79b9) % (large / 4096) * 4096;
            let bytes = vec![n as u8 | 1; 4096];
            match guest.write_at(&bytes, at) {
                Ok(()) => acked.fetch_add(1, Ordering::SeqCst),
                // Only what may have been beyond the end.
                Err(FrontendError::Failed { .. }) if at >= small => refused.fetch_add(1, Ordering::SeqCst),
                Err(error) => return Err(error.into()),
            };
            if at < small {
                model[at as usize..][..4096].copy_from_slice(&bytes);
            }
        }
        Ok(())
    };
    beside(vec![Box::new(write)], || {
        for round in 0..60 {
            resize(&mut qmp, small)?;
            let goal = acked.load(Ordering::SeqCst) + 5;
            while acked.load(Ordering::SeqCst) < goal {
                ensure!(fs::metadata(&disk.path)?.len() == small, "round {round}: a write went beyond the end");
            }
            if round % 2 == 0 {
                resize(&mut qmp, large)?;
                let goal = acked.load(Ordering::SeqCst) + 5;
                while acked.load(Ordering::SeqCst) < goal {
                    std::thread::yield_now();
                }
            }
        }
        resize(&mut qmp, small)
    })?;
    ensure!(refused.into_inner() > 0, "no write met the end");
    drop(guest);
    ensure!(disk.content()? == model, "an acknowledged write is not there");
    let image = lab.path("inc.qcow2");
    incremental(&mut qmp, &base, "raw", &image, small)?;
    images::assert_equal(&image, &disk.path)?;
    daemon.stop()?;
    Ok(())
}

/// A block device has the size that its volume manager gave it: blkmark follows, and takes no other.
#[test]
fn a_block_device_that_grew_is_followed() -> Result<()> {
    let lab = Lab::new()?;
    let file = lab.filled_disk("drive0", 8 * MIB)?;
    let device = Loop::over(&file.path, 512)?;
    let disk = Disk { path: device.path().to_owned(), ..file };
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = attach(&disk)?;
    let full = lab.path("full.qcow2");
    let backup = json!({ "job-id": "full", "device": "drive0", "sync": "full", "target": full, "format": "qcow2" });
    let actions = json!([
        { "type": "block-dirty-bitmap-add", "data": { "node": "drive0", "name": "b" } },
        { "type": "drive-backup", "data": backup },
    ]);
    qmp.run("transaction", json!({ "actions": actions }))?;
    qmp.job_completed("full")?;
    guest.write_at(&vec![1; 4096], MIB)?;

    for size in [4 * MIB, 12 * MIB] {
        let error = qmp.refused("block_resize", json!({ "node-name": "drive0", "size": size }))?;
        ensure!(error.desc.contains("Cannot resize device files"), "{}", error.desc);
        ensure!(shown_size(&mut qmp)? == 8 * MIB && count(&mut qmp, "b")? == 64 * KIB);
    }
    device.grow(12 * MIB)?;
    ensure!(shown_size(&mut qmp)? == 8 * MIB, "it is told, it does not guess");
    resize(&mut qmp, 12 * MIB)?;
    ensure!(shown_size(&mut qmp)? == 12 * MIB);
    ensure!(count(&mut qmp, "b")? == 64 * KIB + 4 * MIB, "{}", count(&mut qmp, "b")?);
    let config = guest.guest_mut().context("the front end")?.read_config()?;
    ensure!(config.size() == 12 * MIB, "the guest sees {}", config.size());
    guest.write_at(&vec![2; 4096], 12 * MIB - 4096)?;
    let larger = lab.path("larger.qcow2");
    incremental(&mut qmp, &full, "qcow2", &larger, 12 * MIB)?;
    images::assert_equal(&larger, &disk.path)?;
    ensure!(count(&mut qmp, "b")? == 0);
    drop(guest);
    daemon.stop()?;
    Ok(())
}

#[test]
fn a_linux_guest_sees_the_new_size_at_once() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", 64 * MIB)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::boot(&lab, std::slice::from_ref(&disk))?;
    for size in [96 * MIB, 80 * MIB] {
        resize(&mut qmp, size)?;
        let sectors = size / 512;
        guest
            .run(&format!("while [ $(cat /sys/block/vda/size) != {sectors} ]; do sleep 0.05; done"))
            .with_context(|| format!("the guest does not see {size} bytes:\n{}", guest.console()))?;
    }
    guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=79 count=1 conv=fsync")?;
    guest.assert_no_disk_errors()?;
    guest.poweroff()?;
    daemon.stop()?;
    Ok(())
}

#[test]
fn what_blkmark_refuses_changes_nothing() -> Result<()> {
    refusals(Kind::Blkmark)
}

#[test]
fn qemu_storage_daemon_refuses_the_same() -> Result<()> {
    refusals(Kind::Qsd)
}

fn refusals(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", 4 * MIB)?;
    let mut fixed = lab.filled_disk("fixed", 4 * MIB)?;
    fixed.readonly = true;
    let daemon = Daemon::start(kind, &lab, &[disk.clone(), fixed])?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
    let mut same = |arguments: Value, text: &str| -> Result<()> {
        let error = qmp.refused("block_resize", arguments.clone())?;
        ensure!(error.desc == text, "{arguments}: {}", error.desc);
        Ok(())
    };
    same(json!({ "node-name": "drive0", "size": -1 }), "Parameter 'size' expects a >0 size")?;
    same(
        json!({ "node-name": "drive0", "size": i64::MAX }),
        "offset(9223372036854775807) exceeds maximum(9223372035781033984)",
    )?;
    same(json!({ "size": 1024 }), "Cannot find device='' nor node-name=''")?;
    same(json!({ "device": "no", "size": 1024 }), "Cannot find device='no' nor node-name=''")?;
    same(json!({ "node-name": "no", "size": 1024 }), "Cannot find device='' nor node-name='no'")?;
    same(json!({ "node-name": "drive0" }), "Parameter 'size' is missing")?;
    same(json!({ "node-name": "drive0", "size": "1" }), "Invalid parameter type for 'size', expected: integer")?;
    same(json!({ "node-name": "fixed", "size": MIB }), "Image is read-only")?;

    // While a job needs the disk.
    let target = lab.path("target.raw");
    fs::write(&target, vec![0; 4 * MIB as usize])?;
    let file = json!({ "driver": "file", "filename": target });
    qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "target", "file": file }))?;
    qmp.run("blockdev-backup", json!({ "job-id": "j", "device": "drive0", "target": "target", "sync": "none" }))?;
    let error = qmp.refused("block_resize", json!({ "node-name": "drive0", "size": MIB }))?;
    // QEMU speaks of the parents that its nodes have.
    let text = match kind {
        Kind::Blkmark => "Node 'drive0' is busy: block device is in use by block job: backup",
        Kind::Qsd => "Permission conflict on node 'drive0': permissions 'resize' are both required by",
    };
    ensure!(error.desc.starts_with(text), "{}", error.desc);
    qmp.run("job-cancel", json!({ "id": "j" }))?;
    ensure!(qmp.job_end("j")? == JobEnd::Cancelled);
    ensure!(shown_size(&mut qmp)? == 4 * MIB && count(&mut qmp, "b")? == 0);
    ensure!(fs::metadata(&disk.path)?.len() == 4 * MIB);

    if kind == Kind::Blkmark {
        // Afterwards it goes, in QEMU's rounding. (qemu-storage-daemon 10.0.2 dies here.)
        resize(&mut qmp, MIB + 1)?;
        ensure!(shown_size(&mut qmp)? == MIB + 512);
        // QEMU takes these: a disk of no bytes, and one that no file system has room for, which it fails to make.
        let error = qmp.refused("block_resize", json!({ "node-name": "drive0", "size": 0 }))?;
        ensure!(error.desc == "Parameter 'size' expects a >0 size: a served disk cannot be empty", "{}", error.desc);
        let error = qmp.refused("block_resize", json!({ "node-name": "drive0", "size": 1u64 << 62 }))?;
        ensure!(error.desc == "Bitmap 'b' would become too large", "{}", error.desc);
        qmp.run("block-dirty-bitmap-remove", json!({ "node": "drive0", "name": "b" }))?;
        let error = qmp.refused("block_resize", json!({ "node-name": "drive0", "size": 1u64 << 62 }))?;
        ensure!(error.desc.starts_with("Failed to resize 'drive0': "), "{}", error.desc);
        let error = qmp.refused("block_resize", json!({ "node-name": "target", "size": MIB }))?;
        ensure!(error.desc.starts_with("Node 'target' is a target"), "{}", error.desc);
        ensure!(shown_size(&mut qmp)? == MIB + 512);
    }
    daemon.stop()?;
    Ok(())
}
