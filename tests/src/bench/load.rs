//! The load: a thread a queue keeps the cell's depth in flight through the embedded front end and counts.

use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkmark::frontend::{Buffer, Completion, Guest, Histogram, Options as GuestOptions, Queue, Request, Wait};

use super::cell::Cell;
use super::cpu::{machine_time, process_time};
use super::options::Options;
use super::server::Server;
use super::target::{Target, fill, next_random};
use crate::process::GIVE_UP;

/// What one run measured.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Requests a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_second: f64,
    /// Latencies, from the request's entry into the ring to the guest's sight of its completion.
    pub latency: Histogram,
    /// Processor time of the server for each request, in microseconds.
    pub server_us: f64,
    /// Processor time of this program for each request, in microseconds: what the guest's side costs.
    pub guest_us: f64,
    /// Share of all processors, in percent, that neither the server nor this program used, but somebody else.
    pub others_percent: f64,
    /// Memory of the server, in bytes, at the end of the load.
    pub server_bytes: u64,
}

const WARM_UP: u8 = 0;
const MEASURE: u8 = 1;
const STOP: u8 = 2;

/// The guests that a cell's load needs, one a disk.
fn connect(options: &Options, target: &Target, cell: &Cell, server: &Server) -> Result<Vec<Guest>> {
    (0..target.disks()).map(|disk| connect_one(options, target, cell, &server.socket(disk))).collect()
}

fn connect_one(options: &Options, target: &Target, cell: &Cell, socket: &Path) -> Result<Guest> {
    let descriptors = if options.no_indirect { cell.depth * 3 } else { cell.depth };
    let guest_options = GuestOptions {
        queues: cell.queues,
        queue_size: u16::try_from(descriptors.next_power_of_two().max(256)).context("too deep")?,
        data_size: cell.depth * cell.block,
        max_request: cell.block,
        indirect: !options.no_indirect,
        ..GuestOptions::default()
    };
    let guest = Guest::connect(socket, guest_options)?;
    let disk = guest.config().size();
    if disk < target.size() {
        bail!("the server shows a disk of {disk} bytes instead of {}", target.size());
    }
    Ok(guest)
}

/// The cell's load until each queue has had so many requests; nothing is measured.
pub(super) fn run_requests(
    options: &Options,
    target: &Target,
    cell: &Cell,
    server: &Server,
    requests: u64,
) -> Result<()> {
    let mut guests = connect(options, target, cell, server)?;
    let phase = AtomicU8::new(WARM_UP);
    for (index, queue) in guests.iter_mut().flat_map(Guest::take_queues).enumerate() {
        let mut worker = Worker::new(options, target, cell, index, queue)?;
        worker.most = Some(requests);
        worker.in_step = true;
        worker.run(&phase)?;
    }
    guests.into_iter().try_for_each(|guest| guest.close().map(drop)).context("after the load")
}

/// Runs the cell's load against the server.
pub fn run(options: &Options, target: &Target, cell: &Cell, server: &mut Server) -> Result<Sample> {
    let mut guests = connect(options, target, cell, server)?;
    let phase = AtomicU8::new(WARM_UP);
    let queues: Vec<Queue> = guests.iter_mut().flat_map(Guest::take_queues).collect();
    let (mut measured, mut memory) = (None, 0);
    let result = std::thread::scope(|scope| -> Result<Tally> {
        let mut threads = Vec::new();
        for (index, queue) in queues.into_iter().enumerate() {
            let phase = &phase;
            threads.push(scope.spawn(move || {
                let done = Worker::new(options, target, cell, index, queue).and_then(|mut worker| worker.run(phase));
                if done.is_err() {
                    // The others need not go on.
                    phase.store(STOP, Ordering::Relaxed);
                }
                done
            }));
        }
        std::thread::sleep(Duration::from_secs_f64(options.warmup));
        let now = || (Instant::now(), server.cpu_time(), process_time(std::process::id()), machine_time());
        let before = now();
        let _ = phase.compare_exchange(WARM_UP, MEASURE, Ordering::Relaxed, Ordering::Relaxed);
        std::thread::sleep(Duration::from_secs_f64(options.seconds()));
        let after = now();
        memory = server.memory()?;
        phase.store(STOP, Ordering::Relaxed);
        measured = Some((before, after));
        let mut tally = Tally::default();
        for thread in threads {
            match thread.join() {
                Ok(part) => tally.add(&part?),
                Err(_) => bail!("a guest thread panicked"),
            }
        }
        Ok(tally)
    });
    let tally = result?;
    guests.into_iter().try_for_each(|guest| guest.close().map(drop)).context("after the load")?;
    let Some((before, after)) = measured else { bail!("nothing was measured") };
    let seconds = after.0.duration_since(before.0).as_secs_f64();
    let server_time = after.1?.saturating_sub(before.1?);
    let guest_time = after.2?.saturating_sub(before.2?);
    let machine_time = after.3?.saturating_sub(before.3?);
    let others = machine_time.saturating_sub(server_time + guest_time).as_secs_f64();
    let processors = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let count = tally.latency.count();
    if count == 0 {
        bail!("no request was finished within {seconds:.2} s");
    }
    let each = |time: Duration| time.as_secs_f64() * 1e6 / count as f64;
    Ok(Sample {
        iops: count as f64 / seconds,
        bytes_per_second: count as f64 * cell.block as f64 / seconds,
        latency: tally.latency,
        server_us: each(server_time),
        guest_us: each(guest_time),
        others_percent: others / (seconds * processors) * 100.0,
        server_bytes: memory,
    })
}

