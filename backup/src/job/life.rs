//! From `running` to `null`: how jobs end, alone or as a group.
//!
//! Whatever ends a job, its thread comes back once with an [`Outcome`], or it had come back before. `advance` then looks at
//! the whole group: if one failed, the others are cancelled; when all threads are back, one commit settles all bitmaps
//! and takes all gates away, and the events are told, newest job first as QEMU does. A job without a group is a group
//! of one. Everything here happens under the registry's lock, except for the copying itself.

use super::backup::{Failure, Outcome};
use super::entry::Entry;
use super::events;
use super::policy::{IoStatus, OnFailure, Reaction};
use super::registry::{Inner, Jobs, lock};
use super::state::Status;
use super::work::{Far, Held, Work};
use crate::copy::{Action, Side};
use crate::node::Node;
use crate::point::Point;
use crate::resume::Phase;
use blkmark_bitmap::{Commit, CommitError, StoreError, flip};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long to leave the queue threads alone before another try to settle. Rare: one of them was kept off the processor
/// inside its critical section.
const BREATH: Duration = Duration::from_millis(20);

thread_local! {
    /// Of a worker: the last stop of its job that it knows of.
    static STOP_MET: Cell<u64> = const { Cell::new(0) };
}

/// How long a job that is told to end may take to finish what it is at, before its target is interrupted: somebody waits for
/// the end, and nobody for what is still written.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is dropped only when the lock is free again: points, whose scratch may be large.
pub(super) type Spent = Vec<Arc<Point>>;

/// Begins the job's thread. If there is none to be had, what was to be run comes back with its outcome.
pub(super) fn launch(jobs: &Arc<Jobs>, entry: &Entry, work: Work) -> Result<JoinHandle<()>, Box<(Held, Outcome)>> {
    let (key, control) = (entry.key, Arc::clone(&entry.control));
    let parcel = Arc::new(Mutex::new(Some(work)));
    let task = {
        let (jobs, parcel) = (Arc::clone(jobs), Arc::clone(&parcel));
        move || {
            let Some(work) = lock(&parcel).take() else { return };
            // A bug in a target must not leave a job that never ends and a bitmap that stays busy.
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                let decide = |side, error: &io::Error| on_error(&jobs, key, side, error);
                work.run(&control, &decide, &|error| on_fatal(&jobs, key, error))
            }))
            .unwrap_or_else(|_| work.failed("internal error".to_owned()));
            come_back(&jobs, key, work.close(), outcome);
        }
    };
    std::thread::Builder::new().name(format!("job-{}", entry.id())).spawn(task).map_err(|error| {
        let Some(work) = lock(&parcel).take() else { unreachable!("a thread that was not made took nothing") };
        let outcome = work.failed(format!("could not start the job's thread: {error}"));
        Box::new((work.close(), outcome))
    })
}

/// An error of a read or write: tells of it, and says how to go on. Several workers may fail at the same time; what is
/// told is the first error.
fn on_error(jobs: &Jobs, key: u64, side: Side, error: &io::Error) -> Action {
    let mut inner = lock(&jobs.inner);
    let Some(entry) = inner.entry(key).filter(|entry| !entry.cancelled && !entry.failing) else {
        return Action::Report;
    };
    let policy = match side {
        Side::Source => entry.settings.on_source_error,
        Side::Target => entry.settings.on_target_error,
    };
    let reaction = policy.reaction(error);
    if reaction == Reaction::Stop {
        // An error may be from before the job was resumed: each worker tries once more before it stops the job again.
        let stopped = entry.user_paused && entry.io_status != IoStatus::Ok;
        if stopped || STOP_MET.get() < entry.stops {
            STOP_MET.set(entry.stops);
            return Action::Retry;
        }
        entry.stops += 1;
        STOP_MET.set(entry.stops);
    }
    tell(jobs, entry, side, error, reaction);
    match reaction {
        Reaction::Report => {
            entry.failing = true;
            Action::Report
        }
        Reaction::Ignore => Action::Retry,
        Reaction::Stop => {
            entry.io_status = IoStatus::of(error);
            // Paused here, under the lock, so that a resume that comes at once is not overtaken.
            jobs.rest(entry);
            Action::Retry
        }
    }
}

