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
//! A point that is *kept* can be read again and again (`read`): its readers settle nothing, so every unit is saved on its
//! first overwrite, and stays in scratch until the point is dropped.

mod read;

pub use read::{PointCost, PointSource};

use crate::cbw::{CopyBeforeWrite, OnError, Saved, State};
use crate::node::Node;
use crate::pulse::Pulse;
use crate::resume::{Ledger, Loaded, Place, Plan};
use crate::scratch::{Blocks, ScratchError, ScratchFiles};
use crate::source::{BlockStatus, Source};
use blkmark_bitmap::sync::{AtomicBool, Mutex, MutexGuard, Ordering, fence, lock};
use blkmark_bitmap::{Bits, ByteRange, Frozen, Gate, Granularity, LiveMap, PreCut, Resume};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;
use thiserror::Error;

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

/// What a killed process left of a point.
#[derive(Default)]
struct Left {
    /// What was saved, until the point begins.
    index: BTreeMap<u64, Saved>,
    /// Clusters that the target holds.
    in_target: Option<Bits>,
}

/// What makes a view of a point.
struct View {
    /// Whose drop ends the point.
    of: Arc<Point>,
    /// The clusters that the reader takes; all if there is none.
    plan: Option<Bits>,
    /// Goes when the reader is done.
    lease: Mutex<Option<Box<dyn Any + Send + Sync>>>,
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
        let ledger = match cbw.scratch_name().filter(|_| options.outlive) {
            Some((haven, scratch)) => {
                let (disk, size, unit) = (haven.disk(), cbw.size(), cbw.unit());
                match Ledger::create(haven, Plan { scratch, disk, size, unit }) {
                    Ok(ledger) => Some(Arc::new(ledger)),
                    Err(error) => {
                        tracing::warn!(disk = node.id, %error, "a point in time will end with the process: no ledger");
                        None
                    }
                }
            }
            None => None,
        };
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

    /// A point that a killed process left, to be armed before the first request of the guest: `cbw` has its scratch, and `blocks`
    /// are what of that it keeps. An error: what was left contradicts itself.
    ///
    /// What the disk holds of a unit that is neither saved nor in the target is the point's value, and stays so. Every write that came
    /// after the instant was submitted only after its units were in the ledger, before and after the kill. A write that was in
    /// flight at the instant may have been in flight at the kill still: it was not acknowledged at the instant, so that any
    /// part of it may be in the image, as after a power cut; nobody has read its units, since readers wait for it; and what of it
    /// lands at all has landed, for this process has the disk's lock (`session/inflight`). Submitted again, it is a write like
    /// any other, and its units are saved first.
    pub(crate) fn restore(
        node: &Arc<Node>,
        cbw: Arc<CopyBeforeWrite>,
        wanted: Wanted,
        cluster: Granularity,
        options: PointOptions,
        loaded: Loaded,
        blocks: &Blocks,
    ) -> Result<Arc<Self>, &'static str> {
        let unit = cbw.unit();
        let units = loaded.in_target();
        let mut index = BTreeMap::new();
        for (start, place) in &loaded.saved {
            let saved = match place {
                Place::Zero => None,
                block => Some(Arc::clone(blocks.get(block).ok_or("a block of its scratch is gone")?)),
            };
            index.insert(*start, saved);
        }
        let mut missing = Bits::full(unit, cbw.size());
        missing.subtract(&units);
        let (missing, in_target) = (missing.at(cluster), units.at(cluster));
        let mut in_whole = in_target.clone();
        in_whole.subtract(&missing);
        if in_whole.dirty_bytes() != in_target.dirty_bytes() {
            return Err("its ledger knows of half a cluster");
        }
        let saved: Vec<ByteRange> =
            index.keys().map(|start| unit.range(unit.index(*start)..unit.index(*start) + 1, cbw.size())).collect();
        let ledger = cbw.scratch_name().map(|(haven, _)| Arc::new(Ledger::reopen(haven, loaded)));
        let left = Left { index, in_target: (!in_target.is_empty()).then_some(in_target) };
        let point = Self::new(node, cbw, wanted, cluster, options, ledger, left);
        saved.into_iter().chain(units.runs()).for_each(|range| point.face.settle(range));
        Ok(point)
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

    /// Where it is written down for the next process, if it is.
    pub(crate) fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.ledger.as_ref()
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
        if let Some(view) = &self.view {
            drop(lock(&view.lease).take());
            return;
        }
        self.cbw.end(self.face.key);
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

    /// Of the wanted clusters, those that a process before this one has not brought to the target yet; `None` if there was none, so
    /// that it is all of them.
    pub fn remaining(&self, clusters: &Bits) -> Option<Bits> {
        let left = lock(&self.left);
        let in_target = left.in_target.as_ref()?;
        let mut remaining = clusters.clone();
        remaining.subtract(in_target);
        Some(remaining)
    }

    /// Whether a process before this one brought some of it to a target, so that it is there alone.
    pub(crate) fn has_released(&self) -> bool {
        lock(&self.left).in_target.is_some()
    }