#[derive(Default)]
struct Tally {
    latency: Histogram,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.latency.merge(&other.latency);
    }
}

/// One queue's load.
struct Worker<'a> {
    cell: &'a Cell,
    queue: Queue,
    /// First block and number of blocks that this queue works on.
    first: u64,
    blocks: u64,
    position: u64,
    random: u64,
    pin: Option<super::cpu::Cpus>,
    /// Ends after so many requests, if that is set.
    most: Option<u64>,
    /// Nothing is submitted before all is answered, so that each batch is as large as the depth, however busy the machine is.
    in_step: bool,
}

impl<'a> Worker<'a> {
    /// The one with this number among all of all disks.
    fn new(options: &Options, target: &Target, cell: &'a Cell, number: usize, queue: Queue) -> Result<Self> {
        let index = queue.index() as u64;
        let all = target.size() / cell.block as u64;
        // Sequential streams each have a part of the disk; random ones meet anywhere.
        let (first, blocks) = if cell.pattern.random() {
            (0, all)
        } else {
            let part = all / cell.queues as u64;
            (index * part, part)
        };
        if blocks == 0 {
            bail!("the disk is too small for {}", cell.name());
        }
        if cell.pattern.writes() {
            let mut bytes = vec![0; cell.depth * cell.block];
            fill(&mut bytes, index + 2);
            queue.write_data(0, &bytes)?;
        }
        Ok(Worker {
            cell,
            first,
            blocks,
            position: 0,
            random: 0x2545_f491_4f6c_dd1d ^ ((number as u64) << 32),
            pin: options.pin.as_ref().map(|pin| pin.guest.one(number)),
            most: None,
            in_step: false,
            queue,
        })
    }

    fn submit(&mut self, slot: u64) -> Result<()> {
        let block = if self.cell.pattern.random() {
            // The high bits are the better ones; the product maps them evenly onto the blocks.
            ((u128::from(next_random(&mut self.random)) * u128::from(self.blocks)) >> 64) as u64
        } else {
            let block = self.position;
            self.position = (self.position + 1) % self.blocks;
            block
        };
        let sector = (self.first + block) * (self.cell.block as u64 / 512);
        let buffer = Buffer::slot(slot as usize, self.cell.block);
        let request = if self.cell.pattern.writes() {
            Request::Write { sector, buffer }
        } else {
            Request::Read { sector, buffer }
        };
        Ok(self.queue.submit(request, slot)?)
    }

    fn run(&mut self, phase: &AtomicU8) -> Result<Tally> {
        if let Some(cpus) = &self.pin {
            cpus.pin_thread()?;
        }
        let mut tally = Tally::default();
        let mut left = self.most.unwrap_or(u64::MAX);
        let mut done: Vec<Completion> = Vec::with_capacity(self.cell.depth);
        let mut next = Vec::with_capacity(self.cell.depth);
        for slot in 0..self.cell.depth as u64 {
            self.submit(slot)?;
        }
        self.queue.kick()?;
        while self.queue.in_flight() > 0 {
            if self.queue.wait(Some(GIVE_UP))? == Wait::TimedOut {
                bail!("{} requests hang for {GIVE_UP:?}", self.queue.in_flight());
            }
            self.queue.completions(&mut done)?;
            let now = phase.load(Ordering::Relaxed);
            for completion in done.drain(..) {
                if !completion.status.is_ok() {
                    bail!("a request failed: {}", completion.status);
                }
                if now == MEASURE {
                    tally.latency.record(completion.latency);
                }
                left = left.saturating_sub(1);
                if now != STOP && left > 0 {
                    next.push(completion.token);
                }
            }
            if !self.in_step || self.queue.in_flight() == 0 {
                next.drain(..).try_for_each(|token| self.submit(token))?;
            }
            self.queue.kick()?;
        }
        Ok(tally)
    }
}
