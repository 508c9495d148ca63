//! Shared memory of a file on tmpfs: where a live map's words outlive the process.
//!
//! The file is allocated in full before it is mapped, so that no store into it can run out of space (SIGBUS), and it is
//! private to this user, so that nobody cuts it short.

use crate::sync::AtomicU64;
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use std::ptr::NonNull;

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain shared memory, owned by this value and bound to no thread.
unsafe impl Send for Mapping {}
// SAFETY: it is only looked at through atomics (`words`) and raw copies by its one writer (`put`).
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the `len` bytes of `file`, all of which are allocated.
    pub(crate) fn new(file: &File, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice takes no memory away from anybody.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, file, 0)?
        };
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    /// Where `count` words from byte `at` on are.
    pub(crate) fn words(&self, at: usize, count: usize) -> *const AtomicU64 {
        assert!(at.is_multiple_of(8) && at + count * 8 <= self.len, "words lie within the mapping");
        // SAFETY: in bounds by the line above; the start of a mapping is aligned to a page.
        unsafe { self.start.as_ptr().add(at).cast_const().cast() }
    }

    /// The word at byte `at`.
    pub(crate) fn word(&self, at: usize) -> &AtomicU64 {
        // SAFETY: `words` checks bounds and alignment; all bit patterns are values; it lives as long as `self`.
        unsafe { &*self.words(at, 1) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; whoever points into it keeps it alive. An error changes nothing.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
