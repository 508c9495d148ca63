//! The flip: drafts of any number of disks come into force at one instant, without a drain.
//!
//! Everything that can fail, allocate or take long happens before (drafts, next maps, gates) or after (folding, storing). In
//! between all lanes of all disks are outside: generations are swapped, writes in flight are marked in the new
//! generation and watched, gates are armed. A write acknowledged before the instant is in every image of it, a write
//! issued after it is in none, on all disks together.

use crate::admission::{Admission, Held, NotQuiescent};
use crate::gate::Gate;
use crate::inflight::{PreCut, Watched};
use crate::live::LiveMap;
use crate::named::{DirtySet, Draft, Frozen};
use crate::store::StoreError;
use crate::store::heat::Heat;
use crate::store::keeper::{Failure, Keeper, State};
use crate::sync::{MutexGuard, Ordering, lock};
use crate::tracker::{Control, Hot, Tracker, View, no_store};
use crate::units::ByteRange;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

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
    /// Why the generation that begins will not outlive the process.
    lost: Option<StoreError>,
}

impl Tracker {
    /// Begins a change of this disk's bitmaps and gates. Dropping it changes nothing.
    pub fn begin(&self) -> Commit<'_> {
        let control = lock(&self.control);
        let draft = control.bitmaps.clone();
        Commit { tracker: self, control, draft, arm: Vec::new(), disarm: Vec::new(), lost: None }
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
    pub fn foreign(&mut self, mut set: DirtySet) -> DirtySet {
        // What the other disk takes for closed has to be.
        self.draft.end_generation();
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

    fn next_gates(&self) -> Vec<Arc<dyn Gate>> {
        let kept = self.control.gates.iter().filter(|gate| !self.disarm.iter().any(|gone| Arc::ptr_eq(gone, gate)));
        kept.chain(&self.arm).cloned().collect()
    }
}

/// What the instant of a commit left behind on one disk.
#[derive(Debug)]
pub struct Cut {
    /// The generation that ended; the one that goes on, if the draft needed no new one.
    pub closed: u64,
    /// The writes that were in flight.
    pub pre_cut: Arc<PreCut>,
    /// For how long queue threads were held out, at most; the same for all disks of a commit.
    pub held: Duration,
}

/// Why a commit did not come about. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CommitError {
    /// A queue thread was in its critical section for too long.
    #[error(transparent)]
    NotQuiescent(#[from] NotQuiescent),
    /// The bitmaps could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Puts the drafts of all `commits` in force at one instant, and makes them durable where there are stores; the answers are in
/// the same order. On an error nothing has changed on any disk. Each disk may appear once.
pub fn commit(commits: Vec<Commit<'_>>) -> Result<Vec<Cut>, CommitError> {
    commit_then(commits, |_| {})
}

/// As [`commit`]; `begun` is called when the drafts are in force and not yet durable, so that what waits for the instant need
/// not wait for a disk. On an error after that, drafts and gates are as they were before, but the instant was.
pub fn commit_then(commits: Vec<Commit<'_>>, begun: impl FnOnce(&[Cut])) -> Result<Vec<Cut>, CommitError> {
    let (cuts, mut parts) = flip(commits, true)?;
    begun(&cuts);
    match store(&mut parts) {
        Ok(()) => {
            parts.into_iter().for_each(Part::finish);
            Ok(cuts)
        }
        Err(error) => {
            roll_back(parts);
            Err(error.into())
        }
    }
}

/// As [`commit`], for what is in force whether it can be stored or not: nothing but gates that are disarmed and freezes that end
/// in failure, which is what a start makes of them anyway.
pub fn commit_regardless(commits: Vec<Commit<'_>>) -> Result<Vec<Cut>, CommitError> {
    let (cuts, mut parts) = flip(commits, false)?;
    if let Err(error) = store(&mut parts) {
        tracing::error!(%error, "what changed is in force, but not stored");
    }
    for part in &mut parts {
        part.give_up_if_torn();
    }
    parts.into_iter().for_each(Part::finish);
    Ok(cuts)
}

/// One disk of a commit that is in force in memory.
struct Part<'a> {
    tracker: &'a Tracker,
    control: MutexGuard<'a, Control>,
    changed: bool,
    /// What is in force if it cannot be stored: the old bitmaps, over the generation that began.
    before: Draft,
    old_gates: Vec<Arc<dyn Gate>>,
    old_size: u64,
    /// The writes that were in flight.
    in_flight: Vec<ByteRange>,
    /// A slot of its store failed, and nobody knows what is in it.
    torn: Option<StoreError>,
    /// Its store has it, if another one decides so.
    prepared: bool,
}

/// Everything up to the instant, and the instant. With `prepare`, what a store may refuse is asked of it first.
fn flip<'a>(commits: Vec<Commit<'a>>, prepare: bool) -> Result<(Vec<Cut>, Vec<Part<'a>>), CommitError> {
    let mut commits = commits;
    let mut next = Vec::with_capacity(commits.len());
    for commit in &mut commits {
        next.push(commit.prepare(prepare)?);
    }
    let gates: Vec<Vec<Arc<dyn Gate>>> = commits.iter().map(Commit::next_gates).collect();
    // What is swapped out inside the hold is dropped outside, and room for the writes in flight is taken before it.
    let mut swap = gates.clone();
    let mut room: Vec<_> = commits.iter().map(|commit| commit.tracker.lanes.room()).collect();
    let admissions: Vec<&Admission<Hot>> = commits.iter().map(|c| &c.tracker.admission).collect();

    let (mut held, began) = hold(&admissions)?;
    for (i, held) in held.iter_mut().enumerate() {
        held.with(|hot| {
            if let Some(next) = &mut next[i] {
                std::mem::swap(&mut hot.live, &mut next.live);
                std::mem::swap(&mut hot.heat, &mut next.heat);
            }
            hot.size = commits[i].draft.size();
            std::mem::swap(&mut hot.gates, &mut swap[i]);
            let live = next[i].as_ref().and(hot.live.as_ref());
            commits[i].tracker.lanes.cut(&mut room[i], |range| {
                if let Some(live) = live {
                    live.mark(range);
                }
            });
        });
    }
    drop(held);
    let lasted = since(began);

    let (mut cuts, mut parts) = (Vec::with_capacity(commits.len()), Vec::with_capacity(commits.len()));
    for (((mut commit, next), gates), watched) in commits.into_iter().zip(next).zip(gates).zip(room) {
        let in_flight = watched.iter().map(Watched::range).collect();
        let pre_cut = Arc::new(commit.tracker.lanes.pre_cut(watched));
        cuts.push(Cut { closed: commit.control.generation, pre_cut, held: lasted });
        let changed = commit.draft.has_changed();
        let (cut, control) = (next.is_some(), &mut *commit.control);
        let closed = control.live.clone();
        if let Some(next) = next {
            control.live = next.began;
            control.generation += 1;
        }
        let old_gates = std::mem::replace(&mut control.gates, gates);
        let old_size = commit.tracker.size.swap(commit.draft.size(), Ordering::AcqRel);
        commit.draft.settle(cut, closed.as_ref());
        let mut before = std::mem::replace(&mut control.bitmaps, commit.draft);
        before.settle(cut, closed.as_ref());
        let (tracker, control, torn) = (commit.tracker, commit.control, commit.lost);
        let prepared = false;
        parts.push(Part { tracker, control, changed, before, old_gates, old_size, in_flight, torn, prepared });
    }
    Ok((cuts, parts))
}

