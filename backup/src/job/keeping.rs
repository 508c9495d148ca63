//! What a job notes of itself for the process that comes after a kill (`resume`), and what is shown of jobs that ended with the
//! one before.
//!
//! Called by `registry` and `life` under the registry's lock: a note lies on tmpfs, so writing it waits for nothing.

use super::backup::{Content, Held};
use super::registry::{Entry, NewJob, Reservation, Settings, lock};
use super::work::{Kind, Work};
use super::{JobError, Jobs};
use crate::point::Wanted;
use crate::resume::{Ledger, Member, Note, Phase, Role};
use serde_json::{Value, json};
use std::sync::Arc;
use uuid::Uuid;

/// A job's note, and where it is kept.
pub(super) struct Keeping {
    ledger: Arc<Ledger>,
    note: Note,
}

impl Keeping {
    /// Of a job that begins, if another process could go on with it.
    pub(super) fn of(job: &NewJob, group: Option<(Uuid, usize)>) -> Option<Self> {
        let Work::Backup(backup) = &job.work else { return None };
        let target = backup.target.file_id();
        Self::new(&job.id, &job.settings, &backup.held, |member| Member { paused: job.paused, group, target, ..member })
    }

    /// Of one that failed, and whose point is kept.
    pub(super) fn of_kept(id: &Reservation, settings: &Settings, held: &Held, error: Option<String>) -> Option<Self> {
        Self::new(id, settings, held, |member| Member { error, ..member })
    }

    fn new(
        id: &Reservation,
        settings: &Settings,
        held: &Held,
        complete: impl FnOnce(Member) -> Member,
    ) -> Option<Self> {
        let point = &held.point;
        let ledger = Arc::clone(point.ledger()?);
        let member = Member {
            id: id.id().to_owned(),
            settings: settings.clone(),
            paused: false,
            hold: held.hold.clone(),
            of_bitmap: matches!(point.wanted(), Wanted::Frozen(_)),
            destination: held.destination.clone(),
            target: None,
            follows: held.content == Content::Overwritten,
            compress: held.compress,
            group: None,
            error: None,
        };
        let note = Note {
            boot: ledger.haven().boot(),
            disk: ledger.haven().disk(),
            run: held.node.tracker.run(),
            cluster: point.cluster(),
            options: point.options(),
            role: Role::Job(Box::new(complete(member))),
        };
        ledger.set_note(&note);
        ledger.announce(note.notice());
        Some(Self { ledger, note })
    }

    /// How far it is.
    pub(super) fn set_phase(&self, phase: Phase) {
        if let Err(error) = self.ledger.set_phase(phase) {
            tracing::error!(%error, ?phase, "a ledger cannot say how far its job is");
        }
    }
}

impl Entry {
    /// Notes how far it is, if it notes anything.
    pub(super) fn set_phase(&self, phase: Phase) {
        if let Some(keeping) = &self.keeping {
            keeping.set_phase(phase);
        }
    }

    /// Brings its note up to date, if it has one.
    pub(super) fn renew_note(&mut self) {
        let (paused, speed, error) = (self.user_paused, self.speed, self.error.clone());
        let latency = self.settings.guest_latency;
        if let Some(Keeping { ledger, note }) = &mut self.keeping
            && let Role::Job(member) = &mut note.role
        {
            (member.paused, member.settings.speed, member.settings.guest_latency) = (paused, speed, latency);
            member.error = error;
            ledger.set_note(note);
        }
    }
}

/// A job that ended with the process before this one.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) id: String,
    /// Why; `None`: it had succeeded, and nobody was told.
    pub(crate) error: Option<String>,
}

impl Jobs {
    /// Shows a job that ended with the process before this one, as concluded, until it is dismissed or its id is taken.
    pub(crate) fn show_ended(&self, ended: Ended) {
        // No event: a client that begins a job of the same id would take it for that one's end.
        lock(&self.ended).push(ended);
    }

    /// What queries show of them.
    pub(super) fn ended(&self) -> Vec<Ended> {
        lock(&self.ended).clone()
    }

    /// Forgets one.
    pub(super) fn dismiss_ended(&self, id: &str) -> Result<(), JobError> {
        let mut ended = lock(&self.ended);
        let at = ended.iter().position(|ended| ended.id == id).ok_or(JobError::NotFound)?;
        ended.remove(at);
        Ok(())
    }
}

impl Ended {
    /// A member of `query-jobs`.
    pub(super) fn info(&self) -> Value {
        let mut info = json!({
            "id": self.id, "type": Kind::Backup.name(), "status": "concluded", "current-progress": 0, "total-progress": 0,
        });
        if let Some(error) = &self.error {
            info["error"] = error.clone().into();
        }
        info
    }

    /// A member of `query-block-jobs`.
    pub(super) fn block_info(&self) -> Value {
        let mut info = json!({
            "type": Kind::Backup.name(), "device": self.id, "len": 0, "offset": 0, "busy": false, "paused": false, "speed": 0,
            "max-guest-latency": 0, "io-status": "ok", "ready": false, "status": "concluded", "auto-finalize": true,
            "auto-dismiss": false,
        });
        if let Some(error) = &self.error {
            info["error"] = error.clone().into();
        }
        info
    }
}
