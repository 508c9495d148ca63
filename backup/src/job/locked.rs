//! How jobs begin: under the registry's lock, together with the commits that freeze their bitmaps and arm their points.
//!
//! Used by `control` for every change of bitmaps and gates, and for `job-retry`, which begins a job again on its kept point in time.

use super::backup::{self, Backup, Destination};
use super::entry::Entry;
use super::keeping::Keeping;
use super::life;
use super::order::{NewJob, Reservation, Settings};
use super::registry::{Inner, lock};
use super::state::{Status, Verb};
use super::work::{Held, Kind, Work};
use super::{JobError, Jobs};
use crate::copy::CopyControl;
use crate::node::Node;
use crate::target::Target;
use blkmark_bitmap::{Commit, CommitError, flip};
use std::any::Any;
use std::sync::{Arc, MutexGuard};
use uuid::Uuid;

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
        let key = inner.new_key();
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
        let group = (grouped && new.len() > 1).then(|| inner.new_key());
        let members = group.map(|_| (Uuid::new_v4(), new.len()));
        inner.threads.retain(|thread| !thread.is_finished());
        let (mut ready, mut paused) = (Vec::new(), Vec::new());
        for job in new {
            let key = inner.new_key();
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

impl Jobs {
    /// Excludes every other change of jobs, bitmaps and gates.
    pub fn lock(self: &Arc<Self>) -> Locked<'_> {
        Locked { jobs: self, inner: lock(&self.inner), spent: Vec::new() }
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
}
