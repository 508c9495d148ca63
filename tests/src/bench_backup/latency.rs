//! The guest scene: what requests at a steady rate wait, idle and during a full backup to targets of several speeds.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::guest::{self, Stretch, millis};
use super::median;
use super::options::{Options, Speed};
use super::place::{Place, SlowServer};
use super::server::{Backup, Contender, Holds, Server};

/// For how long the hanging target hangs, and after what.
const HANG: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(12));

struct Run {
    idle: Stretch,
    busy: Stretch,
    backup: Backup,
}

/// Runs all contenders against all targets.
pub fn run(options: &Options) -> Result<Value> {
    let place = Place::filled(options, options.size)?;
    let (mut cells, mut failures) = (Vec::new(), Vec::new());
    for &speed in &options.targets {
        let mut runs: Vec<(Contender, Vec<Run>)> =
            options.contenders().into_iter().map(|who| (who, Vec::new())).collect();
        for round in 0..options.rounds as usize {
            for turn in 0..runs.len() {
                let at = (turn + round) % runs.len();
                let (contender, done) = &mut runs[at];
                eprintln!("guest: {} to {}, round {}", contender.name(), name(speed), round + 1);
                let run = one(options, &place, *contender, speed);
                match run.with_context(|| format!("{} to {}, round {}", contender.name(), name(speed), round + 1)) {
                    Ok(run) => done.push(run),
                    // The others are measured all the same, and what was measured is shown.
                    Err(error) => {
                        eprintln!("bench-backup: {error:#}");
                        failures.push(format!("{error:#}"));
                    }
                }
            }
        }
        if !options.json {
            table(options, speed, &runs);
        }
        cells.extend(runs.iter().map(|(contender, runs)| to_json(*contender, speed, runs)));
    }
    if !failures.is_empty() {
        if options.json {
            println!("{:#}", json!({"guest": cells}));
        }
        bail!("{} of the runs failed:\n{}", failures.len(), failures.join("\n"));
    }
    Ok(cells.into())
}

fn name(speed: Speed) -> &'static str {
    match speed {
        Speed::Fast => "a fast target",
        Speed::Slow => "20 MB/s",
        Speed::VerySlow => "1 MB/s",
        Speed::Hang => "a target that hangs for 10 s",
    }
}

fn one(options: &Options, place: &Place, contender: Contender, speed: Speed) -> Result<Run> {
    place.settle()?;
    let mut slow = match speed {
        Speed::Fast => None,
        Speed::Slow => Some(SlowServer::start(options, place, Some(20_000_000))?),
        Speed::VerySlow => Some(SlowServer::start(options, place, Some(1_000_000))?),
        Speed::Hang => Some(SlowServer::start(options, place, Some(100_000_000))?),
    };
    let mut server = Server::start(options, place, contender)?;
    let node = match &slow {
        Some(slow) => slow.node(Server::target_name()),
        None => Server::file_target(&place.target("copy.raw")?),
    };
    server.add_target(node)?;
    let patience = Duration::from_secs_f64(if speed == Speed::Fast { 600.0 } else { options.patience });
    let stop = AtomicBool::new(false);
    let socket = server.socket().clone();
    let run = std::thread::scope(|scope| {
        let load = scope.spawn(|| guest::write_until(&stop, &socket, options, place.size()));
        let began = Instant::now();
        std::thread::sleep(Duration::from_secs_f64(options.idle));
        let mut hangs = false;
        let mut meanwhile = |passed: Duration| {
            let due = speed == Speed::Hang && passed >= HANG.0 && passed < HANG.1;
            if let Some(slow) = slow.as_mut().filter(|_| due != hangs) {
                hangs = due;
                slow.hang(due)?;
            }
            Ok(())
        };
        let mut backup = server.backup(false, patience, &mut meanwhile);
        if speed == Speed::Fast {
            // A backup that the next power cut takes away is none: all are over when they are durable.
            backup = backup.and_then(|backup| {
                File::open(place.path("copy.raw"))?.sync_all().context("cannot sync the target")?;
                Ok(Backup { ended: Instant::now(), ..backup })
            });
        }
        // A guest whose requests wait for the target has to get them back. And whatever has failed, the guest ends.
        let woken = meanwhile(HANG.1);
        stop.store(true, Ordering::Relaxed);
        let log = match load.join() {
            Ok(log) => log.context("the guest"),
            Err(_) => Err(anyhow!("the guest's thread panicked")),
        };
        // One failure is often the other's reason: both are told, with how the servers are.
        let (backup, log) = match (backup.context("the backup"), log, woken) {
            (Ok(backup), Ok(log), Ok(())) => (backup, log),
            (backup, log, woken) => {
                let reasons = [backup.err(), log.err(), woken.err()].into_iter().flatten();
                let reasons: Vec<String> = reasons.map(|error| format!("{error:#}")).collect();
                let target = slow.as_mut().map_or(String::new(), |slow| slow.state());
                bail!("{}\n{}\n{target}", reasons.join("; "), server.state());
            }
        };
        // The first moments of a connection are not those of an idle guest.
        let idle = log.between(began + Duration::from_secs_f64(options.idle / 4.0), backup.began);
        Ok(Run { idle, busy: log.between(backup.began, backup.ended), backup })
    })?;
    server.stop()?;
    Ok(run)
}

