//! What a job notes of itself for the process that comes after a kill (`resume`).
//!
//! Called by `registry` and `life` under the registry's lock: a note lies on tmpfs, so writing it waits for nothing.

use super::backup::{Content, Held};
use super::entry::Entry;
use super::order::{NewJob, Reservation, Settings};
use super::populate::Populate;
use super::work::{Kind, Work};
use crate::point::Wanted;
use crate::resume::{Ledger, Member, Note, Notice, Phase, Role, Search, Slip, Written};
use std::sync::Arc;
use uuid::Uuid;

/// What a job keeps for the next process.
pub(super) enum Keeping {
    /// It can be gone on with: its note, and where that is kept.
    Going { ledger: Arc<Ledger>, note: Note },
    /// It has no ledger: what to search anew, or only its name, since it ends with this process.
    Slip(Box<Slip>),
}

impl Keeping {
    /// Of a job that begins.
    pub(super) fn of(job: &NewJob, group: Option<(Uuid, usize)>) -> Option<Self> {
        let backup = match &job.work {
            Work::Backup(backup) if backup.held.point.ledger().is_none() => {
                let haven = backup.held.node.haven()?;
                let notice = Notice::of_job(haven.boot(), job.id.id().to_owned(), Kind::Backup);
                return Some(Self::Slip(Box::new(Slip::leave(
                    haven,
                    Uuid::new_v4(),
                    Written { notice, search: None },
                ))));
            }
            Work::Backup(backup) => backup,
            Work::Populate(populate) => return Self::of_populate(job, populate, group),
        };
        let target = backup.target.file_id();
        Self::new(&job.id, &job.settings, &backup.held, |member| Member { paused: job.paused, group, target, ..member })
    }

    fn of_populate(job: &NewJob, populate: &Populate, group: Option<(Uuid, usize)>) -> Option<Self> {
        let haven = populate.node.haven()?;
        let search = populate.sought().map(|sought| Search {
            disk: haven.disk(),
            run: populate.node.tracker.run(),
            settings: job.settings.clone(),
            paused: job.paused,
            bitmap: populate.bitmap.clone(),
            freeze: populate.frozen.id(),
            sought,
            mask: populate.mask,
            group,
        });
        let notice = Notice::of_job(haven.boot(), job.id.id().to_owned(), Kind::Populate);
        Some(Self::Slip(Box::new(Slip::leave(haven, populate.slip, Written { notice, search }))))
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
            (Self::Slip(slip), Phase::Committing) => slip.commits(true),
            (Self::Slip(slip), Phase::Running) => slip.commits(false),
            (Self::Slip(slip), Phase::Over) => slip.end(),
            (Self::Slip(_), Phase::Broken) => {}
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
        let renew = |settings: &mut Settings| (settings.speed, settings.guest_latency) = (speed, latency);
        match &mut self.keeping {
            Some(Keeping::Going { ledger, note }) => {
                if let Role::Job(member) = &mut note.role {
                    renew(&mut member.settings);
                    (member.paused, member.error) = (paused, error);
                    ledger.set_note(note);
                }
            }
            Some(Keeping::Slip(slip)) => slip.renew(|search| {
                renew(&mut search.settings);
                search.paused = paused;
            }),
            None => {}
        }
    }
}
