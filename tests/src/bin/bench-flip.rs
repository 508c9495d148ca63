//! How long a flip holds queue threads, and what marking costs: on disks from 1 GiB to 64 TiB, with 1 to 64 bitmaps. And what
//! memory bitmaps take where everything is dirty.
//!
//! No disk is written. Threads do what queue threads do with every write (enter, gates, mark, register, finish) as fast as
//! they can, which no real queue does, while bitmaps are frozen and given back again and again. `docs/performance.md`
//! says how to read it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Granularity, Tracker, commit};
use blkmark_tests::bench::cpu::private_memory;
use clap::Parser;

/// How long a flip holds queue threads, and what marking costs
#[derive(Debug, Parser)]
struct Options {
    /// Freezes of each row, after which the bitmap is given back
    #[arg(long, default_value_t = 500)]
    flips: usize,
    /// Threads that write meanwhile
    #[arg(long, default_value_t = 1)]
    writers: usize,
    /// Show instead the memory of eight bitmaps of 64 TiB that begin one after the other, all of the disk written in between
    #[arg(long)]
    memory: bool,
}

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// Writes that go through one critical section, as a busy queue's do.
const BATCH: usize = 16;

fn main() -> Result<()> {
    let options = Options::parse();
    ensure!(options.flips > 0, "--flips must be above 0");
    if options.memory {
        return memory();
    }
    println!("      disk  bitmaps    hold p50    hold p99    hold max   freeze p50   a write");
    for size in [GIB, TIB, 64 * TIB] {
        for bitmaps in [1, 8, 64] {
            row(&options, size, bitmaps)?;
        }
    }
    Ok(())
}

fn row(options: &Options, size: u64, bitmaps: usize) -> Result<()> {
    let tracker = Tracker::new(size, options.writers, BATCH);
    let mut begun = tracker.begin();
    for index in 0..bitmaps {
        begun.draft.add(&format!("b{index}"), Granularity::DEFAULT, false)?;
    }
    commit(vec![begun])?;
    let (done, writes) = (AtomicBool::new(false), AtomicU64::new(0));
    let began = Instant::now();
    let measured = std::thread::scope(|scope| {
        for index in 0..options.writers {
            let (tracker, done, writes) = (&tracker, &done, &writes);
            scope.spawn(move || write(tracker, index, done, writes));
        }
        // Of a flip that nobody is in the way of nothing is to be learnt.
        while writes.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        let measured = (0..options.flips).map(|_| freeze(&tracker)).collect::<Result<Vec<_>>>();
        done.store(true, Ordering::Relaxed);
        measured
    })?;
    let lasted = began.elapsed();
    let (mut holds, mut freezes): (Vec<Duration>, Vec<Duration>) = measured.into_iter().unzip();
    holds.sort_unstable();
    freezes.sort_unstable();
    let at = |sorted: &[Duration], share: f64| sorted[((sorted.len() - 1) as f64 * share) as usize];
    let a_write = lasted.as_secs_f64() * options.writers as f64 * 1e9 / writes.load(Ordering::Relaxed) as f64;
    println!(
        "{:>6} GiB  {bitmaps:>7}  {:>10.1?}  {:>10.1?}  {:>10.1?}  {:>11.1?}  {a_write:>5.0} ns",
        size / GIB,
        at(&holds, 0.5),
        at(&holds, 0.99),
        at(&holds, 1.0),
        at(&freezes, 0.5),
    );
    Ok(())
}

/// What bitmaps take that have nothing in common but that everything is dirty.
fn memory() -> Result<()> {
    let tracker = Tracker::new(64 * TIB, 1, 1);
    let mut lane = tracker.lane(0).context("a lane")?;
    println!("bitmaps  dirty GiB     MiB");
    for index in 0..8 {
        let mut begun = tracker.begin();
        begun.draft.add(&format!("b{index}"), Granularity::DEFAULT, false)?;
        commit(vec![begun])?;
        // As large as a discard of a guest may be.
        for at in (0..64 * TIB).step_by(16 << 20) {
            let admitted = lane.enter().admit(0, ByteRange::new(at, 16 << 20));
            ensure!(matches!(admitted, Admitted::Go), "nothing is in the way");
            lane.finish(0);
        }
        let mib = private_memory(std::process::id())? >> 20;
        // Of one of them; each has a disk's worth.
        let dirty = tracker.bits("b0")?.dirty_bytes() / GIB;
        println!("{:>7}  {dirty:>9}  {mib:>6}", index + 1);
    }
    Ok(())
}

/// Random 4 KiB writes over the first GiB, so that the map in use is as large on each disk.
fn write(tracker: &Arc<Tracker>, index: usize, done: &AtomicBool, writes: &AtomicU64) {
    let Some(mut lane) = tracker.lane(index) else { return };
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 ^ index as u64;
    while !done.load(Ordering::Relaxed) {
        let passage = lane.enter();
        for slot in 0..BATCH {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let admitted = passage.admit(slot, ByteRange::new((random >> 34 << 12) % GIB, 4096));
            debug_assert!(matches!(admitted, Admitted::Go));
        }
        drop(passage);
        (0..BATCH).for_each(|slot| lane.finish(slot));
        writes.fetch_add(BATCH as u64, Ordering::Relaxed);
    }
}

/// Freezes one bitmap, and gives it back; answers how long queues were held, and how long the freeze took in all.
fn freeze(tracker: &Arc<Tracker>) -> Result<(Duration, Duration)> {
    let began = Instant::now();
    let mut begun = tracker.begin();
    let frozen = begun.draft.freeze("b0")?;
    let cut = commit(vec![begun])?.pop().context("one disk, one cut")?;
    let took = began.elapsed();
    let mut begun = tracker.begin();
    begun.draft.abdicate("b0", frozen.id())?;
    commit(vec![begun])?;
    Ok((cut.held, took))
}
