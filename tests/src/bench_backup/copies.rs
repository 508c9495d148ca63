//! The copy scene: a whole disk without a guest, against the tools that copy files. Until it is durable, for all alike.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::median;
use super::options::Options;
use super::place::Place;
use super::server::{Contender, Server};
use crate::bench::cpu::children_time;
use crate::tools;

/// Who copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copier {
    Server(Contender),
    /// A program, and the arguments before or around source and target.
    Tool(&'static str, &'static [&'static str]),
}

/// `{}` stands for the source and `[]` for the target.
const TOOLS: [Copier; 5] = [
    Copier::Tool("qemu-img", &["convert", "-f", "raw", "-O", "raw", "{}", "[]"]),
    Copier::Tool("qemu-img", &["convert", "-T", "none", "-t", "none", "-W", "-f", "raw", "-O", "raw", "{}", "[]"]),
    Copier::Tool("cp", &["--reflink=never", "{}", "[]"]),
    Copier::Tool("dd", &["bs=1M", "status=none", "if={}", "of=[]"]),
    Copier::Tool("dd", &["bs=1M", "status=none", "iflag=direct", "oflag=direct", "if={}", "of=[]"]),
];

impl Copier {
    fn name(self) -> String {
        match self {
            Copier::Server(contender) => contender.name().into(),
            Copier::Tool(tool, arguments) if arguments.contains(&"none") || arguments.contains(&"oflag=direct") => {
                format!("{tool} direct")
            }
            Copier::Tool(tool, _) => tool.into(),
        }
    }
}

/// One copy.
#[derive(Clone, Copy, Debug)]
struct Copied {
    /// Bytes a second.
    rate: f64,
    /// Processor time of the copier, in seconds a GB.
    cpu: f64,
}

/// Copies the disk with each, round after round.
pub fn run(options: &Options) -> Result<Value> {
    let place = Place::filled(options, options.size)?;
    // Behind a filter that nobody writes through, fleecing is the same as without.
    let servers = options.contenders().into_iter().filter(|who| *who != Contender::QsdFleecing);
    let mut rows: Vec<(Copier, Vec<Copied>)> =
        servers.map(Copier::Server).chain(TOOLS).map(|copier| (copier, Vec::new())).collect();
    let mut reason = None;
    for round in 0..options.rounds as usize {
        for turn in 0..rows.len() {
            let at = (turn + round) % rows.len();
            let (copier, rounds) = &mut rows[at];
            let name = copier.name();
            eprintln!("copy: {name}, round {}", round + 1);
            match one(options, &place, *copier).with_context(|| name.clone()) {
                Ok(copied) => rounds.push(copied),
                // A file system without direct I/O, for instance: the others are measured all the same.
                Err(error) if matches!(copier, Copier::Tool(..)) => {
                    eprintln!("{error:#}");
                    reason.get_or_insert(format!("{error:#}"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    rows.retain(|(_, rounds)| !rounds.is_empty());
    if !options.json {
        println!("\nfull copy of {} MiB without a guest, until it is durable", options.size >> 20);
        let find =
            |who: &dyn Fn(&Copier) -> bool| rows.iter().find(|(copier, _)| who(copier)).map(|(_, rounds)| rounds);
        let qsd = find(&|copier| *copier == Copier::Server(Contender::Qsd));
        let cp = find(&|copier| copier.name() == "cp");
        let blkmark = find(&|copier| *copier == Copier::Server(Contender::Blkmark));
        for (copier, rounds) in &rows {
            let of = |figure: fn(&Copied) -> f64| median(rounds.iter().map(figure).collect());
            let (rate, cpu) = (of(|copied| copied.rate) / 1e9, of(|copied| copied.cpu));
            let ratio = |name: &str, to: Option<&Vec<Copied>>| {
                let ratios = to.map(|to| rounds.iter().zip(to).map(|(copied, to)| copied.rate / to.rate).collect());
                ratios.map_or(String::new(), |ratios| format!("{:>7.2} x {name}", median(ratios)))
            };
            let (to_qsd, to_cp, to_us) = (ratio("qsd", qsd), ratio("cp", cp), ratio("blkmark", blkmark));
            let (least, most) = rounds.iter().fold((f64::MAX, 0.0_f64), |(least, most), copied| {
                (least.min(copied.rate / 1e9), most.max(copied.rate / 1e9))
            });
            println!(
                "{:<18}{rate:>6.2} GB/s ({least:.2} to {most:.2}){cpu:>7.3} s of processors a GB{to_qsd}{to_cp}{to_us}",
                copier.name()
            );
        }
    }
    let figures = |rounds: &[Copied], of: fn(&Copied) -> f64| rounds.iter().map(of).collect::<Vec<f64>>();
    let cells: Vec<Value> = rows
        .iter()
        .map(|(copier, rounds)| {
            let (rates, times) = (figures(rounds, |copied| copied.rate), figures(rounds, |copied| copied.cpu));
            json!({"copier": copier.name(), "bytes_per_second": rates, "cpu_seconds_per_gb": times})
        })
        .collect();
    Ok(json!({"cells": cells, "left_out": reason}))
}

fn one(options: &Options, place: &Place, copier: Copier) -> Result<Copied> {
    place.settle()?;
    let target = place.path("copy.raw");
    let (seconds, cpu) = match copier {
        Copier::Server(contender) => {
            place.target("copy.raw")?;
            let mut server = Server::start(options, place, contender)?;
            server.add_target(Server::file_target(&target))?;
            let (began, used) = (Instant::now(), server.cpu_time()?);
            server.backup(false, Duration::from_secs(3600), &mut |_| Ok(()))?;
            sync(&target)?;
            let took = (began.elapsed(), server.cpu_time()? - used);
            server.stop()?;
            took
        }
        Copier::Tool(tool, arguments) => {
            let _ = std::fs::remove_file(&target);
            let disk = place.disk().display().to_string();
            let mut command = tools::command(tool).or_else(|_| anyhow::Ok(std::process::Command::new(tool)))?;
            for argument in arguments {
                command.arg(argument.replace("{}", &disk).replace("[]", &target.display().to_string()));
            }
            let (began, used) = (Instant::now(), children_time()?);
            tools::run(&mut command)?;
            sync(&target)?;
            (began.elapsed(), children_time()? - used)
        }
    };
    place.assert_same(&target, 4096)?;
    std::fs::remove_file(&target)?;
    let bytes = place.size() as f64;
    Ok(Copied { rate: bytes / seconds.as_secs_f64(), cpu: cpu.as_secs_f64() / (bytes / 1e9) })
}

fn sync(target: &Path) -> Result<()> {
    File::open(target)?.sync_all().with_context(|| format!("cannot sync {}", target.display()))
}
