//! The guest: one thread a virtqueue, which writes at full speed and keeps the table of what it wrote.
//!
//! `story` starts it, holds it for a moment where it wants to know the disk exactly ([`Writers::hold`]), and takes its
//! measurements. It writes through the embedded vhost-user front end and knows nothing of backups.
//!
//! Invariant: what is submitted stands in the table as issued before, and what is acknowledged there was completed
//! without an error. A failed request ends the writer, and `story` hears of it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::error::DemoError;
use super::model::{BLOCK, Content, FIRST_STAMP, Snapshot, Table, fill};
use super::workload::{Kind, LONGEST_WRITE, Plan, Step, Workload};
use crate::frontend::{Buffer, Completion, FrontendError, Guest, Histogram, Options, Queue, Request, Wait};

/// Virtqueues, each with a writer.
pub const QUEUES: usize = 2;

/// Requests that a writer keeps in flight.
pub const DEPTH: usize = 8;

/// A request that takes longer is taken for lost.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tries to find a request that does not overlap one in flight, before completions are awaited.
const TRIES: usize = 4;

/// What the guest saw of its disk in a span of time.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    /// How long each write took.
    pub latency: Histogram,
    /// Requests of all kinds.
    pub requests: u64,
    /// Bytes written with data.
    pub bytes: u64,
    /// Discards and write-zeroes among the requests.
    pub zeroings: u64,
    /// The span.
    pub elapsed: Duration,
}

impl Meter {
    fn count(&mut self, step: &Step, latency: Duration) {
        self.requests += 1;
        match step.kind {
            Kind::Write => {
                self.latency.record(latency);
                self.bytes += step.blocks * BLOCK as u64;
            }
            Kind::Discard | Kind::WriteZeroes => self.zeroings += 1,
        }
    }

    fn merge(&mut self, other: &Meter) {
        self.latency.merge(&other.latency);
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.zeroings += other.zeroings;
    }
}

/// A completed request with its times, kept while [`Writers::record`] is on.
#[derive(Clone, Copy, Debug)]
pub struct Recorded {
    /// What was done.
    pub step: Step,
    /// Its stamp.
    pub stamp: u32,
    /// Just before it was submitted.
    pub issued: Instant,
    /// Just after its completion was seen.
    pub acknowledged: Instant,
}

#[derive(Default)]
struct Crew {
    running: usize,
    resting: usize,
    hold: bool,
    stop: bool,
    failure: Option<String>,
}

struct Shared {
    table: Table,
    crew: Mutex<Crew>,
    changed: Condvar,
    /// Whether `crew` says something other than "go on"; looked at before each request.
    attention: AtomicBool,
    epoch: AtomicU64,
    recording: AtomicBool,
    /// One a writer, so that they do not wait for each other.
    notes: Vec<Mutex<Notes>>,
}

#[derive(Default)]
struct Notes {
    meter: Meter,
    recorded: Vec<Recorded>,
}

/// A thread that panicked has spoilt no data of ours: what it left is whole between any two statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The guest with its threads.
pub struct Writers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    metered: Instant,
    /// Holds the session; dropped after the threads have ended, it stops the rings and hangs up.
    _guest: Guest,
}

impl Writers {
    /// Attaches a guest to the disk behind `socket` and lets it write as `plan` says.
    pub fn start(socket: &Path, plan: Plan, table: Table) -> Result<Self, DemoError> {
        let mut guest = Guest::connect(socket, Options::default().queues(QUEUES))?;
        let queues = guest.take_queues();
        let shared = Arc::new(Shared {
            table,
            crew: Mutex::new(Crew { running: queues.len(), ..Crew::default() }),
            changed: Condvar::new(),
            attention: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            recording: AtomicBool::new(false),
            notes: queues.iter().map(|_| Mutex::default()).collect(),
        });
        let mut writers = Writers { shared, threads: Vec::new(), metered: Instant::now(), _guest: guest };
        for queue in queues {
            let shared = Arc::clone(&writers.shared);
            let workload = Workload::new(plan, queue.index() as u64, QUEUES as u64);
            let thread = std::thread::Builder::new().name(format!("guest-{}", queue.index())).spawn(move || {
                let _leave = Leave(&shared);
                if let Err(error) = Writer::new(&shared, queue, workload).run() {
                    lock(&shared.crew).failure.get_or_insert(error.to_string());
                }
            })?;
            writers.threads.push(thread);
        }
        Ok(writers)
    }

