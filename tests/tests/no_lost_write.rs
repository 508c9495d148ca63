//! The promise: no write is lost to a bitmap, whatever flips while it is in flight.
//!
//! Two queues keep thirty requests each in flight: writes of all lengths, discards, zeroes. Meanwhile a chain of
//! incrementals is taken, each beside other bitmaps being added, cleared, disabled, enabled, merged and removed, and
//! backups cancelled half-way, whose marks have to come back. In the end:
//! - the chain reads as the disk does, byte for byte;
//! - so does one increment by a bitmap that recorded all along, over the disk as it was in the beginning;
//! - a second bitmap of another granularity, put together by merging pieces that recorded in turn, does so too.
//!
//! The same story is told to `qemu-storage-daemon`.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use blkmark::frontend::{Buffer, Guest, Options, Queue, Request, Wait};
use blkmark_tests::beside::{Stop, Worker, beside};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::images;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::process::GIVE_UP;
use blkmark_tests::qmp::{JobEnd, Qmp};
use blkmark_tests::random::Random;
use serde_json::json;

const SIZE: u64 = 32 * MIB;
const DEPTH: usize = 30;
/// The longest write.
const SLOT: usize = 64 << 10;

#[test]
fn blkmark_loses_no_write() -> Result<()> {
    no_write_is_lost(Kind::Blkmark, 12)
}

#[test]
fn qemu_storage_daemon_loses_no_write() -> Result<()> {
    no_write_is_lost(Kind::Qsd, 4)
}

fn no_write_is_lost(kind: Kind, rounds: u32) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?.with_queues(2);
    let before = lab.path("before.raw");
    fs::copy(&disk.path, &before)?;
    let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;

    add(&mut qmp, "chain", 65536)?;
    add(&mut qmp, "always", 4096)?;
    add(&mut qmp, "whole", 512)?;
    qmp.run("block-dirty-bitmap-disable", json!({"node": "drive0", "name": "whole"}))?;
    add(&mut qmp, "piece0", 32768)?;

    let mut guest = Guest::connect(&disk.socket, Options::default().queues(2))?;
    let writes = AtomicU64::new(0);
    let writers = guest.take_queues().into_iter().map(|queue| {
        let writes = &writes;
        Box::new(move |stop: &Stop| keep_busy(queue, stop, writes)) as Worker<'_>
    });
    let last = beside(writers.collect(), || take_chain(&lab, &mut qmp, &before, &writes, rounds))?;
    drop(guest);

    let chain = lab.path("chain-last.qcow2");
    increment(&mut qmp, "chain", &last, "qcow2", &chain)?;
    qmp.run(
        "block-dirty-bitmap-merge",
        json!({"node": "drive0", "target": "whole", "bitmaps": [format!("piece{rounds}")]}),
    )?;
    let mut images = vec![chain];
    for bitmap in ["always", "whole"] {
        let image = lab.path(&format!("{bitmap}.qcow2"));
        increment(&mut qmp, bitmap, &before, "raw", &image)?;
        images.push(image);
    }
    drop(qmp);
    daemon.stop()?;
    for image in images {
        images::assert_sound(&image)?;
        images::assert_equal(&image, &disk.path)?;
    }
    Ok(())
}

/// Incrementals on top of each other, with flips of every kind between them; the last image.
fn take_chain(lab: &Lab, qmp: &mut Qmp, before: &Path, writes: &AtomicU64, rounds: u32) -> Result<std::path::PathBuf> {
    let mut base = before.to_owned();
    let mut format = "raw";
    for round in 0..rounds {
        let written = writes.load(Ordering::Relaxed);
        let deadline = Instant::now() + GIVE_UP;
        while writes.load(Ordering::Relaxed) < written + 500 {
            ensure!(Instant::now() < deadline, "the writers make no progress");
            std::thread::yield_now();
        }

        // The piece that recorded so far goes into the whole, at the instant that the next one begins.
        let (old, new) = (format!("piece{round}"), format!("piece{}", round + 1));
        let action = |kind: &str, data| json!({"type": kind, "data": data});
        let node = "drive0";
        let actions = [
            action("block-dirty-bitmap-disable", json!({"node": node, "name": old})),
            action("block-dirty-bitmap-add", json!({"node": node, "name": new, "persistent": false})),
            action("block-dirty-bitmap-merge", json!({"node": node, "target": "whole", "bitmaps": [old]})),
        ];
        qmp.run("transaction", json!({"actions": actions}))?;
        qmp.run("block-dirty-bitmap-remove", json!({"node": node, "name": old}))?;

        // Others come, are cleared, stop and go on, and go.
        add(qmp, "passing", 1 << 20)?;
        for order in ["clear", "disable", "enable", "remove"] {
            let order = format!("block-dirty-bitmap-{order}");
            qmp.run(&order, json!({"node": node, "name": "passing"}))?;
        }

        if round % 3 == 2 {
            cancel_half_way(lab, qmp, &base, format, round)?;
        }
        let image = lab.path(&format!("chain-{round}.qcow2"));
        increment(qmp, "chain", &base, format, &image)?;
        (base, format) = (image, "qcow2");
    }
    Ok(base)
}

