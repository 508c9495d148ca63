//! The copy engine: moves a point in time into a target at the target's pace.
//!
//! Called by jobs. Workers take hands of the plan one after another (`deal`); each reads its hand as of the point, finds out
//! what of it is zero, and writes (`worker`). Others steer it (`control`), and the guest's own latency bounds how much is
//! under way at once (`pace`). The guest is not in here at all: however slow the target, all that waits is a worker.

mod control;
mod deal;
mod pace;
mod worker;

use crate::point::{Point, PointError};
use crate::target::Target;
use blkmark_bitmap::Bits;
pub use control::CopyControl;
use deal::Deal;
pub(crate) use pace::Pace;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};
use thiserror::Error;
pub(crate) use worker::STEPS_A_SECOND;
use worker::{Shared, Worker};

/// Workers for long runs: while one reads the other writes. More take turns on one disk, which is then slower than it is with two
/// (docs/performance.md), and each costs a buffer of `CHUNK`.
const WORKERS: u64 = 2;

/// Most workers for short runs scattered over a disk, which take longer to reach than to read. There are as many only where
/// runs do take long: on memory, or out of a cache, they would be in each other's way.
const WORKERS_SCATTERED: u64 = 16;

/// Runs that take longer are worth one more worker: no cache is as slow, and hardly a disk as fast,
const LONG: Duration = Duration::from_micros(40);

/// if so many in a row do. A single one may be a worker that waited for a processor: with another one it would wait for longer.
const IN_A_ROW: u32 = 3;

/// Runs that are shorter than this on average are scattered.
const SCATTERED: u64 = 256 << 10;

/// Most bytes that a worker reads at once, unless the target wants more.
const CHUNK: u64 = 1 << 20;

/// How long an error that the operator wants ignored is left alone before the same bytes are tried again.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// How long guest requests may take before a backup makes room for them, unless another limit is asked for.
pub const GUEST_LATENCY: Duration = Duration::from_millis(1);

/// Which side of a copy failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The disk.
    Source,
    /// The backup.
    Target,
}

/// What a failed read or write leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// The copy ends with this error.
    Report,
    /// The same bytes are tried again.
    Retry,
    /// The copy pauses; when it is resumed the same bytes are tried again.
    Stop,
}

/// Why a copy ended before it was done.
#[derive(Debug, Error)]
pub enum CopyError {
    /// It was told to.
    #[error("the job was cancelled")]
    Cancelled,
    /// The point in time cannot be read.
    #[error(transparent)]
    Point(#[from] PointError),
    /// The target refused a write.
    #[error("could not write the target at {offset:#x}: {error}")]
    Target {
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        error: io::Error,
    },
}

/// How a plan lies on the disk.
#[derive(Clone, Copy)]
struct Extent {
    bytes: u64,
    runs: u64,
}

impl Extent {
    fn of(plan: &Bits) -> Self {
        plan.runs()
            .fold(Self { bytes: 0, runs: 0 }, |sum, run| Self { bytes: sum.bytes + run.len(), runs: sum.runs + 1 })
    }

    fn workers(self, chunk: u64) -> u64 {
        let workers = if self.bytes / self.runs.max(1) < SCATTERED { WORKERS_SCATTERED } else { WORKERS };
        workers.min(self.runs.max(self.bytes / chunk)).max(1)
    }
}

/// Copies the clusters of `plan` (of the point's cluster size) from `point` to `target`. Blocks until it is done,
/// cancelled or has failed; `on_error` decides what a failed read or write leads to. The target is not flushed.
pub fn run(
    point: &Point,
    plan: &Bits,
    target: &dyn Target,
    control: &CopyControl,
    on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync),
) -> Result<(), CopyError> {
    let extent = Extent::of(plan);
    control.begin(plan, extent.bytes);
    let chunk = CHUNK.max(point.cluster().bytes()).max(target.stride());
    let workers = extent.workers(chunk);
    let pace = Pace::new(point.pulse(), control, chunk, workers);
    let deal = Mutex::new(Deal::new(point, plan, target.stride()));
    let unreleased = Mutex::new((Vec::new(), Instant::now() + target.noted_every()));
    let shared = Shared { point, target, control, on_error, deal, pace, chunk, unreleased };
    let failure: Mutex<Option<CopyError>> = Mutex::new(None);
    let (hired, shared, failure) = (AtomicU64::new(WORKERS.min(workers)), &shared, &failure);
    std::thread::scope(|scope| {
        let crew = Crew { scope, most: workers, hired: &hired, shared, failure };
        for _ in 1..WORKERS.min(workers) {
            crew.put_one_to_work();
        }
        crew.work();
    });
    match std::mem::take(&mut *failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner())) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// The workers of a copy, and room for more.
#[derive(Clone, Copy)]
struct Crew<'scope, 'env, 'a> {
    scope: &'scope Scope<'scope, 'env>,
    most: u64,
    hired: &'env AtomicU64,
    shared: &'env Shared<'a>,
    failure: &'env Mutex<Option<CopyError>>,
}

impl Crew<'_, '_, '_> {
    fn work(self) {
        if let Err(error) = Worker::new(self.shared).run(&|| self.hire()) {
            let mut failure = self.failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // The first failure ends the others, which then report that they were cancelled.
            failure.get_or_insert(error);
            self.shared.deal().close();
        }
    }

    /// One more, if there may be one.
    fn hire(self) {
        let more = |hired: u64| (hired < self.most).then_some(hired + 1);
        if self.hired.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
            self.put_one_to_work();
        }
    }

    /// Without a thread there are fewer; whoever begins is there in any case.
    fn put_one_to_work(self) {
        let builder = std::thread::Builder::new().name("copy".to_owned());
        if let Err(error) = builder.spawn_scoped(self.scope, move || self.work()) {
            tracing::warn!(%error, "a copy has one worker less");
        }
    }
}
