//! The flip: drafts of any number of disks come into force at one instant, without a drain.
//!
//! Everything that can fail, allocate or take long happens before (drafts, next maps, gates) or after (folding). In
//! between all lanes of all disks are outside: generations are swapped, writes in flight are marked in the new
//! generation and watched, gates are armed. A write acknowledged before the instant is in every image of it, a write
//! issued after it is in none, on all disks together.

use crate::admission::{Admission, Held, NotQuiescent};
use crate::gate::Gate;
use crate::inflight::PreCut;
use crate::live::LiveMap;
use crate::named::{DirtySet, Draft, Frozen};
use crate::sync::{MutexGuard, Ordering, lock};
use crate::tracker::{Control, Hot, Tracker};
use std::sync::Arc;
use std::time::Duration;

/// How often `hold_all` asks before the patience of a commit ends, when there is no clock (models).
#[cfg(any(loom, shuttle))]
const ROUNDS: u32 = 1000;

/// How long queues are held out while one of their threads has not left its critical section. Sections last microseconds;
/// only a thread that the host does not let run takes longer, and the guests of the others must not pay for that.
#[cfg(not(any(loom, shuttle)))]
const PATIENCE: Duration = Duration::from_millis(2);

/// How often a commit tries again after that, and the time it leaves to the queues in between: over a second in all.
#[cfg(not(any(loom, shuttle)))]
const TRIES: usize = 500;
#[cfg(not(any(loom, shuttle)))]
const BREATH: Duration = Duration::from_millis(1);

/// One disk's part of a commit: its draft, under its control lock.
///
/// Whoever works on several disks at once begins their commits in one agreed order, or excludes others by a lock of its
/// own, since each holds its disk's control lock until it is committed or dropped.
pub struct Commit<'a> {
    tracker: &'a Tracker,
    control: MutexGuard<'a, Control>,
    /// The bitmaps as they shall be.
    pub draft: Draft,
    arm: Vec<Arc<dyn Gate>>,
    disarm: Vec<Arc<dyn Gate>>,
}

impl Tracker {
    /// Begins a change of this disk's bitmaps and gates. Dropping it changes nothing.
    pub fn begin(&self) -> Commit<'_> {
        let control = lock(&self.control);
        let draft = control.bitmaps.clone();
        Commit { tracker: self, control, draft, arm: Vec::new(), disarm: Vec::new() }
    }
}

impl Commit<'_> {
    /// Completes what a freeze in this draft gave, so that a gate can be built on it before the flip: the generation
    /// that the flip will close is named now.
    pub fn closing(&self, mut frozen: Frozen) -> Frozen {
        frozen.close(self.control.live.as_ref());
        frozen
    }

    /// Makes a set of this disk's draft fit to be merged into a bitmap of another disk.
    pub fn foreign(&self, mut set: DirtySet) -> DirtySet {
        set.close(self.control.live.as_ref());
        set
    }

    /// Arms `gate` at the instant of the commit.
    pub fn arm(&mut self, gate: Arc<dyn Gate>) {
        self.arm.push(gate);
    }

    /// Takes `gate` away at the instant of the commit.
    pub fn disarm(&mut self, gate: Arc<dyn Gate>) {
        self.disarm.push(gate);
    }

    /// Whether a gate is armed: a point in time of this disk is kept.
    pub fn is_gated(&self) -> bool {
        !self.control.gates.is_empty()
    }

    fn next(&self) -> Option<Arc<LiveMap>> {
        let granularity = self.draft.recording_granularity()?;
        Some(Arc::new(LiveMap::new(granularity, self.draft.size())))
    }

    fn next_gates(&self) -> Vec<Arc<dyn Gate>> {
        let kept = self.control.gates.iter().filter(|gate| !self.disarm.iter().any(|gone| Arc::ptr_eq(gone, gate)));
        kept.chain(&self.arm).cloned().collect()
    }
}

/// What the instant of a commit left behind on one disk.
#[derive(Debug)]
pub struct Cut {
    /// The generation that ended.
    pub closed: u64,
    /// The writes that were in flight.
    pub pre_cut: Arc<PreCut>,
    /// For how long queue threads were held out, at most; the same for all disks of a commit.
    pub held: Duration,
}

