//! One disk's marking: what the write path passes on every write, and where the named bitmaps stand.
//!
//! Two sides meet here. Queue threads own a [`Lane`] each and pass `Hot` through admission: gates, live map, in-flight
//! slot. Control operations own the named bitmaps, and the disk's store, behind a mutex that no queue thread ever takes, and
//! change `Hot` only while all lanes are held out (`flip`).

use crate::admission::{Admission, Pass, Section};
use crate::bits::Bits;
use crate::gate::Gate;
use crate::inflight::{Bell, Lanes, Slots};
use crate::live::LiveMap;
use crate::named::{BitmapError, BitmapInfo, Draft, Frozen};
use crate::store::heat::Heat;
use crate::store::keeper::{Keeper, Opened};
use crate::store::{Before, Place, StoreError};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};
use crate::units::ByteRange;
use std::fmt;
use std::sync::Arc;

/// What a critical section sees. Replaced in parts by a flip, never while a lane is inside.
pub(crate) struct Hot {
    pub(crate) live: Option<Arc<LiveMap>>,
    pub(crate) gates: Vec<Arc<dyn Gate>>,
    /// There while a bitmap of the store records.
    pub(crate) heat: Option<Arc<Heat>>,
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
    /// Who writes them to the disk's store, if it may have one.
    pub(crate) keeper: Option<Keeper>,
}

/// What queries see: what is in force and, where there is a store, durable. A mutex of its own, so that nobody who asks waits
/// for a disk.
pub(crate) struct View {
    pub(crate) bitmaps: Draft,
    pub(crate) live: Option<Arc<LiveMap>>,
}

/// The dirty tracking of one disk.
pub struct Tracker {
    /// Bytes of the disk, written by a commit alone.
    pub(crate) size: AtomicU64,
    pub(crate) admission: Admission<Hot>,
    pub(crate) lanes: Arc<Lanes>,
    pub(crate) control: Mutex<Control>,
    pub(crate) view: Mutex<View>,
    /// Of the store, if there may be one.
    pub(crate) heat: Option<Arc<Heat>>,
    /// What works for it.
    pub(crate) threads: std::sync::Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Tracker {
    /// For a disk of `size` bytes that `lanes` queue threads write to, each with up to `slots` writes in flight. Its bitmaps
    /// end with the process.
    pub fn new(size: u64, lanes: usize, slots: usize) -> Arc<Self> {
        Self::with(size, lanes, slots, None)
    }

    /// The same, for the disk that `place` tells of, with the bitmaps that its store has.
    pub fn open(place: Place, lanes: usize, slots: usize) -> Arc<Self> {
        let size = place.disk.size;
        let tracker = Self::with(size, lanes, slots, Some(Keeper::open(place)));
        #[cfg(not(any(loom, shuttle)))]
        tracker.employ();
        tracker
    }

    /// The same, with nobody at work for it but who calls [`Tracker::serve_store`] and [`Tracker::cool`]: for crash tests.
    pub fn open_idle(place: Place, lanes: usize, slots: usize) -> Arc<Self> {
        let size = place.disk.size;
        Self::with(size, lanes, slots, Some(Keeper::open(place)))
    }

    fn with(size: u64, lanes: usize, slots: usize, opened: Option<Opened>) -> Arc<Self> {
        let (bitmaps, generation, live, keeper) = match opened {
            Some(Opened { keeper, draft, generation, live }) => (draft, generation, live, Some(keeper)),
            None => (Draft::new(size), 0, None, None),
        };
        let heat = keeper.as_ref().map(|keeper| Arc::clone(&keeper.heat));
        let hot_heat = heat.clone().filter(|_| live.is_some());
        let view = View { bitmaps: bitmaps.clone(), live: live.clone() };
        Arc::new(Self {
            size: AtomicU64::new(size),
            admission: Admission::new(Hot { live: live.clone(), gates: Vec::new(), heat: hot_heat, size }, lanes),
            lanes: Arc::new(Lanes { slots: (0..lanes).map(|_| Slots::new(slots)).collect(), bell: Bell::new() }),
            control: Mutex::new(Control { generation, live, gates: Vec::new(), bitmaps, keeper }),
            view: Mutex::new(view),
            heat,
            threads: std::sync::Mutex::default(),
        })
    }

    /// Whether persistent bitmaps can be had, and if not, why.
    pub fn persistence(&self) -> Result<(), StoreError> {
        match &lock(&self.control).keeper {
            Some(keeper) => keeper.is_usable(),
            None => Err(no_store()),
        }
    }

    /// What the process before left in the store; `None` where there is none.
    pub fn before(&self) -> Option<Before> {
        lock(&self.control).keeper.as_ref().map(|keeper| keeper.before)
    }

    /// The run that this process is in the store; `None` where there is none.
    pub fn run(&self) -> Option<uuid::Uuid> {
        lock(&self.control).keeper.as_ref().map(Keeper::run)
    }

    /// What is frozen of a bitmap, if it is in this freeze: for a job that goes on after the process before it.
    pub fn frozen(&self, name: &str, freeze: uuid::Uuid) -> Option<Frozen> {
        self.draft().0.frozen_in(name, freeze)
    }

    /// Whether there may be a store at all.
    pub fn has_store(&self) -> bool {
        self.heat.is_some()
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
        let (draft, live) = self.draft();
        draft.info(live.as_ref())
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
        let view = lock(&self.view);
        (view.bitmaps.clone(), view.live.clone())
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

/// Why a bitmap cannot be persistent where there is no store.
pub(crate) fn no_store() -> StoreError {
    StoreError::Off("This disk has no bitmap store (bitmaps=off): only bitmaps with 'persistent': false".to_owned())
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
    /// Asks every gate, sees that the extent is hot, marks the live generation, registers the write in `slot`, which must be free.
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
            if let Some(heat) = &hot.heat
                && !heat.admits(range)
            {
                return Admitted::Held(Arc::clone(heat) as _);
            }
            if let Some(live) = &hot.live {
                live.mark(range);
            }
            self.slots.register(slot, range);
            Admitted::Go
        })
    }
}
