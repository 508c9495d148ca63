//! fio on the same file with the same load: what the disk gives without a guest, a protocol or a second process.
//!
//! fio is server and guest in one, so its processor time is all that there is to pay. Its io_uring engine runs as it comes
//! (`fio --ioengine=io_uring`, one job a queue, buffers of its own), without registered files or buffers and without polling.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkmark::frontend::Histogram;
use serde_json::Value;

use super::cell::{Cell, Pattern};
use super::cpu::{machine_time, private_memory, process_time};
use super::load::Sample;
use super::options::Options;
use super::target::Target;
use crate::process::{GIVE_UP, Process};

/// Before and after the window in which its processor time is taken: fio starts up, and writes its report.
const MARGIN: Duration = Duration::from_millis(150);

/// Runs the cell's load.
pub fn run(options: &Options, target: &Target, cell: &Cell) -> Result<Sample> {
    let dir = tempfile::Builder::new().prefix("bench-fio-").tempdir().context("cannot make a folder for fio")?;
    let report = dir.path().join("report.json");
    let rw = match cell.pattern {
        Pattern::RandRead => "randread",
        Pattern::RandWrite => "randwrite",
        Pattern::SeqRead => "read",
        Pattern::SeqWrite => "write",
    };
    let warm_up = Duration::from_secs_f64(options.warmup) + MARGIN;
    let measure = Duration::from_secs_f64(options.seconds());
    let mut command = Command::new(&options.fio);
    command
        .args(["--name=bench", "--ioengine=io_uring", "--thread", "--group_reporting", "--time_based", "--norandommap"])
        .args(["--output-format=json+", "--allow_mounted_write=0", "--eta=never"])
        .arg(format!("--output={}", report.display()))
        .arg(format!("--filename={}", target.path(0).display().to_string().replace(':', "\\:")))
        .arg(format!("--direct={}", u8::from(options.direct())))
        .arg(format!("--rw={rw}"))
        .arg(format!("--bs={}", cell.block))
        .arg(format!("--iodepth={}", cell.depth))
        .arg(format!("--numjobs={}", cell.queues))
        .arg(format!("--size={}", target.size()))
        .arg(format!("--ramp_time={}ms", warm_up.as_millis()))
        .arg(format!("--runtime={}ms", (measure + 2 * MARGIN).as_millis()))
        .stdin(Stdio::null());
    let log = dir.path().join("log");
    let mut start = || Process::start("fio", &mut command, &log);
    let mut process = match &options.pin {
        Some(pin) => pin.server.pin_child(start)?,
        None => start()?,
    };
    std::thread::sleep(warm_up + MARGIN);
    let now = || (Instant::now(), process_time(process.pid()), process_time(std::process::id()), machine_time());
    let before = now();
    std::thread::sleep(measure);
    let after = now();
    let server_bytes = private_memory(process.pid())?;
    let status = process.wait(GIVE_UP)?;
    if !status.success() {
        bail!("fio ended with {status}; it said:\n{}", process.log());
    }
    let text = std::fs::read_to_string(&report).context("fio left no report")?;
    // What it has to say to people stands before the report.
    let json = text.find('{').map_or("", |at| &text[at..]);
    let report: Value = serde_json::from_str(json).context("cannot read fio's report")?;
    let side = if cell.pattern.writes() { "write" } else { "read" };
    let job = &report["jobs"][0][side];
    let iops = job["iops"].as_f64().context("fio's report tells no IOPS")?;
    let seconds = after.0.duration_since(before.0).as_secs_f64();
    let time =
        |after: Result<Duration>, before: Result<Duration>| -> Result<Duration> { Ok(after?.saturating_sub(before?)) };
    let used = time(after.1, before.1)?;
    let own = time(after.2, before.2)?;
    let machine = time(after.3, before.3)?;
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    Ok(Sample {
        iops,
        bytes_per_second: iops * cell.block as f64,
        latency: latency(&job["clat_ns"]["bins"])?,
        server_us: used.as_secs_f64() * 1e6 / (iops * seconds),
        guest_us: 0.0,
        server_bytes,
        others_percent: machine.saturating_sub(used + own).as_secs_f64() / (seconds * processors) * 100.0,
    })
}

/// fio's histogram, as ours.
fn latency(bins: &Value) -> Result<Histogram> {
    let mut histogram = Histogram::default();
    for (nanos, count) in bins.as_object().context("fio's report has no latencies")? {
        let nanos = Duration::from_nanos(nanos.parse().context("fio's report has an odd latency")?);
        for _ in 0..count.as_u64().unwrap_or(0) {
            histogram.record(nanos);
        }
    }
    Ok(histogram)
}