/// An error that no policy can help with.
fn on_fatal(jobs: &Jobs, key: u64, error: &io::Error) {
    if let Some(entry) = lock(&jobs.inner).entry(key) {
        tell(jobs, entry, Side::Target, error, Reaction::Report);
    }
}

fn tell(jobs: &Jobs, entry: &Entry, side: Side, error: &io::Error, reaction: Reaction) {
    tracing::warn!(job = entry.id(), ?side, %error, action = reaction.name(), "I/O error");
    events::error(&jobs.events, entry, side, reaction);
}

fn come_back(jobs: &Jobs, key: u64, held: Held, outcome: Outcome) {
    let mut inner = lock(&jobs.inner);
    // Work that was done before the workers saw the pause waits for its end like work that was not.
    while outcome.result.is_ok() && inner.entry(key).is_some_and(|entry| entry.user_paused && !entry.cancelled) {
        inner = jobs.changed.wait(inner).unwrap_or_else(|poisoned| poisoned.into_inner());
    }
    let spent = finish(jobs, &mut inner, key, held, outcome);
    drop(inner);
    jobs.changed.notify_all();
    drop(spent);
}

/// The job's thread is through with it.
pub(super) fn finish(jobs: &Jobs, inner: &mut Inner, key: u64, held: Held, mut outcome: Outcome) -> Spent {
    let Some(entry) = inner.entry(key) else { return Spent::new() };
    // Told to end, it may meet the error once more that had stopped it: that is not why it ends.
    if entry.cancelled && !entry.failing {
        outcome.result = Err(Failure::Cancelled);
    }
    if outcome.result.is_ok() {
        jobs.set_status(entry, Status::Waiting);
    }
    entry.outcome = Some(outcome);
    entry.held = Some(held);
    advance(jobs, inner, key)
}

/// Ends a job by command. One whose thread is back already takes its group down at once.
pub(super) fn cancel(jobs: &Jobs, inner: &mut Inner, key: u64, force: bool) -> Spent {
    let Some(entry) = inner.entry(key) else { return Spent::new() };
    match &mut entry.outcome {
        Some(outcome) => {
            outcome.result = Err(Failure::Cancelled);
            advance(jobs, inner, key)
        }
        None => {
            stop(jobs, entry, force);
            Spent::new()
        }
    }
}

/// Makes a pending job's group conclude.
pub(super) fn finalize(jobs: &Jobs, inner: &mut Inner, key: u64) -> Spent {
    let members = group_of(inner, key);
    conclude(jobs, inner, &members, true)
}

/// Tells a job's thread to come back, which it does on its own.
fn stop(jobs: &Jobs, entry: &mut Entry, force: bool) {
    entry.cancelled = true;
    // Whoever wanted it to end has been told that it does. What it would keep then is another matter.
    if entry.settings.on_failure != OnFailure::Keep {
        entry.set_phase(Phase::Over);
    }
    match &entry.endless {
        // It ends when its point does. Unless forced, what is saved goes to the target first.
        Some((node, point)) => {
            commit_until_done(|| {
                let mut commit = node.tracker.begin();
                commit.disarm(point.gate());
                vec![commit]
            });
            if force {
                entry.control.cancel();
            }
            point.end();
            if !force {
                return jobs.wake(entry);
            }
        }
        None => entry.control.cancel(),
    }
    jobs.wake(entry);
    do_not_wait_for_ever(jobs, entry);
}

/// A target may hang, a server that no longer answers for one: the thread that is at it cannot see that it is to end.
fn do_not_wait_for_ever(jobs: &Jobs, entry: &Entry) {
    let Some(jobs) = jobs.me.upgrade() else { return };
    let (key, id) = (entry.key, entry.id().to_owned());
    let watch = move || {
        let at_it = |inner: &mut Inner| inner.entry(key).is_some_and(|entry| entry.outcome.is_none());
        let inner = lock(&jobs.inner);
        let waited = jobs.changed.wait_timeout_while(inner, PATIENCE, at_it);
        let (mut inner, waited) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
        let far = inner.entry(key).map(|entry| std::mem::replace(&mut entry.far, Far::Nothing));
        drop(inner);
        if let (true, Some(far)) = (waited.timed_out(), far) {
            tracing::warn!(job = id, "was told to end and still waits: interrupted");
            far.interrupt();
        }
    };
    if let Err(error) = std::thread::Builder::new().name("job-patience".to_owned()).spawn(watch) {
        tracing::warn!(job = entry.id(), %error, "its target will not be interrupted");
    }
}

