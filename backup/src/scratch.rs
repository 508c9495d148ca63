//! Scratch: where old data waits from the moment a guest overwrites it until every point in time that needs it has let it
//! go. Knows nothing of disks and points: it keeps blocks, and a [`Block`] gives its space back when it is dropped.
//!
//! Two tiers: memory up to a budget, then a sparse file. Where points in time outlive the process (`resume`) both have names, so
//! that a killed process leaves them behind; elsewhere neither has one. It
//! never fills the file system: besides its own cap it leaves a tenth of the space free for others. Every block carries a
//! checksum, so what was damaged on the way is an error and not a backup.

use crate::resume::{Haven, Kind, Place};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use thiserror::Error;
use uuid::Uuid;

/// How much growth passes between two looks at the file system's free space.
const LOOK_EVERY: u64 = 16 << 20;

/// Where scratch goes, and how large it may grow.
#[derive(Debug, Clone)]
pub struct ScratchSettings {
    /// A directory; it should be as fast as the disk.
    pub directory: PathBuf,
    /// Most bytes that all blocks of a disk's scratch may take.
    pub cap: u64,
    /// How many of them may be memory.
    pub memory: u64,
}

/// Why old data could not be kept, or not be given back.
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
    /// A guest write waited too long for its old data to be kept.
    #[error("a guest write was held for {seconds} seconds")]
    Timeout {
        /// The limit.
        seconds: u64,
    },
    /// Reading or writing failed.
    #[error("scratch: {0}")]
    Io(#[from] io::Error),
    /// What outlives the process cannot be kept up.
    #[error("its ledger cannot be written: {0}")]
    Ledger(io::Error),
    /// What came back is not what was kept.
    #[error("scratch: a block does not match its checksum")]
    Damaged,
}

/// One file with blocks in it, used again from the start of the free list.
struct Tier {
    file: File,
    cap: u64,
    /// Whether other users of the file system have to be left room.
    shares_space: bool,
    space: Mutex<Space>,
}

#[derive(Default)]
struct Space {
    free: Vec<u64>,
    end: u64,
    looked_at: Option<u64>,
    used: u64,
}

struct Tiers {
    memory: Tier,
    file: Tier,
    block: u64,
    cap: u64,
    /// Goes after the last block.
    names: Option<Names>,
}

/// The names of both files, which go with this.
struct Names {
    haven: Box<Haven>,
    id: Uuid,
}

impl Names {
    fn new(haven: &Haven, id: Uuid) -> Self {
        haven.take_in(id);
        Self { haven: Box::new(haven.clone()), id }
    }
}

impl Drop for Names {
    fn drop(&mut self) {
        self.haven.let_go(self.id);
    }
}

/// What a scratch is made of: two files. To open them may take as long as the file system likes, so that is done apart,
/// where nobody waits for a lock.
pub struct ScratchFiles {
    memory: File,
    file: File,
    names: Option<Names>,
}

/// A disk's scratch: blocks of one size.
pub struct Scratch {
    tiers: Arc<Tiers>,
}

/// Kept data. Dropping it gives the space back.
pub struct Block {
    tiers: Arc<Tiers>,
    in_memory: bool,
    offset: u64,
    len: u32,
    checksum: u32,
}

/// Blocks, by where they are.
pub(crate) type Blocks = HashMap<Place, Arc<Block>>;

impl ScratchFiles {
    /// Makes them, with names in `haven`, if there is one. Errors name the directory.
    pub(crate) fn open(settings: &ScratchSettings, haven: Option<&Haven>) -> io::Result<Self> {
        if let Some(haven) = haven {
            match Self::create_in(haven) {
                Ok(files) => return Ok(files),
                Err(error) => tracing::warn!(%error, "points in time will end with the process: no lasting scratch"),
            }
        }
        let file = nameless(&settings.directory).map_err(|error| {
            let directory = settings.directory.display();
            io::Error::new(error.kind(), format!("Could not create scratch in '{directory}': {error}"))
        })?;
        let memory = rustix::fs::memfd_create("blkmark-scratch", MemfdFlags::CLOEXEC)?.into();
        Ok(Self { memory, file, names: None })
    }

    fn create_in(haven: &Haven) -> io::Result<Self> {
        // Its drop takes away what was made, also if the second one cannot be.
        let names = Names::new(haven, Uuid::new_v4());
        let (memory, file) = (haven.create(names.id, Kind::Memory)?, haven.create(names.id, Kind::File)?);
        Ok(Self { memory, file, names: Some(names) })
    }

    /// Those that a killed process left. If that fails they stay.
    pub(crate) fn reopen(haven: &Haven, id: Uuid) -> io::Result<Self> {
        let (memory, file) = (haven.open(id, Kind::Memory)?, haven.open(id, Kind::File)?);
        Ok(Self { memory, file, names: Some(Names::new(haven, id)) })
    }
}

impl fmt::Debug for ScratchFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScratchFiles").finish_non_exhaustive()
    }
}

impl Scratch {
    /// Both tiers, for blocks of `block` bytes. Touches no file system.
    pub fn new(files: ScratchFiles, settings: &ScratchSettings, block: u64) -> Self {
        let tier = |file, cap, shares_space| Tier { file, cap, shares_space, space: Mutex::default() };
        let memory = tier(files.memory, settings.memory.min(settings.cap), files.names.is_some());
        let file = tier(files.file, settings.cap, true);
        Self { tiers: Arc::new(Tiers { memory, file, block, cap: settings.cap, names: files.names }) }
    }

    /// By what name it outlives the process, if it does.
    pub(crate) fn name(&self) -> Option<(&Haven, Uuid)> {
        self.tiers.names.as_ref().map(|names| (&*names.haven, names.id))
    }

