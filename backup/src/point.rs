//! A point in time of a node: a gate on its write path, scratch behind it, and a reader that gives the disk as of one
//! instant, however much the guest writes meanwhile.
//!
//! **Invariant I3.** A cluster's value cannot be read until its pre-cut writes have finished; it never changes afterwards;
//! and it is saved and indexed before any later write to it is submitted.
//!
//! Each wanted cluster is *open* until it is *settled*, in one of two ways: the saver kept it in scratch (data, then index,
//! then settled), or the reader took it from the disk and needs it no more. The gate admits a write only to clusters that
//! are settled or not wanted. The reader's order is disk, then index: a hit in the index means that a write may have
//! come meanwhile, so what was read is dropped and scratch counts. Both decide under one lock, and the reader leaves a
//! cluster open that the saver is just reading, for else a write could slip in under the saver's read.
//!
//! The guest waits for one local read and one local write at most, never for the reader or its target. If old data cannot
//! be kept, the point breaks: that is noted before the write is let go, and readers look for it after they have read.

use crate::buffer::{AlignedBuffer, is_zero};
use crate::node::Node;
use crate::scratch::{Scratch, ScratchError, Slot};
use crate::source::BlockStatus;
use blkmark_bitmap::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering, fence, lock};
use blkmark_bitmap::{Bits, ByteRange, Frozen, Gate, Granularity, LiveMap, PreCut, Resume};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// What a point in time has to be able to give back.
#[derive(Debug)]
pub enum Wanted {
    /// The whole disk.
    All,
    /// What a bitmap held at its freeze.
    Frozen(Frozen),
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
    #[error("could not read scratch: {0}")]
    Scratch(Arc<io::Error>),
}

/// A saved cluster: its place in scratch, or none if it is all zero.
type Saved = Option<Slot>;

struct Held {
    range: ByteRange,
    resume: Resume,
}

#[derive(Default)]
struct State {
    held: VecDeque<Held>,
    /// What the saver is reading from the disk at this moment.
    saving: ByteRange,
    index: BTreeMap<u64, Saved>,
    broken: Option<Arc<ScratchError>>,
    ended: bool,
}

/// A frozen point in time, armed as a gate.
pub struct Point {
    node: Arc<Node>,
    wanted: Wanted,
    cluster: Granularity,
    settled: LiveMap,
    scratch: Scratch,
    pre_cut: Mutex<Option<Arc<PreCut>>>,
    /// The same as `state.broken.is_some()`, for the critical section.
    broken: AtomicBool,
    state: Mutex<State>,
    /// Something for the saver, or the beginning, or the end.
    work: Condvar,
    /// A cluster was saved, or the end.
    saved: Condvar,
}

