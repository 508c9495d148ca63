//! What a job notes of itself for the process that comes after a kill (`resume`).
//!
//! Called by `registry` and `life` under the registry's lock: a note lies on tmpfs, so writing it waits for nothing.

use super::backup::{Content, Held};
use super::entry::Entry;
use super::order::{NewJob, Reservation, Settings};
use super::work::{Kind, Work};
use crate::node::Node;
use crate::point::Wanted;
use crate::resume::{Ledger, Member, Note, Notice, Phase, Role, Slip};
use std::sync::Arc;
use uuid::Uuid;

/// What a job keeps for the next process.
pub(super) enum Keeping {
    /// It can be gone on with: its note, and where that is kept.
    Going { ledger: Arc<Ledger>, note: Note },
    /// It ends with this one, which is to be told.
    Ending(Slip),
}

impl Keeping {
    /// Of a job that begins.
    pub(super) fn of(job: &NewJob, group: Option<(Uuid, usize)>) -> Option<Self> {
        let ending = |node: &Node, kind| {
            let haven = node.haven()?;
            let notice = Notice::of_job(haven.boot(), job.id.id().to_owned(), kind);
            Some(Self::Ending(Slip::leave(haven, notice)))
        };
        let backup = match &job.work {
            Work::Backup(backup) if backup.held.point.ledger().is_none() => {
                return ending(&backup.held.node, Kind::Backup);
            }
            Work::Backup(backup) => backup,
            Work::Populate(populate) => return ending(&populate.node, Kind::Populate),
        };
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
            point: point.ledger_of_owner(),
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
        Some(Self::Going { ledger, note })
    }

    /// How far it is.
    pub(super) fn set_phase(&self, phase: Phase) {
        match (self, phase) {
            (Self::Going { ledger, .. }, phase) => {
                if let Err(error) = ledger.set_phase(phase) {
                    tracing::error!(%error, ?phase, "a ledger cannot say how far its job is");
                }
            }
            (Self::Ending(slip), Phase::Committing) => slip.commits(),
            (Self::Ending(slip), Phase::Over) => slip.end(),
            (Self::Ending(_), Phase::Running | Phase::Broken) => {}
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
        if let Some(Keeping::Going { ledger, note }) = &mut self.keeping
            && let Role::Job(member) = &mut note.role
        {
            (member.paused, member.settings.speed, member.settings.guest_latency) = (paused, speed, latency);
            member.error = error;
            ledger.set_note(note);
        }
    }
}
