//! A guest that writes at a steady rate whatever becomes of its requests: an open load.
//!
//! A request has a moment when it is due. Its latency counts from then, also when it cannot be sent because the queue is
//! full of requests that hang, and also when it has not even been sent at the end.

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use blkmark::frontend::{Buffer, Guest, Histogram, Options as GuestOptions, Queue, Request, Wait};
use serde_json::{Value, json};

use super::options::Options;
use crate::bench::target::{fill, next_random};
use crate::process::GIVE_UP;

const BLOCK: usize = 4096;

/// What became of one request.
#[derive(Clone, Copy, Debug)]
struct Sample {
    due: Instant,
    latency: Duration,
}

/// All that a guest saw.
pub struct Log {
    samples: Vec<Sample>,
}

/// Latencies of a stretch of time.
#[derive(Clone, Debug, Default)]
pub struct Stretch {
    all: Histogram,
    windows: Vec<Histogram>,
}

/// Connects to `socket` and writes at random places until `stop`. `size`: bytes of the disk.
pub fn write_until(stop: &AtomicBool, socket: &Path, options: &Options, size: u64) -> Result<Log> {
    let depth = usize::from(options.depth);
    let guest_options = GuestOptions { data_size: depth * BLOCK, max_request: BLOCK, ..GuestOptions::default() };
    // A request is sent when it is due, not when it suits the kernel to wake several at once.
    rustix::thread::set_current_timer_slack(NonZeroU64::new(1))?;
    let mut guest = Guest::connect(socket, guest_options)?;
    let Some(mut queue) = guest.take_queues().pop() else { bail!("no queue") };
    let log = write(stop, &mut queue, options, size)?;
    drop(queue);
    guest.close()?;
    Ok(log)
}

fn write(stop: &AtomicBool, queue: &mut Queue, options: &Options, size: u64) -> Result<Log> {
    let depth = usize::from(options.depth);
    let mut bytes = vec![0; depth * BLOCK];
    fill(&mut bytes, 7);
    queue.write_data(0, &bytes)?;
    let interval = Duration::from_secs(1) / options.rate;
    let mut due = Instant::now() + interval;
    let mut random = 0x2545_f491_4f6c_dd1d;
    let mut free: Vec<u64> = (0..depth as u64).collect();
    let mut dues = vec![due; depth];
    let mut samples = Vec::new();
    let mut done = Vec::new();
    let mut stopped = None;
    loop {
        if stop.load(Ordering::Relaxed) && stopped.is_none() {
            stopped = Some(Instant::now());
        }
        let mut sent = false;
        while stopped.is_none() && due <= Instant::now() {
            let Some(slot) = free.pop() else { break };
            let block = ((u128::from(next_random(&mut random)) * u128::from(size / BLOCK as u64)) >> 64) as u64;
            let buffer = Buffer::slot(slot as usize, BLOCK);
            queue.submit(Request::Write { sector: block * (BLOCK as u64 / 512), buffer }, slot)?;
            dues[slot as usize] = due;
            due += interval;
            sent = true;
        }
        if sent {
            queue.kick()?;
        }
        if stopped.is_some() && queue.in_flight() == 0 {
            break;
        }
        let wait = match (stopped, free.is_empty()) {
            (Some(_), _) => GIVE_UP,
            // Not for ever: somebody may say stop.
            (None, true) => Duration::from_millis(100),
            (None, false) => due.saturating_duration_since(Instant::now()),
        };
        if queue.wait(Some(wait))? == Wait::TimedOut && stopped.is_some() {
            bail!("{} requests hang for {GIVE_UP:?}", queue.in_flight());
        }
        queue.completions(&mut done)?;
        let now = Instant::now();
        for completion in done.drain(..) {
            if !completion.status.is_ok() {
                bail!("a request failed: {}", completion.status);
            }
            let due = dues[completion.token as usize];
            samples.push(Sample { due, latency: now.saturating_duration_since(due) });
            free.push(completion.token);
        }
    }
    // What was due and could not be sent has waited, too.
    let stopped = stopped.unwrap_or_else(Instant::now);
    while due <= stopped {
        samples.push(Sample { due, latency: stopped.saturating_duration_since(due) });
        due += interval;
    }
    Ok(Log { samples })
}

impl Log {
    /// What was due from `began` until `ended`.
    pub fn between(&self, began: Instant, ended: Instant) -> Stretch {
        const WINDOW: u128 = 100;
        let mut stretch = Stretch::default();
        for sample in self.samples.iter().filter(|sample| began <= sample.due && sample.due < ended) {
            let window = (sample.due.duration_since(began).as_millis() / WINDOW) as usize;
            if stretch.windows.len() <= window {
                stretch.windows.resize_with(window + 1, Histogram::default);
            }
            stretch.windows[window].record(sample.latency);
            stretch.all.record(sample.latency);
        }
        stretch
    }
}

/// In milliseconds.
pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn figures(histogram: &Histogram) -> [f64; 4] {
    let at = |percent| millis(histogram.percentile(percent));
    [at(50.0), at(99.0), at(99.9), millis(histogram.max())]
}

impl Stretch {
    /// p50, p99, p99.9 and max in milliseconds.
    pub fn figures(&self) -> [f64; 4] {
        figures(&self.all)
    }

    /// The same in JSON, with each tenth of a second.
    pub fn json(&self) -> Value {
        let windows: Vec<[f64; 4]> = self.windows.iter().map(figures).collect();
        json!({"requests": self.all.count(), "ms": self.figures(), "ms_per_100ms": windows})
    }
}
