//! A disk's file: opened, measured and locked once at start; read by backups beside the guest; given another size by
//! `block_resize`.

use super::identity;
use blkmark_backup::buffer::{ALIGNMENT, AlignedBuffer};
use blkmark_backup::file_lock::{self, LockError, LockMode};
use blkmark_backup::pulse::Pulse;
use blkmark_backup::source::{BlockStatus, FileId, Source};
use blkmark_bitmap::store::{Flush, Stamp, is_memory};
use rustix::fs::{FileType, OFlags, SeekFrom};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use thiserror::Error;
use uuid::Uuid;

/// How long the requests of a killed process may hold its lock. Measured: under a tenth of a second; full queues on a
/// rotating disk take some seconds. A disk that somebody else serves is reported only after that.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What a disk's bytes lie on, as far as it matters for how to move them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Medium {
    /// Something that may take its time.
    Device,
    /// A file in memory: tmpfs.
    Memory,
    /// Nothing: a benchmark's disk, which forgets what is written and leaves what is read as it was.
    Null,
}

/// How to open a disk.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// A raw file or a block device.
    pub path: PathBuf,
    /// Never write to it.
    pub read_only: bool,
    /// Past the page cache or through it; `None`: past it where the file system can.
    pub direct: Option<bool>,
}

/// Why a disk cannot be served. Each says what to do.
#[derive(Debug, Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("Could not open '{}': {error}", path.display())]
    Open {
        /// The disk.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("'{}' is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// `direct=on` where the file system has no direct I/O.
    #[error("'{}': its file system has no direct I/O; use direct=off", .0.display())]
    NoDirect(PathBuf),
    /// It has no bytes.
    #[error("'{}' is empty: a disk needs a size, for example: truncate -s 10G FILE", .0.display())]
    Empty(PathBuf),
    /// Its size is no multiple of the block size.
    #[error("'{}' has {size} bytes, which is not a multiple of {block}; truncate -s %{block} FILE rounds it up", path.display())]
    OddSize {
        /// The disk.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Bytes of a block.
        block: u32,
    },
    /// Another process uses it.
    #[error("'{}' is in use by another process: {error}", path.display())]
    Locked {
        /// The disk.
        path: PathBuf,
        /// Which lock was refused.
        error: LockError,
    },
}

/// An open, locked disk.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    path: PathBuf,
    id: FileId,
    /// In bytes; only [`Source::resize`] changes it.
    size: AtomicU64,
    device: bool,
    medium: Medium,
    read_only: bool,
    direct: bool,
    block: u32,
    physical: u32,
    memory_alignment: u32,
    pulse: Pulse,
}

