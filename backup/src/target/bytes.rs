//! Whole reads, writes, zeroing and syncing of a file or block device.
//!
//! Called by the raw target and by the storage beneath qcow2. Short transfers and EINTR end here; errors come out as
//! the kernel gave them. A failed fsync is remembered: the kernel reports lost pages once, so that a second fsync which
//! succeeds would prove nothing.

use crate::source::FileId;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// What images can lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    BlockDevice,
}

/// Refuses whatever is neither a regular file nor a block device.
pub(super) fn kind_of(file: &File) -> io::Result<Kind> {
    let kind = file.metadata()?.file_type();
    if kind.is_file() {
        Ok(Kind::Regular)
    } else if kind.is_block_device() {
        Ok(Kind::BlockDevice)
    } else if kind.is_dir() {
        Err(Errno::ISDIR.into())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device"))
    }
}

/// Whom it is, whatever its name.
pub(super) fn file_id(file: &File) -> io::Result<FileId> {
    let meta = file.metadata()?;
    Ok(if meta.file_type().is_block_device() {
        FileId { device: 0, inode: meta.rdev() }
    } else {
        FileId { device: meta.dev(), inode: meta.ino() }
    })
}

/// A descriptor with what is known of it.
#[derive(Debug)]
pub(super) struct Bytes {
    file: File,
    kind: Kind,
    id: FileId,
    sync_failed: AtomicBool,
}

impl Bytes {
    pub fn new(file: File) -> io::Result<Self> {
        let (kind, id) = (kind_of(&file)?, file_id(&file)?);
        Ok(Self { file, kind, id, sync_failed: AtomicBool::new(false) })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn id(&self) -> FileId {
        self.id
    }

    /// Length now.
    pub fn len(&self) -> io::Result<u64> {
        match self.kind {
            Kind::Regular => Ok(self.file.metadata()?.len()),
            Kind::BlockDevice => Ok(rustix::fs::seek(&self.file, rustix::fs::SeekFrom::End(0))?),
        }
    }

    /// Fills `buf`; past the end there are zeroes.
    pub fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Writes all of `buf`.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    /// Makes the range read as zeroes, by a hole where possible. Does not change the length of a file.
    pub fn zero_at(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zeroes = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        for flags in [hole, zeroes] {
            loop {
                match fallocate(&self.file, flags, offset, len) {
                    Ok(()) => return Ok(()),
                    Err(Errno::INTR) => {}
                    // EINVAL: a block device and a range that is not aligned to its sectors.
                    Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV) => break,
                    Err(e) => return Err(e.into()),
                }
            }
        }
        self.fill_zero(offset, len)
    }

    /// Writes zeroes, so that the range has its place on the disk.
    pub fn fill_zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let n = (end - at).min(ZEROES.len() as u64);
            self.write_at(&ZEROES[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }

    /// Waits for what was sent to the disk by the last call, and sends what is in the page cache since. It only helps: what
    /// the kernel cannot do is left to the sync. An error of the disk counts as one of a sync, for the kernel tells it once.
    pub fn write_behind(&self) {
        let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE;
        // SAFETY: an open descriptor and three numbers; 0 bytes means up to the end.
        let result = unsafe { libc::sync_file_range(self.file.as_raw_fd(), 0, 0, flags) };
        let helpless = [libc::EINVAL, libc::ENOSYS, libc::ESPIPE, libc::EINTR];
        if result != 0 && !io::Error::last_os_error().raw_os_error().is_some_and(|errno| helpless.contains(&errno)) {
            self.sync_failed.store(true, Ordering::Release);
        }
    }

    /// Waits until data and metadata are on the medium. Once failed, always failed.
    pub fn sync(&self) -> io::Result<()> {
        if self.sync_failed.load(Ordering::Acquire) {
            return Err(Errno::IO.into());
        }
        loop {
            match rustix::fs::fsync(&self.file) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(e) => {
                    self.sync_failed.store(true, Ordering::Release);
                    return Err(e.into());
                }
            }
        }
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // Closing is not enough while a child process, just forked, still has a copy of the descriptor. A failure
        // leaves it to the closing.
        let _ = crate::file_lock::unlock(&self.file);
    }
}

/// Refuses a range that is not wholly inside `size`.
pub(super) fn check_range(offset: u64, len: u64, size: u64) -> io::Result<()> {
    if len <= size && offset <= size - len {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("range {offset}+{len} lies outside of a disk of {size} bytes"),
        ))
    }
}
