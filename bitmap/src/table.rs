//! Tables that are zero when they are made, and take memory only where they are written.
//!
//! Used for what sets of bits consist of. Large ones are mappings of their own: the allocator would sooner or later serve
//! them from memory that was used before, and clear all of it by hand, which makes whatever needs a new set (a freeze) cost
//! what the disk's size says. Invariant: every element is zero until somebody writes it.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::sync::{AtomicU32, AtomicU64};

/// Tables of fewer bytes than this come from the allocator: to clear them costs less than to map and unmap them.
#[cfg(not(any(loom, shuttle)))]
const LARGE: usize = 32 << 10;

/// A huge page where they are smallest; what has fewer bytes does not get any by itself.
#[cfg(not(any(loom, shuttle)))]
const HUGE: usize = 2 << 20;

/// What a table may consist of.
///
/// # Safety
///
/// All bytes zero have to be a value, the same as the default one, and there must be nothing to drop.
pub(crate) unsafe trait Zero: Default {}

// SAFETY: a number.
unsafe impl Zero for u32 {}
// SAFETY: a number.
unsafe impl Zero for u64 {}
// SAFETY: it has the layout of a u32. In a model checker nobody makes one of zeroed bytes.
unsafe impl Zero for AtomicU32 {}
// SAFETY: it has the layout of a u64. In a model checker nobody makes one of zeroed bytes.
unsafe impl Zero for AtomicU64 {}

/// A fixed number of elements.
pub(crate) struct Table<T> {
    first: NonNull<T>,
    count: usize,
    /// Bytes of the mapping that they are, if they are one.
    mapped: Option<usize>,
}

// SAFETY: it owns its elements as a boxed slice does.
unsafe impl<T: Send> Send for Table<T> {}
// SAFETY: likewise.
unsafe impl<T: Sync> Sync for Table<T> {}

impl<T: Zero> Table<T> {
    /// `count` elements, all zero.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn new(count: usize) -> Self {
        let bytes = count.checked_mul(size_of::<T>()).filter(|bytes| *bytes >= LARGE);
        if let Some((bytes, first)) = bytes.and_then(|bytes| Some((bytes, map(bytes)?))) {
            return Self { first: first.cast(), count, mapped: Some(bytes) };
        }
        // SAFETY: all bytes zero are a value of `T`.
        Self::of(unsafe { Box::new_zeroed_slice(count).assume_init() })
    }

    /// `count` elements, all zero.
    #[cfg(any(loom, shuttle))]
    pub(crate) fn new(count: usize) -> Self {
        Self::of((0..count).map(|_| T::default()).collect())
    }

    fn of(elements: Box<[T]>) -> Self {
        let count = elements.len();
        Self { first: NonNull::from(Box::leak(elements)).cast(), count, mapped: None }
    }
}

/// Private memory of the system; `None` if it has none to give.
#[cfg(not(any(loom, shuttle)))]
fn map(bytes: usize) -> Option<NonNull<u8>> {
    use rustix::mm::{Advice, MapFlags, ProtFlags};
    let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice takes no memory away from anybody.
    let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, protection, flags).ok()? };
    if bytes >= HUGE {
        // What is touched here and there is not to take huge pages, nor to wait until one is cleared. If that is refused it
        // is merely dearer.
        // SAFETY: the mapping of the lines above; the advice changes no content.
        let _ = unsafe { rustix::mm::madvise(start, bytes, Advice::LinuxNoHugepage) };
    }
    NonNull::new(start.cast())
}

impl<T> Deref for Table<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `count` elements, initialised and owned; a page is aligned enough for each `Zero`.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl<T> DerefMut for Table<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.count) }
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        match self.mapped {
            #[cfg(not(any(loom, shuttle)))]
            Some(bytes) => {
                // SAFETY: mapped by `map` with this length, and nobody has it any more. An error changes nothing.
                let _ = unsafe { rustix::mm::munmap(self.first.as_ptr().cast(), bytes) };
            }
            _ => {
                let elements = std::ptr::slice_from_raw_parts_mut(self.first.as_ptr(), self.count);
                // SAFETY: leaked by `of` with this length, and taken back once.
                drop(unsafe { Box::from_raw(elements) });
            }
        }
    }
}

impl<T> fmt::Debug for Table<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("count", &self.count).finish_non_exhaustive()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_zero_when_it_is_made_whatever_was_there_before() {
        for count in [0, 1, LARGE / 8 - 1, LARGE / 8, LARGE] {
            for _ in 0..3 {
                let mut table = Table::<u64>::new(count);
                assert_eq!(table.len(), count);
                assert!(table.iter().all(|word| *word == 0), "{count}");
                table.fill(u64::MAX);
            }
        }
    }
}