fn abort(jobs: &Jobs, entry: &mut Entry) {
    jobs.wake(entry);
    if entry.status != Status::Aborting {
        jobs.set_status(entry, Status::Aborting);
    }
}

/// Newest first.
fn group_of(inner: &Inner, key: u64) -> Vec<u64> {
    let group = inner.entries.iter().find(|entry| entry.key == key).and_then(|entry| entry.group);
    let member = |entry: &&Entry| entry.key == key || group.is_some() && entry.group == group;
    inner.entries.iter().filter(member).filter(|entry| entry.status != Status::Concluded).map(|e| e.key).collect()
}

/// Something happened to `key`: what does that mean for its group?
fn advance(jobs: &Jobs, inner: &mut Inner, key: u64) -> Spent {
    let members = group_of(inner, key);
    let mut entries: Vec<&mut Entry> = inner.entries.iter_mut().filter(|entry| members.contains(&entry.key)).collect();
    let has_failed = |entry: &Entry| entry.outcome.as_ref().is_some_and(|outcome| outcome.result.is_err());
    let any_failed = entries.iter().any(|entry| has_failed(entry));
    if any_failed {
        for entry in &mut entries {
            if entry.key == key && has_failed(entry) {
                abort(jobs, entry);
            } else if entry.outcome.is_none() && !entry.cancelled {
                stop(jobs, entry, true);
            }
        }
    }
    if entries.iter().any(|entry| entry.outcome.is_none()) {
        return Spent::new();
    }
    if any_failed {
        return conclude(jobs, inner, &members, false);
    }
    for entry in &mut entries {
        jobs.set_status(entry, Status::Pending);
        if !entry.settings.auto_finalize {
            events::pending(&jobs.events, entry);
        }
    }
    if entries.iter().all(|entry| entry.settings.auto_finalize) {
        conclude(jobs, inner, &members, true)
    } else {
        Spent::new()
    }
}

/// All threads are back: settles everything at one instant, then tells of it.
fn conclude(jobs: &Jobs, inner: &mut Inner, members: &[u64], mut success: bool) -> Spent {
    if success {
        // If this process is killed, whoever finds the freeze gone knows why.
        each(inner, members, |entry| entry.set_phase(Phase::Committing));
    }
    if success && let Err(error) = settle(inner, members, true) {
        // The targets are whole, but the bitmaps could not follow: the next increment begins where this one did.
        success = false;
        // Whoever finds the freeze gone must not take it for a success.
        each(inner, members, |entry| entry.set_phase(Phase::Running));
        for entry in inner.entries.iter_mut().filter(|entry| members.contains(&entry.key)) {
            if let Some(outcome) = &mut entry.outcome {
                outcome.result = Err(Failure::Error(error.to_string()));
            }
        }
    }
    let kept: Vec<u64> = inner.entries.iter().filter(|e| !success && keeps(e)).map(|entry| entry.key).collect();
    let over: Vec<u64> = members.iter().copied().filter(|key| !kept.contains(key)).collect();
    if !success && let Err(error) = settle(inner, &over, false) {
        tracing::error!(%error, "what a failure leaves is not stored");
    }
    // Before anybody hears of it.
    each(inner, members, |entry| {
        entry.set_phase(if kept.contains(&entry.key) { Phase::Running } else { Phase::Over });
    });
    let mut spent = Spent::new();
    for entry in inner.entries.iter_mut().filter(|entry| members.contains(&entry.key)) {
        if kept.contains(&entry.key)
            && let Some(held) = &mut entry.held
        {
            // The point and its bitmap stay as they are; the target is free.
            held.give_up_claim();
        } else if let Some(held) = entry.held.take() {
            // And so of the claim on the target, before anybody hears of the end.
            spent.extend(held.end());
        }
        if let Some((_, point)) = entry.endless.as_ref() {
            spent.push(Arc::clone(point));
        }
    }
    for key in members {
        let Some(entry) = inner.entry(*key) else { continue };
        let outcome = if kept.contains(key) { entry.outcome.clone() } else { entry.outcome.take() };
        let failure = match outcome {
            _ if success => None,
            Some(Outcome { result: Err(failure), .. }) => Some(failure),
            // It did all that it should; one of its group did not.
            _ => Some(Failure::Cancelled),
        };
        if failure.is_some() {
            abort(jobs, entry);
        }
        entry.error = failure.as_ref().map(ToString::to_string);
        if kept.contains(key) {
            entry.renew_note();
        }
        match failure {
            Some(Failure::Cancelled) => events::cancelled(&jobs.events, entry),
            Some(Failure::Error(_)) | None => events::completed(&jobs.events, entry),
        }
        jobs.set_status(entry, Status::Concluded);
        if entry.settings.auto_dismiss && !kept.contains(key) {
            jobs.set_status(entry, Status::Null);
            inner.entries.retain(|entry| entry.key != *key);
        }
    }
    spent
}

