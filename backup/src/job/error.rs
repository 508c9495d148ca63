//! Why a command about a job is refused, in QEMU's words.

use super::state::{Status, Verb};
use thiserror::Error;

/// Why a command about a job was refused. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum JobError {
    /// No job of this id.
    #[error("Job not found")]
    NotFound,
    /// Its state does not accept the command.
    #[error("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")]
    Verb {
        /// The job.
        id: String,
        /// Its state.
        status: Status,
        /// The command.
        verb: Verb,
    },
    /// It is paused by command, or by an error.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// Nobody paused it.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// A paused job can only be cancelled by force.
    #[error("The block job for device '{0}' is currently paused")]
    Paused(String),
    /// A negative speed.
    #[error("Parameter 'speed' expects a non-negative value")]
    Speed,
    /// Another job has this id.
    #[error("Job ID '{0}' already in use")]
    IdInUse(String),
    /// It must begin with a letter, and go on with letters, digits, '-', '.', '_'.
    #[error("Invalid job ID '{0}'")]
    InvalidId(String),
    /// Its point in time is gone, or was never to be kept.
    #[error("Job '{0}' keeps no point in time to try again")]
    NotKept(String),
    /// Somebody is at it.
    #[error("Job '{0}' is being tried again")]
    Retrying(String),
    /// It is of another type than the client says.
    #[error("Job '{0}' is of another type")]
    OtherKind(String),
    /// The daemon is on its way out.
    #[error("The daemon is shutting down")]
    ShuttingDown,
}
