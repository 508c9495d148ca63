//! Which jobs there are, what can be asked of them, and what queries show.
//!
//! One mutex guards all of it, and it is the control mutex of the daemon too: whoever commits changes to bitmaps or gates
//! holds it ([`Jobs::lock`]), so that no two commits over several disks can wait for each other. It is never held during
//! I/O on a target, except for closing one that is already durable; no queue thread ever takes it.

use super::backup::{self, Backup, Destination, Outcome};
use super::ended::{AllEnded, Ended};
use super::keeping::Keeping;
use super::policy::{IoStatus, OnError, OnFailure};
use super::state::{Status, Verb};
use super::work::{Far, Held, Kind, Work};
use super::{events, life};
use crate::copy::{CopyControl, GUEST_LATENCY};
use crate::node::Node;
use crate::point::Point;
use crate::qmp::Events;
use crate::target::Target;
use blkmark_bitmap::{Commit, CommitError, flip};
use serde_json::{Map, Value, json};
use std::any::Any;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// Why a command about a job was refused. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JobError {
    /// No job of this id.
    #[error("Job not found")]
    NotFound,
    /// Its state does not accept the command.
    #[error("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")]
    Verb {
        /// The job.
        id: String,
        /// Its state.
        status: Status,
        /// The command.
        verb: Verb,
    },
    /// It is paused by command, or by an error.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// Nobody paused it.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// A paused job can only be cancelled by force.
    #[error("The block job for device '{0}' is currently paused")]
    Paused(String),
    /// A negative speed.
    #[error("Parameter 'speed' expects a non-negative value")]
    Speed,
    /// Another job has this id.
    #[error("Job ID '{0}' already in use")]
    IdInUse(String),
    /// It must begin with a letter, and go on with letters, digits, '-', '.', '_'.
    #[error("Invalid job ID '{0}'")]
    InvalidId(String),
    /// Its point in time is gone, or was never to be kept.
    #[error("Job '{0}' keeps no point in time to try again")]
    NotKept(String),
    /// Somebody is at it.
    #[error("Job '{0}' is being tried again")]
    Retrying(String),
    /// It is of another type than the client says.
    #[error("Job '{0}' is of another type")]
    OtherKind(String),
    /// The daemon is on its way out.
    #[error("The daemon is shutting down")]
    ShuttingDown,
}

/// How a job is to behave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Bytes a second; 0: as fast as it goes.
    pub speed: u64,
    /// Goes from pending to concluded by itself.
    pub auto_finalize: bool,
    /// Goes from concluded to null by itself.
    pub auto_dismiss: bool,
    /// When the disk cannot be read.
    pub on_source_error: OnError,
    /// When the target cannot be written.
    pub on_target_error: OnError,
    /// How long the guest's requests may take before the copy makes room for them; zero: whatever.
    pub guest_latency: Duration,
    /// Whether the target may take blocks from the disk's file, where it can.
    pub sharing: bool,
    /// What becomes of its point in time if it fails.
    pub on_failure: OnFailure,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            speed: 0,
            auto_finalize: true,
            auto_dismiss: true,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            guest_latency: GUEST_LATENCY,
            sharing: false,
            on_failure: OnFailure::Reclaim,
        }
    }
}

/// A job id that nobody else can take while this lives.
#[derive(Debug)]
pub struct Reservation {
    id: String,
    taken: Arc<Mutex<HashSet<String>>>,
}

impl Reservation {
    /// The id.
    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        lock(&self.taken).remove(&self.id);
    }
}

/// A job whose freeze and gate are in force, to be started.
#[derive(Debug)]
pub struct NewJob {
    /// Its id.
    pub id: Reservation,
    /// How it is to behave.
    pub settings: Settings,
    /// Its work.
    pub work: Work,
    /// It begins paused.
    pub paused: bool,
}

/// A job, as everybody but its own thread sees it.
pub(super) struct Entry {
    pub(super) reservation: Reservation,
    pub(super) key: u64,
    pub(super) kind: Kind,
    pub(super) group: Option<u64>,
    pub(super) settings: Settings,
    pub(super) control: Arc<CopyControl>,
    pub(super) status: Status,
    /// By command, or by an error that stopped it.
    pub(super) user_paused: bool,
    pub(super) io_status: IoStatus,
    /// How often an error stopped it.
    pub(super) stops: u64,
    pub(super) speed: u64,
    /// It shall end as cancelled, however its thread comes back.
    pub(super) cancelled: bool,
    /// An error was reported that ends it.
    pub(super) failing: bool,
    /// Set when its thread is through with it, together with `held`.
    pub(super) outcome: Option<Outcome>,
    pub(super) held: Option<Held>,
    /// A retry is being prepared, without the lock.
    pub(super) retrying: bool,
    /// What its thread may wait for.
    pub(super) far: Far,
    /// What ends a job that would follow the guest's writes for ever.
    pub(super) endless: Option<(Arc<Node>, Arc<Point>)>,
    /// Bytes of the disk: the length until the plan is known, and of an endless job.
    pub(super) size: u64,
    pub(super) error: Option<String>,
    /// The freeze that it holds.
    pub(super) freeze: Option<Uuid>,
    /// What it notes for the process that comes after a kill.
    pub(super) keeping: Option<Keeping>,
}

