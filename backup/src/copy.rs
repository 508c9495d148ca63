//! The copy engine: moves a point in time into a target at the target's pace.
//!
//! A few workers take chunks of the plan one after another. Each reads its chunk as of the point, finds out what of it is
//! zero, and writes. The guest is not in here at all: however slow the target, all that waits is a worker.

use crate::buffer::{AlignedBuffer, is_zero};
use crate::point::{Point, PointError};
use crate::target::Target;
use blkmark_bitmap::{Bits, ByteRange};
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Workers of a job. More does not help one disk, and each costs a buffer of `CHUNK`.
const WORKERS: usize = 4;

/// Most bytes that a worker reads at once.
const CHUNK: u64 = 1 << 20;

/// Most bytes that are asked at once whether they are a hole.
const HOLE: u64 = 1 << 30;

/// How long an error that the operator wants ignored is left alone before the same bytes are tried again.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(100);

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

struct Flow {
    cancelled: bool,
    paused: bool,
    /// Workers that wait because of `paused`.
    resting: usize,
    /// Bytes a second; 0: as fast as it goes.
    speed: u64,
    /// When the next byte may be read, under `speed`.
    next: Instant,
    done: u64,
    total: u64,
    uncopied: Option<Bits>,
}

/// How others steer a copy and see how far it is.
pub struct CopyControl {
    flow: Mutex<Flow>,
    changed: Condvar,
}

impl Default for CopyControl {
    fn default() -> Self {
        let flow = Flow {
            cancelled: false,
            paused: false,
            resting: 0,
            speed: 0,
            next: Instant::now(),
            done: 0,
            total: 0,
            uncopied: None,
        };
        Self { flow: Mutex::new(flow), changed: Condvar::new() }
    }
}

impl CopyControl {
    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn change(&self, change: impl FnOnce(&mut Flow)) {
        change(&mut self.flow());
        self.changed.notify_all();
    }

    /// Ends the copy after what is being written now.
    pub fn cancel(&self) {
        self.change(|flow| flow.cancelled = true);
    }

    /// Whether it was told to end.
    pub fn is_cancelled(&self) -> bool {
        self.flow().cancelled
    }

    /// Lets no further chunk begin.
    pub fn pause(&self) {
        self.change(|flow| flow.paused = true);
    }

    /// Goes on after a pause.
    pub fn resume(&self) {
        self.change(|flow| flow.paused = false);
    }

    /// Whether it is paused.
    pub fn is_paused(&self) -> bool {
        self.flow().paused
    }

    /// Bounds the bytes a second from now on; 0 takes the bound away.
    pub fn set_speed(&self, speed: u64) {
        self.change(|flow| {
            flow.speed = speed;
            flow.next = Instant::now();
        });
    }

    /// Bytes done and bytes in all. The total of a job that has not begun is 0.
    pub fn progress(&self) -> (u64, u64) {
        let flow = self.flow();
        (flow.done, flow.total)
    }

    /// Adds to both sides of the progress: a job whose total is not known before (sync=none).
    pub fn add_done(&self, bytes: u64) {
        let mut flow = self.flow();
        flow.done += bytes;
        flow.total += bytes;
    }

    /// The clusters of the plan that did not get to the target; all of them if the copy never began.
    pub fn uncopied(&self) -> Option<Bits> {
        self.flow().uncopied.clone()
    }

    fn begin(&self, plan: &Bits) {
        let total = plan.runs().map(ByteRange::len).sum();
        self.change(|flow| {
            flow.total = total;
            flow.uncopied = Some(plan.clone());
        });
    }

    fn done(&self, range: ByteRange) {
        let mut flow = self.flow();
        flow.done += range.len();
        if let Some(uncopied) = &mut flow.uncopied {
            uncopied.clear(range);
        }
    }

    /// Waits until `bytes` more may be copied: not paused, not over the speed. Fails if cancelled.
    pub fn admit(&self, bytes: u64) -> Result<(), CopyError> {
        let mut flow = self.flow();
        loop {
            if flow.cancelled {
                return Err(CopyError::Cancelled);
            }
            if flow.paused {
                flow.resting += 1;
                flow = self.changed.wait(flow).unwrap_or_else(|poisoned| poisoned.into_inner());
                flow.resting -= 1;
                continue;
            }
            if flow.speed == 0 {
                return Ok(());
            }
            let now = Instant::now();
            if flow.next <= now {
                let cost = Duration::from_secs_f64(bytes as f64 / flow.speed as f64);
                // Time not used is not saved up: after a pause the speed is still the speed.
                flow.next = now + cost;
                return Ok(());
            }
            let wait = flow.next - now;
            flow = self.changed.wait_timeout(flow, wait).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// Waits for `time`, or until the copy is cancelled.
    pub(crate) fn rest(&self, time: Duration) {
        let flow = self.flow();
        let resumed = self.changed.wait_timeout_while(flow, time, |flow| !flow.cancelled);
        drop(resumed.unwrap_or_else(|poisoned| poisoned.into_inner()));
    }
}

/// What is left of the plan, dealt out in chunks.
struct Deal {
    runs: std::vec::IntoIter<ByteRange>,
    rest: ByteRange,
}

impl Deal {
    fn next(&mut self, most: u64) -> Option<ByteRange> {
        if self.rest.is_empty() {
            self.rest = self.runs.next()?;
        }
        let chunk = ByteRange::new(self.rest.start(), self.rest.len().min(most));
        self.rest = ByteRange::between(chunk.end(), self.rest.end());
        Some(chunk)
    }
}

/// One copy under way.
struct Engine<'a> {
    point: &'a Point,
    target: &'a dyn Target,
    control: &'a CopyControl,
    on_error: &'a (dyn Fn(Side, &io::Error) -> Action + Sync),
    deal: Mutex<Deal>,
    /// Bytes of a chunk: whole clusters.
    chunk: u64,
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
    control.begin(plan);
    let runs: Vec<ByteRange> = plan.runs().collect();
    let deal = Mutex::new(Deal { runs: runs.into_iter(), rest: ByteRange::default() });
    let chunk = CHUNK.max(point.cluster().bytes());
    let engine = Engine { point, target, control, on_error, deal, chunk };
    let failure: Mutex<Option<CopyError>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                if let Err(error) = engine.work() {
                    let mut failure = failure.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                    // The first failure ends the others, which then report that they were cancelled.
                    failure.get_or_insert(error);
                    engine.stop_dealing();
                }
            });
        }
    });
    match failure.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner()) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

