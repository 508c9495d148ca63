//! What can go wrong with a store, in the words of a command's error.

use std::io;
use thiserror::Error;

/// Why bitmaps could not be stored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The disk has no store in this run.
    #[error("{0}")]
    Off(String),
    /// The store failed; its bitmaps are inconsistent.
    #[error("The bitmap store '{store}' failed ({reason}): persistent bitmaps need a restart of the daemon")]
    Failed {
        /// Where it is.
        store: String,
        /// What happened.
        reason: String,
    },
    /// A file could not be made or written.
    #[error("Could not store bitmaps in '{store}': {reason}")]
    Write {
        /// Where it is.
        store: String,
        /// What the system said.
        reason: String,
    },
    /// The disk could not be flushed.
    #[error("Could not flush the disk, which its persistent bitmaps rely on: {0}")]
    Flush(String),
    /// The disk grew far beyond what it was at the start.
    #[error(
        "The bitmap store '{0}' has no room for a disk of this size: restart the daemon with the smaller disk first"
    )]
    TooLarge(String),
}

/// How far a record got.
pub(crate) enum Failure {
    /// The old one is in force.
    Before(StoreError),
    /// Nobody knows.
    Torn(StoreError),
}

pub(super) fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => {
            let text = io::Error::from_raw_os_error(errno).to_string();
            text.split(" (os error").next().unwrap_or(&text).to_owned()
        }
        None => error.to_string(),
    }
}