impl DiskFile {
    /// Opens, measures and locks. Nothing is written.
    pub fn open(options: &OpenOptions) -> Result<Self, DiskError> {
        let path = options.path.clone();
        let failed = |error: io::Error| DiskError::Open { path: options.path.clone(), error };
        // O_NONBLOCK: opening a pipe by mistake must not hang.
        let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK;
        flags |= if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
        let open = |flags| rustix::fs::open(&path, flags, rustix::fs::Mode::empty());
        let (fd, direct) = match options.direct {
            Some(false) => (open(flags), false),
            wish => match open(flags | OFlags::DIRECT) {
                Err(rustix::io::Errno::INVAL) if wish.is_none() => (open(flags), false),
                Err(rustix::io::Errno::INVAL) => return Err(DiskError::NoDirect(path)),
                opened => (opened, true),
            },
        };
        let file = File::from(fd.map_err(|error| failed(error.into()))?);
        // On a block device io_uring would take it as a wish for EAGAIN instead of waiting.
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|error| failed(error.into()))?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(|error| failed(error.into()))?;
        let stat = rustix::fs::fstat(&file).map_err(|error| failed(error.into()))?;
        let (id, size, block, physical) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                (FileId { device: stat.st_dev, inode: stat.st_ino }, stat.st_size as u64, 512, stat.st_blksize as u32)
            }
            FileType::BlockDevice => {
                let (size, block, physical) = block_device(&file).map_err(failed)?;
                (FileId { device: 0, inode: stat.st_rdev }, size, block, physical)
            }
            _ => return Err(DiskError::Kind(path)),
        };
        let (memory_alignment, offset_alignment) = if direct { direct_alignment(&file) } else { (1, 1) };
        let block = block.max(offset_alignment);
        if size == 0 {
            return Err(DiskError::Empty(path));
        }
        if !size.is_multiple_of(u64::from(block)) {
            return Err(DiskError::OddSize { path, size, block });
        }
        let mode = if options.read_only { LockMode::Reader } else { LockMode::Writer };
        file_lock::lock_within(&file, mode, LOCK_PATIENCE)
            .map_err(|error| DiskError::Locked { path: path.clone(), error })?;
        let physical = physical.max(block);
        let (read_only, pulse) = (options.read_only, Pulse::default());
        let (size, device) = (AtomicU64::new(size), id.device == 0);
        let medium = if !device && in_memory(&file) { Medium::Memory } else { Medium::Device };
        Ok(Self { file, path, id, size, device, medium, read_only, direct, block, physical, memory_alignment, pulse })
    }

    /// A disk without a medium, for benchmarks of everything else. Backups see it as zeroes.
    ///
    /// # Errors
    /// If there is no memory for it (it needs next to none).
    pub fn null(size: u64, read_only: bool) -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("blkmark-null", rustix::fs::MemfdFlags::CLOEXEC)?);
        file.set_len(size)?;
        let stat = rustix::fs::fstat(&file)?;
        Ok(Self {
            file,
            path: PathBuf::from("(null)"),
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            size: AtomicU64::new(size),
            device: false,
            medium: Medium::Null,
            read_only,
            direct: false,
            block: 512,
            physical: 4096,
            memory_alignment: 1,
            pulse: Pulse::default(),
        })
    }

    /// What its bytes lie on.
    #[inline]
    pub fn medium(&self) -> Medium {
        self.medium
    }

    /// As the operator named it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it may not be written to.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Whether it is used past the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Bytes of a logical block: offsets and lengths of all I/O are multiples of it.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Bytes of the unit that the device likes best, at least a logical block.
    pub fn physical(&self) -> u32 {
        self.physical
    }

    /// Alignment in bytes that memory needs for I/O.
    pub fn memory_alignment(&self) -> u32 {
        self.memory_alignment
    }

    /// How its guest fares, for queue threads to tell.
    pub fn guest_pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// What is seen of it from outside, to know it again. After [`DiskFile::sync_all`] it stays so until somebody writes.
    pub fn stamp(&self, boot: Uuid) -> io::Result<Stamp> {
        let stat = rustix::fs::fstat(&self.file)?;
        let time = |seconds: i64, nanoseconds: u64| i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        let (inode, changed, touched, name) = match self.device {
            // The node's times and number say nothing of what is on the device.
            true => {
                let identity = identity::of(stat.st_rdev);
                (identity.sequence, 0, 0, identity.name)
            }
            false => (stat.st_ino, time(stat.st_mtime, stat.st_mtime_nsec), time(stat.st_ctime, stat.st_ctime_nsec), 0),
        };
        let device = if self.device { stat.st_rdev } else { stat.st_dev };
        Ok(Stamp { block_device: self.device, device, inode, size: self.size(), changed, touched, boot, name })
    }

    /// Makes all completed writes durable, and the times of the file with them.
    pub fn sync_all(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    /// Does the same as [`DiskFile::sync`] for who cannot hold this.
    pub fn flusher(&self) -> io::Result<Flush> {
        let file = self.file.try_clone()?;
        Ok(Arc::new(move || file.sync_data()))
    }

    /// Makes all completed writes durable.
    pub fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

impl AsFd for DiskFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Whether reads and writes of a file are copies in memory.
fn in_memory(file: &File) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|stat| is_memory(&stat))
}

