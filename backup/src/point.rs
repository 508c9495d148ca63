//! A point in time of a disk: a gate on its write path, and a reader that gives the disk as of one instant, however much
//! the guest writes meanwhile. What the guest overwrites is kept by `cbw`.
//!
//! **Invariant I3.** A cluster's value cannot be read until its pre-cut writes have finished; it never changes afterwards;
//! and it is saved and indexed before any later write to it is submitted.
//!
//! Each wanted unit is *open* until it is *settled*, in one of two ways: a saver kept it in scratch (data, then index, then
//! settled), or the reader took it from the disk and the point need not keep it. The gate admits a write only to units that
//! are settled or not wanted. The reader's order is disk, then index: a hit in the index means that a write may have
//! come meanwhile, so what was read is dropped and scratch counts. Both decide under one lock, and the reader leaves a
//! unit open that a saver is just reading, for else a write could slip in under the saver's read.
//!
//! Where a point outlives the process (`resume`), *settled* means in a ledger besides: what a reader has taken is open until the
//! reader says that the target holds it.
//!
//! A point that is *kept* can be read again and again: its readers settle nothing, so every unit is saved on its first overwrite,
//! and stays in scratch until the point is dropped.
//!
//! Rooms: `take` (a job reads it), `read` (others do, as if it were a disk), `view` (a job reads one that belongs to somebody else),
//! `outlive` (what the process after this one needs to go on).

mod outlive;
mod read;
mod take;
mod view;

pub use read::{PointCost, PointSource};

use crate::cbw::{CopyBeforeWrite, OnError};
use crate::node::Node;
use crate::resume::Ledger;
use crate::scratch::{ScratchError, ScratchFiles};
use blkmark_bitmap::sync::{AtomicBool, Mutex, Ordering, fence, lock};
use blkmark_bitmap::{Bits, ByteRange, Frozen, Gate, Granularity, LiveMap, PreCut, Resume};
use outlive::Left;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};
use thiserror::Error;
use view::View;

/// What a point in time has to be able to give back.
#[derive(Debug)]
pub enum Wanted {
    /// The whole disk.
    All,
    /// What a bitmap held at its freeze.
    Frozen(Frozen),
}

/// How a point behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PointOptions {
    /// Whether it can be read more than once.
    pub keep: bool,
    /// What happens when old data cannot be kept.
    pub on_error: OnError,
    /// How long a guest write may be held; `None`: for ever.
    pub timeout: Option<Duration>,
    /// Whether another process can go on with it if this one is killed, where the disk has a place for that. What a reader takes
    /// is kept until the reader says that it is elsewhere ([`Point::release`]).
    pub outlive: bool,
}

impl Default for PointOptions {
    fn default() -> Self {
        Self { keep: false, on_error: OnError::BreakSnapshot, timeout: Some(Duration::from_secs(10)), outlive: false }
    }
}

/// Why a point in time cannot be read (any more).
#[derive(Debug, Clone, Error)]
pub enum PointError {
    /// The disk could not be read.
    #[error("could not read the disk at {offset:#x}: {error}")]
    Source {
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        error: Arc<io::Error>,
    },
    /// Old data could not be kept, so the guest's write went ahead without the point.
    #[error("the point in time is broken: {0}")]
    Broken(Arc<ScratchError>),
    /// What was kept could not be read back.
    #[error("could not read back what was kept: {0}")]
    Scratch(Arc<ScratchError>),
}

/// What the gate needs, and what the savers need of it.
pub(crate) struct Face {
    pub(crate) key: u64,
    wanted: Wanted,
    settled: LiveMap,
    /// The same as `Kept::broken.is_some()`, for the critical section.
    pub(crate) broken: AtomicBool,
    pub(crate) on_error: OnError,
    pub(crate) timeout: Option<Duration>,
}

impl Face {
    fn is_wanted(&self, range: ByteRange) -> bool {
        match &self.wanted {
            Wanted::All => true,
            Wanted::Frozen(frozen) => frozen.any(range),
        }
    }

    /// Whether the point still needs what the disk holds in this unit.
    pub(crate) fn is_open(&self, unit: ByteRange) -> bool {
        !self.settled.all(unit) && self.is_wanted(unit)
    }

    /// The point does not need what the disk holds in `range` any more.
    pub(crate) fn settle(&self, range: ByteRange) {
        // Pairs with the fence in `admits`: who finds it settled sees what was done before.
        fence(Ordering::Release);
        self.settled.mark(range);
    }
}

/// A frozen point in time, armed as a gate.
pub struct Point {
    node: Arc<Node>,
    cbw: Arc<CopyBeforeWrite>,
    face: Arc<Face>,
    cluster: Granularity,
    keep: bool,
    /// Where it is written down for the next process.
    ledger: Option<Arc<Ledger>>,
    /// Of a point that a killed process left.
    left: Mutex<Left>,
    pre_cut: Mutex<Option<Arc<PreCut>>>,
    /// There if this is a reader's way to a point that belongs to somebody else.
    view: Option<View>,
}

/// Points are told apart by number, which is never used again.
static NEXT_KEY: AtomicU64 = AtomicU64::new(0);

