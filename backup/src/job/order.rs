//! What a job begins with: an id that nobody else has, how it is to behave, its work.
//!
//! Made by `control`, and by whoever goes on after a kill. Invariant: an id is that of one job, or of one to come.

use super::JobError;
use super::policy::{OnError, OnFailure};
use super::registry::lock;
use super::work::Work;
use crate::copy::GUEST_LATENCY;
use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

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
    /// Takes an id out of those that are free. What is not used is free again when this is dropped.
    pub(super) fn take(id: &str, taken: &Arc<Mutex<HashSet<String>>>) -> Result<Self, JobError> {
        if !well_formed(id) {
            return Err(JobError::InvalidId(id.to_owned()));
        }
        if !lock(taken).insert(id.to_owned()) {
            return Err(JobError::IdInUse(id.to_owned()));
        }
        Ok(Self { id: id.to_owned(), taken: Arc::clone(taken) })
    }

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

/// Whether QEMU would take it as an id: a letter, then letters, digits and `-._`.
pub(crate) fn well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
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
