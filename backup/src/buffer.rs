//! Page-aligned buffers: direct I/O wants aligned memory, and everybody who reads a disk gets it from here.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// No device that Linux knows needs more for direct I/O.
pub const ALIGNMENT: usize = 4096;

/// A fixed number of bytes, page-aligned, zeroed when made.
pub struct AlignedBuffer {
    /// What was allocated; the buffer begins at its first page boundary.
    memory: NonNull<u8>,
    layout: Layout,
    start: NonNull<u8>,
    len: usize,
}

impl AlignedBuffer {
    /// `len` bytes of zero; at least one page is taken. Large ones are taken from the system as they are and cost only what is
    /// used of them: a worker that copies small blocks does not pay for the largest that it might meet.
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(ALIGNMENT);
        // Without asking for the alignment: memory that is allocated with one is zeroed by hand, which touches every page.
        let Ok(layout) = Layout::from_size_align(len + ALIGNMENT - 1, 1) else {
            unreachable!("buffers are sized by clusters, far below isize::MAX")
        };
        // SAFETY: the layout has a size above zero.
        let Some(memory) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        // SAFETY: at most ALIGNMENT - 1 bytes on, behind which `len` are left.
        let start = unsafe { memory.byte_add(memory.align_offset(ALIGNMENT)) };
        Self { memory, layout, start, len }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout, and freed once.
        unsafe { dealloc(self.memory.as_ptr(), self.layout) }
    }
}

// SAFETY: it owns plain memory.
unsafe impl Send for AlignedBuffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for AlignedBuffer {}

/// Whether every byte is zero. Compilers make wide loads of this; data usually shows in the first block.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(512).all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_zero_and_all_its_own() {
        for len in [0, 1, 4096, 4097, 64 << 10, 3 << 20] {
            let mut buffers = [AlignedBuffer::new(len), AlignedBuffer::new(len)];
            for (fill, buffer) in (1..).zip(&mut buffers) {
                assert!(buffer.as_ptr().addr().is_multiple_of(ALIGNMENT));
                assert_eq!(buffer.len(), len.max(1).next_multiple_of(ALIGNMENT));
                assert!(is_zero(buffer), "{len}");
                buffer.fill(fill);
            }
            assert!((1..).zip(&buffers).all(|(fill, buffer)| buffer.iter().all(|byte| *byte == fill)));
        }
    }

    #[test]
    fn what_is_not_used_of_a_large_buffer_takes_no_memory() {
        const LEN: usize = 64 << 20;
        let buffer = AlignedBuffer::new(LEN);
        let mut resident = vec![0_u8; LEN / ALIGNMENT];
        // SAFETY: the range is the buffer, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(buffer.as_ptr().cast_mut().cast(), LEN, resident.as_mut_ptr()) };
        assert_eq!(result, 0);
        assert!(resident.iter().filter(|page| **page & 1 == 1).count() < resident.len() / 8);
    }
}
