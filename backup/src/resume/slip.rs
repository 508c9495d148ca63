//! What a job leaves that has no ledger. A populate notes what to search anew (`search`); of a backup that could not make a ledger, and of a
//! populate whose older image nobody can find again, there is the name alone, so that the process that comes after it says that it
//! ended.
//!
//! A *slip* on tmpfs, which is there before the command that began the job is answered, and a notice for the case that the machine
//! goes. Kept by `job::keeping`. Invariant: there is none of a job whose end was told.

use super::announce::Announcement;
use super::note::{opt, sealed, unsealed};
use super::search::Search;
use super::{Haven, Kind, Notice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

/// What is on a slip.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Written {
    pub(crate) notice: Notice,
    /// What is to be searched, if the job can be gone on with.
    pub(crate) search: Option<Search>,
}

impl Written {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut value = self.notice.value();
        if let Some(search) = &self.search {
            value["search"] = search.encode();
        }
        sealed(&value)
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let value = unsealed(bytes)?;
        Some(Self { notice: Notice::of(&value)?, search: opt(&value["search"], Search::decode)? })
    }
}

/// The slip of a job that runs.
pub(crate) struct Slip {
    haven: Haven,
    id: Uuid,
    written: Written,
    word: Arc<Announcement>,
    ended: AtomicBool,
}

impl Slip {
    /// Leaves one, or takes over the one of this id that a killed process left.
    pub(crate) fn leave(haven: &Haven, id: Uuid, written: Written) -> Self {
        let word = Announcement::of(haven, id, false);
        let slip = Self { haven: haven.clone(), id, written, word, ended: AtomicBool::new(false) };
        slip.write(false);
        slip.word.make(slip.written.notice.clone());
        slip
    }

    /// What it comes to is being stored; or that came to nothing.
    pub(crate) fn commits(&self, commits: bool) {
        self.write(commits);
    }

    /// Brings it up to date, if there is anything to go on with.
    pub(crate) fn renew(&mut self, change: impl FnOnce(&mut Search)) {
        if let Some(search) = &mut self.written.search {
            change(search);
            self.write(false);
        }
    }

    fn write(&self, commits: bool) {
        if self.ended.load(Ordering::SeqCst) {
            return;
        }
        let notice = Notice { commits, ..self.written.notice.clone() };
        let written = Written { notice, ..self.written.clone() };
        if let Err(error) = self.haven.replace(self.id, Kind::Slip, &written.encode(), false) {
            tracing::warn!(job = self.written.notice.name, %error, "if this process is killed, nothing will tell of a job");
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
