//! The three parts of a ring, as pointers: the room where this ring's unsafe code lives.
//!
//! Layout (virtio 1.x, 2.7): available ring `u16 flags, u16 index, u16 entries[size], u16 used_event`; used ring
//! `u16 flags, u16 index, { u32 id, u32 len } entries[size], u16 avail_event`. All little-endian.
//!
//! Invariant: each part was found whole inside one region of a view which this keeps, and every field is addressed by a
//! constant or an index modulo `size`, so every access is in bounds and mapped. The guest may write anything there at any
//! time: every access is an atomic one, and no reference outlives it.

use std::rc::Rc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use vm_memory::GuestAddress;

use super::{RingError, RingPlace};
use crate::memory::view::View;

pub(super) struct Parts {
    avail: *mut u8,
    used: *mut u8,
    size: u16,
    /// Keeps the memory mapped.
    _view: Rc<View>,
}

impl Parts {
    pub(super) fn find(place: &RingPlace, view: &Rc<View>) -> Result<Self, RingError> {
        let size = place.size;
        if !place.is_well_formed() {
            return Err(RingError::Misplaced);
        }
        let n = u64::from(size);
        let find = |address: GuestAddress, len, to| {
            let host = view.spans().range(address.0, len);
            // Regions begin on pages for the guest and here; that is checked again, since the atomics rely on it.
            host.filter(|host| host.addr().is_multiple_of(to)).ok_or(RingError::Outside)
        };
        find(place.desc, 16 * n, 1)?;
        let (avail, used) = (find(place.avail, 6 + 2 * n, 2)?, find(place.used, 6 + 8 * n, 4)?);
        Ok(Self { avail, used, size, _view: Rc::clone(view) })
    }

    /// Which of the ring's entries a running index names.
    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    #[inline]
    fn avail(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at.is_multiple_of(2) && at + 2 <= 6 + 2 * usize::from(self.size));
        // SAFETY: in bounds (every caller's `at` is a field of the layout above, checked in debug builds), aligned, mapped as
        // long as `_view` lives, and used by this process through atomics alone.
        unsafe { AtomicU16::from_ptr(self.avail.add(at).cast()) }
    }

    #[inline]
    fn used(&self, at: usize) -> &AtomicU16 {
        debug_assert!(at.is_multiple_of(2) && at + 2 <= 6 + 8 * usize::from(self.size));
        // SAFETY: as in `avail`.
        unsafe { AtomicU16::from_ptr(self.used.add(at).cast()) }
    }

    #[inline]
    fn used_word(&self, at: usize) -> &AtomicU32 {
        debug_assert!(at.is_multiple_of(4) && at + 4 <= 4 + 8 * usize::from(self.size));
        // SAFETY: as in `avail`; the ring begins on a multiple of 4, and so does the field.
        unsafe { AtomicU32::from_ptr(self.used.add(at).cast()) }
    }

    #[inline]
    pub(super) fn avail_index(&self, order: Ordering) -> u16 {
        u16::from_le(self.avail(2).load(order))
    }

    /// The head that the guest has put into this entry.
    #[inline]
    pub(super) fn available(&self, index: u16) -> u16 {
        u16::from_le(self.avail(4 + 2 * self.slot(index)).load(Ordering::Relaxed))
    }

    /// Without EVENT_IDX: whether the guest wants signals at all.
    #[inline]
    pub(super) fn wants_signals(&self) -> bool {
        u16::from_le(self.avail(0).load(Ordering::Relaxed)) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0
    }

    /// With EVENT_IDX: the entry for which the guest wants a signal.
    #[inline]
    pub(super) fn used_event(&self) -> u16 {
        u16::from_le(self.avail(4 + 2 * usize::from(self.size)).load(Ordering::Relaxed))
    }

    #[inline]
    pub(super) fn put_used(&self, index: u16, id: u32, len: u32) {
        let at = 4 + 8 * self.slot(index);
        self.used_word(at).store(id.to_le(), Ordering::Relaxed);
        self.used_word(at + 4).store(len.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn set_used_index(&self, index: u16, order: Ordering) {
        self.used(2).store(index.to_le(), order);
    }

    pub(super) fn set_used_flags(&self, flags: u16) {
        self.used(0).store(flags.to_le(), Ordering::Relaxed);
    }

    #[inline]
    pub(super) fn set_avail_event(&self, index: u16) {
        self.used(4 + 8 * usize::from(self.size)).store(index.to_le(), Ordering::Relaxed);
    }
}
