//! Why a client command failed, and the exit status that says so to scripts.

use std::process::ExitCode;

use blkmark_backup::qmp::{ClientError, QmpError};

/// Why a client command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The daemon refused a command. Exit status 1.
    #[error("{0}")]
    Refused(QmpError),
    /// A job ended without success. Exit status 1.
    #[error("job '{job}' {outcome}")]
    Job {
        /// Its id.
        job: String,
        /// `failed: …` or `was cancelled`.
        outcome: String,
    },
    /// Something of this command's own failed, for instance making the target's image. Exit status 1.
    #[error("{0}")]
    Failed(String),
    /// The command line does not make sense. Exit status 2, as for options that do not exist.
    #[error("{0}")]
    Usage(String),
    /// The daemon cannot be reached, or the connection to it broke. Exit status 3.
    #[error("{0}")]
    Unreachable(ClientError),
}

impl Failure {
    /// The exit status of the process.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Failure::Refused(_) | Failure::Job { .. } | Failure::Failed(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable(_) => 3,
        })
    }

    /// The failure as an error object of QMP, for `--json`.
    pub(super) fn as_qmp(&self) -> QmpError {
        match self {
            Failure::Refused(error) => error.clone(),
            other => QmpError::generic(other.to_string()),
        }
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        match error {
            ClientError::Refused(error) => Failure::Refused(error),
            other => Failure::Unreachable(other),
        }
    }
}