fn block_device(file: &File) -> io::Result<(u64, u32, u32)> {
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    const BLKSSZGET: libc::Ioctl = 0x1268;
    const BLKPBSZGET: libc::Ioctl = 0x127b;
    let fd = file.as_raw_fd();
    let (mut size, mut logical, mut physical) = (0u64, 0i32, 0u32);
    // SAFETY: the three requests write a u64, an int and an unsigned int (linux/fs.h), and get one each.
    let results = unsafe {
        [
            libc::ioctl(fd, BLKGETSIZE64, &raw mut size),
            libc::ioctl(fd, BLKSSZGET, &raw mut logical),
            libc::ioctl(fd, BLKPBSZGET, &raw mut physical),
        ]
    };
    if results.contains(&-1) {
        return Err(io::Error::last_os_error());
    }
    Ok((size, logical.max(512) as u32, physical.max(512)))
}

/// What direct I/O on this file wants of memory and of offsets; 512 where the kernel does not tell.
fn direct_alignment(file: &File) -> (u32, u32) {
    const STATX_DIOALIGN: libc::c_uint = 0x2000;
    // SAFETY: plain numbers, for which zero is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an open descriptor, an empty path with AT_EMPTY_PATH, and room for the answer.
    let result =
        unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, STATX_DIOALIGN, &raw mut stat) };
    if result == 0 && stat.stx_mask & STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0 {
        (stat.stx_dio_mem_align.max(1), stat.stx_dio_offset_align.max(512))
    } else {
        (512, 512)
    }
}

impl Source for DiskFile {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn alignment(&self) -> u32 {
        self.block
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let aligned = buf.as_ptr().addr().is_multiple_of(self.memory_alignment as usize)
            && offset.is_multiple_of(u64::from(self.block))
            && buf.len().is_multiple_of(self.block as usize);
        if !self.direct || aligned {
            return self.file.read_exact_at(buf, offset);
        }
        // Callers bring aligned buffers; this is for those who cannot.
        let start = offset - offset % ALIGNMENT as u64;
        let end = (offset + buf.len() as u64).next_multiple_of(ALIGNMENT as u64).min(self.size());
        let mut whole = AlignedBuffer::new((end - start) as usize);
        self.file.read_exact_at(&mut whole[..(end - start) as usize], start)?;
        let skip = (offset - start) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }

    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        let limit = limit.min(self.size().saturating_sub(offset));
        let until = |end: u64| end.saturating_sub(offset).clamp(1, limit.max(1));
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((BlockStatus::Hole, until(data))),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok((BlockStatus::Data, until(hole))),
                _ => Ok((BlockStatus::Data, limit)),
            },
            // Nothing but a hole up to the end of the file. What was cut off it behind our back is not zero but lost, and
            // whoever reads it is told.
            Err(rustix::io::Errno::NXIO) => match self.file.metadata()?.len() {
                end if end > offset => Ok((BlockStatus::Hole, until(end))),
                _ => Ok((BlockStatus::Data, limit)),
            },
            // A block device, or a file system that cannot tell.
            Err(_) => Ok((BlockStatus::Data, limit)),
        }
    }

    fn may_resize(&self, size: u64) -> io::Result<()> {
        if self.device {
            let (there, ..) = block_device(&self.file)?;
            if size != there {
                let text = format!("Cannot resize device files: it has {there} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
        }
        Ok(())
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        self.may_resize(size)?;
        if !self.device && size != self.size() {
            self.file.set_len(size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn is_memory(&self) -> bool {
        self.medium != Medium::Device
    }

    fn file_id(&self) -> Option<FileId> {
        Some(self.id)
    }

    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn pulse(&self) -> Option<&Pulse> {
        Some(&self.pulse)
    }
}
