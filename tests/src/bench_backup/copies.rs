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

/// Copies the disk with each, round after round.
pub fn run(options: &Options) -> Result<Value> {
    let place = Place::filled(options, options.size)?;
    // Behind a filter that nobody writes through, fleecing is the same as without.
    let servers = options.contenders.iter().filter(|who| **who != Contender::QsdFleecing);
    let mut rows: Vec<(Copier, Vec<f64>)> =
        servers.map(|who| Copier::Server(*who)).chain(TOOLS).map(|copier| (copier, Vec::new())).collect();
    let mut reason = None;
    for round in 0..options.rounds as usize {
        for turn in 0..rows.len() {
            let at = (turn + round) % rows.len();
            let (copier, rates) = &mut rows[at];
            let name = copier.name();
            eprintln!("copy: {name}, round {}", round + 1);
            match one(options, &place, *copier).with_context(|| name.clone()) {
                Ok(rate) => rates.push(rate),
                // A file system without direct I/O, for instance: the others are measured all the same.
                Err(error) if matches!(copier, Copier::Tool(..)) => {
                    eprintln!("{error:#}");
                    reason.get_or_insert(format!("{error:#}"));
                }
                Err(error) => return Err(error),
            }
        }
    }
    rows.retain(|(_, rates)| !rates.is_empty());
    if !options.json {
        println!("\nfull copy of {} MiB without a guest, until it is durable", options.size >> 20);
        let qsd = rows.iter().find(|(copier, _)| *copier == Copier::Server(Contender::Qsd)).map(|(_, rates)| rates);
        for (copier, rates) in &rows {
            let ratio = qsd.map_or(String::new(), |qsd| {
                let ratios = rates.iter().zip(qsd).map(|(rate, qsd)| rate / qsd);
                format!("{:.2} x qsd", median(ratios.collect()))
            });
            println!("{:<18}{:>10.2} GB/s  {ratio}", copier.name(), median(rates.clone()) / 1e9);
        }
    }
    let cells: Vec<Value> =
        rows.iter().map(|(copier, rates)| json!({"copier": copier.name(), "bytes_per_second": rates})).collect();
    Ok(json!({"cells": cells, "left_out": reason}))
}

fn one(options: &Options, place: &Place, copier: Copier) -> Result<f64> {
    place.settle()?;
    let target = place.path("copy.raw");
    let seconds = match copier {
        Copier::Server(contender) => {
            place.target("copy.raw")?;
            let mut server = Server::start(options, place, contender)?;
            server.add_target(Server::file_target(&target))?;
            let began = Instant::now();
            server.backup(false, Duration::from_secs(3600), &mut |_| Ok(()))?;
            sync(&target)?;
            let seconds = began.elapsed().as_secs_f64();
            server.stop()?;
            seconds
        }
        Copier::Tool(tool, arguments) => {
            let _ = std::fs::remove_file(&target);
            let disk = place.disk().display().to_string();
            let mut command = tools::command(tool).or_else(|_| anyhow::Ok(std::process::Command::new(tool)))?;
            for argument in arguments {
                command.arg(argument.replace("{}", &disk).replace("[]", &target.display().to_string()));
            }
            let began = Instant::now();
            tools::run(&mut command)?;
            sync(&target)?;
            began.elapsed().as_secs_f64()
        }
    };
    place.assert_same(&target, 4096)?;
    std::fs::remove_file(&target)?;
    Ok(place.size() as f64 / seconds)
}

fn sync(target: &Path) -> Result<()> {
    File::open(target)?.sync_all().with_context(|| format!("cannot sync {}", target.display()))
}
