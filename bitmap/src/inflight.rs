//! In-flight slots: which writes of a queue thread are on their way to the disk.
//!
//! A queue thread registers a write inside its critical section and clears the slot at the final completion, resubmitted
//! remainders included. The flip reads the slots while nobody is inside: what it finds it marks in the new generation
//! (I1) and watches. Readers of a point in time wait until the watched writes that touch their range are over (I3).

use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, lock};
use crate::units::ByteRange;
use std::fmt;
use std::sync::Arc;

const BUSY: u64 = 1;
const WATCHED: u64 = 2;
const SEQUENCE: u64 = 4;

/// One write. `state` is `sequence | WATCHED | BUSY`; the sequence grows with each registration, so that a watcher knows
/// the write it saw from the next one in the same slot.
#[repr(align(32))]
struct Slot {
    state: AtomicU64,
    start: AtomicU64,
    len: AtomicU64,
}

/// The slots of one queue thread.
pub(crate) struct Slots {
    slots: Box<[Slot]>,
}

impl Slots {
    pub(crate) fn new(count: usize) -> Self {
        let slots = (0..count)
            .map(|_| Slot { state: AtomicU64::new(0), start: AtomicU64::new(0), len: AtomicU64::new(0) })
            .collect();
        Self { slots }
    }

    pub(crate) fn count(&self) -> usize {
        self.slots.len()
    }

    /// Only inside a critical section, only by the thread whose slots these are, only into a free slot.
    #[inline]
    pub(crate) fn register(&self, slot: usize, range: ByteRange) {
        let slot = &self.slots[slot];
        let state = slot.state.load(Ordering::Relaxed);
        debug_assert_eq!(state & BUSY, 0, "a slot holds one write at a time");
        slot.start.store(range.start(), Ordering::Relaxed);
        slot.len.store(range.len(), Ordering::Relaxed);
        slot.state.store((state & !WATCHED).wrapping_add(SEQUENCE) | BUSY, Ordering::Release);
    }

    /// The write is over. Answers whether somebody watches for that.
    #[inline]
    pub(crate) fn finish(&self, slot: usize) -> bool {
        let slot = &self.slots[slot];
        // Release: whoever sees the slot free sees what the write did. One swap, since a watcher may set its mark
        // meanwhile, and either it finds the slot free or this finds the mark.
        let state = slot.state.load(Ordering::Relaxed) & !(BUSY | WATCHED);
        slot.state.swap(state, Ordering::AcqRel) & WATCHED != 0
    }

    /// Only while nobody is inside a critical section: names every write in flight and asks to be told of its end.
    fn watch(&self, mut seen: impl FnMut(usize, u64, ByteRange)) {
        for (index, slot) in self.slots.iter().enumerate() {
            let state = slot.state.load(Ordering::Acquire);
            if state & BUSY == 0 {
                continue;
            }
            let range = ByteRange::new(slot.start.load(Ordering::Relaxed), slot.len.load(Ordering::Relaxed));
            let watched = state | WATCHED;
            // It can only fail because the write ended under our eyes: then it is before the cut, and over.
            if state == watched
                || slot.state.compare_exchange(state, watched, Ordering::AcqRel, Ordering::Acquire).is_ok()
            {
                seen(index, watched, range);
            }
        }
    }

    fn in_flight(&self, seen: &mut impl FnMut(ByteRange)) {
        let busy = self.slots.iter().filter(|slot| slot.state.load(Ordering::Acquire) & BUSY != 0);
        busy.for_each(|slot| {
            seen(ByteRange::new(slot.start.load(Ordering::Relaxed), slot.len.load(Ordering::Relaxed)));
        });
    }

    fn still(&self, slot: usize, state: u64) -> bool {
        self.slots[slot].state.load(Ordering::Acquire) == state
    }
}

/// Rung when a watched write ends.
pub(crate) struct Bell {
    lock: Mutex<()>,
    rung: Condvar,
}

impl Bell {
    pub(crate) fn new() -> Self {
        Self { lock: Mutex::new(()), rung: Condvar::new() }
    }

    #[cold]
    pub(crate) fn ring(&self) {
        // The lock orders this behind a waiter's check: it either saw the end, or is waiting now.
        drop(lock(&self.lock));
        self.rung.notify_all();
    }
}

/// A write in flight at a cut.
pub(crate) struct Watched {
    lane: usize,
    slot: usize,
    state: u64,
    range: ByteRange,
}

impl Watched {
    pub(crate) fn range(&self) -> ByteRange {
        self.range
    }
}

/// All that a cut needs of one disk's lanes, shared by the tracker and the cuts that were made of it.
pub(crate) struct Lanes {
    pub(crate) slots: Box<[Slots]>,
    pub(crate) bell: Bell,
}

impl Lanes {
    /// Room for as many writes as can be in flight.
    pub(crate) fn room(&self) -> Vec<Watched> {
        Vec::with_capacity(self.slots.iter().map(Slots::count).sum())
    }

    /// Only while nobody is inside: the writes in flight, each put into `watched` and told to `mark`.
    pub(crate) fn cut(&self, watched: &mut Vec<Watched>, mut mark: impl FnMut(ByteRange)) {
        for (lane, slots) in self.slots.iter().enumerate() {
            slots.watch(|slot, state, range| {
                mark(range);
                watched.push(Watched { lane, slot, state, range });
            });
        }
    }

    /// Only while nobody is inside: the writes in flight.
    pub(crate) fn in_flight(&self, mut seen: impl FnMut(ByteRange)) {
        self.slots.iter().for_each(|slots| slots.in_flight(&mut seen));
    }

    /// What `cut` found, to be waited for.
    pub(crate) fn pre_cut(self: &Arc<Self>, watched: Vec<Watched>) -> PreCut {
        PreCut { lanes: Arc::clone(self), watched: Mutex::new(watched) }
    }
}

/// The writes that were in flight at a cut. Not acknowledged at that instant, either outcome of each belongs to the
/// point in time, but it must be decided before the point is read.
pub struct PreCut {
    lanes: Arc<Lanes>,
    watched: Mutex<Vec<Watched>>,
}

impl PreCut {
    /// Whether a write of before the cut that touches `range` is still in flight.
    pub fn pending(&self, range: ByteRange) -> bool {
        let mut watched = lock(&self.watched);
        watched.retain(|w| self.lanes.slots[w.lane].still(w.slot, w.state));
        watched.iter().any(|w| w.range.intersects(range))
    }

    /// Blocks until no write of before the cut that touches `range` is in flight. Never call it on a queue thread.
    pub fn wait(&self, range: ByteRange) {
        if !self.pending(range) {
            return;
        }
        let mut guard = lock(&self.lanes.bell.lock);
        while self.pending(range) {
            guard = self.lanes.bell.rung.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

impl fmt::Debug for PreCut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PreCut").field("watched", &lock(&self.watched).len()).finish()
    }
}
