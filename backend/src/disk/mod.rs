//! The disk: a raw file or block device, and the io_uring engine that moves its bytes. Knows nothing of virtio.
//!
//! [`DiskFile`] is what was opened, measured and locked; backups read it as their [`Source`](blkmark_backup::source).
//! [`Engine`] is one queue thread's ring onto it.

mod engine;
mod enter;
mod file;
mod identity;

pub use engine::{Completion, Engine, EngineError, Operation};
pub use file::{DiskError, DiskFile, Medium, OpenOptions};
