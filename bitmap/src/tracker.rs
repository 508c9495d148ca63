//! One disk's marking: what the write path passes on every write, and where the named bitmaps stand.
//!
//! Two sides meet here. Queue threads own a [`Lane`] each and pass `Hot` through admission: gates, live map, in-flight
//! slot. Control operations own the named bitmaps behind a mutex that no queue thread ever takes, and change `Hot` only
//! while all lanes are held out (`flip`).

use crate::admission::{Admission, Pass, Section};
use crate::bits::Bits;
use crate::gate::Gate;
use crate::inflight::{Bell, Lanes, Slots};
use crate::live::LiveMap;
use crate::named::{BitmapError, BitmapInfo, Draft};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::units::ByteRange;
use std::fmt;
use std::sync::Arc;

/// What a critical section sees. Replaced in parts by a flip, never while a lane is inside.
pub(crate) struct Hot {
    pub(crate) live: Option<Arc<LiveMap>>,
    pub(crate) gates: Vec<Arc<dyn Gate>>,
    /// Bytes of the disk: no change goes beyond it.
    pub(crate) size: u64,
}

/// What only control operations touch.
pub(crate) struct Control {
    /// Number of the generation being written; never reused.
    pub(crate) generation: u64,
    /// The same map as in `Hot`, readable without holding anybody.
    pub(crate) live: Option<Arc<LiveMap>>,
    /// Likewise.
    pub(crate) gates: Vec<Arc<dyn Gate>>,
    pub(crate) bitmaps: Draft,
}

/// The dirty tracking of one disk.
pub struct Tracker {
    /// Bytes of the disk, written by a commit alone.
    pub(crate) size: AtomicU64,
    pub(crate) admission: Admission<Hot>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) control: Mutex<Control>,
}

impl Tracker {
    /// For a disk of `size` bytes that `lanes` queue threads write to, each with up to `slots` writes in flight.
    pub fn new(size: u64, lanes: usize, slots: usize) -> Arc<Self> {
        Arc::new(Self {
            size: AtomicU64::new(size),
            admission: Admission::new(Hot { live: None, gates: Vec::new(), size }, lanes),
            lanes: Arc::new(Lanes { slots: (0..lanes).map(|_| Slots::new(slots)).collect(), bell: Bell::new() }),
            control: Mutex::new(Control { generation: 0, live: None, gates: Vec::new(), bitmaps: Draft::new(size) }),
        })
    }

    /// Bytes of the disk, which only a commit of a draft of another size changes.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The lane of queue thread `index`; `None` if there is no such lane or its last owner still has it.
    pub fn lane(self: &Arc<Self>, index: usize) -> Option<Lane> {
        let pass = self.admission.take_pass(index)?;
        Some(Lane { tracker: Arc::clone(self), index, pass: Some(pass) })
    }

    /// All bitmaps in the order in which they were added.
    pub fn list(&self) -> Vec<BitmapInfo> {
        let control = lock(&self.control);
        control.bitmaps.info(control.live.as_ref())
    }

    /// The dirty bits of a bitmap as they stand; of the frozen set while there is one.
    pub fn bits(&self, name: &str) -> Result<Bits, BitmapError> {
        let (draft, live) = self.draft();
        draft.bits(name, live.as_ref())
    }

    /// A bitmap and its bits, of one moment; of the frozen set while there is one.
    pub fn look(&self, name: &str) -> Result<(BitmapInfo, Bits), BitmapError> {
        let (draft, live) = self.draft();
        draft.look(name, live.as_ref())
    }

    /// All that stands, and the generation that is being written, to look at with no lock held.
    pub(crate) fn draft(&self) -> (Draft, Option<Arc<LiveMap>>) {
        let control = lock(&self.control);
        (control.bitmaps.clone(), control.live.clone())
    }

    /// Number of the generation being written.
    pub fn generation(&self) -> u64 {
        lock(&self.control).generation
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker").field("size", &self.size()).finish_non_exhaustive()
    }
}

/// What became of a write that asked to go.
pub enum Admitted {
    /// It is marked and registered: submit it, and call [`Lane::finish`] at its final completion.
    Go,
    /// A gate holds it. Outside of the section, call [`Gate::hold`] and, when resumed, admit it again from the start.
    Held(Arc<dyn Gate>),
    /// It goes beyond the end of the disk, which has become smaller since it was asked for.
    Beyond,
}

/// One queue thread's way through the tracker.
pub struct Lane {
    tracker: Arc<Tracker>,
    index: usize,
    /// There until `drop` gives it back.
    pass: Option<Pass>,
}

/// A critical section of a lane: one a batch. No system call, no wait, no allocation belongs in it.
pub struct Passage<'a> {
    section: Section<'a, Hot>,
    slots: &'a Slots,
}

impl Lane {
    /// Writes that may be in flight at once; slots are numbered below this.
    pub fn slots(&self) -> usize {
        self.tracker.lanes.slots[self.index].count()
    }

    /// Enters the critical section, after a flip that is under way.
    #[inline]
    pub fn enter(&mut self) -> Passage<'_> {
        let Some(pass) = &mut self.pass else { unreachable!("a lane has its pass until it is dropped") };
        Passage { section: self.tracker.admission.enter(pass), slots: &self.tracker.lanes.slots[self.index] }
    }

    /// The write in `slot` had its final result, good or bad.
    #[inline]
    pub fn finish(&mut self, slot: usize) {
        if self.tracker.lanes.slots[self.index].finish(slot) {
            self.tracker.lanes.bell.ring();
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let Some(pass) = self.pass.take() {
            self.tracker.admission.return_pass(pass);
        }
    }
}

impl Passage<'_> {
    /// Asks every gate, marks the live generation, registers the write in `slot`, which must be free.
    ///
    /// I1: the mark stands in the generation that is live now, and a flip finds the slot from the moment this section
    /// ends, so no generation that the write overlaps is without its mark.
    #[inline]
    pub fn admit(&self, slot: usize, range: ByteRange) -> Admitted {
        self.section.with(|hot| {
            if range.end() > hot.size {
                return Admitted::Beyond;
            }
            for gate in &hot.gates {
                if !gate.admits(range) {
                    return Admitted::Held(Arc::clone(gate));
                }
            }
            if let Some(live) = &hot.live {
                live.mark(range);
            }
            self.slots.register(slot, range);
            Admitted::Go
        })
    }
}