fn each(inner: &mut Inner, members: &[u64], change: impl FnMut(&mut Entry)) {
    inner.entries.iter_mut().filter(|entry| members.contains(&entry.key)).for_each(change);
}

/// Whether a failed job leaves its point in time behind.
fn keeps(entry: &Entry) -> bool {
    entry.settings.on_failure == OnFailure::Keep && entry.held.as_ref().is_some_and(Held::can_be_kept)
}

/// Forgets a concluded job; what it kept is reclaimed.
pub(super) fn dismiss(jobs: &Jobs, inner: &mut Inner, key: u64) -> Spent {
    if let Err(error) = settle(inner, &[key], false) {
        tracing::error!(%error, "what a failure leaves is not stored");
    }
    each(inner, &[key], |entry| entry.set_phase(Phase::Over));
    let mut spent = Spent::new();
    if let Some(entry) = inner.entry(key) {
        if let Some(held) = entry.held.take() {
            spent.extend(held.end());
        }
        jobs.set_status(entry, Status::Null);
    }
    inner.entries.retain(|entry| entry.key != key);
    spent
}

/// One commit for all bitmaps and gates of the group. Success has to be durable before anybody hears of it, or it is none.
fn settle(inner: &Inner, members: &[u64], success: bool) -> Result<(), StoreError> {
    let jobs: Vec<(&Held, Option<&Outcome>)> = inner
        .entries
        .iter()
        .filter(|entry| members.contains(&entry.key))
        .filter_map(|entry| Some((entry.held.as_ref()?, entry.outcome.as_ref())))
        .collect();
    let mut nodes: BTreeMap<&str, (&Node, Vec<_>)> = BTreeMap::new();
    for (held, outcome) in jobs {
        let node = held.node();
        nodes.entry(&node.id).or_insert_with(|| (node, Vec::new())).1.push((held, outcome));
    }
    let prepare = || {
        nodes
            .values()
            .map(|(node, jobs)| {
                let mut commit = node.tracker.begin();
                for (held, outcome) in jobs {
                    held.settle(&mut commit, success, *outcome);
                }
                commit
            })
            .collect()
    };
    if success {
        return commit_durably(prepare);
    }
    commit_until_done(prepare);
    Ok(())
}

/// What a job leaves behind has to come into force, so there is no giving up. If it cannot be stored, that is no reason either: a
/// start makes of what is stored what a failed job leaves.
pub(crate) fn commit_until_done<'a>(prepare: impl Fn() -> Vec<Commit<'a>>) {
    while let Err(error) = flip::commit_regardless(prepare()) {
        tracing::warn!(%error, "will try again");
        std::thread::sleep(BREATH);
    }
}

/// Commits what has to be durable (I5). On an error nothing has changed.
fn commit_durably<'a>(prepare: impl Fn() -> Vec<Commit<'a>>) -> Result<(), StoreError> {
    loop {
        match flip::commit(prepare()) {
            Ok(_) => return Ok(()),
            Err(CommitError::Store(error)) => return Err(error),
            Err(error @ CommitError::NotQuiescent(_)) => {
                tracing::warn!(%error, "will try again");
                std::thread::sleep(BREATH);
            }
        }
    }
}
