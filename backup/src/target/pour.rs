//! Large writes into a file, past the page cache where the file system can.
//!
//! Used by both formats for what a backup consists of. A backup that fills the page cache pushes out what others read, and the
//! kernel then writes it back in bursts, under which the guest's own requests wait for seconds. What lies in memory anyway has huge
//! pages made for it (`huge`).

use super::bytes::{Bytes, Kind};
use super::huge::{self, HugePages};
use crate::buffer::ALIGNMENT;
use blkmark_bitmap::store::is_memory;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard};

/// Writes that are smaller than this are left to the page cache: scattered over a sparse file, direct ones are slow, since
/// each allocates for itself, while the cache brings them to the disk in order.
const SMALL: usize = 128 * 1024;

/// So much in the page cache is sent on its way to the disk at once, and waited for when as much again is there: what is
/// left for the end, and what the kernel might write in one burst, is no more than twice this.
const BEHIND: u64 = 128 << 20;

/// A file that much is written to.
pub(super) struct Pour {
    /// The same file past the page cache; locks and lengths stay with the other descriptor.
    direct: Option<File>,
    /// Of a file that is memory itself.
    huge: Option<HugePages>,
    /// Who writes through the page cache. The kernel lets only one do so at a time, and has the others spin.
    /// Holds how much of that was not sent to the disk yet.
    cached: Mutex<u64>,
}

/// Whose turn it is to write through the page cache.
pub(super) type Turn<'a> = MutexGuard<'a, u64>;

impl Pour {
    pub fn new(bytes: &Bytes) -> Self {
        let in_memory = in_memory(bytes);
        let direct = if in_memory { None } else { open_direct(bytes.file()) };
        Self { direct, huge: in_memory.then(HugePages::new), cached: Mutex::new(0) }
    }

    /// Writes of which size, beginning at its multiples, it likes best; 0: it has no wishes.
    pub fn stride(&self) -> u64 {
        self.huge.as_ref().map_or(0, |_| huge::BLOCK as u64)
    }

    /// Writes all of `buf`.
    pub fn write_at(&self, bytes: &Bytes, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_in_turn(bytes, buf, offset, &mut None)
    }

    /// The same for who writes more, and has the turn from the first write on that needs it.
    pub fn write_in_turn<'a>(
        &'a self,
        bytes: &Bytes,
        buf: &[u8],
        offset: u64,
        turn: &mut Option<Turn<'a>>,
    ) -> io::Result<()> {
        match &self.direct {
            Some(direct) if goes_direct(buf, offset) => match direct.write_all_at(buf, offset) {
                // Not on this device, or not this range of it, after all.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.write_cached(bytes, buf, offset, turn),
                done => done,
            },
            _ => self.write_cached(bytes, buf, offset, turn),
        }
    }

    fn write_cached<'a>(
        &'a self,
        bytes: &Bytes,
        buf: &[u8],
        offset: u64,
        turn: &mut Option<Turn<'a>>,
    ) -> io::Result<()> {
        if let Some(huge) = &self.huge {
            huge.prepare(bytes, buf, offset);
        }
        let waiting = turn.get_or_insert_with(|| self.cached.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        bytes.write_at(buf, offset)?;
        **waiting += buf.len() as u64;
        if **waiting >= BEHIND && self.direct.is_some() {
            **waiting = 0;
            bytes.write_behind();
        }
        Ok(())
    }
}

/// Such a file takes O_DIRECT and is nothing but page cache. The nodes of block devices lie beside it, the devices do not.
fn in_memory(bytes: &Bytes) -> bool {
    bytes.kind() == Kind::Regular && rustix::fs::fstatfs(bytes.file()).is_ok_and(|system| is_memory(&system))
}

/// Opens it anew, through no name that anybody could have changed. Without /proc, or where the file system refuses, what
/// there is will do.
fn open_direct(file: &File) -> Option<File> {
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(itself, flags, Mode::empty()).ok().map(File::from)
}

/// Whether it is worth direct I/O, and direct I/O takes it, on any device that Linux knows.
fn goes_direct(buf: &[u8], offset: u64) -> bool {
    let aligned = |number: u64| number.is_multiple_of(ALIGNMENT as u64);
    buf.len() >= SMALL && aligned(buf.as_ptr().addr() as u64) && aligned(buf.len() as u64) && aligned(offset)
}