    /// Whether what is read has to be released, or is the reader's at once.
    fn waits_for_release(&self) -> bool {
        self.keep || self.ledger.is_some()
    }

    /// Whether [`Point::release`] does anything.
    pub fn is_released(&self) -> bool {
        self.ledger.is_some() && !self.keep
    }

    /// The target holds these ranges, which consist of whole clusters, and a killed process would take nothing of them away: what
    /// the point keeps of them goes, and the guest may write there without any more ado. Nothing for a point that is kept.
    pub fn release(&self, ranges: &[ByteRange]) {
        let Some(ledger) = self.ledger.as_ref().filter(|_| !self.keep) else { return };
        for range in ranges {
            // Before anything of it goes: whoever comes after a kill must not look for it.
            if let Err(error) = ledger.held(*range) {
                // What is kept stays kept, which costs space alone.
                tracing::error!(disk = self.node.id, %error, "the ledger of a point in time can be neither written nor removed");
                continue;
            }
            let mut gone = Vec::new();
            let mut state = self.cbw.state();
            let saving = state.saving_in(*range);
            let Some(kept) = state.points.get_mut(&self.face.key) else { return };
            let starts: Vec<u64> = kept.index.range(range.start()..range.end()).map(|(start, _)| *start).collect();
            gone.extend(starts.iter().map(|start| kept.index.remove(start)));
            // What a saver is reading, it settles itself: a write must not slip in under it.
            let mut at = range.start();
            for unit in saving {
                self.face.settle(ByteRange::between(at, unit.start()));
                at = unit.end();
            }
            self.face.settle(ByteRange::between(at, range.end()));
            drop(state);
            // Gives its space back, without the lock.
            drop(gone);
        }
    }

    /// Why the point cannot be read any more, if so.
    pub fn broken(&self) -> Option<PointError> {
        let state = self.cbw.state();
        state.points.get(&self.face.key)?.broken.clone().map(PointError::Broken)
    }

    fn wait_for_pre_cut(&self, range: ByteRange) {
        let pre_cut = lock(&self.pre_cut).clone();
        if let Some(pre_cut) = pre_cut {
            pre_cut.wait(range);
        }
    }

    fn units(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        let (unit, size) = (self.cbw.unit(), self.size());
        unit.cover(range).map(move |index| unit.range(index..index + 1, size))
    }

