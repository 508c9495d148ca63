//! The promise: a transaction of backups of several disks cuts all of them at one instant, between order and answer.
//!
//! One client writes n to disk A, waits, writes n to disk B, waits, and goes on with n + 1, at full speed. Number n goes
//! to slot n modulo [`SLOTS`], so an image tells not only the last number but whether every slot is of that same
//! instant. Beside it, transactions of two full backups (with new bitmaps) and of two incrementals are ordered at random
//! moments. For every pair of images:
//! - each is one instant: slot k holds the greatest number up to the last that belongs there;
//! - both are the same instant: A >= B >= A - 1;
//! - what was acknowledged before the order is in, and what was issued after the answer is not.
//!
//! The same story, shorter, is told to `qemu-storage-daemon`.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::GIVE_UP;
use blkmark_tests::qmp::Qmp;
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;
const SLOTS: u64 = 1024;
const STRIDE: u64 = SIZE / SLOTS;
const BLOCK: usize = 4096;

/// What the writing client tells of itself.
#[derive(Default)]
struct Progress {
    /// The last number that was begun on A.
    issued: AtomicU64,
    /// The last number that both disks have acknowledged.
    acked: AtomicU64,
}

#[test]
fn a_cut_of_blkmark_is_one_instant() -> Result<()> {
    cuts_are_one_instant(Kind::Blkmark, 12)
}

#[test]
fn a_cut_of_qemu_storage_daemon_is_one_instant() -> Result<()> {
    cuts_are_one_instant(Kind::Qsd, 3)
}

/// Each round makes two cuts.
fn cuts_are_one_instant(kind: Kind, rounds: u64) -> Result<()> {
    let lab = Lab::new()?;
    let disks = [lab.filled_disk("a", SIZE)?, lab.filled_disk("b", SIZE)?];
    for disk in &disks {
        clear_slots(disk)?;
    }
    let daemon = Daemon::start(kind, &lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    let mut attached = [attach(&disks[0])?, attach(&disks[1])?];
    let progress = Progress::default();
    let write = |stop: &Stop| write_numbers(&mut attached, &progress, stop);
    beside(vec![Box::new(write)], || cut_again_and_again(&lab, &mut qmp, &progress, rounds))?;
    drop(attached);
    daemon.stop()?;
    Ok(())
}

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(Guest::connect(&disk.socket, Options::default())?.into_disk()?)
}

fn write_numbers(disks: &mut [Attached; 2], progress: &Progress, stop: &Stop) -> Result<()> {
    let mut block = vec![0u8; BLOCK];
    for n in 1u64.. {
        if stop.is_due() {
            break;
        }
        for word in block.chunks_exact_mut(8) {
            word.copy_from_slice(&n.to_le_bytes());
        }
        progress.issued.store(n, Ordering::SeqCst);
        for disk in disks.iter_mut() {
            disk.write_at(&block, n % SLOTS * STRIDE)?;
        }
        progress.acked.store(n, Ordering::SeqCst);
    }
    Ok(())
}

fn cut_again_and_again(lab: &Lab, qmp: &mut Qmp, progress: &Progress, rounds: u64) -> Result<()> {
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for round in 0..rounds {
        let mode = if round % 2 == 0 { "individual" } else { "grouped" };
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        await_writes(progress, 50 + (random >> 33) % 1000)?;

        let full = |disk: &str| lab.path(&format!("{disk}-{round}-full.qcow2"));
        let bitmap = format!("b{round}");
        let mut actions = Vec::new();
        for disk in ["a", "b"] {
            let data = json!({"node": disk, "name": bitmap, "persistent": false});
            actions.push(json!({"type": "block-dirty-bitmap-add", "data": data}));
        }
        // A grouped transaction takes no bitmap actions: they come just before, and mark more than is needed.
        let mut individual = Vec::new();
        if mode == "grouped" {
            std::mem::swap(&mut actions, &mut individual);
            qmp.run("transaction", json!({"actions": individual}))?;
        }
        for disk in ["a", "b"] {
            let data = json!({"job-id": disk, "device": disk, "target": full(disk), "format": "qcow2", "sync": "full"});
            actions.push(json!({"type": "drive-backup", "data": data}));
        }
        let cut = cut(qmp, progress, mode, actions)?;
        check(&full("a"), &full("b"), cut).with_context(|| format!("round {round}, full, {mode}"))?;

        await_writes(progress, 50 + (random >> 43) % 1000)?;
        let increment = |disk: &str| lab.path(&format!("{disk}-{round}-inc.qcow2"));
        let mut actions = Vec::new();
        for disk in ["a", "b"] {
            images::create_on_top(&full(disk), "qcow2", &increment(disk))?;
            let data = json!({
                "job-id": disk, "device": disk, "target": increment(disk), "format": "qcow2", "mode": "existing",
                "sync": "incremental", "bitmap": bitmap,
            });
            actions.push(json!({"type": "drive-backup", "data": data}));
        }
        let cut = self::cut(qmp, progress, mode, actions)?;
        check(&increment("a"), &increment("b"), cut).with_context(|| format!("round {round}, incremental, {mode}"))?;

        for disk in ["a", "b"] {
            qmp.run("block-dirty-bitmap-remove", json!({"node": disk, "name": bitmap}))?;
            for image in [increment(disk), full(disk)] {
                images::assert_sound(&image)?;
                fs::remove_file(image)?;
            }
        }
    }
    Ok(())
}

