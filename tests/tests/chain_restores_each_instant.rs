//! The promise: while a guest writes, a full backup and incrementals on top of it are each the disk at one instant.
//!
//! A guest writes numbered files: it writes file n, syncs, writes n into a counter file, syncs, and only then says
//! "n is safe". The host takes a full backup together with a new bitmap, and two incrementals, all beside those
//! writes. For each of the three points of the chain, restored to a raw image:
//! - the file system is as after a power cut: replaying its journal leaves nothing to mend;
//! - the counter in it is at least what the guest had called safe before the order was sent, and no more than what
//!   the guest could have begun when the order was answered;
//! - every file up to that counter is there with exactly its content.
//!
//! After the guest has ended, one more incremental makes the chain equal to the disk byte by byte, and `qemu-img
//! check` finds every image clean. The same story is told to `qemu-storage-daemon`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::guest::Guest;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::{ext4, images};
use serde_json::{Value, json};

/// One backup and what has to be in it.
struct Point {
    image: PathBuf,
    safe_before: u64,
    begun_after: u64,
}

#[test]
fn a_chain_of_blkmark_restores_each_instant() -> Result<()> {
    a_chain_restores_each_instant(Kind::Blkmark)
}

#[test]
fn a_chain_of_qemu_storage_daemon_restores_each_instant() -> Result<()> {
    a_chain_restores_each_instant(Kind::Qsd)
}

fn a_chain_restores_each_instant(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", 192 * MIB)?.with_queues(2);
    let mut daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::boot(&lab, std::slice::from_ref(&disk))?;
    guest.run("mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt && echo 0 >/mnt/counter && sync")?;
    guest.run("echo 0 >/run/safe")?;
    guest.spawn(WRITER)?;

    let full = lab.path("full.qcow2");
    let mut points = Vec::new();
    write_on(&mut guest, 5)?;
    points.push(point(&mut guest, &full, || {
        let actions = json!({"actions": [
            {"type": "block-dirty-bitmap-add",
             "data": {"node": "drive0", "name": "b0", "persistent": false}},
            {"type": "drive-backup",
             "data": {"job-id": "full", "device": "drive0", "target": full, "format": "qcow2", "sync": "full"}},
        ]});
        qmp.run("transaction", actions)
    })?);
    qmp.job_completed("full")?;

    let mut base = full;
    for name in ["inc1", "inc2"] {
        write_on(&mut guest, 5)?;
        let image = lab.path(&format!("{name}.qcow2"));
        images::create_on_top(&base, "qcow2", &image)?;
        points.push(point(&mut guest, &image, || incremental(&mut qmp, name, &image))?);
        qmp.job_completed(name)?;
        base = image;
    }

    guest.run("touch /run/stop && while [ ! -e /run/stopped ]; do sleep 0.1; done")?;
    guest.assert_no_disk_errors()?;
    guest.poweroff()?;
    let last = lab.path("inc3.qcow2");
    images::create_on_top(&base, "qcow2", &last)?;
    incremental(&mut qmp, "inc3", &last)?;
    qmp.job_completed("inc3")?;
    let marks = qmp.bitmap("drive0", "b0")?;
    ensure!(marks["count"] == 0, "nothing was written since, but: {marks}");
    daemon.assert_running()?;
    drop(qmp);
    daemon.stop()?;

    for point in &points {
        images::assert_sound(&point.image)?;
        check(&lab, point).with_context(|| format!("restored from {}", point.image.display()))?;
    }
    images::assert_sound(&last)?;
    images::assert_equal(&last, &disk.path)?;
    ext4::assert_clean(&disk.path)?;
    Ok(())
}

/// File n holds `n` in as many lines as fill 4 to 64 KiB.
const WRITER: &str = "\
n=0
while [ ! -e /run/stop ]; do
    n=$((n + 1))
    yes \"content of file $n\" | head -c $((n % 16 * 4096 + 4096)) >/mnt/file$n
    sync
    printf '%010d' $n | dd of=/mnt/counter conv=notrunc
    sync
    echo $n >/run/next && mv /run/next /run/safe
done
touch /run/stopped";

/// Waits until the guest has made `more` further files safe.
fn write_on(guest: &mut Guest, more: u64) -> Result<()> {
    let goal = safe(guest)? + more;
    guest.run(&format!("while [ $(cat /run/safe) -lt {goal} ]; do sleep 0.05; done"))?;
    Ok(())
}

/// What the guest calls safe now.
fn safe(guest: &mut Guest) -> Result<u64> {
    guest.run("cat /run/safe")?.parse().context("the guest's counter")
}

/// Gives an order between two looks at what the guest has written.
fn point(guest: &mut Guest, image: &Path, order: impl FnOnce() -> Result<Value>) -> Result<Point> {
    let safe_before = safe(guest)?;
    order()?;
    // What is begun after this look was not begun when the order was answered.
    let begun_after = safe(guest)? + 1;
    Ok(Point { image: image.to_owned(), safe_before, begun_after })
}

fn incremental(qmp: &mut Qmp, job: &str, image: &Path) -> Result<Value> {
    qmp.run(
        "drive-backup",
        json!({
            "job-id": job, "device": "drive0", "bitmap": "b0", "sync": "incremental",
            "target": image, "format": "qcow2", "mode": "existing",
        }),
    )
}

fn check(lab: &Lab, point: &Point) -> Result<()> {
    let name = point.image.file_stem().unwrap_or_default().to_string_lossy();
    let raw = images::restore(&point.image)?;
    ext4::assert_crash_consistent(&raw)?;
    let files = ext4::extract(lab, &raw, &format!("{name}.files"))?;
    let counter: u64 = fs::read_to_string(files.join("counter"))?.trim().parse()?;
    ensure!(
        point.safe_before <= counter && counter <= point.begun_after,
        "the image is of counter {counter}, the order fell between {} and {}",
        point.safe_before,
        point.begun_after
    );
    for n in 1..=counter {
        let found = fs::read(files.join(format!("file{n}"))).with_context(|| format!("file{n}"))?;
        ensure!(found == content(n), "file{n} of {counter} differs: {} bytes", found.len());
    }
    Ok(())
}

fn content(n: u64) -> Vec<u8> {
    format!("content of file {n}\n").bytes().cycle().take((n % 16 * 4096 + 4096) as usize).collect()
}
