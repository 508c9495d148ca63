//! The durable word that there was something, a point in time or a job, for the case that the machine goes: a *notice* where scratch
//! is.
//!
//! Written on a thread of its own, since that file system takes its time and may hang. Called by `ledger` and `slip`. Invariant: once
//! it was withdrawn, no notice is left, or whoever is writing it takes it away.

use super::{Haven, Kind, Notice};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use uuid::Uuid;

/// How long the end of something waits for the word of its beginning.
const PATIENCE: Duration = Duration::from_secs(1);

/// Whether there is durable word of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    No,
    /// It is being written.
    Underway,
    There,
    /// It is being written, and to be taken away again.
    Unwanted,
}

/// The notice of one point in time or job.
pub(super) struct Announcement {
    haven: Haven,
    id: Uuid,
    state: Mutex<State>,
    changed: Condvar,
}

impl Announcement {
    /// Of what has this id. `there`: a process before this one made it.
    pub(super) fn of(haven: &Haven, id: Uuid, there: bool) -> Arc<Self> {
        let state = Mutex::new(if there { State::There } else { State::No });
        Arc::new(Self { haven: haven.clone(), id, state, changed: Condvar::new() })
    }

    /// Makes it.
    pub(super) fn make(self: &Arc<Self>, notice: Notice) {
        *self.state() = State::Underway;
        let this = Arc::clone(self);
        let make = move || {
            let written = this.haven.replace(this.id, Kind::Notice, &notice.encode(), true);
            if let Err(error) = &written {
                tracing::warn!(point = %this.id, %error, "a power cut will end a job without a word");
            }
            let mut state = this.state();
            if *state == State::Unwanted {
                this.haven.take_away(this.id, Kind::Notice);
            }
            *state = if written.is_ok() { State::There } else { State::No };
            drop(state);
            this.changed.notify_all();
        };
        if let Err(error) = std::thread::Builder::new().name("point-notice".to_owned()).spawn(make) {
            tracing::warn!(point = %self.id, %error, "a power cut will end a job without a word");
            *self.state() = State::No;
        }
    }

    /// Takes it away.
    pub(super) fn withdraw(&self) {
        let underway = |state: &mut State| *state == State::Underway;
        let waited = self.changed.wait_timeout_while(self.state(), PATIENCE, underway);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match *state {
            // Whoever is at it takes it away.
            State::Underway => *state = State::Unwanted,
            State::There => {
                *state = State::No;
                drop(state);
                self.haven.take_away(self.id, Kind::Notice);
            }
            State::No | State::Unwanted => {}
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