/// Lets the client write some more numbers.
fn await_writes(progress: &Progress, more: u64) -> Result<()> {
    let goal = progress.acked.load(Ordering::SeqCst) + more;
    let deadline = Instant::now() + GIVE_UP;
    while progress.acked.load(Ordering::SeqCst) < goal {
        ensure!(Instant::now() < deadline, "the writer makes no progress");
        std::thread::yield_now();
    }
    Ok(())
}

/// Orders a transaction and waits for its two jobs; the last number acknowledged before it and issued after it.
fn cut(qmp: &mut Qmp, progress: &Progress, mode: &str, actions: Vec<Value>) -> Result<(u64, u64)> {
    let acked_before = progress.acked.load(Ordering::SeqCst);
    qmp.run("transaction", json!({"actions": actions, "properties": {"completion-mode": mode}}))?;
    let issued_after = progress.issued.load(Ordering::SeqCst);
    qmp.job_completed("a")?;
    qmp.job_completed("b")?;
    Ok((acked_before, issued_after))
}

fn check(image_a: &Path, image_b: &Path, (acked_before, issued_after): (u64, u64)) -> Result<()> {
    let a = last_number(image_a).context("disk A")?;
    let b = last_number(image_b).context("disk B")?;
    ensure!(a >= b && b + 1 >= a, "A is of number {a}, B of {b}");
    ensure!(b >= acked_before, "number {acked_before} was acknowledged before the order, B is of {b}");
    ensure!(a <= issued_after, "number {issued_after} was the last issued before the answer, A is of {a}");
    Ok(())
}

/// The last number in an image that has to be of one instant.
fn last_number(image: &Path) -> Result<u64> {
    let raw = images::restore(image)?;
    let bytes = fs::read(&raw)?;
    fs::remove_file(&raw)?;
    let mut slots = Vec::new();
    for slot in 0..SLOTS {
        let at = (slot * STRIDE) as usize;
        let words: Vec<u64> = bytes[at..at + BLOCK]
            .chunks_exact(8)
            .map(|word| word.try_into().map(u64::from_le_bytes))
            .collect::<Result<_, _>>()?;
        ensure!(words.iter().all(|word| *word == words[0]), "slot {slot} is torn");
        slots.push(words[0]);
    }
    let last = slots.iter().copied().max().unwrap_or(0);
    for (slot, &found) in (0..SLOTS).zip(&slots) {
        // The greatest number up to `last` that goes into this slot; 0 was there before the first.
        let back = (last + SLOTS - slot) % SLOTS;
        let wanted = last.saturating_sub(back);
        ensure!(found == wanted, "the last number is {last}, but slot {slot} holds {found}, not {wanted}");
    }
    Ok(last)
}

/// Slots start at number 0; what is between them stays filled, so that a backup has something to copy.
fn clear_slots(disk: &Disk) -> Result<()> {
    let mut bytes = disk.content()?;
    for slot in 0..SLOTS {
        let at = (slot * STRIDE) as usize;
        bytes[at..at + BLOCK].fill(0);
    }
    fs::write(&disk.path, bytes)?;
    Ok(())
}
