//! INFLIGHT_SHMFD: memory that the front end keeps, in which a back end notes which requests it has taken, so that the one
//! after a crash finds them.
//!
//! The handler answers GET_INFLIGHT_FD with [`create`] and SET_INFLIGHT_FD with [`Area::map`]; [`super::ring`] takes a
//! queue's part of it at each start ([`Area::queue`], [`InflightQueue::recover`]) and hands it to the device, whose queue
//! thread keeps the notes ([`InflightQueue::begin`], [`InflightQueue::answer`]).
//! Layout and order of the stores are the vhost-user specification's ("Inflight I/O tracking", split virtqueues), so that a
//! region may also come from another back end, or go to one.
//!
//! # Why a request may be submitted again
//!
//! It has no entry in the used ring, so its buffers are still the device's and the guest knows nothing of its outcome: to
//! carry it out once more changes nothing that anybody could have relied on. That holds only if the first submission is
//! over: a write of the dead process that lands after the guest was told of the second one would undo what the guest wrote
//! there since. The kernel goes on with a killed process's io_uring requests for a while, and each of them holds the open
//! file that it works on. With it they hold the disk's lock, an OFD lock, which goes only with the last user of that open
//! file. A daemon takes the lock before it binds a socket (`disk::DiskFile::open` waits for it), so no ring starts, and
//! nothing is resubmitted, before the last request of the process before is over. Within one process a ring
//! starts only after the one before it has finished what it had, or not at all (`write_path::queue`).
//!
//! # What is not covered
//!
//! A front end that does not negotiate it (Firecracker, old versions of others) says at a reconnect where to go on. At the used
//! index: the ring's entries from there on are carried out again, which is right unless requests ended out of order; then
//! some are done twice and others never. At the available index: what was in flight is never answered.
//! The region lies in the front end's memory: it dies with the front end or the host, as the guest does.
//! Bitmaps are not in it.
//!
//! Invariant: nothing read from the region is used before it was checked, and nothing is read twice; a front end that
//! changes it at any time harms only its own guest.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod queue;
#[cfg(test)]
mod tests;

pub use queue::InflightQueue;

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::MmapRegion;

use crate::memory::{MapError, MemoryTable};

/// Bytes before a queue's first entry, and of each entry.
const HEADER: usize = 16;
const ENTRY: usize = 16;
/// Each queue's part begins on a cache line.
const ALIGNMENT: usize = 64;
/// More entries no split virtqueue has.
const MAX_ENTRIES: u16 = 32768;

/// Why a region was refused.
#[derive(Debug, Error)]
pub(super) enum InflightError {
    #[error("{queues} queues of {entries} entries: there are {most} queues, of up to {MAX_ENTRIES} entries")]
    Shape { queues: u16, entries: u16, most: u16 },
    #[error("{has} bytes are too few for {queues} queues of {entries} entries, which need {needs}")]
    TooSmall { has: u64, needs: usize, queues: u16, entries: u16 },
    #[error(transparent)]
    Map(#[from] MapError),
    #[error("cannot make one: {0}")]
    Create(io::Error),
    #[error("it has entries for {entries} descriptors, the ring {size}")]
    Entries { entries: u16, size: u16 },
    #[error("version {version} with features {features:#x} is not known here")]
    Version { version: u16, features: u64 },
    #[error("the ring's used index is {ring}, the region's {region}: too far apart")]
    UsedIndex { ring: u16, region: u16 },
    #[error("descriptor {head} of its last batch does not exist: the ring has {size}")]
    Head { head: u16, size: u16 },
}

/// Bytes of one queue's part.
fn stride(entries: u16) -> usize {
    (HEADER + ENTRY * usize::from(entries)).next_multiple_of(ALIGNMENT)
}

/// Checks what a front end says of the shape, and gives the bytes that all queues need.
fn size_of(told: &VhostUserInflight, most: u16) -> Result<usize, InflightError> {
    let (queues, entries) = (told.num_queues, told.queue_size);
    if queues == 0 || queues > most || entries == 0 || entries > MAX_ENTRIES {
        return Err(InflightError::Shape { queues, entries, most });
    }
    Ok(stride(entries) * usize::from(queues))
}

/// GET_INFLIGHT_FD: a region of zeroes that can neither shrink nor grow, for the front end to keep.
pub(super) fn create(wish: &VhostUserInflight, most: u16) -> Result<(VhostUserInflight, File), InflightError> {
    let size = size_of(wish, most)? as u64;
    let failed = |errno: rustix::io::Errno| InflightError::Create(errno.into());
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("blkmark-inflight", flags).map_err(failed)?);
    file.set_len(size).map_err(InflightError::Create)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(failed)?;
    Ok((VhostUserInflight::new(size, 0, wish.num_queues, wish.queue_size), file))
}

/// A mapped region.
#[derive(Debug)]
pub(super) struct Area {
    map: Arc<MmapRegion>,
    queues: u16,
    entries: u16,
}

impl Area {
    /// SET_INFLIGHT_FD: maps what the front end sends. Memory that can shrink is watched as guest memory is.
    pub fn map(told: &VhostUserInflight, file: File, most: u16, memory: &MemoryTable) -> Result<Self, InflightError> {
        let needs = size_of(told, most)?;
        let (queues, entries, has) = (told.num_queues, told.queue_size, told.mmap_size);
        if has < needs as u64 {
            return Err(InflightError::TooSmall { has, needs, queues, entries });
        }
        let map = memory.map_beside(file, told.mmap_offset, needs)?;
        Ok(Self { map, queues, entries })
    }

    /// One queue's part; none if the region was made for fewer queues.
    pub fn queue(&self, index: u16) -> Option<InflightQueue> {
        (index < self.queues)
            .then(|| InflightQueue::new(Arc::clone(&self.map), stride(self.entries) * usize::from(index), self.entries))
    }
}