impl Entry {
    /// One of which nothing has happened yet.
    fn new(reservation: Reservation, key: u64, settings: Settings, kind: Kind, size: u64) -> Self {
        Self {
            reservation,
            key,
            kind,
            group: None,
            speed: settings.speed,
            settings,
            control: Arc::default(),
            status: Status::Undefined,
            user_paused: false,
            io_status: IoStatus::Ok,
            stops: 0,
            cancelled: false,
            failing: false,
            outcome: None,
            held: None,
            retrying: false,
            far: Far::Nothing,
            endless: None,
            size,
            error: None,
            freeze: None,
            keeping: None,
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.reservation.id
    }

    /// Bytes done, and bytes in all.
    pub(super) fn progress(&self) -> (u64, u64) {
        let (done, total) = self.control.progress();
        let begun = total > 0 || !matches!(self.status, Status::Created | Status::Running | Status::Paused);
        if self.endless.is_some() || !begun { (done, total.max(self.size)) } else { (done, total) }
    }

    fn is_idle(&self) -> Result<(), JobError> {
        if self.retrying { Err(JobError::Retrying(self.id().to_owned())) } else { Ok(()) }
    }

    fn accept(&self, verb: Verb) -> Result<(), JobError> {
        if self.status.accepts(verb) {
            return Ok(());
        }
        Err(JobError::Verb { id: self.id().to_owned(), status: self.status, verb })
    }
}

#[derive(Default)]
pub(super) struct Inner {
    /// Newest first, as QEMU lists them.
    pub(super) entries: Vec<Entry>,
    next_key: u64,
    closing: bool,
    threads: Vec<JoinHandle<()>>,
}

impl Inner {
    pub(super) fn entry(&mut self, key: u64) -> Option<&mut Entry> {
        self.entries.iter_mut().find(|entry| entry.key == key)
    }

    fn by_id(&mut self, id: &str) -> Result<&mut Entry, JobError> {
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

/// Whether QEMU would take it as an id: a letter, then letters, digits and `-._`.
pub(crate) fn well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
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
        if !well_formed(id) {
            return Err(JobError::InvalidId(id.to_owned()));
        }
        if !lock(&self.taken).insert(id.to_owned()) {
            return Err(JobError::IdInUse(id.to_owned()));
        }
        Ok(Reservation { id: id.to_owned(), taken: Arc::clone(&self.taken) })
    }

    /// Excludes every other change of jobs, bitmaps and gates.
    pub fn lock(self: &Arc<Self>) -> Locked<'_> {
        Locked { jobs: self, inner: lock(&self.inner), spent: Vec::new() }
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

