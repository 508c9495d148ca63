//! What the server needs to know of something that it exports, and nothing more.
//!
//! Implemented by `exports` for served disks; called from the threads of every connection at once. Offsets and lengths are
//! within the export when they get here, of any alignment.

use std::io;

/// A run of bytes with one status in one metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, at least one.
    pub len: u64,
    /// Flags, as the context defines them.
    pub flags: u32,
}

/// What is exported.
pub trait Export: Send + Sync {
    /// Bytes. Fixed.
    fn size(&self) -> u64;

    /// Writes are refused before they get here.
    fn read_only(&self) -> bool {
        true
    }

    /// The size of requests that do best; a power of two, 512 to 32 MiB.
    fn preferred_block(&self) -> u32 {
        4096
    }

    /// Fills `buf`.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Whether the whole range reads as zeroes and that is quickly known.
    fn is_hole(&self, offset: u64, len: u64) -> bool {
        let _ = (offset, len);
        false
    }

    /// Writes all of `buf`.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _ = (buf, offset);
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }

    /// Makes the range read as zeroes; `hole` allows that it takes no space.
    fn write_zeroes_at(&self, offset: u64, len: u64, hole: bool) -> io::Result<()> {
        let _ = (offset, len, hole);
        Err(io::Error::from_raw_os_error(libc::EPERM))
    }

    /// The contents of the range are no longer wanted. May do nothing.
    fn trim(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Ok(())
    }

    /// Returns when all that was written is durable.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Full names of the metadata contexts, such as `base:allocation`. Fixed; a context's number is its place.
    fn contexts(&self) -> Vec<String>;

    /// The status of `len` bytes from `offset` in context number `context`: at least one extent and at most `most`, which
    /// together may cover less than was asked, and not more.
    fn block_status(&self, context: usize, offset: u64, len: u64, most: usize) -> io::Result<Vec<Extent>>;
}
