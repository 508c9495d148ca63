//! Guest memory: the regions a front end shares, mapped and checked.
//!
//! The session feeds [`MemoryTable`] from SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG; rings read
//! [`GuestMemory`] snapshots. A snapshot keeps its mappings alive, so a request in flight may go on
//! using the pointers it took although the front end has replaced the table meanwhile.
//!
//! Invariant: regions do not overlap in guest memory (they may in the front end's own addresses: one
//! memory seen twice), and each lies inside its file as long as it was when it was mapped. A file that is not sealed
//! against shrinking later is watched (`guard`), and [`MemoryTable::lost`] tells when it did.

mod guard;
pub mod view;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, SealFlags};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
    GuestRegionMmap, MmapRegion,
};

/// Guest memory that may be replaced while it is used.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;
/// One state of guest memory; it stays mapped as long as this lives.
pub type MemorySnapshot = GuestMemoryLoadGuard<GuestMemoryMmap>;

/// How many regions a front end may share: what QEMU's own back ends offer.
pub const MAX_REGIONS: usize = 509;

/// Regions start on a page in guest memory, so that what is aligned for the guest is aligned here.
const PAGE: u64 = 4096;

/// A region as the front end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// The address in the front end's own address space, in which it names rings.
    pub user: u64,
    /// Where the region starts in its file, in bytes.
    pub file_offset: u64,
}

/// Why a region was refused.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MemoryError {
    #[error("memory region of zero bytes at guest address {0:#x}")]
    Empty(u64),
    #[error("memory region at guest address {guest:#x} of {size:#x} bytes ends past the last address")]
    Overflow { guest: u64, size: u64 },
    #[error("memory region at guest address {0:#x} does not start on a page")]
    Unaligned(u64),
    #[error("memory region at guest address {0:#x} overlaps another one")]
    Overlap(u64),
    #[error("memory region at guest address {0:#x} is not backed by a regular file")]
    NotAFile(u64),
    #[error("memory region at guest address {guest:#x} needs {needs:#x} bytes of its file, which has {has:#x}")]
    FileTooShort { guest: u64, needs: u64, has: u64 },
    #[error("no memory region at guest address {0:#x} to remove")]
    Unknown(u64),
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    #[error("a table of {regions} regions came with {files} files")]
    FileCount { regions: usize, files: usize },
    #[error("cannot map the memory region at guest address {guest:#x}: {source}")]
    Map { guest: u64, source: io::Error },
}

/// Why shared memory that is not guest memory was refused.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum MapError {
    #[error("it is not a regular file")]
    NotAFile,
    #[error("it needs {needs:#x} bytes of its file, which has {has:#x}")]
    FileTooShort { needs: u64, has: u64 },
    #[error("cannot map it: {0}")]
    Map(io::Error),
}

/// One mapped region.
#[derive(Clone, Debug)]
pub struct Region {
    /// As the front end described it.
    pub spec: RegionSpec,
    /// Whether its file is sealed against shrinking (F_SEAL_SHRINK), so that touching it cannot
    /// raise SIGBUS.
    pub sealed: bool,
    map: Arc<MmapRegion>,
}

/// The regions of one connection, and the guest memory made of them.
#[derive(Debug)]
pub struct MemoryTable {
    regions: Vec<Region>,
    memory: GuestMemory,
    lost: Arc<AtomicBool>,
}

impl Default for MemoryTable {
    fn default() -> Self {
        Self { regions: Vec::new(), memory: GuestMemoryAtomic::new(GuestMemoryMmap::new()), lost: Arc::default() }
    }
}