    /// The table of stamps.
    pub fn table(&self) -> &Table {
        &self.shared.table
    }

    /// Moves the guest's habits to other places of the disk.
    pub fn next_epoch(&self) {
        self.shared.epoch.fetch_add(1, Ordering::Relaxed);
    }

    /// An error if a writer had to give up.
    pub fn check(&self) -> Result<(), DemoError> {
        match &lock(&self.shared.crew).failure {
            Some(failure) => Err(DemoError::Guest(failure.clone())),
            None => Ok(()),
        }
    }

    /// Takes what was measured since the last call, or since the start.
    pub fn take_meter(&mut self) -> Meter {
        let mut sum = Meter::default();
        for notes in &self.shared.notes {
            sum.merge(&std::mem::take(&mut lock(notes).meter));
        }
        let now = Instant::now();
        sum.elapsed = now - std::mem::replace(&mut self.metered, now);
        sum
    }

    /// Keeps the completed requests from now on, those in flight included, or no more. What was kept is handed out.
    pub fn record(&self, on: bool) -> Vec<Recorded> {
        self.shared.recording.store(on, Ordering::SeqCst);
        self.shared.notes.iter().flat_map(|notes| std::mem::take(&mut lock(notes).recorded)).collect()
    }

    /// Holds the guest: returns once nothing is in flight. It goes on when the result is dropped.
    pub fn hold(&self) -> Result<Held<'_>, DemoError> {
        let mut crew = lock(&self.shared.crew);
        crew.hold = true;
        self.shared.attention.store(true, Ordering::SeqCst);
        let held = Held { shared: &self.shared };
        let is_moving = |crew: &mut Crew| crew.resting < crew.running && crew.failure.is_none();
        let waited = self.shared.changed.wait_timeout_while(crew, PATIENCE, is_moving);
        let (crew, timeout) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        let failure = crew.failure.clone();
        drop(crew);
        match failure {
            Some(failure) => Err(DemoError::Guest(failure)),
            None if timeout.timed_out() => Err(DemoError::Guest("its requests in flight do not come back".into())),
            None => Ok(held),
        }
    }

    /// Ends the threads after what they have in flight, and hangs up. What they wrote is the disk from now on.
    pub fn stop(mut self) -> Result<Snapshot, DemoError> {
        self.join();
        self.check()?;
        settled(&self.shared.table)
    }

    fn join(&mut self) {
        lock(&self.shared.crew).stop = true;
        self.shared.attention.store(true, Ordering::SeqCst);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was reported by the panic handler, and shows as a table that does not fit the disk.
            let _ = thread.join();
        }
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.join();
    }
}

/// As long as this lives, the guest has nothing in flight.
pub struct Held<'a> {
    shared: &'a Shared,
}

impl Held<'_> {
    /// The disk, exactly.
    pub fn snapshot(&self) -> Result<Snapshot, DemoError> {
        settled(&self.shared.table)
    }
}

fn settled(table: &Table) -> Result<Snapshot, DemoError> {
    let snapshot = table.issued();
    if !snapshot.is_settled(&table.acknowledged()) {
        return Err(DemoError::Guest("a request was never answered".into()));
    }
    Ok(snapshot)
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut crew = lock(&self.shared.crew);
        crew.hold = false;
        self.shared.attention.store(crew.stop, Ordering::SeqCst);
        drop(crew);
        self.shared.changed.notify_all();
    }
}

/// Takes a writer off the crew, however it ends.
struct Leave<'a>(&'a Shared);

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        let mut crew = lock(&self.0.crew);
        crew.running -= 1;
        if std::thread::panicking() {
            crew.failure.get_or_insert("a writer panicked".into());
        }
        drop(crew);
        self.0.changed.notify_all();
    }
}

#[derive(Clone, Copy)]
struct InFlight {
    step: Step,
    stamp: u32,
    issued: Instant,
}

/// One queue's thread.
struct Writer<'a> {
    shared: &'a Shared,
    queue: Queue,
    workload: Workload,
    stamp: u32,
    /// What is in flight, by the slot of the buffer it has.
    slots: [Option<InFlight>; DEPTH],
    data: Vec<u8>,
    completions: Vec<Completion>,
}

