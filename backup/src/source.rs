//! What a backup needs of a disk, and nothing more.
//!
//! `backend` implements it for the files and block devices that it serves; tests implement it in memory. A source
//! is read beside live guest writes: it knows nothing of points in time, which are the gate's affair.

use crate::pulse::Pulse;
use std::io;
use std::os::fd::BorrowedFd;

/// Device and inode of what a source or target stores its bytes in, to refuse a backup of a disk onto itself.
/// For a block device `device` is 0 and `inode` is its `st_rdev`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// `st_dev`, or 0 for a block device.
    pub device: u64,
    /// `st_ino`, or `st_rdev` for a block device.
    pub inode: u64,
}

/// What a range of a source holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockStatus {
    /// Bytes that have to be read.
    Data,
    /// Reads as zeroes and takes no space (a hole).
    Hole,
}

/// A disk that can be read while a guest writes to it. Called from copy workers and savers, many at a time.
pub trait Source: Send + Sync {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Alignment in bytes that offsets and lengths of reads need (a power of two, at most 4096).
    fn alignment(&self) -> u32;

    /// Reads `buf.len()` bytes at `offset`. Both are multiples of [`Source::alignment`], except that a read may end
    /// at the end of the disk. Short reads and EINTR are handled inside; an `Err` means bytes that cannot be read.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// What stands at `offset`, and for how many bytes at most `limit` that holds (at least 1).
    /// A source that cannot tell answers `(Data, limit)`.
    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)>;

    /// Gives it another size. On an error it has the one it had.
    ///
    /// Larger: what is added reads as zeroes. Smaller: nobody may be writing beyond the new end any more. Of a device, whose
    /// size others decide, only the size that it has is accepted.
    fn resize(&self, size: u64) -> io::Result<()> {
        let _ = size;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whether it can be given that size at all; asked before anything follows. What it cannot know is left to `resize`.
    fn may_resize(&self, size: u64) -> io::Result<()> {
        let _ = size;
        Ok(())
    }

    /// Whether its bytes lie in memory, so that to read them is to copy them and waits for nobody.
    fn is_memory(&self) -> bool {
        false
    }

    /// The file or device behind it, where there is one.
    fn file_id(&self) -> Option<FileId>;

    /// Makes what waits in here fail at once, and everything later: for a source over a network that no longer answers. Files
    /// have nothing to wait for. May be called from any thread.
    fn interrupt(&self) {}

    /// A file that holds the bytes of the disk one to one, for targets that take them without moving them through this
    /// process. Only to be read from.
    fn file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// How the guest that uses the disk fares; `None` where nobody can tell.
    fn pulse(&self) -> Option<&Pulse> {
        None
    }
}
