//! The store: bitmaps that survive kill -9 and power cuts, beside the disk and never in it.
//!
//! From the bottom up: [`medium`] (what is needed of a directory; `directory` is the real one), `codec`, [`object`] (sets of
//! bits, written once), [`record`] (all there is to know, in two slots), [`table`] (which extents may have changed since),
//! [`maps`] (live maps on tmpfs; `shm`, `mapping`), [`stamp`] (whether the disk is the same), [`reading`] (what a crash left
//! amounts to), `heat` (makes an extent durably hot before it is written to), `keeper` (writes records). `docs/store.md` has
//! every byte, and why no crash loses a bit.
//!
//! Called by `tracker` and `flip`, under the control lock of a disk; `heat` by queue threads, which it costs a load and a test.

pub(crate) mod codec;
pub mod directory;
#[cfg(all(any(test, fuzzing), not(any(loom, shuttle))))]
pub(crate) mod fuzzing;
pub(crate) mod heat;
pub(crate) mod keeper;
#[cfg(not(any(loom, shuttle)))]
pub(crate) mod mapping;
pub mod maps;
pub mod medium;
pub mod object;
pub mod reading;
pub mod record;
#[cfg(not(any(loom, shuttle)))]
pub mod shm;
pub mod stamp;
pub mod table;

pub use codec::Damage;
pub use directory::Directory;
pub use keeper::StoreError;
pub use maps::{Maps, NoMaps};
pub use medium::Medium;
#[cfg(not(any(loom, shuttle)))]
pub use shm::Shm;
pub use stamp::Stamp;

/// Makes durable all writes to the disk that have ended.
pub type Flush = std::sync::Arc<dyn Fn() -> std::io::Result<()> + Send + Sync>;

/// Where a disk's bitmaps are to be kept.
pub struct Place {
    /// The store's files.
    pub medium: std::sync::Arc<dyn Medium>,
    /// Its live maps.
    pub maps: Box<dyn Maps>,
    /// The disk as it is now.
    pub disk: Stamp,
    /// Flushes it.
    pub flush: Flush,
    /// Freezes of jobs that somebody may go on with, if the process before was killed. All others end.
    pub resume: Vec<uuid::Uuid>,
}

/// What a process that was killed before this one left in the store, as far as it matters to those who go on with its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// No record: nothing was persistent.
    Nothing,
    /// It was killed while this run was in force, and nothing that it marked is lost.
    Killed(uuid::Uuid),
    /// It ended in another way, or the store was not to be trusted.
    Other,
}

/// Of tmpfs and ramfs, in `statfs` (linux/magic.h).
const MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];

/// Whether a file system's files are memory.
pub fn is_memory(stat: &rustix::fs::StatFs) -> bool {
    MEMORY.contains(&(stat.f_type as u64))
}
