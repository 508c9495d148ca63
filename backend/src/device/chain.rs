//! A descriptor chain by its head: the descriptors behind it, in order, an indirect table resolved.
//!
//! The write path walks every head with this, one that was just taken from the ring and one that an earlier process left
//! alike. It yields what `virtio_queue::DescriptorChain` yields for the same head, which a property test holds it to.
//!
//! Invariant: total and bounded. A table is walked for at most as many steps as it has entries, and one indirect table at
//! most is entered. A descriptor is copied before it is looked at.

use crate::memory::view::{Pair, Spans, read_pair};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::GuestAddress;

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// A descriptor (virtio 1.x, 2.7.5), copied from guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// One of these parts.
    pub fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self { addr, len, flags, next }
    }

    #[inline]
    fn from_pair((addr, rest): Pair) -> Self {
        Self { addr, len: rest as u32, flags: (rest >> 32) as u16, next: (rest >> 48) as u16 }
    }

    #[cfg(test)]
    pub(super) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }

    /// Where its buffer lies.
    pub fn addr(&self) -> GuestAddress {
        GuestAddress(self.addr)
    }

    /// Bytes of its buffer.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether its buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All flags.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// The next one's number, if there is one.
    pub fn next(&self) -> u16 {
        self.next
    }

    /// Whether another one follows.
    #[inline]
    pub fn has_next(&self) -> bool {
        self.flags & VRING_DESC_F_NEXT as u16 != 0
    }

    /// Whether the device writes to its buffer; else it reads there.
    #[inline]
    pub fn is_write_only(&self) -> bool {
        self.flags & VRING_DESC_F_WRITE as u16 != 0
    }

    /// Whether its buffer is a table of descriptors.
    #[inline]
    pub fn refers_to_indirect_table(&self) -> bool {
        self.flags & VRING_DESC_F_INDIRECT as u16 != 0
    }
}

/// The descriptors behind a head. It ends early where they are invalid.
#[derive(Debug)]
pub struct Chain<'a> {
    spans: &'a Spans,
    table: u64,
    /// The whole table, if it lies in one region, as all but odd ones do.
    host: Option<*const u8>,
    entries: u16,
    next: u16,
    steps_left: u16,
    indirect: bool,
    bytes: u32,
}

impl<'a> Chain<'a> {
    /// The chain that begins with descriptor `head` of a table of `entries`.
    #[inline]
    pub fn new(spans: &'a Spans, table: GuestAddress, entries: u16, head: u16) -> Self {
        let host = spans.range(table.0, u64::from(entries) * u64::from(DESCRIPTOR)).map(<*mut u8>::cast_const);
        Self { spans, table: table.0, host, entries, next: head, steps_left: entries, indirect: false, bytes: 0 }
    }

    #[inline]
    fn enter(&mut self, indirect: Descriptor) -> Option<()> {
        // One level, and whole descriptors (virtio 1.x, 2.7.5.3).
        if self.indirect || !indirect.len.is_multiple_of(DESCRIPTOR) {
            return None;
        }
        self.entries = u16::try_from(indirect.len / DESCRIPTOR).ok()?;
        self.table = indirect.addr;
        self.host = self.spans.range(indirect.addr, u64::from(indirect.len)).map(<*mut u8>::cast_const);
        self.next = 0;
        self.steps_left = self.entries;
        self.indirect = true;
        Some(())
    }

    #[inline]
    fn read(&self) -> Option<Descriptor> {
        if self.steps_left == 0 || self.next >= self.entries {
            return None;
        }
        let skip = u32::from(self.next) * DESCRIPTOR;
        let pair = match self.host {
            // SAFETY: the whole table lies in guest memory that `spans` keeps mapped, and `next` is below its entries.
            Some(host) => unsafe { read_pair(host.add(skip as usize)) },
            None => self.spans.read_pair(self.table.checked_add(u64::from(skip))?)?,
        };
        Some(Descriptor::from_pair(pair))
    }
}

impl Iterator for Chain<'_> {
    type Item = Descriptor;

    #[inline]
    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(descriptor)?;
            descriptor = self.read()?;
            // A table in a table is none.
            if descriptor.refers_to_indirect_table() {
                return None;
            }
        }
        // No chain has more than 2^32 bytes (virtio 1.x, 2.7.5.2).
        self.bytes = self.bytes.checked_add(descriptor.len)?;
        self.next = descriptor.next;
        self.steps_left = if descriptor.has_next() { self.steps_left - 1 } else { 0 };
        Some(descriptor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::view::View;
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestMemoryMmap};

    const ENTRIES: u16 = 8;
    const AVAIL: u64 = 0x1000;
    /// Where descriptors point to, so that indirect tables are found there. A region ends in the midst of them.
    const ELSEWHERE: u64 = 0x3f80;

    fn descriptor() -> impl Strategy<Value = [u8; 16]> {
        let address = prop_oneof![
            8 => (0u64..4).prop_map(|n| ELSEWHERE + 128 * n),
            1 => (0u64..600).prop_map(|n| ELSEWHERE + n),
            1 => Just(u64::MAX - 7),
            1 => any::<u64>()
        ];
        let len = prop_oneof![8 => (0u32..9).prop_map(|n| 16 * n), 1 => 0u32..200, 1 => any::<u32>()];
        // NEXT 1, WRITE 2, INDIRECT 4.
        let flags =
            prop_oneof![6 => Just(1u16), 2 => Just(3), 1 => Just(0), 2 => Just(4), 1 => Just(5), 1 => any::<u16>()];
        let next = prop_oneof![8 => 0u16..ENTRIES, 1 => any::<u16>()];
        (address, len, flags, next).prop_map(|(address, len, flags, next)| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&address.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            bytes
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn a_head_is_walked_as_virtio_queue_walks_it(
            table in prop::collection::vec(descriptor(), usize::from(ENTRIES)),
            elsewhere in prop::collection::vec(descriptor(), 32),
            head in prop_oneof![8 => 0u16..ENTRIES, 1 => any::<u16>()],
            gap: bool,
        ) {
            let second = if gap { 0x5000 } else { 0x4000 };
            let ranges = [(GuestAddress(0), 0x4000), (GuestAddress(second), 0x4000)];
            let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
            memory.write_slice(table.as_flattened(), GuestAddress(0)).unwrap();
            memory.write(elsewhere.as_flattened(), GuestAddress(ELSEWHERE)).unwrap();
            memory.write_obj(1u16.to_le(), GuestAddress(AVAIL + 2)).unwrap();
            memory.write_obj(head.to_le(), GuestAddress(AVAIL + 4)).unwrap();
            let mut queue = Queue::new(ENTRIES).unwrap();
            queue.set_size(ENTRIES);
            queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
            queue.set_ready(true);
            let oracle: Vec<_> = queue.iter(&memory).unwrap().next().unwrap()
                .map(|d| (d.addr().0, d.len(), d.flags(), d.next())).collect();
            let view = View::over(&memory);
            let ours: Vec<_> = Chain::new(view.spans(), GuestAddress(0), ENTRIES, head)
                .map(|d| (d.addr().0, d.len(), d.flags(), d.next())).collect();
            prop_assert_eq!(ours, oracle);
        }
    }
}