    /// Reads `range`, which consists of whole wanted clusters, as of the point in time. Unless the point is kept, what was
    /// read is the caller's from then on. Several readers at a time take disjoint ranges.
    pub fn take(&self, range: ByteRange, buf: &mut [u8]) -> Result<(), PointError> {
        self.wait_for_pre_cut(range);
        let mut at = range.start();
        while at < range.end() {
            // What is saved already needs no look at the disk; the rest is read in as large pieces as there are.
            let (from_scratch, end) = {
                let state = self.readable()?;
                let index = &state.points[&self.face.key].index;
                let first_saved = index.range(at..range.end()).next().map(|(start, _)| *start);
                if first_saved == Some(at) {
                    let ahead = ByteRange::between(at, range.end());
                    let gap = self.units(ahead).find(|unit| !index.contains_key(&unit.start()));
                    (true, gap.map_or(range.end(), |unit| unit.start()))
                } else {
                    (false, first_saved.unwrap_or(range.end()))
                }
            };
            let piece = ByteRange::between(at, end);
            let part = &mut buf[(at - range.start()) as usize..(end - range.start()) as usize];
            if !from_scratch {
                self.node
                    .source
                    .read_at(part, at)
                    .map_err(|error| PointError::Source { offset: at, error: Arc::new(error) })?;
            }
            for (unit, saved) in self.settle_read(piece)? {
                let part = &mut part[(unit.start() - at) as usize..(unit.end() - at) as usize];
                match &saved {
                    None => part.fill(0),
                    Some(block) => block.load(part).map_err(|error| PointError::Scratch(Arc::new(error)))?,
                }
                if !self.waits_for_release() {
                    self.forget(unit);
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Lets `carry` bring what the disk holds of `range`, which consists of whole wanted clusters, to where the caller wants it;
    /// it answers whether it has. What was carried is as of the point in time, except for the units in the answer: a guest's
    /// write may have come before they were carried, so what was carried of them is to be thrown away and taken with
    /// [`Point::take`]. `None` if nothing was carried, or nothing of it counts.
    ///
    /// The order is that of `take`, with the same argument. A write to a unit that the point needs is submitted only after the unit
    /// is in the index or settled, and only a reader of this range or a saver settles it. So if the unit is not in the index behind
    /// the carrying, nothing was written to it before that look, and the disk held its value all the time. Whether the carrier
    /// copies bytes or shares blocks makes no difference: it is over when it answers, and writes that come later do not reach what
    /// it has made.
    pub fn carry(
        &self,
        range: ByteRange,
        carry: impl FnOnce(&dyn Source) -> bool,
    ) -> Result<Option<Vec<ByteRange>>, PointError> {
        self.wait_for_pre_cut(range);
        {
            // To carry what is in scratch already is of no use.
            let state = self.readable()?;
            if state.points[&self.face.key].index.range(range.start()..range.end()).next().is_some() {
                return Ok(None);
            }
        }
        if !carry(&*self.node.source) {
            return Ok(None);
        }
        let saved = self.settle_read(range)?;
        Ok(Some(saved.into_iter().map(|(unit, _)| unit).collect()))
    }

    /// The state, if the point is whole and in the books.
    fn readable(&self) -> Result<MutexGuard<'_, State>, PointError> {
        let state = self.cbw.state();
        match state.points.get(&self.face.key) {
            Some(kept) => match &kept.broken {
                Some(broken) => Err(PointError::Broken(Arc::clone(broken))),
                None => Ok(state),
            },
            None => unreachable!("a point is read between its beginning and its drop"),
        }
    }

    /// The second look at the index, behind a read of `piece`: what is in it is answered and counts, the rest is settled,
    /// except for what a saver is reading, and unless the point is kept.
    fn settle_read(&self, piece: ByteRange) -> Result<Vec<(ByteRange, Saved)>, PointError> {
        let state = self.readable()?;
        let index = &state.points[&self.face.key].index;
        if index.range(piece.start()..piece.end()).next().is_none() && !state.is_saving(piece) {
            // The usual case: nobody has overwritten any of it, and nobody is about to.
            if !self.waits_for_release() {
                self.face.settle(piece);
            }
            return Ok(Vec::new());
        }
        let mut saved = Vec::new();
        for unit in self.units(piece) {
            match index.get(&unit.start()) {
                Some(block) => saved.push((unit, block.clone())),
                None if self.waits_for_release() || state.is_saving(unit) => {}
                None => self.face.settle(unit),
            }
        }
        Ok(saved)
    }

    fn forget(&self, unit: ByteRange) {
        let mut state = self.cbw.state();
        let block = state.points.get_mut(&self.face.key).and_then(|kept| kept.index.remove(&unit.start()));
        drop(state);
        // Gives its space back, without the lock.
        drop(block);
    }

    /// How many of the bytes of `range`, which begins at a cluster and consists of wanted ones, were a hole at the
    /// point in time: whole units from its start, taken as if they had been read. 0 if the first must be read.
    pub fn take_hole(&self, range: ByteRange) -> Result<u64, PointError> {
        self.wait_for_pre_cut(range);
        let (status, len) = self
            .node
            .source
            .block_status(range.start(), range.len())
            .map_err(|error| PointError::Source { offset: range.start(), error: Arc::new(error) })?;
        let end = (range.start() + len).min(range.end());
        // Whole clusters only, the last one of the disk counts as whole.
        let end = if end == self.size() { end } else { end & !(self.cluster.bytes() - 1) };
        if status == BlockStatus::Data || end <= range.start() {
            return Ok(0);
        }
        let state = self.readable()?;
        let hole = ByteRange::between(range.start(), end);
        let index = &state.points[&self.face.key].index;
        let saved = index.range(hole.start()..hole.end()).next().map(|(start, _)| *start);
        let end = [Some(end), saved, state.first_saving(hole)].into_iter().flatten().min().unwrap_or(end);
        let end = if end == self.size() { end } else { end & !(self.cluster.bytes() - 1) };
        if !self.waits_for_release() {
            self.face.settle(ByteRange::between(range.start(), end));
        }
        Ok(end.saturating_sub(range.start()))
    }

    /// The next unit that was saved, in order of offset, for a job that copies nothing else (sync=none). Waits until
    /// there is one; `None` once the point has ended and all are taken.
    pub fn next_saved(&self) -> Result<Option<ByteRange>, PointError> {
        let mut state = self.readable()?;
        loop {
            let kept = &state.points[&self.face.key];
            if let Some((&start, _)) = kept.index.first_key_value() {
                let unit = self.cbw.unit();
                let index = unit.index(start);
                return Ok(Some(unit.range(index..index + 1, self.size())));
            }
            if kept.ended {
                return Ok(None);
            }
            if let Some(broken) = &kept.broken {
                return Err(PointError::Broken(Arc::clone(broken)));
            }
            state = self.cbw.saved.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
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

    fn hold(&self, range: ByteRange, resume: Resume) {
        self.cbw.hold(self.face.key, range, resume);
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        match &self.view {
            // `of` does it, once the last view is gone.
            Some(view) => debug_assert_eq!(view.of.face.key, self.face.key),
            None => {
                // Before its blocks are used for something else.
                if let Some(ledger) = &self.ledger {
                    ledger.end();
                }
                self.cbw.leave(self.face.key);
            }
        }
    }
}

impl fmt::Debug for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Point").field("node", &self.node.id).field("key", &self.face.key).finish_non_exhaustive()
    }
}

/// What the copy engine asks besides.
impl Point {
    /// What the disk says of the beginning of `range` at this moment: a hint on how to go about it, no more.
    pub fn status(&self, range: ByteRange) -> io::Result<(BlockStatus, u64)> {
        self.node.source.block_status(range.start(), range.len())
    }

    /// How the guest of the disk fares.
    pub fn pulse(&self) -> Option<&Pulse> {
        self.node.source.pulse()
    }
}
