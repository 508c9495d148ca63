//! Scratch: a bounded, sparse, nameless file that keeps old data from the moment a guest overwrites it until a backup has
//! taken it. Knows nothing of disks and points: it stores blocks of one size and finds them again by slot.
//!
//! The file has no name from the start, so that a killed process leaves nothing behind. It never fills the file system:
//! besides its own cap it leaves a tenth of the space free for others.

use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use thiserror::Error;

/// How much growth passes between two looks at the file system's free space.
const LOOK_EVERY: u64 = 16 << 20;

/// Where scratch goes, and how large it may grow.
#[derive(Debug, Clone)]
pub struct ScratchSettings {
    /// A directory; it should be as fast as the disk.
    pub directory: PathBuf,
    /// Most bytes that all blocks of one scratch may take.
    pub cap: u64,
}

/// Why old data could not be kept.
#[derive(Debug, Error)]
pub enum ScratchError {
    /// The cap is reached.
    #[error("scratch is full: its limit of {cap} bytes is reached")]
    Cap {
        /// The limit in bytes.
        cap: u64,
    },
    /// The file system has to keep a tenth of its space.
    #[error("scratch is full: the file system has less than a tenth of its space left")]
    Floor,
    /// Reading or writing failed.
    #[error("scratch: {0}")]
    Io(#[from] io::Error),
}

/// Where a block stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u64);

#[derive(Default)]
struct Space {
    free: Vec<u64>,
    end: u64,
    looked_at: Option<u64>,
    used: u64,
}

/// Blocks of `block` bytes each.
pub struct Scratch {
    file: File,
    block: u64,
    cap: u64,
    space: Mutex<Space>,
}

impl Scratch {
    /// Creates the file. Errors name the directory.
    pub fn create(settings: &ScratchSettings, block: u64) -> io::Result<Self> {
        let file = nameless(&settings.directory).map_err(|error| {
            io::Error::new(
                error.kind(),
                format!("Could not create scratch in '{}': {error}", settings.directory.display()),
            )
        })?;
        Ok(Self { file, block, cap: settings.cap, space: Mutex::default() })
    }

    fn space(&self) -> std::sync::MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Bytes in use.
    pub fn used(&self) -> u64 {
        self.space().used
    }

    fn allocate(&self) -> Result<Slot, ScratchError> {
        let mut space = self.space();
        let slot = match space.free.pop() {
            Some(slot) => slot,
            None => {
                if space.end + self.block > self.cap {
                    return Err(ScratchError::Cap { cap: self.cap });
                }
                if space.looked_at.is_none_or(|at| space.end >= at + LOOK_EVERY) {
                    let fs = rustix::fs::fstatvfs(&self.file).map_err(io::Error::from)?;
                    if fs.f_bavail < fs.f_blocks / 10 {
                        return Err(ScratchError::Floor);
                    }
                    space.looked_at = Some(space.end);
                }
                let slot = space.end;
                space.end += self.block;
                slot
            }
        };
        space.used += self.block;
        Ok(Slot(slot))
    }

    /// Keeps `data`, at most one block.
    pub fn save(&self, data: &[u8]) -> Result<Slot, ScratchError> {
        debug_assert!(data.len() as u64 <= self.block);
        let slot = self.allocate()?;
        match self.file.write_all_at(data, slot.0) {
            Ok(()) => Ok(slot),
            Err(error) => {
                self.free(slot);
                Err(error.into())
            }
        }
    }

    /// Reads back the first `buf.len()` bytes of a block.
    pub fn load(&self, slot: Slot, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, slot.0)
    }

    /// Gives a block back, its space to the file system too.
    pub fn free(&self, slot: Slot) {
        // Without holes in this file system the space stays with the file and is used again; that loses nothing.
        let _ = rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            slot.0,
            self.block,
        );
        let mut space = self.space();
        space.free.push(slot.0);
        space.used -= self.block;
    }
}

fn nameless(directory: &Path) -> io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
        Ok(fd) => Ok(fd.into()),
        // Not every file system has nameless files: make one and take its name away.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => {
            let path = directory.join(format!(".blkmark-scratch-{}", uuid::Uuid::new_v4()));
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
            let fd = rustix::fs::open(&path, flags, mode)?;
            std::fs::remove_file(&path)?;
            Ok(fd.into())
        }
        Err(error) => Err(error.into()),
    }
}
