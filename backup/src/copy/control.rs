//! How others steer a copy and see how far it is: cancel, pause, speed, progress.
//!
//! One lock, taken by the workers once a batch, by commands and queries whenever they like. Nothing blocks under it but
//! the waiting that it is for.

use super::CopyError;
use blkmark_bitmap::{Bits, ByteRange};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

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
    /// What the guest's latency is to stay below, in microseconds; 0: whatever.
    guest_latency: AtomicU64,
    /// Whether the target may take blocks from the disk.
    sharing: AtomicBool,
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
        Self {
            flow: Mutex::new(flow),
            changed: Condvar::new(),
            guest_latency: AtomicU64::new(0),
            sharing: AtomicBool::new(false),
        }
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

    /// Bounds the guest's latency from now on, as far as the copy can; zero takes the bound away.
    pub fn set_guest_latency(&self, limit: Duration) {
        self.guest_latency.store(u64::try_from(limit.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What the guest's latency is to stay below; zero: whatever.
    pub fn guest_latency(&self) -> Duration {
        Duration::from_micros(self.guest_latency.load(Ordering::Relaxed))
    }

    /// Whether a target may take what it needs from the disk's file, where it can, instead of being sent it.
    pub fn set_sharing(&self, sharing: bool) {
        self.sharing.store(sharing, Ordering::Relaxed);
    }

    pub(super) fn is_sharing(&self) -> bool {
        self.sharing.load(Ordering::Relaxed)
    }

    /// So many bytes there are to be done, by whoever keeps no account of which they are.
    pub(crate) fn expect(&self, total: u64) {
        self.change(|flow| flow.total = total);
    }

    pub(super) fn begin(&self, plan: &Bits, total: u64) {
        self.change(|flow| {
            flow.total = total;
            // Unlike a clone it leaves alone the memory of what is not in the plan.
            flow.uncopied = Some(plan.at(plan.granularity()));
        });
    }

    /// These are in the target, or need not be.
    pub(crate) fn done(&self, ranges: &[ByteRange]) {
        let mut flow = self.flow();
        flow.done += ranges.iter().map(|range| range.len()).sum::<u64>();
        if let Some(uncopied) = &mut flow.uncopied {
            for range in ranges {
                uncopied.clear(*range);
            }
        }
    }

    /// Waits until `bytes` more may be copied: not paused, not over the speed. Fails if cancelled. Answers the speed.
    pub fn admit(&self, bytes: u64) -> Result<u64, CopyError> {
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
                return Ok(0);
            }
            let now = Instant::now();
            if flow.next <= now {
                let cost = Duration::from_secs_f64(bytes as f64 / flow.speed as f64);
                // Time not used is not saved up: after a pause the speed is still the speed.
                flow.next = now + cost;
                return Ok(flow.speed);
            }
            let wait = flow.next - now;
            flow = self.changed.wait_timeout(flow, wait).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// Leaves things alone for `time`, or until cancelled.
    pub(crate) fn rest(&self, time: Duration) {
        let flow = self.flow();
        let resumed = self.changed.wait_timeout_while(flow, time, |flow| !flow.cancelled);
        drop(resumed.unwrap_or_else(|poisoned| poisoned.into_inner()));
    }
}
