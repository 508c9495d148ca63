//! A split virtqueue as the device uses it (virtio 1.x, 2.7), by pointers into guest memory that are looked up once for
//! each state of that memory, not once for each access.
//!
//! The session says where a ring lies ([`RingPlace`]); a queue thread makes a [`SplitRing`] of it and is its only user.
//! Taking heads and filling used entries is separate from showing them: [`SplitRing::push`] writes an entry behind the used
//! index, [`SplitRing::publish`] shows all of them with one store, so that a batch is one batch for the guest and for the
//! inflight region. Chains are walked elsewhere (`device::chain`); all that is here is heads.
//!
//! Invariants. Every access lies inside the ring, whatever the guest writes there: indices are taken modulo the size,
//! and the ring's three parts were found inside guest memory, which the ring keeps mapped. What the guest can write
//! is read once, through atomics. An available index that is further ahead than the ring is long is an error, not a loop.

mod parts;
#[cfg(test)]
mod tests;

use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use parts::Parts;
use thiserror::Error;
use virtio_bindings::virtio_ring::VRING_USED_F_NO_NOTIFY;
use vm_memory::GuestAddress;

use crate::memory::view::View;

/// More entries no split virtqueue has.
const MAX_SIZE: u16 = 32768;

/// Where a ring lies and where it goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingPlace {
    /// Entries, a power of two up to 32768.
    pub size: u16,
    /// The descriptor table, aligned to 16 bytes.
    pub desc: GuestAddress,
    /// The available ring, aligned to 2 bytes.
    pub avail: GuestAddress,
    /// The used ring, aligned to 4 bytes.
    pub used: GuestAddress,
    /// The first entry of the available ring that was not taken.
    pub next_avail: u16,
    /// The used index as the guest sees it.
    pub next_used: u16,
    /// Whether EVENT_IDX was negotiated.
    pub event_idx: bool,
}

impl RingPlace {
    /// Whether size and addresses are such as a ring can have.
    pub fn is_well_formed(&self) -> bool {
        let aligned = |address: GuestAddress, to: u64| address.0.is_multiple_of(to);
        self.size.is_power_of_two()
            && self.size <= MAX_SIZE
            && aligned(self.desc, 16)
            && aligned(self.avail, 2)
            && aligned(self.used, 4)
    }
}

/// Why a ring cannot be used, or used any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// Its size is none that a ring can have, or a part is not aligned.
    #[error("a size or an address is not one that a ring can have")]
    Misplaced,
    /// A part is outside of guest memory, or in more than one region of it.
    #[error("it is not inside guest memory")]
    Outside,
    /// The guest says that more entries are available than the ring has.
    #[error("the available index is {index}, {ahead} ahead of a ring of {size}")]
    AvailableIndex {
        /// As the guest wrote it.
        index: u16,
        /// How far that is ahead.
        ahead: u16,
        /// Entries of the ring.
        size: u16,
    },
}

/// The device's side of one split virtqueue.
pub struct SplitRing {
    place: RingPlace,
    parts: Parts,
    /// Up to here entries may be taken without another look at the guest's index.
    seen_avail: u16,
    /// Used entries that were written, shown or not.
    written: u16,
    /// The used index at the last question whether to signal.
    asked: u16,
}

impl SplitRing {
    /// The ring in this state of guest memory.
    ///
    /// # Errors
    /// [`RingError`]: it cannot be there.
    pub fn new(place: RingPlace, view: &Rc<View>) -> Result<Self, RingError> {
        let parts = Parts::find(&place, view)?;
        let (seen_avail, written) = (place.next_avail, place.next_used);
        Ok(Self { place, parts, seen_avail, written, asked: written })
    }

    /// The ring goes on in another state of guest memory.
    ///
    /// # Errors
    /// [`RingError::Outside`]: it is no longer there; it stays in the state it was in.
    pub fn move_to(&mut self, view: &Rc<View>) -> Result<(), RingError> {
        self.parts = Parts::find(&self.place, view)?;
        Ok(())
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.place.size
    }

    /// Where the descriptor table begins.
    pub fn table(&self) -> GuestAddress {
        self.place.desc
    }

    /// The first entry of the available ring that was not taken.
    pub fn next_avail(&self) -> u16 {
        self.place.next_avail
    }

    /// Takes the next head. It may be any number: a chain of one beyond the table has no descriptors.
    ///
    /// # Errors
    /// [`RingError::AvailableIndex`].
    #[inline]
    pub fn pop(&mut self) -> Result<Option<u16>, RingError> {
        if self.place.next_avail == self.seen_avail && !self.look()? {
            return Ok(None);
        }
        let head = self.parts.available(self.place.next_avail);
        self.place.next_avail = self.place.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Reads the guest's index; whether there is something to take.
    #[inline]
    fn look(&mut self) -> Result<bool, RingError> {
        // Acquire: what the guest wrote before it moved the index is visible after this.
        let index = self.parts.avail_index(Ordering::Acquire);
        let (ahead, size) = (index.wrapping_sub(self.place.next_avail), self.place.size);
        if ahead > size {
            return Err(RingError::AvailableIndex { index, ahead, size });
        }
        self.seen_avail = index;
        Ok(ahead != 0)
    }

    /// Whether the guest seems to have made something available. Costs one load, orders nothing.
    #[inline]
    pub fn has_more(&self) -> bool {
        self.parts.avail_index(Ordering::Relaxed) != self.place.next_avail
    }

    /// Asks the guest for a kick when it makes more available; whether it has done so already, which it need not have
    /// noticed the wish before.
    pub fn ask_for_kick(&self) -> bool {
        if self.place.event_idx {
            self.parts.set_avail_event(self.place.next_avail);
        } else {
            self.parts.set_used_flags(0);
        }
        // The wish before the look: either the guest sees the wish, or this sees what it has made available.
        fence(Ordering::SeqCst);
        self.has_more()
    }

    /// Tells the guest that kicks are not needed for now. With EVENT_IDX nothing is to be done: an event that has passed
    /// stays silent.
    pub fn forgo_kicks(&self) {
        if !self.place.event_idx {
            self.parts.set_used_flags(VRING_USED_F_NO_NOTIFY as u16);
        }
    }

    /// Writes a used entry behind those that are shown. At most `size` may wait to be shown.
    #[inline]
    pub fn push(&mut self, head: u16, len: u32) {
        self.parts.put_used(self.written, u32::from(head), len);
        self.written = self.written.wrapping_add(1);
    }

    /// Shows all entries that were written to the guest, with one store; answers the used index.
    #[inline]
    pub fn publish(&mut self) -> u16 {
        // Release: who sees the index sees the entries, the status bytes and the data.
        self.parts.set_used_index(self.written, Ordering::Release);
        self.place.next_used = self.written;
        self.written
    }

    /// Whether the guest wants to be signalled for what was shown since this was asked the last time.
    #[inline]
    pub fn needs_signal(&mut self) -> bool {
        // What was shown comes before the look at the guest's wish.
        fence(Ordering::SeqCst);
        let (new, old) = (self.place.next_used, self.asked);
        self.asked = new;
        if !self.place.event_idx {
            return self.parts.wants_signals();
        }
        // Whether the guest's event lies among the entries from `old` on to `new` (virtio 1.x, 2.7.10).
        new.wrapping_sub(self.parts.used_event()).wrapping_sub(1) < new.wrapping_sub(old)
    }
}