impl Engine<'_> {
    fn deal(&self) -> MutexGuard<'_, Deal> {
        self.deal.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn stop_dealing(&self) {
        let mut deal = self.deal();
        deal.rest = ByteRange::default();
        deal.runs = Vec::new().into_iter();
    }

    /// The next chunk to copy; holes at the head of the plan are passed over on the way, however large.
    fn next(&self) -> Result<Option<ByteRange>, CopyError> {
        loop {
            let Some(chunk) = self.deal().next(self.chunk) else { return Ok(None) };
            let hole = self.insist(|| self.point.take_hole(chunk).map_err(CopyError::from))?;
            if hole == 0 {
                return Ok(Some(chunk));
            }
            self.zeroes(ByteRange::new(chunk.start(), hole))?;
            if hole < chunk.len() {
                return Ok(Some(ByteRange::between(chunk.start() + hole, chunk.end())));
            }
            self.pass_hole()?;
        }
    }

    /// A whole chunk was a hole: looks how far it goes on, for it may be most of the disk.
    fn pass_hole(&self) -> Result<(), CopyError> {
        loop {
            let Some(ahead) = self.deal().next(HOLE) else { return Ok(()) };
            let hole = self.insist(|| self.point.take_hole(ahead).map_err(CopyError::from))?;
            self.zeroes(ByteRange::new(ahead.start(), hole))?;
            if hole < ahead.len() {
                let left = ByteRange::between(ahead.start() + hole, ahead.end());
                let mut deal = self.deal();
                let rest = std::mem::replace(&mut deal.rest, left);
                if !rest.is_empty() {
                    let runs = std::mem::take(&mut deal.runs);
                    deal.runs = std::iter::once(rest).chain(runs).collect::<Vec<_>>().into_iter();
                }
                return Ok(());
            }
        }
    }

    fn work(&self) -> Result<(), CopyError> {
        let mut buffer = AlignedBuffer::new(self.chunk as usize);
        loop {
            // Asked before the point is touched: what is taken from the point must get to the target.
            self.control.admit(0)?;
            let Some(chunk) = self.next()? else { return Ok(()) };
            self.control.admit(chunk.len())?;
            let data = &mut buffer[..chunk.len() as usize];
            self.insist(|| self.point.take(chunk, data).map_err(CopyError::from))?;
            self.write(chunk, data)?;
        }
    }

    fn write(&self, chunk: ByteRange, data: &[u8]) -> Result<(), CopyError> {
        let cluster = self.point.cluster().bytes() as usize;
        let mut clusters = data.chunks(cluster).map(is_zero).peekable();
        let mut at = 0;
        while let Some(zero) = clusters.next() {
            let mut end = at + cluster;
            while clusters.next_if_eq(&zero).is_some() {
                end += cluster;
            }
            let end = end.min(data.len());
            let range = ByteRange::new(chunk.start() + at as u64, (end - at) as u64);
            if zero {
                self.zeroes(range)?;
            } else {
                self.try_target(range, |target| target.write_at(&data[at..end], range.start()))?;
            }
            at = end;
        }
        Ok(())
    }

    fn zeroes(&self, range: ByteRange) -> Result<(), CopyError> {
        if range.is_empty() {
            return Ok(());
        }
        self.try_target(range, |target| {
            if target.reads_zero() { Ok(()) } else { target.write_zeroes_at(range.start(), range.len()) }
        })
    }

    fn try_target(&self, range: ByteRange, write: impl Fn(&dyn Target) -> io::Result<()>) -> Result<(), CopyError> {
        self.insist(|| write(self.target).map_err(|error| CopyError::Target { offset: range.start(), error }))?;
        self.control.done(range);
        Ok(())
    }

    /// Tries until it works or the policy gives up.
    fn insist<T>(&self, mut attempt: impl FnMut() -> Result<T, CopyError>) -> Result<T, CopyError> {
        loop {
            let error = match attempt() {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let action = match &error {
                CopyError::Point(PointError::Source { error, .. }) => (self.on_error)(Side::Source, error),
                CopyError::Target { error, .. } => (self.on_error)(Side::Target, error),
                // A broken point stays broken.
                _ => Action::Report,
            };
            match action {
                Action::Report => return Err(error),
                Action::Retry => self.control.rest(RETRY_PAUSE),
                Action::Stop => self.control.pause(),
            }
            self.control.admit(0)?;
        }
    }
}