fn add(qmp: &mut Qmp, name: &str, granularity: u32) -> Result<()> {
    let data = json!({"node": "drive0", "name": name, "granularity": granularity, "persistent": false});
    qmp.run("block-dirty-bitmap-add", data)?;
    Ok(())
}

fn increment(qmp: &mut Qmp, bitmap: &str, base: &Path, format: &str, image: &Path) -> Result<()> {
    images::create_on_top(base, format, image)?;
    start(qmp, bitmap, image, 0)?;
    qmp.job_completed("job")
}

fn start(qmp: &mut Qmp, bitmap: &str, image: &Path, speed: u64) -> Result<()> {
    let data = json!({
        "job-id": "job", "device": "drive0", "target": image, "format": "qcow2", "mode": "existing",
        "sync": "incremental", "bitmap": bitmap, "speed": speed,
    });
    qmp.run("drive-backup", data)?;
    Ok(())
}

/// A backup so slow that the order to cancel it comes first: its marks are the bitmap's again.
fn cancel_half_way(lab: &Lab, qmp: &mut Qmp, base: &Path, format: &str, round: u32) -> Result<()> {
    let image = lab.path(&format!("cancelled-{round}.qcow2"));
    images::create_on_top(base, format, &image)?;
    start(qmp, "chain", &image, 65536)?;
    qmp.run("block-job-cancel", json!({"device": "job"}))?;
    let end = qmp.job_end("job")?;
    ensure!(end == JobEnd::Cancelled, "a cancelled job ended as {end:?}");
    Ok(())
}

/// Keeps requests in flight until it is told to stop, then takes the last ones back.
fn keep_busy(mut queue: Queue, stop: &Stop, writes: &AtomicU64) -> Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ queue.index() as u64);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut done = Vec::new();
    loop {
        let stopping = stop.is_due();
        while !stopping && let Some(slot) = free.pop() {
            let request = any_request(&mut random, slot);
            if let Request::Write { buffer, .. } = request {
                let bytes: Vec<u8> = (0..buffer.len / 8).flat_map(|_| random.next().to_le_bytes()).collect();
                queue.write_data(buffer.offset, &bytes)?;
            }
            queue.submit(request, slot as u64)?;
        }
        if queue.in_flight() == 0 {
            return Ok(());
        }
        queue.kick()?;
        if queue.wait(Some(Duration::from_secs(60)))? == Wait::TimedOut {
            bail!("{} requests were not answered", queue.in_flight());
        }
        queue.completions(&mut done)?;
        for completion in done.drain(..) {
            ensure!(completion.status.is_ok(), "a request ended with {}", completion.status);
            writes.fetch_add(1, Ordering::Relaxed);
            free.push(completion.token as usize);
        }
    }
}

fn any_request(random: &mut Random, slot: usize) -> Request {
    let sectors_of_disk = SIZE / 512;
    let kind = random.next() % 32;
    let sectors = 1 + random.next() % ((SLOT as u64 / 512) >> (random.next() % 8)).max(1);
    let sector = random.next() % (sectors_of_disk - sectors);
    match kind {
        0 => Request::Flush,
        1 => Request::Discard { sector, sectors: sectors as u32 },
        2 => Request::WriteZeroes { sector, sectors: sectors as u32, unmap: random.next().is_multiple_of(2) },
        _ => {
            let buffer = Buffer { offset: slot * SLOT, len: sectors as usize * 512 };
            Request::Write { sector, buffer }
        }
    }
}