    /// Prepares to begin a concluded job again on its kept point in time: nobody else can, until this is dropped or
    /// [`Locked::retry`] takes it. It says which disk is backed up, and where the last try went.
    pub fn prepare_retry(self: &Arc<Self>, id: &str) -> Result<Retry, JobError> {
        let mut inner = lock(&self.inner);
        let entry = inner.by_id(id)?;
        entry.accept(Verb::Retry)?;
        entry.is_idle()?;
        let Some(Held::Backup(held)) = &entry.held else { return Err(JobError::NotKept(id.to_owned())) };
        let retry = Retry {
            jobs: Arc::clone(self),
            key: entry.key,
            disk: Arc::clone(&held.node),
            destination: held.destination.clone(),
            compress: held.compress,
        };
        entry.retrying = true;
        Ok(retry)
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

    /// `query-jobs`.
    pub fn query(&self) -> Value {
        let inner = lock(&self.inner);
        let shown = inner.entries.iter().map(|entry| {
            let (offset, len) = entry.progress();
            let mut info = Map::new();
            info.insert("id".into(), entry.id().into());
            info.insert("type".into(), entry.kind.name().into());
            info.insert("status".into(), entry.status.name().into());
            info.insert("current-progress".into(), offset.into());
            info.insert("total-progress".into(), len.into());
            if entry.status == Status::Concluded && entry.held.is_some() {
                info.insert("kept".into(), true.into());
            }
            if let Some(error) = &entry.error {
                info.insert("error".into(), error.clone().into());
            }
            Value::Object(info)
        });
        shown.chain(self.ended().iter().map(Ended::info)).collect()
    }

    /// `query-block-jobs`.
    pub fn query_block(&self) -> Value {
        let inner = lock(&self.inner);
        let shown = inner.entries.iter().map(|entry| {
            let (offset, len) = entry.progress();
            let mut info = json!({
                "type": entry.kind.name(),
                "device": entry.id(),
                "len": len,
                "offset": offset,
                "busy": entry.status == Status::Running,
                "paused": entry.user_paused,
                "speed": entry.speed,
                "max-guest-latency": entry.settings.guest_latency.as_micros() as u64,
                "io-status": entry.io_status.name(),
                "ready": false,
                "status": entry.status.name(),
                "auto-finalize": entry.settings.auto_finalize,
                "auto-dismiss": entry.settings.auto_dismiss,
            });
            if let Some(error) = &entry.error {
                info["error"] = error.clone().into();
            }
            info
        });
        shown.chain(self.ended().iter().map(Ended::block_info)).collect()
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

/// A kept point in time that is about to be copied once more.
pub struct Retry {
    jobs: Arc<Jobs>,
    key: u64,
    /// The disk.
    pub disk: Arc<Node>,
    /// Where the last try went.
    pub destination: Destination,
    /// Whether it was to be compressed there.
    pub compress: bool,
}

impl Drop for Retry {
    fn drop(&mut self) {
        if let Some(entry) = lock(&self.jobs.inner).entry(self.key) {
            entry.retrying = false;
        }
    }
}

/// The right to change bitmaps and gates and to start jobs, while nobody else does.
pub struct Locked<'a> {
    jobs: &'a Arc<Jobs>,
    inner: MutexGuard<'a, Inner>,
    /// Dropped after the guard.
    spent: Vec<life::Spent>,
}

impl Locked<'_> {
    /// Refused once the daemon is on its way out.
    pub fn may_start(&self) -> Result<(), JobError> {
        if self.inner.closing { Err(JobError::ShuttingDown) } else { Ok(()) }
    }

    /// Puts drafts in force, durably where the disks have stores.
    pub fn commit(&mut self, commits: Vec<Commit<'_>>) -> Result<Vec<flip::Cut>, CommitError> {
        flip::commit(commits)
    }

    /// The same; `begun` is called as soon as they are in force, so that no guest waits for a store.
    pub fn commit_then(
        &mut self,
        commits: Vec<Commit<'_>>,
        begun: impl FnOnce(&[flip::Cut]),
    ) -> Result<Vec<flip::Cut>, CommitError> {
        flip::commit_then(commits, begun)
    }

    /// Begins a job again: the same point and the same freeze, under the same id, into `target`.
    pub fn retry(
        &mut self,
        retry: &Retry,
        target: Arc<dyn Target>,
        compress: bool,
        destination: Destination,
        claim: Option<Box<dyn Any + Send + Sync>>,
    ) {
        let Some(at) = self.inner.entries.iter().position(|entry| entry.key == retry.key) else { return };
        let mut entry = self.inner.entries.remove(at);
        let Some(Held::Backup(held)) = entry.held.take() else { return };
        // A job of its own in all but its id: whoever watches sees `concluded` become `created`.
        let work = Work::Backup(Backup { held: backup::Held { destination, claim, compress, ..held }, target });
        self.start(vec![NewJob { id: entry.reservation, settings: entry.settings, work, paused: false }], false);
    }

    /// Puts back a job that had failed, with the point that is kept for another try.
    pub(crate) fn put_back(&mut self, id: Reservation, settings: Settings, held: backup::Held, error: Option<String>) {
        let inner = &mut *self.inner;
        let key = inner.next_key;
        inner.next_key += 1;
        let keeping = Keeping::of_kept(&id, &settings, &held, error.clone());
        self.jobs.forget_ended(id.id());
        let entry = Entry {
            status: Status::Concluded,
            freeze: held.hold.as_ref().map(|hold| hold.freeze),
            error,
            keeping,
            ..Entry::new(id, key, settings, Kind::Backup, held.point.size())
        };
        inner.entries.insert(0, Entry { held: Some(Held::Backup(held)), ..entry });
    }

    /// Starts jobs whose freezes and gates are in force, as one group if `grouped`.
    pub fn start(&mut self, new: Vec<NewJob>, grouped: bool) {
        let inner = &mut *self.inner;
        let group = (grouped && new.len() > 1).then_some(inner.next_key);
        let members = group.map(|_| (Uuid::new_v4(), new.len()));
        inner.threads.retain(|thread| !thread.is_finished());
        let (mut ready, mut paused) = (Vec::new(), Vec::new());
        for job in new {
            let key = inner.next_key;
            inner.next_key += 1;
            let control = Arc::new(CopyControl::default());
            control.set_speed(job.settings.speed);
            control.set_guest_latency(job.settings.guest_latency);
            control.set_sharing(job.settings.sharing);
            let keeping = Keeping::of(&job, members);
            if job.paused {
                paused.push(key);
            }
            let work = job.work;
            let mut entry = Entry {
                group,
                control,
                far: work.far(),
                endless: work.endless(),
                freeze: work.freeze(),
                keeping,
                ..Entry::new(job.id, key, job.settings, work.kind(), work.size())
            };
            // One that is only shown gives way.
            self.jobs.forget_ended(entry.id());
            self.jobs.set_status(&mut entry, Status::Created);
            inner.entries.insert(0, entry);
            ready.push((key, work));
        }
        for (key, work) in ready.into_iter().rev() {
            if let Some(entry) = inner.entry(key) {
                self.jobs.set_status(entry, Status::Running);
                if paused.contains(&key) {
                    self.jobs.rest(entry);
                }
                match life::launch(self.jobs, entry, work) {
                    Ok(thread) => inner.threads.push(thread),
                    Err(unborn) => self.spent.push(life::finish(self.jobs, inner, key, unborn.0, unborn.1)),
                }
            }
        }
    }
}
