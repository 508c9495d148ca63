//! Raw targets: a file or block device that holds the bytes of the disk one to one.
//!
//! Made by `target::create` and `target::open`. Workers write at once without a lock: the kernel keeps disjoint ranges
//! apart. The invariant: nothing is ever written outside `0..size`, so neither file nor size changes under a job.
//!
//! What is aligned is written past the page cache where the file system can: a backup that fills the cache pushes out what
//! others read, and the kernel then writes it back in bursts, under which the guest's own requests wait for seconds.

use super::bytes::{Kind, check_range};
use super::draft::Draft;
use super::share::Sharing;
use super::{CreateOptions, Policy, Target, TargetError};
use crate::buffer::ALIGNMENT;
use crate::source::FileId;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// A page: what is written in whole pages needs nothing read.
const CLUSTER: u64 = 4096;

/// A raw image that is written.
pub(super) struct RawTarget {
    draft: Draft,
    size: u64,
    reads_zero: bool,
    path: PathBuf,
    ids: [FileId; 1],
    /// The same file past the page cache; locks and lengths stay with the descriptor of the draft.
    direct: Option<File>,
    /// Who writes through the page cache. The kernel lets only one do so at a time, and has the others spin.
    /// Holds how much of that was not sent to the disk yet.
    cached: Mutex<u64>,
    sharing: Sharing,
}

impl RawTarget {
    /// Opens what exists.
    pub fn open(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open { path: path.to_owned(), source };
        let draft = Draft::existing(path, policy)?;
        let size = draft.bytes.len().map_err(failed)?;
        Ok(Self::new(draft, size, false, path))
    }

    /// Makes a sparse file of the wanted size, or takes a block device as it is.
    pub fn create(path: &Path, options: &CreateOptions, policy: &Policy) -> Result<Self, TargetError> {
        if options.backing.is_some() {
            let reason = "Backing file not supported for file format 'raw'";
            return Err(TargetError::options(path, reason));
        }
        let failed = |source| TargetError::Create { path: path.to_owned(), source };
        let draft = Draft::make(path, options.overwrite, policy)?;
        let is_file = draft.bytes.kind() == Kind::Regular;
        if is_file {
            draft.bytes.file().set_len(options.size).map_err(failed)?;
        }
        let size = draft.bytes.len().map_err(failed)?;
        Ok(Self::new(draft, size, is_file, path))
    }

    fn new(mut draft: Draft, size: u64, reads_zero: bool, path: &Path) -> Self {
        draft.keep();
        let ids = [draft.bytes.id()];
        let direct = open_direct(draft.bytes.file());
        Self {
            draft,
            size,
            reads_zero,
            path: path.to_owned(),
            ids,
            direct,
            cached: Mutex::new(0),
            sharing: Sharing::default(),
        }
    }

    fn write_cached(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut waiting = self.cached.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.draft.bytes.write_at(buf, offset)?;
        *waiting += buf.len() as u64;
        if *waiting >= BEHIND && self.direct.is_some() {
            *waiting = 0;
            self.draft.bytes.write_behind();
        }
        Ok(())
    }
}

/// The kernel's number for tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Opens it anew (but on tmpfs, which takes O_DIRECT and has nothing but a page cache), through no name that anybody could have changed. Without /proc, or where the file system refuses, what
/// there is will do.
fn open_direct(file: &File) -> Option<File> {
    if rustix::fs::fstatfs(file).is_ok_and(|system| system.f_type as u64 == TMPFS_MAGIC) {
        return None;
    }
    let flags = OFlags::WRONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::open(itself, flags, Mode::empty()).ok().map(File::from)
}

/// Writes that are smaller than this are left to the page cache: scattered over a sparse file, direct ones are slow, since
/// each allocates for itself, while the cache brings them to the disk in order.
const SMALL: usize = 128 * 1024;

/// So much in the page cache is sent on its way to the disk at once, and waited for when as much again is there: what is
/// left for the end, and what the kernel might write in one burst, is no more than twice this.
const BEHIND: u64 = 128 << 20;

/// Whether it is worth direct I/O, and direct I/O takes it, on any device that Linux knows.
fn goes_direct(buf: &[u8], offset: u64) -> bool {
    let aligned = |number: u64| number.is_multiple_of(ALIGNMENT as u64);
    buf.len() >= SMALL && aligned(buf.as_ptr().addr() as u64) && aligned(buf.len() as u64) && aligned(offset)
}

impl Target for RawTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        CLUSTER
    }

    fn reads_zero(&self) -> bool {
        self.reads_zero
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        match &self.direct {
            Some(direct) if goes_direct(buf, offset) => match direct.write_all_at(buf, offset) {
                // Not on this device, or not this range of it, after all.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.write_cached(buf, offset),
                done => done,
            },
            _ => self.write_cached(buf, offset),
        }
    }

    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        self.draft.bytes.zero_at(offset, len)
    }

    fn take_from(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
        check_range(offset, len, self.size).is_ok() && self.sharing.take(file, self.draft.bytes.file(), offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.draft.bytes.sync()
    }

    fn accept(&self) -> io::Result<()> {
        self.draft.accept()
    }

    fn conclude(&self) -> io::Result<()> {
        self.accept()?;
        self.flush()?;
        self.draft.sync_name()
    }

    fn abandon(&self) -> io::Result<()> {
        self.draft.remove()
    }

    fn file_ids(&self) -> &[FileId] {
        &self.ids
    }

    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}