impl Point {
    /// Makes ready what a commit then arms: everything that can fail happens here. `cluster` is the unit of saving.
    pub fn prepare(node: &Arc<Node>, wanted: Wanted, cluster: Granularity) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            node: Arc::clone(node),
            wanted,
            cluster,
            settled: LiveMap::new(cluster, node.tracker.size()),
            scratch: Scratch::create(&node.scratch, cluster.bytes())?,
            pre_cut: Mutex::new(None),
            broken: AtomicBool::new(false),
            state: Mutex::new(State::default()),
            work: Condvar::new(),
            saved: Condvar::new(),
        }))
    }

    /// As a gate, to arm and to disarm.
    pub fn gate(self: &Arc<Self>) -> Arc<dyn Gate> {
        Arc::clone(self) as Arc<dyn Gate>
    }

    /// The commit that armed it succeeded: `pre_cut` is what it left in flight. Starts the saver; reading may begin.
    pub fn begin(self: &Arc<Self>, pre_cut: Arc<PreCut>) -> io::Result<()> {
        self.attach(pre_cut);
        let point = Arc::clone(self);
        match std::thread::Builder::new().name(format!("save-{}", self.node.id)).spawn(move || point.serve()) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.give_up(&mut lock(&self.state), ScratchError::Io(io::Error::new(error.kind(), error.to_string())));
                Err(error)
            }
        }
    }

    /// As [`Point::begin`], without a thread: the caller runs [`Point::save_one`] itself.
    pub fn attach(&self, pre_cut: Arc<PreCut>) {
        *lock(&self.pre_cut) = Some(pre_cut);
    }

    /// It is disarmed: lets go whatever is still held, ends the saver. Scratch goes with the last reader.
    pub fn end(&self) {
        let mut state = lock(&self.state);
        state.ended = true;
        let held = std::mem::take(&mut state.held);
        drop(state);
        self.work.notify_all();
        self.saved.notify_all();
        for write in held {
            (write.resume)();
        }
    }

    /// The unit of saving.
    pub fn cluster(&self) -> Granularity {
        self.cluster
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.node.tracker.size()
    }

    /// All wanted clusters; to be asked after the commit.
    pub fn clusters(&self) -> Bits {
        match &self.wanted {
            Wanted::All => Bits::full(self.cluster, self.size()),
            Wanted::Frozen(frozen) => frozen.bits().at(self.cluster),
        }
    }

    /// Why the point cannot be read any more, if so.
    pub fn broken(&self) -> Option<PointError> {
        lock(&self.state).broken.clone().map(PointError::Broken)
    }

    /// Bytes of scratch in use, and guest writes being held.
    pub fn load(&self) -> (u64, usize) {
        (self.scratch.used(), lock(&self.state).held.len())
    }

    fn whole(&self, range: ByteRange) -> ByteRange {
        self.cluster.range(self.cluster.cover(range), self.size())
    }

    fn parts(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        let (cluster, size) = (self.cluster, self.size());
        cluster.cover(range).map(move |index| cluster.range(index..index + 1, size))
    }

    fn is_wanted(&self, range: ByteRange) -> bool {
        match &self.wanted {
            Wanted::All => true,
            Wanted::Frozen(frozen) => frozen.any(range),
        }
    }

    fn is_open(&self, cluster: ByteRange) -> bool {
        !self.settled.all(cluster) && self.is_wanted(cluster)
    }

    fn settle(&self, range: ByteRange) {
        // Pairs with the fence in `admits`: who finds it settled sees what was done before.
        fence(Ordering::Release);
        self.settled.mark(range);
    }

    fn give_up(&self, state: &mut State, error: ScratchError) {
        tracing::error!(node = self.node.id, %error, "point in time broken; the guest goes on");
        state.broken.get_or_insert_with(|| Arc::new(error));
        self.broken.store(true, Ordering::Release);
    }

    fn wait_for_pre_cut(&self, range: ByteRange) {
        let pre_cut = lock(&self.pre_cut).clone();
        if let Some(pre_cut) = pre_cut {
            pre_cut.wait(range);
        }
    }

    // ---- the saver: old data of clusters that a held write is about to change

    fn serve(&self) {
        let mut buffer = AlignedBuffer::new(self.cluster.bytes() as usize);
        loop {
            let mut state = lock(&self.state);
            while state.held.is_empty() && !state.ended {
                state = self.work.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            if state.ended {
                return;
            }
            drop(state);
            self.save_one(&mut buffer);
        }
    }

    /// Makes the oldest held write admissible and lets it go. `buffer` has room for a cluster. Answers whether there
    /// was one.
    pub fn save_one(&self, buffer: &mut [u8]) -> bool {
        let Some(write) = lock(&self.state).held.pop_front() else { return false };
        for cluster in self.parts(write.range) {
            if self.broken.load(Ordering::Acquire) {
                break;
            }
            if let Err(error) = self.save(cluster, buffer) {
                self.give_up(&mut lock(&self.state), error);
            }
        }
        (write.resume)();
        true
    }

    fn save(&self, cluster: ByteRange, buffer: &mut [u8]) -> Result<(), ScratchError> {
        {
            let mut state = lock(&self.state);
            if !self.is_open(cluster) {
                return Ok(());
            }
            state.saving = cluster;
        }
        let result = self.keep(cluster, &mut buffer[..cluster.len() as usize]);
        let mut state = lock(&self.state);
        state.saving = ByteRange::default();
        state.index.insert(cluster.start(), result?);
        self.settle(cluster);
        drop(state);
        self.saved.notify_all();
        Ok(())
    }

    fn keep(&self, cluster: ByteRange, data: &mut [u8]) -> Result<Saved, ScratchError> {
        self.wait_for_pre_cut(cluster);
        self.node.source.read_at(data, cluster.start())?;
        if is_zero(data) { Ok(None) } else { self.scratch.save(data).map(Some) }
    }

    // ---- the reader: one at a time for a cluster; a job's workers read disjoint ranges

    /// Reads `range`, which consists of whole wanted clusters, as of the point in time, and settles it: what was read
    /// is the caller's, the point does not keep it.
    pub fn take(&self, range: ByteRange, buf: &mut [u8]) -> Result<(), PointError> {
        debug_assert_eq!(range, self.whole(range));
        self.wait_for_pre_cut(range);
        let mut at = range.start();
        while at < range.end() {
            // Clusters saved already need no look at the disk; the rest is read in as large pieces as there are.
            let (from_scratch, end) = {
                let state = lock(&self.state);
                let saved = state.index.contains_key(&at);
                let differs = |cluster: &ByteRange| state.index.contains_key(&cluster.start()) != saved;
                let end =
                    self.parts(ByteRange::between(at, range.end())).find(differs).map_or(range.end(), |c| c.start());
                (saved, end)
            };
            let piece = ByteRange::between(at, end);
            if !from_scratch {
                let part = &mut buf[(at - range.start()) as usize..(end - range.start()) as usize];
                self.node
                    .source
                    .read_at(part, at)
                    .map_err(|error| PointError::Source { offset: at, error: Arc::new(error) })?;
            }
            let mut saved = Vec::new();
            self.settle_read(&mut self.readable()?, piece, &mut saved);
            for (cluster, slot) in saved {
                let part =
                    &mut buf[(cluster.start() - range.start()) as usize..(cluster.end() - range.start()) as usize];
                match slot {
                    None => part.fill(0),
                    Some(slot) => {
                        self.scratch.load(slot, part).map_err(|error| PointError::Scratch(Arc::new(error)))?;
                    }
                }
                self.forget(cluster);
            }
            at = end;
        }
        Ok(())
    }

    fn readable(&self) -> Result<MutexGuard<'_, State>, PointError> {
        let state = lock(&self.state);
        match &state.broken {
            Some(broken) => Err(PointError::Broken(Arc::clone(broken))),
            None => Ok(state),
        }
    }

    /// The second look at the index, behind a read of `piece`: what is in it counts, the rest is settled, except for
    /// what the saver is reading.
    fn settle_read(&self, state: &mut MutexGuard<'_, State>, piece: ByteRange, saved: &mut Vec<(ByteRange, Saved)>) {
        for cluster in self.parts(piece) {
            match state.index.get(&cluster.start()) {
                Some(slot) => saved.push((cluster, *slot)),
                None if state.saving.intersects(cluster) => {}
                None => self.settle(cluster),
            }
        }
    }

    fn forget(&self, cluster: ByteRange) {
        let slot = lock(&self.state).index.remove(&cluster.start());
        if let Some(Some(slot)) = slot {
            self.scratch.free(slot);
        }
    }

    /// How many of the bytes of `range`, which begins at a cluster and consists of wanted ones, were a hole at the
    /// point in time: whole clusters from its start, settled as if they had been read. 0 if the first must be read.
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
        let saved = state.index.range(range.start()..end).next().map_or(end, |(start, _)| *start);
        let saving =
            if state.saving.is_empty() || state.saving.end() <= range.start() { end } else { state.saving.start() };
        let end = end.min(saved).min(saving.max(range.start()));
        self.settle(ByteRange::between(range.start(), end));
        Ok(end - range.start())
    }

    /// The next cluster that was saved, in order of offset, for a job that copies nothing else (sync=none). Waits until
    /// there is one; `None` once the point has ended and all are taken.
    pub fn next_saved(&self) -> Result<Option<ByteRange>, PointError> {
        let mut state = self.readable()?;
        loop {
            if let Some((&start, _)) = state.index.first_key_value() {
                return Ok(Some(self.whole(ByteRange::new(start, 1))));
            }
            if state.ended {
                return Ok(None);
            }
            if let Some(broken) = &state.broken {
                return Err(PointError::Broken(Arc::clone(broken)));
            }
            state = self.saved.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

impl Gate for Point {
    fn admits(&self, range: ByteRange) -> bool {
        if self.broken.load(Ordering::Acquire) {
            return true;
        }
        let whole = self.whole(range);
        let admitted = self.settled.all(whole) || self.parts(whole).all(|cluster| !self.is_open(cluster));
        fence(Ordering::Acquire);
        admitted
    }

    fn hold(&self, range: ByteRange, resume: Resume) {
        let mut state = lock(&self.state);
        if state.ended || state.broken.is_some() {
            drop(state);
            return resume();
        }
        state.held.push_back(Held { range, resume });
        drop(state);
        self.work.notify_one();
    }
}
