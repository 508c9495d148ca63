//! Jobs that ended with the process before this one: nobody was connected when they did, so they are shown and told until somebody
//! says that he knows.
//!
//! Filled once by `control::resume`, before there is a control socket. Queries show such a job as concluded; each client is told of
//! it as soon as it has negotiated, with the time at which this was found out. It goes when it is dismissed, or when a job of
//! its id begins.
//!
//! Invariant: what a client was told of, and has not been told to be gone (`null`, or `created`), queries show. The lock in here is the
//! last one to be taken, and nothing is told under it.

use super::registry::lock;
use super::state::Status;
use super::work::Kind;
use super::{JobError, Jobs, events};
use crate::qmp::Event;
use serde_json::{Value, json};
use std::sync::Mutex;
use std::time::SystemTime;

/// A job that ended with the process before this one.
#[derive(Clone, Debug)]
pub(crate) struct Ended {
    pub(crate) id: String,
    pub(crate) kind: Kind,
    /// Bytes of the disk.
    pub(crate) size: u64,
    /// Why; `None`: it had succeeded, and nobody was told.
    pub(crate) error: Option<String>,
}

/// All of them, with the time at which each was found to be over.
#[derive(Default)]
pub(super) struct AllEnded(Mutex<Vec<(SystemTime, Ended)>>);

impl Jobs {
    /// Shows a job that ended with the process before this one, as concluded, until it is dismissed or a job of its id begins.
    pub(crate) fn show_ended(&self, ended: Ended) {
        lock(&self.ended.0).push((SystemTime::now(), ended));
    }

    /// What a client is told that has just come.
    pub(crate) fn told_before(&self) -> Vec<(SystemTime, Event)> {
        let ended = lock(&self.ended.0);
        ended.iter().flat_map(|(time, ended)| ended.events().map(|event| (*time, event))).collect()
    }

    /// What queries show of them.
    pub(super) fn ended(&self) -> Vec<Ended> {
        lock(&self.ended.0).iter().map(|(_, ended)| ended.clone()).collect()
    }

    /// Forgets those of an id. False: there is none.
    pub(super) fn forget_ended(&self, id: &str) -> bool {
        let mut ended = lock(&self.ended.0);
        let before = ended.len();
        ended.retain(|(_, ended)| ended.id != id);
        ended.len() < before
    }

    /// Forgets one, by command.
    pub(super) fn dismiss_ended(&self, id: &str) -> Result<(), JobError> {
        if !self.forget_ended(id) {
            return Err(JobError::NotFound);
        }
        events::status(&self.events, id, Status::Null);
        Ok(())
    }
}

impl Ended {
    /// How far it came is not known, but whether that was far enough is.
    fn offset(&self) -> u64 {
        if self.error.is_none() { self.size } else { 0 }
    }

    /// The end of a job, as it is told live.
    fn events(&self) -> [Event; 2] {
        let mut end = json!({
            "device": self.id, "len": self.size, "offset": self.offset(), "speed": 0, "type": self.kind.name(),
        });
        if let Some(error) = &self.error {
            end["error"] = error.clone().into();
        }
        let status = json!({ "status": Status::Concluded.name(), "id": self.id });
        [("BLOCK_JOB_COMPLETED", end), ("JOB_STATUS_CHANGE", status)]
            .map(|(name, data)| Event { name: name.to_owned(), data })
    }

    /// A member of `query-jobs`.
    pub(super) fn info(&self) -> Value {
        let mut info = json!({
            "id": self.id, "type": self.kind.name(), "status": Status::Concluded.name(),
            "current-progress": self.offset(), "total-progress": self.size,
        });
        if let Some(error) = &self.error {
            info["error"] = error.clone().into();
        }
        info
    }

    /// A member of `query-block-jobs`.
    pub(super) fn block_info(&self) -> Value {
        let mut info = json!({
            "type": self.kind.name(), "device": self.id, "len": self.size, "offset": self.offset(), "busy": false,
            "paused": false, "speed": 0, "max-guest-latency": 0, "io-status": "ok", "ready": false,
            "status": Status::Concluded.name(), "auto-finalize": true, "auto-dismiss": false,
        });
        if let Some(error) = &self.error {
            info["error"] = error.clone().into();
        }
        info
    }
}
