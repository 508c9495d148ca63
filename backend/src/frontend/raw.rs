//! Raw access to a queue, for tests that play a hostile or broken guest: arbitrary descriptors, arbitrary heads,
//! arbitrary indices, arbitrary bytes anywhere in guest memory.
//!
//! Nothing here keeps the books of `Queue`: entries pushed raw are taken back raw with [`RawQueue::take_used`], and
//! after a forced index only raw calls make sense. Guest memory itself stays safe to use: accesses beyond it are
//! refused here, whatever addresses the descriptors name.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::error::{FrontendError, OutOfRange};
use super::queue::{Queue, Wait};

/// A descriptor of the split virtqueue, field by field (virtio 1.2, section 2.7.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// Index of the next descriptor, with NEXT.
    pub next: u16,
}

impl Descriptor {
    /// The 16 bytes in memory.
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// A queue without its good manners. From [`Queue::raw`].
pub struct RawQueue<'a> {
    queue: &'a mut Queue,
}

impl<'a> RawQueue<'a> {
    pub(super) fn new(queue: &'a mut Queue) -> Self {
        RawQueue { queue }
    }

    /// Guest physical address of the data area, where tests put headers, tables, data and status bytes.
    pub fn data_address(&self) -> u64 {
        let ring = self.queue.ring();
        ring.memory().guest_address(ring.layout().data)
    }

    /// Guest physical address of the descriptor table.
    pub fn descriptor_address(&self) -> u64 {
        let ring = self.queue.ring();
        ring.memory().guest_address(ring.layout().descriptors)
    }

    /// Copies `bytes` to any guest physical address.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), OutOfRange> {
        self.queue.memory().write(address, bytes)
    }

    /// Copies from any guest physical address.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), OutOfRange> {
        self.queue.memory().read(address, bytes)
    }

    /// Writes the descriptor at `index` (modulo the ring's size).
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) -> Result<(), OutOfRange> {
        let ring = self.queue.ring();
        let at = ring.layout().descriptor(index);
        ring.memory().write_at(at, &descriptor.to_bytes())
    }

    /// Puts any head, also one beyond the ring, into the next available entry; not yet visible to the device.
    pub fn push_avail(&mut self, head: u16) -> Result<(), OutOfRange> {
        self.queue.ring_mut().push(head)
    }

    /// Makes pushed entries visible and notifies the device, whether it asked for that or not.
    pub fn kick(&mut self) -> Result<(), FrontendError> {
        self.queue.ring_mut().publish()?;
        self.queue.notify()
    }

    /// Notifies the device without publishing anything.
    pub fn notify(&mut self) -> Result<(), FrontendError> {
        self.queue.notify()
    }

    /// The next available index.
    pub fn avail_idx(&self) -> u16 {
        self.queue.ring().next_avail()
    }

    /// Stores any available index at once (no notification), a jump of more than the ring's size included.
    pub fn set_avail_idx(&mut self, idx: u16) -> Result<(), OutOfRange> {
        self.queue.ring_mut().force_avail_idx(idx)
    }

    /// Stores any used_event, the position at which the device is asked to call.
    pub fn set_used_event(&mut self, event: u16) -> Result<(), OutOfRange> {
        let ring = self.queue.ring();
        let at = ring.layout().used_event();
        ring.memory().cell(at)?.store(event, Ordering::Release);
        Ok(())
    }

    /// The used index in memory.
    pub fn used_idx(&self) -> Result<u16, OutOfRange> {
        let ring = self.queue.ring();
        Ok(ring.last_used().wrapping_add(ring.pending()?))
    }

    /// Takes the next used entry as (id, len), if there is one.
    pub fn take_used(&mut self) -> Result<Option<(u32, u32)>, OutOfRange> {
        let ring = self.queue.ring_mut();
        if ring.pending()? == 0 {
            return Ok(None);
        }
        let used = ring.take()?;
        Ok(Some((used.id, used.len)))
    }

    /// Forgets all used entries; how many they were.
    pub fn skip_used(&mut self) -> Result<u16, OutOfRange> {
        self.queue.ring_mut().skip_used()
    }

    /// As [`Queue::wait`].
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Wait, FrontendError> {
        self.queue.wait(timeout)
    }
}
