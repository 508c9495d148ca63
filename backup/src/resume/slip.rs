//! What a job leaves that does not go on after a kill, a comparison, or a backup that could not make a ledger: its name, so that the
//! process that comes after it says that it ended.
//!
//! A *slip* on tmpfs, which is there before the command that began the job is answered, and a notice for the case that the machine
//! goes. Kept by `job::keeping`. Invariant: there is none of a job whose end was told.

use super::announce::Announcement;
use super::{Haven, Kind, Notice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// The slip of a job that runs.
pub(crate) struct Slip {
    haven: Haven,
    id: Uuid,
    notice: Notice,
    word: Arc<Announcement>,
    ended: AtomicBool,
}

impl Slip {
    /// Leaves one, for the job that is named there.
    pub(crate) fn leave(haven: &Haven, notice: Notice) -> Self {
        let id = Uuid::new_v4();
        let word = Announcement::of(haven, id, false);
        let slip = Self { haven: haven.clone(), id, notice, word, ended: AtomicBool::new(false) };
        slip.write(false);
        slip.word.make(slip.notice.clone());
        slip
    }

    /// What it comes to is being stored: whether it succeeded, the next process could not tell.
    pub(crate) fn commits(&self) {
        self.write(true);
    }

    fn write(&self, commits: bool) {
        let notice = Notice { commits, ..self.notice.clone() };
        if let Err(error) = self.haven.replace(self.id, Kind::Slip, &notice.encode(), false) {
            tracing::warn!(job = self.notice.name, %error, "if this process is killed, nothing will tell of a job");
        }
    }

    /// The job is over.
    pub(crate) fn end(&self) {
        if !self.ended.swap(true, Ordering::SeqCst) {
            self.haven.take_away(self.id, Kind::Slip);
            self.word.withdraw();
        }
    }
}

impl Drop for Slip {
    fn drop(&mut self) {
        self.end();
    }
}
