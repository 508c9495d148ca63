//! Which jobs there are, and what can be asked of them.
//!
//! One mutex guards all of it, and it is the control mutex of the daemon too: whoever commits changes to bitmaps or gates
//! holds it ([`Jobs::lock`]), so that no two commits over several disks can wait for each other. It is never held during
//! I/O on a target, except for closing one that is already durable; no queue thread ever takes it.

use super::JobError;
use super::ended::AllEnded;
use super::entry::Entry;
use super::order::Reservation;
use super::policy::IoStatus;
use super::state::{Status, Verb};
use super::work::Kind;
use super::{events, life};
use crate::qmp::Events;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use uuid::Uuid;

#[derive(Default)]
pub(super) struct Inner {
    /// Newest first, as QEMU lists them.
    pub(super) entries: Vec<Entry>,
    next_key: u64,
    pub(super) closing: bool,
    pub(super) threads: Vec<JoinHandle<()>>,
}

impl Inner {
    pub(super) fn new_key(&mut self) -> u64 {
        self.next_key += 1;
        self.next_key
    }

    pub(super) fn entry(&mut self, key: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.key == key)
    }

    pub(super) fn by_id(&mut self, id: &str) -> Result<&mut Entry, JobError> {
        self.entries.iter_mut().find(|entry| entry.id() == id).ok_or(JobError::NotFound)
    }
}

