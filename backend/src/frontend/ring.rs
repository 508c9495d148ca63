//! The driver's side of a split virtqueue (virtio 1.2, section 2.7): available entries out, used entries in, and who
//! is to be notified of them. Knows nothing of block requests; `Queue` owns one, alone.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::error::OutOfRange;
use super::layout::Layout;
use super::memory::GuestMemory;

/// VRING_AVAIL_F_NO_INTERRUPT.
const NO_INTERRUPT: u16 = 1;
/// VRING_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// Whether moving an index from `old` to `new` passes the position that the other side waits for: it wants to hear
/// of entry `event` (virtio 1.2, section 2.7.10). All arithmetic is modulo 2^16.
pub(super) fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub id: u32,
    pub len: u32,
}

#[derive(Debug)]
pub(super) struct DriverRing {
    memory: Arc<GuestMemory>,
    layout: Layout,
    event_idx: bool,
    /// Where the next available entry goes.
    next_avail: u16,
    /// What the avail idx in memory says.
    published: u16,
    /// The next used entry to take.
    last_used: u16,
}

impl DriverRing {
    pub fn new(memory: Arc<GuestMemory>, layout: Layout, event_idx: bool) -> Self {
        DriverRing { memory, layout, event_idx, next_avail: 0, published: 0, last_used: 0 }
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn last_used(&self) -> u16 {
        self.last_used
    }

    fn load(&self, offset: usize, order: Ordering) -> Result<u16, OutOfRange> {
        Ok(self.memory.cell(offset)?.load(order))
    }

    fn store(&self, offset: usize, value: u16, order: Ordering) -> Result<(), OutOfRange> {
        self.memory.cell(offset)?.store(value, order);
        Ok(())
    }

    /// Puts a chain's head into the available ring. The device does not see it before [`DriverRing::publish`].
    pub fn push(&mut self, head: u16) -> Result<(), OutOfRange> {
        let at = self.layout.avail_entry(self.next_avail);
        self.store(at, head, Ordering::Relaxed)?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(())
    }

    /// Shows the device what was pushed, and tells whether it wants to be notified.
    pub fn publish(&mut self) -> Result<bool, OutOfRange> {
        let (old, new) = (self.published, self.next_avail);
        if old == new {
            return Ok(false);
        }
        // Release: descriptors and entries are visible before the index that covers them.
        self.store(self.layout.avail_idx(), new, Ordering::Release)?;
        self.published = new;
        // The index must be visible before the event or flags are read, or both sides could miss each other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.load(self.layout.avail_event(), Ordering::Relaxed)?;
            Ok(need_event(event, new, old))
        } else {
            Ok(self.load(self.layout.used_flags(), Ordering::Relaxed)? & NO_NOTIFY == 0)
        }
    }

    /// How many used entries wait to be taken.
    pub fn pending(&self) -> Result<u16, OutOfRange> {
        // Acquire: the entries, and the data and status that they speak of, are read after the index.
        let used = self.load(self.layout.used_idx(), Ordering::Acquire)?;
        Ok(used.wrapping_sub(self.last_used))
    }

    /// Takes the next used entry. Only after [`DriverRing::pending`] said there is one.
    pub fn take(&mut self) -> Result<Used, OutOfRange> {
        let mut entry = [0; 8];
        self.memory.read_at(self.layout.used_entry(self.last_used), &mut entry)?;
        self.last_used = self.last_used.wrapping_add(1);
        let [a, b, c, d, e, f, g, h] = entry;
        Ok(Used { id: u32::from_le_bytes([a, b, c, d]), len: u32::from_le_bytes([e, f, g, h]) })
    }

    /// Asks to be called for the next used entry. True: one is there already, do not sleep.
    pub fn arm(&self) -> Result<bool, OutOfRange> {
        if self.event_idx {
            let at = self.layout.used_event();
            self.store(at, self.last_used, Ordering::Relaxed)?;
        } else {
            self.store(self.layout.avail_flags(), 0, Ordering::Relaxed)?;
        }
        // The wish must be visible before the index is read again, or a completion in between goes unnoticed.
        fence(Ordering::SeqCst);
        Ok(self.pending()? != 0)
    }

    /// Says that calls are not needed for now. With EVENT_IDX nothing is to be done: a passed event stays silent.
    pub fn disarm(&self) -> Result<(), OutOfRange> {
        if self.event_idx {
            return Ok(());
        }
        self.store(self.layout.avail_flags(), NO_INTERRUPT, Ordering::Relaxed)
    }

    /// Sets the available index to any value, for hostile rings.
    pub fn force_avail_idx(&mut self, idx: u16) -> Result<(), OutOfRange> {
        self.next_avail = idx;
        self.published = idx;
        self.store(self.layout.avail_idx(), idx, Ordering::Release)
    }

    /// Takes the device's used index as what has been consumed, for hostile rings.
    pub fn skip_used(&mut self) -> Result<u16, OutOfRange> {
        let skipped = self.pending()?;
        self.last_used = self.last_used.wrapping_add(skipped);
        Ok(skipped)
    }

    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }
}