fn medians(runs: &[Run], stretch: fn(&Run) -> &Stretch) -> [f64; 4] {
    std::array::from_fn(|at| median(runs.iter().map(|run| stretch(run).figures()[at]).collect()))
}

fn rate(runs: &[Run]) -> f64 {
    median(runs.iter().map(|run| run.backup.rate()).collect()) / 1e6
}

fn table(options: &Options, speed: Speed, all: &[(Contender, Vec<Run>)]) {
    println!("\n{} guest writes a second, full backup to {}; milliseconds", options.rate, name(speed));
    println!(
        "{:<18}{:>10}{:>10}{:>10}{:>10}{:>12}{:>12}{:>12}",
        "", "p50", "p99", "p99.9", "max", "idle p99", "idle p99.9", "copy MB/s"
    );
    for (contender, runs) in all.iter().filter(|(_, runs)| !runs.is_empty()) {
        let [p50, p99, p999, max] = medians(runs, |run| &run.busy);
        let [_, idle, idle9, _] = medians(runs, |run| &run.idle);
        println!(
            "{:<18}{p50:>10.2}{p99:>10.2}{p999:>10.2}{max:>10.1}{idle:>12.2}{idle9:>12.2}{:>12.1}",
            contender.name(),
            rate(runs)
        );
    }
    for (contender, runs) in all.iter().filter(|(contender, runs)| contender.is_blkmark() && !runs.is_empty()) {
        let longest =
            |of: fn(&Holds) -> Duration| millis(runs.iter().map(|run| of(&run.backup.holds)).max().unwrap_or_default());
        println!(
            "{}: longest hold of a write {:.2} ms, longest read of the disk with its write to scratch {:.2} ms",
            contender.name(),
            longest(|holds| holds.longest_hold),
            longest(|holds| holds.longest_save),
        );
    }
    let find = |who| all.iter().find(|(contender, runs)| *contender == who && !runs.is_empty()).map(|(_, runs)| runs);
    for other in [Contender::QsdOne, Contender::BlkmarkBefore] {
        let (Some(ours), Some(theirs)) = (find(Contender::Blkmark), find(other)) else { continue };
        let (a, b) = (medians(ours, |run| &run.busy), medians(theirs, |run| &run.busy));
        println!(
            "blkmark / {}: p50 {:.3}, p99 {:.3}, p99.9 {:.3}, max {:.3}, copy {:.2}",
            other.name(),
            a[0] / b[0],
            a[1] / b[1],
            a[2] / b[2],
            a[3] / b[3],
            rate(ours) / rate(theirs)
        );
    }
}

fn to_json(contender: Contender, speed: Speed, runs: &[Run]) -> Value {
    let rounds: Vec<Value> = runs
        .iter()
        .map(|run| {
            let seconds = run.backup.ended.duration_since(run.backup.began).as_secs_f64();
            json!({
                "idle": run.idle.json(), "backup": run.busy.json(),
                "bytes_per_second": run.backup.rate(), "seconds": seconds,
                "longest_hold_ms": millis(run.backup.holds.longest_hold),
                "longest_save_ms": millis(run.backup.holds.longest_save),
            })
        })
        .collect();
    json!({"contender": contender.name(), "target": name(speed), "rounds": rounds})
}