    /// Takes in the blocks that a killed process left, each with the bytes that are in it: to be called before anything is kept.
    pub(crate) fn adopt(&self, left: &[(Place, u64)]) -> io::Result<Blocks> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "scratch is not as it was left");
        let tiers = &self.tiers;
        let lens = (tiers.memory.file.metadata()?.len(), tiers.file.file.metadata()?.len());
        // One block has one content, whoever names it.
        let mut slots: BTreeMap<(bool, u32), (u64, u32)> = BTreeMap::new();
        for (place, len) in left {
            let Place::Block { in_memory, slot, checksum } = *place else { continue };
            let there = if in_memory { lens.0 } else { lens.1 };
            let known = *slots.entry((in_memory, slot)).or_insert((*len, checksum));
            if u64::from(slot) * tiers.block + len > there || *len > tiers.block || known != (*len, checksum) {
                return Err(damaged());
            }
        }
        // From here on each block gives its space back.
        for in_memory in [true, false] {
            let taken: Vec<u64> =
                slots.keys().filter(|(tier, _)| *tier == in_memory).map(|(_, slot)| u64::from(*slot)).collect();
            let mut space = if in_memory { &tiers.memory } else { &tiers.file }.space();
            space.used = taken.len() as u64 * tiers.block;
            space.end = taken.last().map_or(0, |last| (last + 1) * tiers.block);
            let mut next = taken.iter().peekable();
            let free = (0..space.end / tiers.block).filter(|slot| next.next_if_eq(&slot).is_none());
            space.free = free.map(|slot| slot * tiers.block).collect();
        }
        let block = |((in_memory, slot), (len, checksum)): ((bool, u32), (u64, u32))| {
            let offset = u64::from(slot) * tiers.block;
            let block = Block { tiers: Arc::clone(tiers), in_memory, offset, len: len as u32, checksum };
            (block.place(), Arc::new(block))
        };
        Ok(slots.into_iter().map(block).collect())
    }

    /// Bytes in use: of memory, and of the file.
    pub fn used(&self) -> (u64, u64) {
        (self.tiers.memory.space().used, self.tiers.file.space().used)
    }

    /// Keeps `data`, at most one block.
    pub fn keep(&self, data: &[u8]) -> Result<Block, ScratchError> {
        self.has_room()?;
        // A tmpfs that others use may be full before its share is.
        match self.keep_in(true, data) {
            Err(ScratchError::Cap { .. } | ScratchError::Floor) => self.keep_in(false, data),
            Err(ScratchError::Io(error)) if error.kind() == io::ErrorKind::StorageFull => self.keep_in(false, data),
            kept => kept,
        }
    }

    /// The same in memory or not at all.
    pub(crate) fn keep_in_memory(&self, data: &[u8]) -> Result<Block, ScratchError> {
        self.has_room()?;
        self.keep_in(true, data)
    }

    fn has_room(&self) -> Result<(), ScratchError> {
        let (memory, file) = self.used();
        let Tiers { block, cap, .. } = *self.tiers;
        if memory + file + block > cap { Err(ScratchError::Cap { cap }) } else { Ok(()) }
    }

    fn keep_in(&self, in_memory: bool, data: &[u8]) -> Result<Block, ScratchError> {
        let tiers = &self.tiers;
        debug_assert!(data.len() as u64 <= tiers.block);
        let offset = if in_memory { &tiers.memory } else { &tiers.file }.allocate(tiers.block)?;
        // From here on the block's drop gives the space back.
        let block = Block {
            tiers: Arc::clone(tiers),
            in_memory,
            offset,
            len: data.len() as u32,
            checksum: crc32fast::hash(data),
        };
        block.tier().file.write_all_at(data, offset)?;
        Ok(block)
    }
}

impl Tier {
    fn space(&self) -> MutexGuard<'_, Space> {
        self.space.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn allocate(&self, block: u64) -> Result<u64, ScratchError> {
        let mut space = self.space();
        let offset = match space.free.pop() {
            Some(offset) => offset,
            None => {
                if space.end + block > self.cap {
                    return Err(ScratchError::Cap { cap: self.cap });
                }
                if self.shares_space && space.looked_at.is_none_or(|at| space.end >= at + LOOK_EVERY) {
                    let fs = rustix::fs::fstatvfs(&self.file).map_err(io::Error::from)?;
                    if fs.f_bavail < fs.f_blocks / 10 {
                        return Err(ScratchError::Floor);
                    }
                    space.looked_at = Some(space.end);
                }
                let offset = space.end;
                space.end += block;
                offset
            }
        };
        space.used += block;
        Ok(offset)
    }

    fn free(&self, offset: u64, block: u64) {
        // Without holes in this file system the space stays with the file and is used again; that loses nothing.
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(&self.file, hole, offset, block);
        let mut space = self.space();
        space.free.push(offset);
        space.used -= block;
    }
}

impl Block {
    /// Where it is, to find it again.
    pub(crate) fn place(&self) -> Place {
        let slot = (self.offset / self.tiers.block) as u32;
        Place::Block { in_memory: self.in_memory, slot, checksum: self.checksum }
    }

    fn tier(&self) -> &Tier {
        if self.in_memory { &self.tiers.memory } else { &self.tiers.file }
    }

    /// Reads it back; `buf` has the length that was kept.
    pub fn load(&self, buf: &mut [u8]) -> Result<(), ScratchError> {
        debug_assert_eq!(buf.len(), self.len as usize);
        self.tier().file.read_exact_at(buf, self.offset)?;
        if crc32fast::hash(buf) == self.checksum { Ok(()) } else { Err(ScratchError::Damaged) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.tier().free(self.offset, self.tiers.block);
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

#[cfg(test)]
mod tests;