/// All jobs of the daemon.
pub struct Jobs {
    pub(super) inner: Mutex<Inner>,
    /// A job was resumed, cancelled, or is over.
    pub(super) changed: Condvar,
    pub(super) events: Events,
    taken: Arc<Mutex<HashSet<String>>>,
    /// Jobs that ended with the process before this one.
    pub(super) ended: AllEnded,
    /// For threads that act on their own.
    pub(super) me: Weak<Self>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Jobs {
    /// No jobs yet; they will tell of themselves through `events`.
    pub fn new(events: Events) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            inner: Mutex::default(),
            changed: Condvar::new(),
            events,
            taken: Arc::default(),
            ended: AllEnded::default(),
            me: Weak::clone(me),
        })
    }

    /// Takes an id for a job to come. What is not used is free again when the reservation is dropped.
    pub fn reserve(&self, id: &str) -> Result<Reservation, JobError> {
        Reservation::take(id, &self.taken)
    }

    fn with<T>(&self, id: &str, change: impl FnOnce(&Self, &mut Entry) -> Result<T, JobError>) -> Result<T, JobError> {
        let mut inner = lock(&self.inner);
        let result = change(self, inner.by_id(id)?);
        drop(inner);
        self.changed.notify_all();
        result
    }

    pub(super) fn set_status(&self, entry: &mut Entry, status: Status) {
        if !entry.status.may_become(status) {
            debug_assert!(false, "{} -> {status}", entry.status);
            tracing::error!(job = entry.id(), from = %entry.status, to = %status, "a job changed its state out of turn");
        }
        entry.status = status;
        events::status(&self.events, entry.id(), status);
    }

    /// Rests at the next chunk.
    pub fn pause(&self, id: &str) -> Result<(), JobError> {
        self.with(id, |jobs, entry| {
            entry.accept(Verb::Pause)?;
            if entry.user_paused {
                return Err(JobError::AlreadyPaused);
            }
            jobs.rest(entry);
            Ok(())
        })
    }

    pub(super) fn rest(&self, entry: &mut Entry) {
        // A job that is being cancelled has nothing left to rest from.
        if entry.cancelled {
            return;
        }
        entry.user_paused = true;
        entry.control.pause();
        entry.renew_note();
        if entry.status == Status::Running {
            self.set_status(entry, Status::Paused);
        }
    }

    /// Goes on.
    pub fn resume(&self, id: &str) -> Result<(), JobError> {
        self.with(id, |jobs, entry| {
            if !entry.user_paused {
                return Err(JobError::NotPaused);
            }
            entry.accept(Verb::Resume)?;
            entry.io_status = IoStatus::Ok;
            jobs.wake(entry);
            Ok(())
        })
    }

    pub(super) fn wake(&self, entry: &mut Entry) {
        if std::mem::take(&mut entry.user_paused) {
            entry.renew_note();
        }
        entry.control.resume();
        if entry.status == Status::Paused {
            self.set_status(entry, Status::Running);
        }
    }

    /// Bounds the bytes a second; 0 takes the bound away.
    pub fn set_speed(&self, id: &str, speed: i64) -> Result<(), JobError> {
        self.with(id, |_, entry| {
            entry.accept(Verb::SetSpeed)?;
            let speed = u64::try_from(speed).map_err(|_| JobError::Speed)?;
            entry.speed = speed;
            entry.control.set_speed(speed);
            entry.renew_note();
            Ok(())
        })
    }

    /// Bounds what the guest's requests may take from now on; zero takes the bound away.
    pub fn set_guest_latency(&self, id: &str, kind: Kind, limit: Duration) -> Result<(), JobError> {
        self.with(id, |_, entry| {
            entry.accept(Verb::Change)?;
            if entry.kind != kind {
                return Err(JobError::OtherKind(id.to_owned()));
            }
            // Its settings too: `job-retry` goes on with them.
            entry.settings.guest_latency = limit;
            entry.control.set_guest_latency(limit);
            entry.renew_note();
            Ok(())
        })
    }

    /// Only a job that is ready can be completed, and a backup never is.
    pub fn complete(&self, id: &str) -> Result<(), JobError> {
        self.with(id, |_, entry| entry.accept(Verb::Complete))
    }

    /// Forgets a concluded job.
    pub fn dismiss(&self, id: &str) -> Result<(), JobError> {
        let mut inner = lock(&self.inner);
        let entry = match inner.by_id(id) {
            Err(JobError::NotFound) => return self.dismiss_ended(id),
            found => found?,
        };
        entry.accept(Verb::Dismiss)?;
        entry.is_idle()?;
        let key = entry.key;
        let spent = life::dismiss(self, &mut inner, key);
        drop(inner);
        drop(spent);
        Ok(())
    }

    /// Makes the result of a pending job stand, and of its whole group.
    pub fn finalize(&self, id: &str) -> Result<(), JobError> {
        let mut inner = lock(&self.inner);
        let entry = inner.by_id(id)?;
        entry.accept(Verb::Finalize)?;
        let key = entry.key;
        let spent = life::finalize(self, &mut inner, key);
        drop(inner);
        self.changed.notify_all();
        drop(spent);
        Ok(())
    }

    /// Ends a job as a failure, and its group with it. Without `force` a paused job is refused if `careful`
    /// (block-job-cancel), and one with sync=none first writes what it has saved.
    pub fn cancel(&self, id: &str, force: bool, careful: bool) -> Result<(), JobError> {
        let mut inner = lock(&self.inner);
        let entry = inner.by_id(id)?;
        if careful && entry.user_paused && !force {
            return Err(JobError::Paused(entry.id().to_owned()));
        }
        entry.accept(Verb::Cancel)?;
        let key = entry.key;
        let spent = life::cancel(self, &mut inner, key, force);
        drop(inner);
        self.changed.notify_all();
        drop(spent);
        Ok(())
    }

    /// The freezes that jobs hold.
    pub(crate) fn freezes(&self) -> Vec<Uuid> {
        lock(&self.inner).entries.iter().filter_map(|entry| entry.freeze).collect()
    }

    /// Cancels every job, and returns when all are over and their bitmaps reclaimed. No new ones are accepted.
    pub fn shut_down(&self) {
        let mut spent = Vec::new();
        let mut inner = lock(&self.inner);
        inner.closing = true;
        let alive: Vec<u64> =
            inner.entries.iter().filter(|e| e.status.accepts(Verb::Cancel)).map(|entry| entry.key).collect();
        for key in alive {
            // A sibling may have taken it along.
            if inner.entry(key).is_some_and(|entry| entry.status.accepts(Verb::Cancel)) {
                spent.push(life::cancel(self, &mut inner, key, true));
            }
        }
        let is_kept = |entry: &&Entry| entry.status == Status::Concluded && entry.held.is_some();
        let kept: Vec<u64> = inner.entries.iter().filter(is_kept).map(|entry| entry.key).collect();
        for key in kept {
            spent.push(life::dismiss(self, &mut inner, key));
        }
        self.changed.notify_all();
        let threads = std::mem::take(&mut inner.threads);
        drop(inner);
        drop(spent);
        for thread in threads {
            // A job thread that panicked has said so; nothing is left to wait for.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Jobs").field("jobs", &lock(&self.inner).entries.len()).finish()
    }
}
