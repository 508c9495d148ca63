//! The benchmark: `blkmark serve` and `qemu-storage-daemon` side by side on the same disk in one run.
//!
//! Only ratios of figures taken minutes apart on the same machine mean anything, so every cell (a pattern, a block
//! size, a depth, a number of queues) runs all contenders one after the other, in an order that rotates from round to
//! round, and a ratio is taken within its round before the median is. `bin/bench.rs` is the command;
//! `docs/performance.md` says how to repeat it.

pub mod cell;
pub mod cpu;
pub mod fio;
pub mod instructions;
pub mod load;
pub mod options;
pub mod report;
pub mod server;
pub mod target;

use std::io::IsTerminal;

use anyhow::{Context, Result, anyhow};

use cell::Cell;
use options::Options;
use report::{CellReport, Row};
use server::{Contender, Server};
use target::Target;

/// Runs everything that the options ask for; one report a cell and target.
pub fn run(options: &Options) -> Result<Vec<CellReport>> {
    let cells = options.cells()?;
    let contenders = options.contenders()?;
    let targets = options.targets()?;
    let runs = targets.len() * cells.len() * contenders.len() * options.rounds();
    let seconds = (options.seconds() + options.warmup) * runs as f64;
    eprintln!("{runs} runs, at least {seconds:.0} s");
    let mut reports = Vec::new();
    for place in targets {
        let target = Target::prepare(&place, options)?;
        for cell in &cells {
            reports.push(run_cell(options, &target, cell, &contenders)?);
        }
    }
    Ok(reports)
}

fn run_cell(options: &Options, target: &Target, cell: &Cell, contenders: &[Contender]) -> Result<CellReport> {
    let mut rows: Vec<Row> = contenders.iter().map(|c| Row::new(c.clone())).collect();
    let progress = std::io::stderr().is_terminal();
    for round in 0..options.rounds() {
        for turn in 0..contenders.len() {
            let at = (turn + round) % contenders.len();
            let contender = &contenders[at];
            if progress {
                eprint!("\r\x1b[K{} round {} {contender}", cell.name(), round + 1);
            }
            let sample = run_calmly(options, target, cell, contender)
                .with_context(|| format!("{} with {contender} on {}", cell.name(), target.name()))?;
            rows[at].samples.push(sample);
        }
    }
    if progress {
        eprint!("\r\x1b[K");
    }
    Ok(CellReport { target: target.name().to_owned(), cell: cell.clone(), rows })
}

/// How often a run is repeated for the sake of calm.
const TRIES: usize = 20;

/// The first run that others left alone, as `--calm` says, or else the calmest.
fn run_calmly(options: &Options, target: &Target, cell: &Cell, contender: &Contender) -> Result<load::Sample> {
    let mut best = run_once(options, target, cell, contender)?;
    if let Some(percent) = options.calm {
        for _ in 1..TRIES {
            if best.others_percent <= f64::from(percent) {
                break;
            }
            let next = run_once(options, target, cell, contender)?;
            if next.others_percent < best.others_percent {
                best = next;
            }
        }
    }
    Ok(best)
}

fn run_once(options: &Options, target: &Target, cell: &Cell, contender: &Contender) -> Result<load::Sample> {
    // What the last contender left in the page cache is written back at its expense, not at the next one's.
    target.settle()?;
    if *contender == Contender::Fio {
        return fio::run(options, target, cell);
    }
    let mut server = Server::start(options, target, cell, contender)?;
    let sample = load::run(options, target, cell, &mut server).map_err(|error| match server.log() {
        log if log.is_empty() => error,
        log => anyhow!("{error:#}; the server said:\n{log}"),
    })?;
    server.stop()?;
    Ok(sample)
}
