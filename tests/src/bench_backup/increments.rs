//! The increment scene: how long an incremental backup takes, by what changed and by the size of the disk.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use blkmark::frontend::{Buffer, Guest, Options as GuestOptions, Request, Wait};
use serde_json::{Value, json};

use super::median;
use super::options::Options;
use super::place::Place;
use super::server::{Contender, Server};
use crate::bench::target::{check_room, fill, next_random};
use crate::process::GIVE_UP;

/// What the percents of `--dirty` are taken of.
const BASE: u64 = 4 << 30;

/// Runs all sizes, granularities and amounts.
pub fn run(options: &Options) -> Result<Value> {
    let mut cells = Vec::new();
    if !options.json {
        println!("\nincremental backup into a raw file, until it is durable; seconds");
        println!("{:<10}{:>12}{:>10}  contenders", "disk", "granularity", "dirty");
    }
    for &size in &options.sparse {
        for &granularity in &options.granularities {
            for &percent in &options.dirty {
                let blocks = ((BASE as f64 * percent / 100.0) as u64 / granularity).clamp(1, size / granularity);
                // A contender may copy 64 KiB for each block, and two files take it.
                check_room(&options.dir(), 2 * (blocks * granularity.max(64 << 10)).min(size))?;
                let cell = cell(options, size, granularity, blocks)?;
                if !options.json {
                    print!("{:<10}{granularity:>12}{percent:>9}%", format!("{} GiB", size >> 30));
                    for (contender, seconds) in &cell {
                        print!("  {} {:.3}", contender.name(), median(seconds.clone()));
                    }
                    println!();
                }
                let rows = cell.iter().map(|(who, seconds)| json!({"contender": who.name(), "seconds": seconds}));
                cells.push(json!({
                    "size": size, "granularity": granularity, "dirty_blocks": blocks, "rows": rows.collect::<Vec<_>>(),
                }));
            }
        }
    }
    Ok(cells.into())
}

fn cell(options: &Options, size: u64, granularity: u64, blocks: u64) -> Result<Vec<(Contender, Vec<f64>)>> {
    let contenders = options.contenders().into_iter().filter(|who| *who != Contender::QsdFleecing);
    let mut rows: Vec<(Contender, Vec<f64>)> = contenders.map(|who| (who, Vec::new())).collect();
    for round in 0..options.rounds as usize {
        for turn in 0..rows.len() {
            let at = (turn + round) % rows.len();
            let (contender, seconds) = &mut rows[at];
            eprintln!("increment: {} of {} GiB, {blocks} blocks of {granularity}", contender.name(), size >> 30);
            seconds.push(one(options, *contender, size, granularity, blocks)?);
        }
    }
    Ok(rows)
}

fn one(options: &Options, contender: Contender, size: u64, granularity: u64, blocks: u64) -> Result<f64> {
    let place = Place::sparse(options, size)?;
    let target = place.target("increment.raw")?;
    let mut server = Server::start(options, &place, contender)?;
    server.add_bitmap(granularity, !options.no_persistence)?;
    dirty(&server, size, granularity, blocks)?;
    place.settle()?;
    server.add_target(Server::file_target(&target))?;
    let began = Instant::now();
    server.backup(true, Duration::from_secs(3600), &mut |_| Ok(()))?;
    File::open(&target)?.sync_all()?;
    let seconds = began.elapsed().as_secs_f64();
    server.stop()?;
    place.assert_same(&target, 65536)?;
    Ok(seconds)
}

/// Writes `blocks` blocks of `granularity` bytes, spread over the disk, the next one somewhere else each time.
fn dirty(server: &Server, size: u64, granularity: u64, blocks: u64) -> Result<()> {
    const DEPTH: usize = 64;
    let block = granularity as usize;
    let options = GuestOptions { data_size: DEPTH * block, max_request: block, ..GuestOptions::default() };
    let mut guest = Guest::connect(server.socket(), options)?;
    let Some(mut queue) = guest.take_queues().pop() else { bail!("no queue") };
    let mut bytes = vec![0; DEPTH * block];
    fill(&mut bytes, 3);
    queue.write_data(0, &bytes)?;
    // One in each stretch of the disk: no two fall together, and no two are neighbours by plan.
    let stretch = size / granularity / blocks;
    let mut random = 0x9e37_79b9_7f4a_7c15;
    let mut free: Vec<u64> = (0..DEPTH as u64).collect();
    let mut done = Vec::new();
    let mut next = 0;
    while next < blocks || queue.in_flight() > 0 {
        while let (Some(slot), true) = (free.last().copied(), next < blocks) {
            free.pop();
            let at = next * stretch + next_random(&mut random) % stretch;
            let buffer = Buffer::slot(slot as usize, block);
            queue.submit(Request::Write { sector: at * (granularity / 512), buffer }, slot)?;
            next += 1;
        }
        queue.kick()?;
        if queue.wait(Some(GIVE_UP))? == Wait::TimedOut {
            bail!("{} requests hang for {GIVE_UP:?}", queue.in_flight());
        }
        queue.completions(&mut done)?;
        for completion in done.drain(..) {
            if !completion.status.is_ok() {
                bail!("a request failed: {}", completion.status);
            }
            free.push(completion.token);
        }
    }
    drop(queue);
    guest.close()?;
    Ok(())
}
