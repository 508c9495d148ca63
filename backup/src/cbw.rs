//! Copy-before-write of one disk: keeps old data in scratch before a guest's write changes it.
//!
//! Gates hand held writes in; savers (`savers`) take them in order, keep the old data of each unit they touch (`save`), and let
//! them go. Where that is a copy in memory, the thread that hands a write in does it at once. A unit is read once, however many
//! points in time want it and however many writes wait for it.
//!
//! The order is I3's: pre-cut writes over, data in scratch, index, then settled, then the write. What a saver has read
//! counts for a point only if that point was in force with the unit open both before and after: then its gate has kept
//! every write away from the unit in between.
//!
//! The guest waits for one local read and one local write at most. If that fails or takes too long, the point's policy
//! decides: it breaks, noted before the write is let go, or the guest's write fails.

mod save;
mod savers;

use crate::buffer::AlignedBuffer;
use crate::point::Face;
use crate::resume::{Haven, Ledger, Phase};
use crate::scratch::{Block, Scratch, ScratchError};
use crate::source::Source;
use blkmark_bitmap::sync::{Condvar, Mutex, MutexGuard, Ordering, lock};
use blkmark_bitmap::{ByteRange, Granularity, PreCut, Resume, Verdict};
use savers::Crew;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The most that is saved at once. Points with larger clusters save them in pieces, so that a small write of the guest
/// waits for a small read.
const UNIT: u64 = 64 << 10;

/// What happens when old data cannot be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnError {
    /// The point breaks, the guest does not notice.
    BreakSnapshot,
    /// The guest's write fails, the point stays.
    BreakGuestWrite,
}

/// A unit as of a point in time: its block, or none if it is all zero.
pub(crate) type Saved = Option<Arc<Block>>;

/// What is kept for one point.
pub(crate) struct Kept {
    face: Arc<Face>,
    pre_cut: Arc<PreCut>,
    /// Where it is written down for the next process.
    ledger: Option<Arc<Ledger>>,
    pub(crate) index: BTreeMap<u64, Saved>,
    /// How many of them were saved as a block, not as zeroes.
    pub(crate) blocks: u64,
    pub(crate) broken: Option<Arc<ScratchError>>,
    /// It is disarmed; readers may go on with what is kept.
    pub(crate) ended: bool,
}

struct Held {
    point: u64,
    range: ByteRange,
    since: Instant,
    resume: Resume,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) points: BTreeMap<u64, Kept>,
    held: BTreeMap<u64, Held>,
    /// Held writes that no saver has taken yet, oldest first. Some may be gone from `held` meanwhile.
    queue: VecDeque<u64>,
    /// Units that are being read and kept at this moment.
    saving: Vec<ByteRange>,
    /// Room for a unit, for who saves at once.
    spare: Option<AlignedBuffer>,
    /// What was kept for points that broke, to be given back by whoever may wait for scratch.
    spent: Vec<BTreeMap<u64, Saved>>,
    next: u64,
    /// Until when the watch sleeps, if there was a reason to wake it.
    watched: Option<Instant>,
    longest_hold: Duration,
    longest_save: Duration,
    crew: Crew,
    /// Points that exist, in force or not.
    users: usize,
    /// The last of them is gone; the threads are on their way out.
    closed: bool,
}

impl State {
    /// Whether a saver is at work on part of `range`.
    pub(crate) fn is_saving(&self, range: ByteRange) -> bool {
        self.saving.iter().any(|unit| unit.intersects(range))
    }

    /// The units in `range` that savers are at work on, in order.
    pub(crate) fn saving_in(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut units: Vec<_> = self.saving.iter().filter(|unit| unit.intersects(range)).copied().collect();
        units.sort_unstable_by_key(|unit| unit.start());
        units
    }

    /// Where in `range` a saver is at work first.
    pub(crate) fn first_saving(&self, range: ByteRange) -> Option<u64> {
        self.saving.iter().filter(|unit| unit.intersects(range)).map(|unit| unit.start().max(range.start())).min()
    }

    /// Whether the oldest held write can be taken. If its commit is in force but its pre-cut writes are not known yet, that
    /// is a matter of microseconds.
    fn has_work(&self) -> bool {
        let Some(id) = self.queue.front() else { return false };
        self.held.get(id).is_none_or(|held| self.points.contains_key(&held.point))
    }

    /// When a held write has to be let go, and after how long.
    fn deadline(&self, held: &Held) -> Option<(Instant, Duration)> {
        let timeout = self.points.get(&held.point)?.face.timeout?;
        Some((held.since.checked_add(timeout)?, timeout))
    }

