//! Shared memory of a file on tmpfs: where a live map's words outlive the process.
//!
//! The memory is taken in full before anybody stores into it, so that no store can run out of space (SIGBUS), and the file is
//! private to this user, so that nobody cuts it short.
//!
//! Taken page by page, memory of tmpfs costs about four times what it takes to clear it, and every freeze waits for that; a mark
//! then costs a page fault for each page that has none yet. So huge pages are asked for (`MADV_COLLAPSE`, Linux 6.1, which does
//! not ask how tmpfs is set up). They are no more than a hint: whatever the system refuses is taken page by page, behind it.

use crate::sync::AtomicU64;
use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

/// A huge page where they are smallest. Where they are larger the hint is refused.
const HUGE: usize = 2 << 20;

/// What `MADV_COLLAPSE` is in `linux/mman.h`; not every libc has it.
const COLLAPSE: libc::c_int = 25;

/// A huge page that takes longer than this, several times what its small ones take, is one for which the system had to move others
/// out of the way.
const SLOW: Duration = Duration::from_millis(2);

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain shared memory, owned by this value and bound to no thread.
unsafe impl Send for Mapping {}
// SAFETY: it is only looked at through atomics (`words`).
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Takes `len` bytes of memory for `file`, which is empty, and maps them.
    pub(crate) fn take(file: &File, len: usize) -> io::Result<Self> {
        rustix::fs::ftruncate(file, len as u64)?;
        let mapping = Self::map(file, len)?;
        mapping.take_huge_pages(file);
        // All of it, whatever became of the hint. It costs next to nothing where there is memory already.
        rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len as u64)?;
        Ok(mapping)
    }

    /// Maps a file so that a huge page of it may be one of the process.
    fn map(file: &File, len: usize) -> io::Result<Self> {
        let none = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice takes no memory away from anybody.
        let room = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len + HUGE, none.0, none.1)? };
        let before = room.addr().next_multiple_of(HUGE) - room.addr();
        let end = (before + len).next_multiple_of(page());
        // SAFETY: `before` is less than `HUGE`, so `len` bytes from there on are within the room, and so is `end`, at most.
        let (start, rest) = unsafe { (room.byte_add(before), room.byte_add(end)) };
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: it takes the place of a part of the room, which is ours and has nothing in it.
        let mapped = unsafe { rustix::mm::mmap(start, len, protection, flags, file, 0) };
        // SAFETY: what of the room lies before and behind that part, or all of it; nobody knows of it. An error changes nothing.
        let _ = unsafe {
            match mapped {
                Ok(_) => unmap(room, before).and(unmap(rest, len + HUGE - end)),
                Err(_) => unmap(room, len + HUGE),
            }
        };
        let start = NonNull::new(mapped?.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start, len })
    }

    /// Asks for huge pages, more at a time while there are some: each call makes all processors put away what they have at hand. The
    /// first that cannot be had, or takes long, is the last. Nobody knows of the memory yet.
    fn take_huge_pages(&self, file: &File) {
        let (whole, mut at, mut count) = (self.len - self.len % HUGE, 0, 1);
        while at < whole {
            let end = (at + count * HUGE).min(whole);
            // Where there is nothing at all the system sees nothing to make a huge page of.
            let begun = (at..end)
                .step_by(HUGE)
                .try_for_each(|at| rustix::fs::fallocate(file, FallocateFlags::empty(), at as u64, 1));
            let asked = Instant::now();
            // SAFETY: within the mapping, from a multiple of its pages on. The advice changes no content.
            let advise = || unsafe { libc::madvise(self.start.as_ptr().add(at).cast(), end - at, COLLAPSE) };
            if begun.is_err() || advise() != 0 || asked.elapsed() > SLOW * count as u32 {
                return;
            }
            (at, count) = (end, count * 2);
        }
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

/// Bytes of a page. Asked of the C library: rustix reads it from where a program under valgrind finds something else.
fn page() -> usize {
    // SAFETY: asks for a number, which every Linux has.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Gives back a part of a mapping, which may be empty.
///
/// # Safety
///
/// Nobody may use it any more.
unsafe fn unmap(start: *mut std::ffi::c_void, len: usize) -> io::Result<()> {
    // SAFETY: by the caller.
    if len > 0 { Ok(unsafe { rustix::mm::munmap(start, len) }?) } else { Ok(()) }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length; whoever points into it keeps it alive. An error changes nothing.
        let _ = unsafe { unmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests;
