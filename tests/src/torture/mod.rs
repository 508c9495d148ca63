//! Torture: guests write and look at what they wrote, backups are taken every second, and daemon, guests and clients are
//! killed in between, file systems run full, targets go away. Nothing may be lost. `torture --help`; `docs/reliability.md`.
//!
//! ```text
//! story ── schedule (seed -> events), events ── world (processes) ── orders (QMP)
//!   guests -> journal -> model (what each sector may hold) -> bounds (what an image of an instant may hold)
//!   backups: chain (qcow2), mirror (raw over NBD); marks: bitmaps that come and go
//! ```
//!
//! What is certain decides: a write that was answered before an order must be in its image, one that began after the
//! answer must not; what nobody was answered has either outcome, sector by sector, until it was seen.

mod backups;
mod bitmap_events;
mod bounds;
mod chain;
mod content;
mod events;
mod geometry;
pub mod guest;
mod hearing;
mod journal;
mod log;
mod marks;
mod mirror;
mod model;
pub mod options;
mod orders;
mod place;
mod recognise;
mod schedule;
mod story;
mod world;

use std::time::SystemTime;

use anyhow::{Result, bail};

use options::{Cli, Options, Part};
use world::Torture;

/// Does what the command line says.
pub fn run(cli: Cli) -> Result<()> {
    match cli.part {
        Some(Part::Guest(args)) => guest::run(&args),
        None => torture(cli.options),
    }
}

fn torture(options: Options) -> Result<()> {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64 % 1_000_000_000;
    let seed = options.seed.unwrap_or(clock);
    println!("seed {seed}");
    let keep = options.keep;
    let mut torture = Torture::new(options, seed)?;
    let told = torture.story();
    // Nobody writes any more.
    for served in &mut torture.served {
        served.guest = None;
        served.mirror.kill();
    }
    torture.qmp = None;
    let said = torture.daemon.take().map(|daemon| daemon.log_tail());
    let Torture { log, mut place, .. } = torture;
    let files = (keep || told.is_err()).then(|| place.keep());
    if let Err(error) = told {
        println!("{}", log.tail());
        println!("{}", said.unwrap_or_default());
        print!("{}", log.summary());
        let files = files.unwrap_or_default();
        bail!("seed {seed}: {error:#}\nthe files are in {}", files.display());
    }
    print!("{}", log.summary());
    println!("  losses: 0 in {:.0} s with {} kills, seed {seed}", log.seconds(), log.total("kills"));
    if let Some(files) = files {
        println!("   files: {}", files.display());
    }
    Ok(())
}