    fn in_force(&self, unit: ByteRange) -> impl Iterator<Item = (u64, &Kept)> {
        let open = move |kept: &Kept| !kept.ended && kept.broken.is_none() && kept.face.is_open(unit);
        self.points.iter().filter(move |(_, kept)| open(kept)).map(|(key, kept)| (*key, kept))
    }
}

/// The copy-before-write of one disk, there while a point in time needs it.
pub struct CopyBeforeWrite {
    disk: String,
    source: Arc<dyn Source>,
    /// Bytes of the disk, which does not change while there is a point.
    size: u64,
    unit: Granularity,
    scratch: Scratch,
    state: Mutex<State>,
    /// Something for a saver, or the end.
    work: Condvar,
    /// A write that has to be let go earlier than the watch knows of, or the end.
    overdue: Condvar,
    /// A unit was saved or given up, or a point ended.
    pub(crate) saved: Condvar,
}

/// What the scratch of a disk takes, and what waits for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of the file.
    pub file: u64,
    /// Guest writes that are held.
    pub held: usize,
    /// The longest that one was held, from when a gate said so until its old data was kept, since the first point of those that are there.
    pub longest_hold: Duration,
    /// The longest that it took to keep the old data of a unit: to read it and to write it to scratch.
    pub longest_save: Duration,
}

impl CopyBeforeWrite {
    /// For one point to begin with; [`CopyBeforeWrite::join`] lets in more. `scratch` makes one for blocks of so many bytes.
    pub(crate) fn create(
        disk: &str,
        source: Arc<dyn Source>,
        size: u64,
        scratch: impl FnOnce(u64) -> Scratch,
        cluster: Granularity,
    ) -> io::Result<Arc<Self>> {
        let unit = Granularity::new(UNIT).map_or(cluster, |unit| unit.min(cluster));
        Self::with(disk, source, size, scratch(unit.bytes()), unit)
    }

    /// The same, with a scratch of blocks of `unit`.
    pub(crate) fn with(
        disk: &str,
        source: Arc<dyn Source>,
        size: u64,
        scratch: Scratch,
        unit: Granularity,
    ) -> io::Result<Arc<Self>> {
        let state = State { users: 1, ..State::default() };
        let cbw = Arc::new(Self {
            disk: disk.to_owned(),
            source,
            size,
            unit,
            scratch,
            state: Mutex::new(state),
            work: Condvar::new(),
            overdue: Condvar::new(),
            saved: Condvar::new(),
        });
        // In a model the threads are the model's.
        if cfg!(not(shuttle)) {
            cbw.employ()?;
        }
        Ok(cbw)
    }

    /// Bytes of the disk.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// One more point will use it; `false` if it is closing already.
    pub(crate) fn join(&self) -> bool {
        let mut state = self.state();
        if !state.closed {
            state.users += 1;
        }
        !state.closed
    }

    /// A point is gone, and with it what was kept for it.
    pub(crate) fn leave(&self, key: u64) {
        let mut state = self.state();
        let kept = state.points.remove(&key);
        let gone = take_held(&mut state, key);
        state.users -= 1;
        // At once, so that nobody joins whose writes no thread would save.
        let last = state.users == 0;
        state.closed |= last;
        drop(state);
        // Its blocks are given back without the lock.
        drop(kept);
        let_go(gone, Verdict::Again);
        if last {
            self.close();
        }
    }