/// The generation that a flip begins.
struct Next {
    began: Option<Arc<LiveMap>>,
    /// To be swapped in.
    live: Option<Arc<LiveMap>>,
    heat: Option<Arc<Heat>>,
}

impl Commit<'_> {
    /// Asks the store for all that the flip needs of it, and makes the next generation, if there is to be one.
    fn prepare(&mut self, ask: bool) -> Result<Option<Next>, StoreError> {
        let control = &mut *self.control;
        match &mut control.keeper {
            Some(keeper) if ask && self.draft.has_changed() => keeper.prepare(&control.bitmaps, &self.draft)?,
            None if self.draft.kept().next().is_some() => return Err(no_store()),
            _ => {}
        }
        if !self.draft.cuts() {
            return Ok(None);
        }
        let (old, new) = (&control.bitmaps, &self.draft);
        let keeper = control.keeper.as_mut().filter(|keeper| !keeper.has_failed());
        // Until the new record is durable, the old one is in force, and a commit that any of its disks cannot store is taken
        // back: who records in either state needs the marks, as far as the disk reaches in either.
        let kept = old.kept_granularity().is_some() || new.kept_granularity().is_some();
        let recording = old.recording_granularity().into_iter().chain(new.recording_granularity()).min();
        let size = old.size().max(new.size());
        let (live, heat) = match (keeper, recording) {
            (Some(keeper), Some(granularity)) if kept => {
                let map = match keeper.create_map(granularity, size, control.generation + 1) {
                    Ok(map) => map,
                    Err(error) if ask => return Err(error),
                    // There is no giving up: what is marked from now on ends with the process, so nothing may rely on it.
                    Err(error) => {
                        self.lost = Some(error);
                        Arc::new(LiveMap::new(granularity, size))
                    }
                };
                (Some(map), Some(Arc::clone(&keeper.heat)))
            }
            _ => (recording.map(|granularity| Arc::new(LiveMap::new(granularity, size))), None),
        };
        Ok(Some(Next { began: live.clone(), live, heat }))
    }
}

