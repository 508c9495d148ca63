//! Guest memory: one sealed memfd, mapped here and shared with the back end.
//!
//! The room where the front end's unsafe code lives: every access is bounds-checked, copies bytes, and never makes a
//! Rust reference to memory that another process may change (except to atomics).

use std::fs::File;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU16;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::error::{FrontendError, OutOfRange};

/// Where guest memory begins in guest physical address space: unlike any host address and unlike zero, so that a
/// back end that mixes up its address spaces is found out.
const GUEST_BASE: u64 = 0x1_0000_0000;

/// One region of guest memory.
#[derive(Debug)]
pub struct GuestMemory {
    file: File,
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is valid until drop, wherever the value lives; access to it is by copies and atomics only.
unsafe impl Send for GuestMemory {}
// SAFETY: as above: concurrent copies may tear, which is what shared memory with another process means anyway; no
// reference to plain bytes is ever made.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// Makes `len` bytes (rounded up to pages) of zeroed memory that can neither shrink nor grow.
    pub(super) fn new(len: usize) -> Result<Self, FrontendError> {
        let len = len.next_multiple_of(rustix::param::page_size());
        let fd = rustix::fs::memfd_create("blkmark-guest", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(FrontendError::system("memfd_create for guest memory"))?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(FrontendError::system("sizing guest memory"))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(FrontendError::system("sealing guest memory"))?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory of ours.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd.as_fd(),
                0,
            )
        }
        .map_err(FrontendError::system("mapping guest memory"))?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or(rustix::io::Errno::FAULT)
            .map_err(FrontendError::system("mapping guest memory"))?;
        Ok(GuestMemory { file: File::from(fd), base, len })
    }

    /// The memfd behind it.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Size in bytes, a multiple of the page size.
    pub fn size(&self) -> usize {
        self.len
    }

    /// The first guest physical address.
    pub fn guest_base(&self) -> u64 {
        GUEST_BASE
    }

    /// The guest physical address of byte `offset`.
    pub(super) fn guest_address(&self, offset: usize) -> u64 {
        GUEST_BASE + offset as u64
    }

    /// The address in this process ("user address" in vhost-user's words) of byte `offset`.
    pub(super) fn user_address(&self, offset: usize) -> u64 {
        self.base.as_ptr() as u64 + offset as u64
    }

    fn at(&self, offset: usize, len: usize) -> Result<NonNull<u8>, OutOfRange> {
        match offset.checked_add(len) {
            // SAFETY: offset <= self.len, so the result lies in the mapping or one past its end.
            Some(end) if end <= self.len => Ok(unsafe { self.base.add(offset) }),
            _ => Err(OutOfRange { address: GUEST_BASE.wrapping_add(offset as u64), len }),
        }
    }

    fn offset_of(&self, address: u64, len: usize) -> Result<usize, OutOfRange> {
        address
            .checked_sub(GUEST_BASE)
            .and_then(|offset| usize::try_from(offset).ok())
            .ok_or(OutOfRange { address, len })
    }

    /// Copies `bytes` to the guest physical `address`.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.write_at(self.offset_of(address, bytes.len())?, bytes)
    }

    /// Copies from the guest physical `address` into `bytes`.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), OutOfRange> {
        self.read_at(self.offset_of(address, bytes.len())?, bytes)
    }

    pub(super) fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<(), OutOfRange> {
        let to = self.at(offset, bytes.len())?;
        // SAFETY: `at` has checked that the range lies in the mapping; `bytes` is private memory, so the two do not
        // overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
        Ok(())
    }

    pub(super) fn read_at(&self, offset: usize, bytes: &mut [u8]) -> Result<(), OutOfRange> {
        let from = self.at(offset, bytes.len())?;
        // SAFETY: as in `write_at`, in the other direction.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// The 16-bit cell at `offset`, which is even: a ring's index, flags or entry.
    pub(super) fn cell(&self, offset: usize) -> Result<&AtomicU16, OutOfRange> {
        let at = self.at(offset, 2)?;
        if !offset.is_multiple_of(2) {
            return Err(OutOfRange { address: GUEST_BASE + offset as u64, len: 2 });
        }
        // SAFETY: in bounds, aligned (the mapping is page-aligned and `offset` even), valid for as long as `self`,
        // and accessed by this process through atomics alone.
        Ok(unsafe { AtomicU16::from_ptr(at.as_ptr().cast()) })
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `new` with this length and is used by nobody any more. Unmapping can only
        // fail for a wrong range.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_access_leaves_guest_memory() {
        let memory = GuestMemory::new(1).unwrap();
        let end = memory.guest_base() + memory.size() as u64;
        assert!(memory.write(end - 4, b"last").is_ok());
        let mut back = [0; 4];
        memory.read(end - 4, &mut back).unwrap();
        assert_eq!(&back, b"last");
        assert!(memory.write(end - 3, b"over").is_err());
        assert!(memory.write(0, b"below").is_err());
        assert!(memory.read(u64::MAX, &mut back).is_err());
        assert!(memory.cell(1).is_err());
        assert!(memory.cell(memory.size()).is_err());
    }

    #[test]
    fn guest_memory_cannot_shrink_under_the_back_end() {
        let memory = GuestMemory::new(8192).unwrap();
        assert!(memory.file().set_len(4096).is_err());
    }
}