/// Bytes of a slot's buffer.
const SLOT: usize = LONGEST_WRITE as usize * BLOCK;

impl<'a> Writer<'a> {
    fn new(shared: &'a Shared, queue: Queue, workload: Workload) -> Self {
        Writer {
            shared,
            queue,
            workload,
            stamp: FIRST_STAMP,
            slots: [None; DEPTH],
            data: vec![0; SLOT],
            completions: Vec::new(),
        }
    }

    fn run(&mut self) -> Result<(), DemoError> {
        loop {
            if self.shared.attention.load(Ordering::SeqCst) {
                while self.queue.in_flight() > 0 {
                    self.take_completions()?;
                }
                if !self.rest() {
                    return Ok(());
                }
            }
            while let Some(slot) = self.slots.iter().position(Option::is_none) {
                let Some(step) = self.next_step() else { break };
                self.submit(slot, step)?;
            }
            self.take_completions()?;
        }
    }

    /// Waits while the guest is held. Answers whether to go on.
    fn rest(&self) -> bool {
        let mut crew = lock(&self.shared.crew);
        if crew.stop {
            return false;
        }
        crew.resting += 1;
        self.shared.changed.notify_all();
        let is_held = |crew: &mut Crew| crew.hold && !crew.stop;
        crew = self.shared.changed.wait_while(crew, is_held).unwrap_or_else(|poisoned| poisoned.into_inner());
        crew.resting -= 1;
        !crew.stop
    }

    /// A request for blocks that have none in flight.
    fn next_step(&mut self) -> Option<Step> {
        let epoch = self.shared.epoch.load(Ordering::Relaxed);
        for _ in 0..TRIES {
            let step = self.workload.next(epoch);
            if !self.slots.iter().flatten().any(|busy| busy.step.overlaps(&step)) {
                return Some(step);
            }
        }
        None
    }

    fn submit(&mut self, slot: usize, step: Step) -> Result<(), DemoError> {
        let stamp = self.stamp.checked_add(1).ok_or_else(|| DemoError::Guest("its stamps are used up".into()))?;
        self.stamp = stamp;
        let blocks = step.first..step.first + step.blocks;
        self.shared.table.issue(blocks.clone(), stamp, step.kind != Kind::Write);
        let sector = step.first * (BLOCK as u64 / 512);
        let sectors = (step.blocks * (BLOCK as u64 / 512)) as u32;
        let request = match step.kind {
            Kind::Write => {
                let data = &mut self.data[..step.blocks as usize * BLOCK];
                for (block, bytes) in blocks.zip(data.chunks_exact_mut(BLOCK)) {
                    fill(block, Content::Data(stamp), bytes);
                }
                self.queue.write_data(slot * SLOT, data)?;
                Request::Write { sector, buffer: Buffer { offset: slot * SLOT, len: data.len() } }
            }
            Kind::Discard => Request::Discard { sector, sectors },
            Kind::WriteZeroes => Request::WriteZeroes { sector, sectors, unmap: true },
        };
        self.slots[slot] = Some(InFlight { step, stamp, issued: Instant::now() });
        self.queue.submit(request, slot as u64)?;
        Ok(())
    }

    /// Kicks, and waits until at least one request has come back.
    fn take_completions(&mut self) -> Result<(), DemoError> {
        self.queue.kick()?;
        while self.queue.completions(&mut self.completions)? == 0 {
            if self.queue.wait(Some(PATIENCE))? == Wait::TimedOut {
                return Err(FrontendError::TimedOut(PATIENCE).into());
            }
        }
        let acknowledged = Instant::now();
        let mut notes = lock(&self.shared.notes[self.queue.index()]);
        let recording = self.shared.recording.load(Ordering::SeqCst);
        for completion in self.completions.drain(..) {
            let Some(done) = self.slots.get_mut(completion.token as usize).and_then(Option::take) else { continue };
            let InFlight { step, stamp, issued } = done;
            if !completion.status.is_ok() {
                let text = format!("{:?} of {} blocks at block {}", step.kind, step.blocks, step.first);
                return Err(DemoError::Guest(format!("{text} failed: {}", completion.status)));
            }
            self.shared.table.acknowledge(step.first..step.first + step.blocks, stamp);
            notes.meter.count(&step, completion.latency);
            if recording {
                notes.recorded.push(Recorded { step, stamp, issued, acknowledged });
            }
        }
        Ok(())
    }
}
