//! Huge pages for what is new in files in memory.
//!
//! Called by `pour` before all of a block of a file on tmpfs is written. Most of what a write into a hole costs there is making 512
//! pages for the block, each charged and entered by itself; one huge page in their place takes a fraction of that. tmpfs makes
//! them by itself only where it is mounted with `huge=`, but whoever asks for a range gets one (`madvise(2)`, MADV_COLLAPSE,
//! Linux 6.1), provided that something is in the range.
//!
//! It only helps: whatever the kernel refuses, the write that follows goes as it would have gone. Invariant: the file takes no
//! memory but that of blocks which are about to be written as a whole, and nothing is ever read or written through a mapping, so a
//! file that somebody cuts short meanwhile does no harm.

use super::bytes::Bytes;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::os::fd::AsRawFd;
use std::ptr::{null_mut, without_provenance_mut};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Bytes of a huge page. Where the processor has others the kernel refuses.
pub(super) const BLOCK: usize = 2 << 20;

/// What comes first, so that there is something in the range.
const PAGE: usize = 4096;

/// A huge page that took longer was made by moving other pages out of its way: on a machine whose memory is that fragmented,
/// small ones are cheaper. In a virtual machine whose host has to find the memory, one may take a few milliseconds.
const TOO_LONG: Duration = Duration::from_millis(20);

/// A file on tmpfs.
pub(super) struct HugePages {
    given_up: AtomicBool,
}

impl HugePages {
    pub fn new() -> Self {
        Self { given_up: AtomicBool::new(false) }
    }

    /// All of `buf` is about to be written at `offset`. Blocks that lie in there as a whole get their memory, if that is to be had.
    pub fn prepare(&self, bytes: &Bytes, buf: &[u8], offset: u64) {
        let first = offset.next_multiple_of(BLOCK as u64);
        let end = offset.saturating_add(buf.len() as u64);
        let mut block = first;
        while block.saturating_add(BLOCK as u64) <= end && !self.given_up.load(Ordering::Relaxed) {
            let at = (block - offset) as usize;
            let began = Instant::now();
            // An error is met again by the write that follows.
            if is_hole(bytes, block)
                && (bytes.write_at(&buf[at..at + PAGE], block).is_err()
                    || !collapse(bytes, block)
                    || began.elapsed() > TOO_LONG)
            {
                self.given_up.store(true, Ordering::Relaxed);
            }
            block += BLOCK as u64;
        }
    }
}

/// Whether nothing is in the block at `offset` yet.
fn is_hole(bytes: &Bytes, offset: u64) -> bool {
    match rustix::fs::seek(bytes.file(), SeekFrom::Data(offset)) {
        Ok(data) => data >= offset + BLOCK as u64,
        Err(error) => error == Errno::NXIO,
    }
}

/// Asks for one huge page at `offset`, a multiple of [`BLOCK`].
fn collapse(bytes: &Bytes, offset: u64) -> bool {
    let Some(window) = Window::reserve() else { return false };
    let flags = libc::MAP_SHARED | libc::MAP_FIXED;
    let (fd, offset) = (bytes.file().as_raw_fd(), offset as libc::off_t);
    // SAFETY: BLOCK bytes at `start` lie in the reservation, which is this function's alone, and nobody looks into them.
    let mapped = unsafe { libc::mmap(window.start(), BLOCK, libc::PROT_READ, flags, fd, offset) };
    // SAFETY: as above; the call concerns the pages behind the mapping, none of which anybody has a reference to.
    mapped != libc::MAP_FAILED && unsafe { libc::madvise(mapped, BLOCK, libc::MADV_COLLAPSE) } == 0
}

/// Addresses for one block, aligned as a huge page has to be. Nothing can be read or written there.
struct Window {
    reserved: *mut libc::c_void,
}

impl Window {
    const LEN: usize = 2 * BLOCK;

    fn reserve() -> Option<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let reserved = unsafe { libc::mmap(null_mut(), Self::LEN, libc::PROT_NONE, flags, -1, 0) };
        (reserved != libc::MAP_FAILED).then_some(Self { reserved })
    }

    /// Where in there a block may be mapped.
    fn start(&self) -> *mut libc::c_void {
        without_provenance_mut(self.reserved.addr().next_multiple_of(BLOCK))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: what `reserve` has mapped, and what was mapped over it; nobody has a reference into it.
        unsafe { libc::munmap(self.reserved, Self::LEN) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::MetadataExt;

    fn in_memory(len: usize) -> io::Result<Bytes> {
        let file: File = rustix::fs::memfd_create("huge-pages", rustix::fs::MemfdFlags::CLOEXEC)?.into();
        file.set_len(len as u64)?;
        Bytes::new(file)
    }

    fn noise(len: usize) -> Vec<u8> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect()
    }

    #[test]
    fn what_is_written_is_there_and_nothing_else_takes_memory() {
        let bytes = in_memory(8 * BLOCK).unwrap();
        let huge = HugePages::new();
        // From the middle of the second block to the middle of the fifth: two whole ones.
        let (data, offset) = (noise(3 * BLOCK), (BLOCK + BLOCK / 2) as u64);
        huge.prepare(&bytes, &data, offset);
        assert!(bytes.file().metadata().unwrap().blocks() <= 2 * BLOCK as u64 / 512);
        bytes.write_at(&data, offset).unwrap();
        assert_eq!(bytes.file().metadata().unwrap().blocks(), 3 * BLOCK as u64 / 512);
        assert_eq!(bytes.len().unwrap(), 8 * BLOCK as u64);
        let mut all = vec![0xEE; 8 * BLOCK];
        bytes.read_at(&mut all, 0).unwrap();
        let (before, rest) = all.split_at(offset as usize);
        let (there, after) = rest.split_at(data.len());
        assert!(there == data && [before, after].concat().iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_there_already_is_left_alone() {
        let (bytes, data) = (in_memory(2 * BLOCK).unwrap(), noise(BLOCK));
        bytes.write_at(&data[..PAGE], (BLOCK + BLOCK / 2) as u64).unwrap();
        let huge = HugePages::new();
        huge.prepare(&bytes, &data, BLOCK as u64);
        assert_eq!(bytes.file().metadata().unwrap().blocks(), PAGE as u64 / 512);
        assert!(!huge.given_up.load(Ordering::Relaxed));
    }

    #[test]
    fn what_is_shorter_than_a_block_is_left_to_the_write() {
        let bytes = in_memory(4 * BLOCK).unwrap();
        HugePages::new().prepare(&bytes, &noise(BLOCK), 4096);
        HugePages::new().prepare(&bytes, &noise(BLOCK - 512), 0);
        assert_eq!(bytes.file().metadata().unwrap().blocks(), 0);
    }

    #[test]
    fn a_file_that_was_cut_short_does_no_harm() {
        let bytes = in_memory(BLOCK).unwrap();
        bytes.file().set_len(0).unwrap();
        let (huge, data) = (HugePages::new(), noise(2 * BLOCK));
        huge.prepare(&bytes, &data, 0);
        bytes.write_at(&data, 0).unwrap();
        let mut all = vec![0; 2 * BLOCK];
        bytes.read_at(&mut all, 0).unwrap();
        assert!(all == data);
    }

    #[test]
    fn where_there_are_none_it_gives_up() {
        // No such file system, and no shared mapping of what may not be read.
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("write-only")).unwrap();
        let (bytes, huge) = (Bytes::new(file).unwrap(), HugePages::new());
        huge.prepare(&bytes, &noise(BLOCK), 0);
        assert!(huge.given_up.load(Ordering::Relaxed));
    }
}