/// Puts the drafts of all `commits` in force at one instant; the answers are in the same order. On an error nothing
/// has changed on any disk. Each disk may appear once.
pub fn commit(commits: Vec<Commit<'_>>) -> Result<Vec<Cut>, NotQuiescent> {
    let next: Vec<Option<Arc<LiveMap>>> = commits.iter().map(Commit::next).collect();
    let gates: Vec<Vec<Arc<dyn Gate>>> = commits.iter().map(Commit::next_gates).collect();
    // What is swapped out inside the hold is dropped outside, and room for the writes in flight is taken before it.
    let mut swap = gates.clone();
    let mut room: Vec<_> = commits.iter().map(|commit| commit.tracker.lanes.room()).collect();
    let admissions: Vec<&Admission<Hot>> = commits.iter().map(|c| &c.tracker.admission).collect();

    let mut cuts = Vec::with_capacity(commits.len());
    let (mut held, began) = hold(&admissions)?;
    for (i, held) in held.iter_mut().enumerate() {
        held.with(|hot| {
            hot.live.clone_from(&next[i]);
            hot.size = commits[i].draft.size();
            std::mem::swap(&mut hot.gates, &mut swap[i]);
            commits[i].tracker.lanes.cut(&mut room[i], |range| {
                if let Some(next) = &next[i] {
                    next.mark(range);
                }
            });
        });
    }
    drop(held);
    let lasted = since(began);

    for (((mut commit, next), gates), watched) in commits.into_iter().zip(next).zip(gates).zip(room) {
        let pre_cut = Arc::new(commit.tracker.lanes.pre_cut(watched));
        cuts.push(Cut { closed: commit.control.generation, pre_cut, held: lasted });
        let closed = std::mem::replace(&mut commit.control.live, next);
        commit.control.generation += 1;
        commit.control.gates = gates;
        commit.tracker.size.store(commit.draft.size(), Ordering::Release);
        commit.draft.settle(closed.as_ref());
        commit.control.bitmaps = commit.draft;
    }
    Ok(cuts)
}

/// Holds all queues out, and tells since when.
#[cfg(not(any(loom, shuttle)))]
fn hold<'a>(admissions: &[&'a Admission<Hot>]) -> Result<(Vec<Held<'a, Hot>>, Moment), NotQuiescent> {
    for _ in 1..TRIES {
        let began = now();
        match Admission::hold_all(admissions, patience()) {
            Ok(held) => return Ok((held, began)),
            // The thread that is inside needs a processor, perhaps this one.
            Err(NotQuiescent) => std::thread::sleep(BREATH),
        }
    }
    let began = now();
    Ok((Admission::hold_all(admissions, patience())?, began))
}

#[cfg(any(loom, shuttle))]
fn hold<'a>(admissions: &[&'a Admission<Hot>]) -> Result<(Vec<Held<'a, Hot>>, Moment), NotQuiescent> {
    Ok((Admission::hold_all(admissions, patience())?, now()))
}

#[cfg(not(any(loom, shuttle)))]
fn patience() -> impl FnMut() -> bool {
    let mut end = None;
    let mut asked = 0u32;
    move || {
        // The clock is asked, and the processor offered, only now and then: a section ends within nanoseconds.
        asked = asked.wrapping_add(1);
        if asked.is_multiple_of(64) {
            std::thread::yield_now();
            return std::time::Instant::now() < *end.get_or_insert_with(|| std::time::Instant::now() + PATIENCE);
        }
        true
    }
}

#[cfg(any(loom, shuttle))]
fn patience() -> impl FnMut() -> bool {
    let mut left = ROUNDS;
    move || {
        left = left.saturating_sub(1);
        left > 0
    }
}

#[cfg(not(any(loom, shuttle)))]
use std::time::Instant as Moment;

/// Models have no clock.
#[cfg(any(loom, shuttle))]
type Moment = ();

#[cfg(not(any(loom, shuttle)))]
fn now() -> Moment {
    Moment::now()
}

#[cfg(not(any(loom, shuttle)))]
fn since(began: Moment) -> Duration {
    began.elapsed()
}

#[cfg(any(loom, shuttle))]
fn now() -> Moment {}

#[cfg(any(loom, shuttle))]
fn since((): Moment) -> Duration {
    Duration::ZERO
}
