//! A descriptor chain by its head alone, for requests that an earlier process took from the ring.
//!
//! The available ring no longer tells of them, and `virtio_queue` makes chains of nothing else. The write path walks a saved
//! head with this and parses it like any other chain. It yields what `virtio_queue::DescriptorChain` yields for the same
//! head, which a property test holds it to.
//!
//! Invariant: total and bounded. A table is walked for at most as many steps as it has entries, and one indirect table at
//! most is entered.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// The descriptors behind a head, in order, an indirect table resolved. It ends early where they are invalid.
#[derive(Debug)]
pub struct SavedChain<'a> {
    memory: &'a GuestMemoryMmap,
    table: GuestAddress,
    entries: u16,
    next: u16,
    steps_left: u16,
    indirect: bool,
    bytes: u32,
}

impl<'a> SavedChain<'a> {
    /// The chain that begins with descriptor `head` of a table of `entries`.
    pub fn new(memory: &'a GuestMemoryMmap, table: GuestAddress, entries: u16, head: u16) -> Self {
        Self { memory, table, entries, next: head, steps_left: entries, indirect: false, bytes: 0 }
    }

    fn enter(&mut self, indirect: Descriptor) -> Option<()> {
        // One level, and whole descriptors (virtio 1.x, 2.7.5.3).
        if self.indirect || !indirect.len().is_multiple_of(DESCRIPTOR) {
            return None;
        }
        self.entries = u16::try_from(indirect.len() / DESCRIPTOR).ok()?;
        self.table = indirect.addr();
        self.next = 0;
        self.steps_left = self.entries;
        self.indirect = true;
        Some(())
    }

    fn read(&self) -> Option<Descriptor> {
        if self.steps_left == 0 || self.next >= self.entries {
            return None;
        }
        let at = self.table.checked_add(u64::from(self.next) * u64::from(DESCRIPTOR))?;
        self.memory.read_obj(at).ok()
    }
}

impl Iterator for SavedChain<'_> {
    type Item = Descriptor;

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
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        self.next = descriptor.next();
        self.steps_left = if descriptor.has_next() { self.steps_left - 1 } else { 0 };
        Some(descriptor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};

    const ENTRIES: u16 = 8;
    const AVAIL: u64 = 0x1000;
    /// Where descriptors point to, so that indirect tables are found there.
    const ELSEWHERE: u64 = 0x4000;

    fn descriptor() -> impl Strategy<Value = [u8; 16]> {
        let address =
            prop_oneof![8 => (0u64..4).prop_map(|n| ELSEWHERE + 128 * n), 1 => Just(u64::MAX - 7), 1 => any::<u64>()];
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
        fn a_saved_head_is_walked_as_virtio_queue_walks_it(
            table in prop::collection::vec(descriptor(), usize::from(ENTRIES)),
            elsewhere in prop::collection::vec(descriptor(), 32),
            head in prop_oneof![8 => 0u16..ENTRIES, 1 => any::<u16>()],
        ) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x8000)]).unwrap();
            memory.write_slice(table.as_flattened(), GuestAddress(0)).unwrap();
            memory.write_slice(elsewhere.as_flattened(), GuestAddress(ELSEWHERE)).unwrap();
            memory.write_obj(1u16.to_le(), GuestAddress(AVAIL + 2)).unwrap();
            memory.write_obj(head.to_le(), GuestAddress(AVAIL + 4)).unwrap();
            let mut queue = Queue::new(ENTRIES).unwrap();
            queue.set_size(ENTRIES);
            queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
            queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
            queue.try_set_used_ring_address(GuestAddress(0x2000)).unwrap();
            queue.set_ready(true);
            let oracle: Vec<_> = queue.iter(&memory).unwrap().next().unwrap().map(raw).collect();
            let ours: Vec<_> = SavedChain::new(&memory, GuestAddress(0), ENTRIES, head).map(raw).collect();
            prop_assert_eq!(ours, oracle);
        }
    }

    fn raw(d: Descriptor) -> (u64, u32, u16, u16) {
        (d.addr().0, d.len(), d.flags(), d.next())
    }
}