impl MemoryTable {
    /// The guest memory, shared: it shows every later change of the table.
    pub fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    /// Set once memory that was mapped turns out to be gone: the front end cut its file short.
    pub fn lost(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.lost)
    }

    /// The memory as it is now.
    pub fn snapshot(&self) -> MemorySnapshot {
        self.memory.memory()
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Replaces all regions (SET_MEM_TABLE).
    ///
    /// # Errors
    /// [`MemoryError`]; the table is then as it was.
    pub fn set(&mut self, specs: &[RegionSpec], files: Vec<File>) -> Result<(), MemoryError> {
        if specs.len() != files.len() {
            return Err(MemoryError::FileCount { regions: specs.len(), files: files.len() });
        }
        let mut regions = Vec::with_capacity(specs.len());
        for (spec, file) in specs.iter().zip(files) {
            insert(&mut regions, self.map(*spec, file)?)?;
        }
        self.install(regions)
    }

    /// Adds a region (ADD_MEM_REG).
    ///
    /// # Errors
    /// [`MemoryError`]; the table is then as it was.
    pub fn add(&mut self, spec: RegionSpec, file: File) -> Result<(), MemoryError> {
        let mut regions = self.regions.clone();
        insert(&mut regions, self.map(spec, file)?)?;
        self.install(regions)
    }

    /// Removes a region (REM_MEM_REG), named by its guest address, user address and size.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`]; the table is then as it was.
    pub fn remove(&mut self, spec: RegionSpec) -> Result<(), MemoryError> {
        let mut regions = self.regions.clone();
        let at = regions
            .iter()
            .position(|r| (r.spec.guest, r.spec.user, r.spec.size) == (spec.guest, spec.user, spec.size))
            .ok_or(MemoryError::Unknown(spec.guest))?;
        regions.remove(at);
        self.install(regions)
    }

    /// Where `len` bytes at the front end's address `user` lie in guest memory. They must lie in
    /// one region, since neighbours in one address space need not be neighbours in the other.
    pub fn translate(&self, user: u64, len: u64) -> Option<GuestAddress> {
        let end = user.checked_add(len)?;
        self.regions
            .iter()
            .map(|r| r.spec)
            // Checked when it was inserted: `user + size` does not overflow.
            .find(|s| user >= s.user && end <= s.user + s.size)
            .map(|s| GuestAddress(s.guest + (user - s.user)))
    }

    fn map(&self, spec: RegionSpec, file: File) -> Result<Region, MemoryError> {
        let region = map(spec, file)?;
        if !region.sealed {
            guard::watch(&region.map, &self.lost).map_err(|source| MemoryError::Map { guest: spec.guest, source })?;
        }
        Ok(region)
    }

    /// Maps `len` bytes of memory that a front end shares beside the guest's. It is watched like guest memory: if it shrinks,
    /// [`MemoryTable::lost`] tells.
    ///
    /// # Errors
    /// [`MapError`], if the file has no such bytes or cannot be mapped for reading and writing.
    pub fn map_beside(&self, file: File, offset: u64, len: usize) -> Result<Arc<MmapRegion>, MapError> {
        let (map, sealed) = map_file(file, offset, len)?;
        if !sealed {
            guard::watch(&map, &self.lost).map_err(MapError::Map)?;
        }
        Ok(map)
    }

    fn install(&mut self, regions: Vec<Region>) -> Result<(), MemoryError> {
        let mut parts = Vec::with_capacity(regions.len());
        for region in &regions {
            let guest = region.spec.guest;
            let part = GuestRegionMmap::with_arc(region.map.clone(), GuestAddress(guest))
                .ok_or(MemoryError::Overflow { guest, size: region.spec.size })?;
            parts.push(part);
        }
        let memory = if parts.is_empty() {
            GuestMemoryMmap::new()
        } else {
            // Sorted and disjoint by `insert`: this cannot fail, and if it did nothing changed.
            GuestMemoryMmap::from_regions(parts)
                .map_err(|_| MemoryError::Overlap(regions.first().map_or(0, |r| r.spec.guest)))?
        };
        // A poisoned lock only says that a writer panicked before it stored; a load is atomic.
        match self.memory.lock() {
            Ok(guard) => guard.replace(memory),
            Err(poisoned) => poisoned.into_inner().replace(memory),
        }
        self.regions = regions;
        Ok(())
    }
}

/// Puts `new` where its guest address belongs, unless it overlaps a neighbour.
fn insert(regions: &mut Vec<Region>, new: Region) -> Result<(), MemoryError> {
    if regions.len() >= MAX_REGIONS {
        return Err(MemoryError::TooMany);
    }
    let n = new.spec;
    // Neither sum overflows: `map` has checked them.
    let overlaps = |r: &RegionSpec| n.guest < r.guest + r.size && r.guest < n.guest + n.size;
    if regions.iter().any(|r| overlaps(&r.spec)) {
        return Err(MemoryError::Overlap(n.guest));
    }
    let at = regions.partition_point(|r| r.spec.guest < n.guest);
    regions.insert(at, new);
    Ok(())
}

/// Checks a description against itself and its file, and maps it.
fn map(spec: RegionSpec, file: File) -> Result<Region, MemoryError> {
    let RegionSpec { guest, size, user, file_offset } = spec;
    if size == 0 {
        return Err(MemoryError::Empty(guest));
    }
    let overflow = MemoryError::Overflow { guest, size };
    let (Some(_), Some(_), Some(_), Ok(len)) =
        (guest.checked_add(size), user.checked_add(size), file_offset.checked_add(size), usize::try_from(size))
    else {
        return Err(overflow);
    };
    if !guest.is_multiple_of(PAGE) {
        return Err(MemoryError::Unaligned(guest));
    }
    let (map, sealed) = map_file(file, file_offset, len).map_err(|error| match error {
        MapError::NotAFile => MemoryError::NotAFile(guest),
        MapError::FileTooShort { needs, has } => MemoryError::FileTooShort { guest, needs, has },
        MapError::Map(source) => MemoryError::Map { guest, source },
    })?;
    tracing::debug!(guest, size, sealed, "mapped guest memory");
    Ok(Region { spec, sealed, map })
}

/// Checks a file and maps a part of it; whether it is sealed against shrinking.
fn map_file(file: File, offset: u64, len: usize) -> Result<(Arc<MmapRegion>, bool), MapError> {
    let stat = rustix::fs::fstat(&file).map_err(|e| MapError::Map(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(MapError::NotAFile);
    }
    let has = u64::try_from(stat.st_size).unwrap_or(0);
    let needs = offset.saturating_add(len as u64);
    if needs > has {
        return Err(MapError::FileTooShort { needs, has });
    }
    // Only memfds and tmpfs files know seals; anything else answers EINVAL, and can shrink.
    let sealed = rustix::fs::fcntl_get_seals(&file).is_ok_and(|s| s.contains(SealFlags::SHRINK));
    let map = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(|e| match e {
        MmapRegionError::Mmap(source) => MapError::Map(source),
        other => MapError::Map(io::Error::other(other.to_string())),
    })?;
    Ok((Arc::new(map), sealed))
}

#[cfg(test)]
mod tests;
