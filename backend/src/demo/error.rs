//! Why a demo did not come to a good end.

use std::io;

use blkmark_backup::qmp::ClientError;
use blkmark_backup::target::TargetError;

use super::disproof::Disproof;
use crate::frontend::FrontendError;

/// Why a demo did not come to a good end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The size or the directory will not do; nothing was begun.
    #[error("{0}")]
    Place(String),
    /// The guest could not write.
    #[error("the guest: {0}")]
    Guest(String),
    /// The front end failed.
    #[error("the guest: {0}")]
    FrontEnd(#[from] FrontendError),
    /// The daemon refused a command, or did not answer.
    #[error("the control socket: {0}")]
    Control(#[from] ClientError),
    /// A backup failed.
    #[error("backup '{job}' failed: {reason}")]
    Backup {
        /// The job.
        job: String,
        /// What it died of.
        reason: String,
    },
    /// An image could not be made or read.
    #[error(transparent)]
    Image(#[from] TargetError),
    /// A restored image is not what it has to be.
    #[error("NOT PROVED: {0}")]
    Disproved(#[from] Disproof),
    /// A system call failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The daemon could not be started or ended.
    #[error("the daemon: {0:#}")]
    Daemon(anyhow::Error),
    /// Somebody pressed Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}