/// Makes durable what is in force. Several stores: all that are not first write down both outcomes; the record of the first
/// decides; then the others write down what was decided. Nobody is answered before.
fn store(parts: &mut [Part<'_>]) -> Result<(), StoreError> {
    let mut kept: Vec<&mut Part<'_>> = parts.iter_mut().filter(|part| part.is_stored()).collect();
    for part in &mut kept {
        part.warm()?;
    }
    let Some((first, others)) = kept.split_first_mut() else { return Ok(()) };
    if others.is_empty() {
        return first.record(None, None);
    }
    let (commit, decider) = (Uuid::new_v4(), first.store_name());
    let mut done = others.iter_mut().try_for_each(|part| {
        part.record(Some((commit, decider.clone())), None)?;
        part.prepared = true;
        Ok(())
    });
    if done.is_ok() {
        done = first.record(None, Some(commit));
    }
    if done.is_err() {
        let unknown = first.torn.is_some();
        for part in others {
            part.undo(unknown);
        }
        return done;
    }
    for part in others {
        if let Err(error) = part.record(None, None) {
            // It is decided, but this store will not know for ever.
            part.torn.get_or_insert(error);
            part.give_up_if_torn();
        }
    }
    Ok(())
}

impl Part<'_> {
    fn is_stored(&self) -> bool {
        let control = &*self.control;
        self.changed && control.keeper.as_ref().is_some_and(|keeper| keeper.concerns(&self.before, &control.bitmaps))
    }

    fn store_name(&self) -> String {
        self.control.keeper.as_ref().map_or_else(String::new, Keeper::name)
    }

    /// The writes that were in flight are marked in the new generation: their extents have to be hot before it counts.
    fn warm(&mut self) -> Result<(), StoreError> {
        let control = &mut *self.control;
        let Some(keeper) = control.keeper.as_mut().filter(|keeper| !keeper.has_failed()) else { return Ok(()) };
        if control.bitmaps.kept_granularity().is_none() {
            return Ok(());
        }
        if self.before.kept_granularity().is_none() {
            // Nothing was hot so far, and a power cut must not take back what was written by then.
            keeper.flush_disk()?;
        }
        keeper.warm(self.in_flight.iter().copied()).inspect_err(|error| self.torn = Some(error.clone()))
    }

    fn record(&mut self, prepared: Option<(Uuid, String)>, decides: Option<Uuid>) -> Result<(), StoreError> {
        let Control { keeper, bitmaps: draft, generation, live, .. } = &mut *self.control;
        let Some(keeper) = keeper else { return Ok(()) };
        let live = live.as_ref().filter(|_| draft.kept_granularity().or(self.before.kept_granularity()).is_some());
        let prepared = prepared.map(|(commit, decider)| (commit, decider, &self.before));
        let state = State { draft, generation: *generation, live, prepared, decides, clean: None };
        keeper.record(&state).map_err(|failure| match failure {
            Failure::Before(error) => error,
            Failure::Torn(error) => {
                self.torn = Some(error.clone());
                error
            }
        })
    }

    /// Writes down that it did not come about, if it was written down that it may. If there is no room for that, it holds all the same:
    /// the store that decides has not; `unknown`: nobody knows whether it has.
    fn undo(&mut self, unknown: bool) {
        if self.torn.is_none() && self.prepared {
            std::mem::swap(&mut self.control.bitmaps, &mut self.before);
            if let Err(error) = self.record(None, None)
                && unknown
            {
                self.torn.get_or_insert(error);
            }
            std::mem::swap(&mut self.control.bitmaps, &mut self.before);
        }
    }

    fn give_up_if_torn(&mut self) {
        let Control { keeper, bitmaps, .. } = &mut *self.control;
        if let (Some(error), Some(keeper)) = (self.torn.take(), keeper) {
            keeper.distrust(bitmaps, &error.to_string());
            keeper.heat.give_up();
        }
    }

    /// Marks that nobody needs any more are not made any more, and queries see the new state.
    fn finish(mut self) {
        let control = &mut *self.control;
        if self.changed && control.bitmaps.kept_granularity().is_none() {
            let idle = control.bitmaps.recording_granularity().is_none();
            // If a queue thread is in the way, the marks go on for nothing.
            if let Ok((mut held, _)) = hold(&[&self.tracker.admission])
                && let Some(held) = held.first_mut()
            {
                let gone = held.with(|hot| (hot.heat.take(), if idle { hot.live.take() } else { None }));
                if idle {
                    control.live = None;
                }
                drop(gone);
            }
        }
        self.show();
    }

    fn show(&self) {
        *lock(&self.tracker.view) = View { bitmaps: self.control.bitmaps.clone(), live: self.control.live.clone() };
    }
}