impl Point {
    /// Makes ready what a commit then arms: everything that can fail happens here. Readers take whole clusters. Makes scratch,
    /// so it may take as long as the file system likes; where others would wait for that, see [`Point::prepare_with`].
    pub fn prepare(
        node: &Arc<Node>,
        wanted: Wanted,
        cluster: Granularity,
        options: PointOptions,
    ) -> io::Result<Arc<Self>> {
        Self::prepare_with(node, &mut Some(node.open_scratch()?), wanted, cluster, options)
    }

    /// [`Point::prepare`] without a call to a file system. `scratch` is from [`Node::open_scratch`]; it is left to the caller if
    /// the disk has one already.
    pub fn prepare_with(
        node: &Arc<Node>,
        scratch: &mut Option<ScratchFiles>,
        wanted: Wanted,
        cluster: Granularity,
        options: PointOptions,
    ) -> io::Result<Arc<Self>> {
        let cbw = node.copy_before_write(scratch, cluster)?;
        let ledger = options.outlive.then(|| outlive::new_ledger(node, &cbw)).flatten();
        Ok(Self::new(node, cbw, wanted, cluster, options, ledger, Left::default()))
    }

    fn new(
        node: &Arc<Node>,
        cbw: Arc<CopyBeforeWrite>,
        wanted: Wanted,
        cluster: Granularity,
        options: PointOptions,
        ledger: Option<Arc<Ledger>>,
        left: Left,
    ) -> Arc<Self> {
        let face = Face {
            key: NEXT_KEY.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            wanted,
            settled: LiveMap::new(cbw.unit(), node.tracker.size()),
            broken: AtomicBool::new(false),
            on_error: options.on_error,
            timeout: options.timeout,
        };
        Arc::new(Self {
            node: Arc::clone(node),
            cbw,
            face: Arc::new(face),
            cluster,
            keep: options.keep,
            ledger,
            left: Mutex::new(left),
            pre_cut: Mutex::new(None),
            view: None,
        })
    }

    /// What it has to be able to give back.
    pub(crate) fn wanted(&self) -> &Wanted {
        &self.face.wanted
    }

    /// How it behaves.
    pub(crate) fn options(&self) -> PointOptions {
        let (on_error, timeout) = (self.face.on_error, self.face.timeout);
        PointOptions { keep: self.keep, on_error, timeout, outlive: self.ledger.is_some() }
    }

    /// As a gate, to arm and to disarm.
    pub fn gate(self: &Arc<Self>) -> Arc<dyn Gate> {
        Arc::clone(self) as Arc<dyn Gate>
    }

    /// The commit that armed it succeeded: `pre_cut` is what it left in flight. Reading may begin.
    pub fn begin(&self, pre_cut: Arc<PreCut>) {
        *lock(&self.pre_cut) = Some(Arc::clone(&pre_cut));
        let index = std::mem::take(&mut lock(&self.left).index);
        self.cbw.enter(Arc::clone(&self.face), pre_cut, self.ledger.clone(), index);
    }

    /// It is disarmed: lets go of whatever is still held. What is kept goes with the last reader.
    pub fn end(&self) {
        match &self.view {
            Some(view) => view.end(),
            None => self.cbw.end(self.face.key),
        }
    }

    /// The unit that readers take.
    pub fn cluster(&self) -> Granularity {
        self.cluster
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.node.tracker.size()
    }

    /// Whether it can be read again.
    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// The disk's copy-before-write, for those who watch it.
    pub fn copy_before_write(&self) -> &Arc<CopyBeforeWrite> {
        &self.cbw
    }

    /// All wanted clusters; to be asked after the commit.
    pub fn clusters(&self) -> Bits {
        if let Some(plan) = self.view.as_ref().and_then(|view| view.plan.as_ref()) {
            return plan.at(self.cluster);
        }
        match &self.face.wanted {
            Wanted::All => Bits::full(self.cluster, self.size()),
            Wanted::Frozen(frozen) => frozen.bits().into_at(self.cluster),
        }
    }

    /// Why the point cannot be read any more, if so.
    pub fn broken(&self) -> Option<PointError> {
        let state = self.cbw.state();
        state.points.get(&self.face.key)?.broken.clone().map(PointError::Broken)
    }
}

impl Gate for Point {
    fn admits(&self, range: ByteRange) -> bool {
        if self.face.broken.load(Ordering::Acquire) {
            return true;
        }
        let admitted = self.face.settled.all(range) || self.units(range).all(|unit| !self.face.is_open(unit));
        fence(Ordering::Acquire);
        admitted
    }

    fn hold(&self, range: ByteRange, since: Instant, resume: Resume) {
        self.cbw.hold(self.face.key, range, since, resume);
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        // Before its blocks are used for something else.
        if let Some(ledger) = &self.ledger {
            ledger.end();
        }
        match &self.view {
            // `of` does it, once the last view is gone.
            Some(view) => debug_assert_eq!(view.of.face.key, self.face.key),
            None => self.cbw.leave(self.face.key),
        }
    }
}

impl fmt::Debug for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Point").field("node", &self.node.id).field("key", &self.face.key).finish_non_exhaustive()
    }
}