    fn close(&self) {
        self.state().closed = true;
        self.work.notify_all();
        self.overdue.notify_all();
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// By what name its scratch outlives the process, if it does.
    pub(crate) fn scratch_name(&self) -> Option<(&Haven, uuid::Uuid)> {
        self.scratch.name()
    }

    /// The unit of saving.
    pub(crate) fn unit(&self) -> Granularity {
        self.unit
    }

    /// What it takes and holds at this moment.
    pub fn load(&self) -> Load {
        let (memory, file) = self.scratch.used();
        let state = self.state();
        // Its threads may still be on their way out when the last point is gone.
        let longest = (state.users > 0).then_some((state.longest_hold, state.longest_save));
        let (longest_hold, longest_save) = longest.unwrap_or_default();
        Load { memory, file, held: state.held.len(), longest_hold, longest_save }
    }

    /// A point came into force.
    pub(crate) fn enter(
        &self,
        face: Arc<Face>,
        pre_cut: Arc<PreCut>,
        ledger: Option<Arc<Ledger>>,
        index: BTreeMap<u64, Saved>,
    ) {
        let blocks = index.values().flatten().count() as u64;
        let kept = Kept { pre_cut, ledger, index, blocks, broken: None, ended: false, face: Arc::clone(&face) };
        self.state().points.insert(face.key, kept);
        self.work.notify_all();
        self.overdue.notify_all();
    }

    /// A point is disarmed: whatever is held for it goes.
    pub(crate) fn end(&self, key: u64) {
        let mut state = self.state();
        if let Some(kept) = state.points.get_mut(&key) {
            kept.ended = true;
        }
        let gone = take_held(&mut state, key);
        drop(state);
        self.work.notify_all();
        self.saved.notify_all();
        let_go(gone, Verdict::Again);
    }

    /// Takes in a held write, or saves what it needs saved at once. `resume` may be called from here.
    pub(crate) fn hold(&self, point: u64, range: ByteRange, since: Instant, resume: Resume) {
        if self.save_at_once(point, range, since) {
            return resume(Verdict::Again);
        }
        let mut state = self.state();
        if state.points.get(&point).is_some_and(|kept| kept.ended || kept.broken.is_some()) {
            drop(state);
            return resume(Verdict::Again);
        }
        let id = state.next;
        state.next += 1;
        let held = Held { point, range, since, resume };
        // While its point is not in the books yet, nobody knows for how long it may be held.
        let unseen = match (state.deadline(&held), state.watched) {
            (Some((at, _)), Some(until)) => at < until,
            _ => true,
        };
        state.held.insert(id, held);
        state.queue.push_back(id);
        drop(state);
        // One saver for one write. To wake all that sleep for each would take the processors from the guest.
        self.work.notify_one();
        if unseen {
            self.overdue.notify_all();
        }
    }

    /// Old data could not be kept for `point`: what its policy says happens to it, or to the held write `id`.
    fn fail(&self, point: u64, id: Option<u64>, error: ScratchError) {
        let mut state = self.state();
        let Some(kept) = state.points.get_mut(&point) else { return };
        match (kept.face.on_error, id) {
            (OnError::BreakGuestWrite, Some(id)) => {
                tracing::error!(disk = self.disk, %error, "old data could not be kept; the guest's write fails");
                let held = state.held.remove(&id);
                drop(state);
                let_go(held.into_iter().collect(), Verdict::Refused);
            }
            _ => {
                tracing::error!(disk = self.disk, %error, "a point in time is broken; the guest goes on");
                if let Some(ledger) = &kept.ledger
                    && let Err(error) = ledger.set_phase(Phase::Broken)
                {
                    tracing::error!(disk = self.disk, %error, "a point in time broke, and its ledger cannot say so");
                }
                kept.broken.get_or_insert_with(|| Arc::new(error));
                // Before any of its writes goes. Readers look for it after they have read.
                kept.face.broken.store(true, Ordering::Release);
                let index = std::mem::take(&mut kept.index);
                // Not here: where scratch hangs, its blocks cannot be given back, and the writes have to go now.
                state.spent.push(index);
                let gone = take_held(&mut state, point);
                drop(state);
                self.work.notify_all();
                self.saved.notify_all();
                let_go(gone, Verdict::Again);
            }
        }
    }

    /// The watch: acts on writes that are held for too long.
    fn watch(&self) {
        let mut state = self.state();
        while !state.closed {
            let overdue =
                state.held.iter().filter_map(|(id, held)| Some((state.deadline(held)?, *id, held.point))).min();
            let now = Instant::now();
            state.watched = overdue.map(|((at, _), ..)| at);
            match overdue {
                Some(((at, timeout), id, point)) if at <= now => {
                    drop(state);
                    self.fail(point, Some(id), ScratchError::Timeout { seconds: timeout.as_secs() });
                    state = self.state();
                }
                Some(((at, _), ..)) => state = self.wait_until(state, at - now),
                None => state = self.overdue.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()),
            }
        }
    }

    #[cfg(not(any(loom, shuttle)))]
    fn wait_until<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.overdue.wait_timeout(state, time).unwrap_or_else(|poisoned| poisoned.into_inner()).0
    }

    /// Models have no clock.
    #[cfg(any(loom, shuttle))]
    fn wait_until<'a>(&self, state: MutexGuard<'a, State>, _: Duration) -> MutexGuard<'a, State> {
        self.overdue.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

fn take_held(state: &mut State, point: u64) -> Vec<Held> {
    let (gone, held) = std::mem::take(&mut state.held).into_iter().partition(|(_, held)| held.point == point);
    state.held = held;
    let gone: BTreeMap<u64, Held> = gone;
    gone.into_values().collect()
}

fn let_go(held: Vec<Held>, verdict: Verdict) {
    for write in held {
        (write.resume)(verdict);
    }
}