/// It could not be stored: everything but the generation is as it was.
fn roll_back(mut parts: Vec<Part<'_>>) {
    let admissions: Vec<&Admission<Hot>> = parts.iter().map(|part| &part.tracker.admission).collect();
    let mut held = loop {
        match hold(&admissions) {
            Ok((held, _)) => break held,
            Err(NotQuiescent) => tracing::warn!("a commit that failed cannot be taken back yet"),
        }
    };
    let mut swap: Vec<_> = parts.iter().map(|part| part.old_gates.clone()).collect();
    for ((held, part), gates) in held.iter_mut().zip(&parts).zip(&mut swap) {
        held.with(|hot| {
            std::mem::swap(&mut hot.gates, gates);
            hot.size = part.old_size;
        });
    }
    drop(held);
    for part in &mut parts {
        part.tracker.size.store(part.old_size, Ordering::Release);
        part.control.gates = std::mem::take(&mut part.old_gates);
        std::mem::swap(&mut part.control.bitmaps, &mut part.before);
        part.give_up_if_torn();
        part.show();
    }
}

/// Holds all queues out, and tells since when.
#[cfg(not(any(loom, shuttle)))]
pub(crate) fn hold<'a>(admissions: &[&'a Admission<Hot>]) -> Result<(Vec<Held<'a, Hot>>, Moment), NotQuiescent> {
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
pub(crate) fn hold<'a>(admissions: &[&'a Admission<Hot>]) -> Result<(Vec<Held<'a, Hot>>, Moment), NotQuiescent> {
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
