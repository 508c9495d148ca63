//! Page-aligned buffers: direct I/O wants aligned memory, and everybody who reads a disk gets it from here.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// No device that Linux knows needs more for direct I/O.
pub const ALIGNMENT: usize = 4096;

/// A fixed number of bytes, page-aligned, zeroed when made.
pub struct AlignedBuffer {
    start: NonNull<u8>,
    layout: Layout,
}

impl AlignedBuffer {
    /// `len` bytes of zero; at least one page is taken.
    pub fn new(len: usize) -> Self {
        let len = len.max(1).next_multiple_of(ALIGNMENT);
        let Ok(layout) = Layout::from_size_align(len, ALIGNMENT) else {
            unreachable!("buffers are sized by clusters, far below isize::MAX")
        };
        // SAFETY: the layout has a size above zero.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Self { start, layout }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `layout.size()` initialised bytes that this value owns.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.layout.size()) }
    }
}

impl Drop for AlignedBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated with this very layout, and freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
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
