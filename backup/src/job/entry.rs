//! One job in the registry, as everybody but its own thread sees it.
//!
//! Read and changed under the registry's lock only, by `registry` (verbs), `life` (how it ends), `keeping` and `events`.

use super::JobError;
use super::backup::Outcome;
use super::keeping::Keeping;
use super::order::{Reservation, Settings};
use super::policy::IoStatus;
use super::state::{Status, Verb};
use super::work::{Far, Held, Kind};
use crate::copy::CopyControl;
use crate::node::Node;
use crate::point::Point;
use std::sync::Arc;
use uuid::Uuid;

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
    pub(super) fn new(reservation: Reservation, key: u64, settings: Settings, kind: Kind, size: u64) -> Self {
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
        self.reservation.id()
    }

    /// Bytes done, and bytes in all.
    pub(super) fn progress(&self) -> (u64, u64) {
        let (done, total) = self.control.progress();
        let begun = total > 0 || !matches!(self.status, Status::Created | Status::Running | Status::Paused);
        if self.endless.is_some() || !begun { (done, total.max(self.size)) } else { (done, total) }
    }

    pub(super) fn is_idle(&self) -> Result<(), JobError> {
        if self.retrying { Err(JobError::Retrying(self.id().to_owned())) } else { Ok(()) }
    }

    pub(super) fn accept(&self, verb: Verb) -> Result<(), JobError> {
        if self.status.accepts(verb) {
            return Ok(());
        }
        Err(JobError::Verb { id: self.id().to_owned(), status: self.status, verb })
    }
}
