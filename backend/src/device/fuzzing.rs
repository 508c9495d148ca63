//! Chains and rings whose every byte is chosen by the fuzzer, as a hostile guest chooses them.
//!
//! Promises: a request lies inside the disk and its data inside guest memory, and has as many bytes as it says; what is no
//! request leaves nothing behind; a chain is the same whether it is walked from the ring or by its head alone; a ring yields
//! at most as many chains as it has entries.

use super::chain::Chain;
use super::request::{Bounds, Kind, MAX_DATA, MAX_IOVECS, Parsed, SECTOR, parse, put_id};
use crate::memory::view::View;
use crate::vring::{RingPlace, SplitRing};
use libc::iovec;
use std::rc::Rc;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

/// Two regions that touch in guest memory, a hole, and a third.
const REGIONS: [(GuestAddress, usize); 3] =
    [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000), (GuestAddress(0x1_0000), 0x2000)];
const LOW: usize = 0x8000;
const ENTRIES: u16 = 16;
/// Of [`ring`]: behind the table of 16 entries.
const AVAIL: u64 = 0x100;
const USED: u64 = 0x180;

/// Guest memory with these bytes from address 0 on; what is too much lies in the third region.
fn memory(bytes: &[u8]) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&REGIONS).unwrap();
    let (low, high) = bytes.split_at(bytes.len().min(LOW));
    memory.write_slice(low, GuestAddress(0)).unwrap();
    memory.write_slice(&high[..high.len().min(0x2000)], REGIONS[2].0).unwrap();
    memory
}

fn view(bytes: &[u8]) -> Rc<View> {
    Rc::new(View::new(GuestMemoryAtomic::new(memory(bytes)).memory()))
}

/// A disk that the first byte chooses, and the rest.
fn disk(data: &[u8]) -> Option<(Bounds, &[u8])> {
    let (first, rest) = data.split_first()?;
    let capacity = [SECTOR, 1 << 20, 1 << 40, u64::MAX - SECTOR + 1][usize::from(first >> 1 & 3)];
    Some((Bounds { capacity, read_only: first & 1 != 0 }, rest))
}

/// Parses, and holds the outcome to its promises.
fn judged(view: &View, head: u16, disk: &Bounds) {
    let (chain, memory) = (Chain::new(view.spans(), GuestAddress(0), ENTRIES, head), view.memory());
    let foreign = iovec { iov_base: std::ptr::null_mut(), iov_len: 5 };
    let mut iovecs = vec![foreign];
    let parsed = parse(chain, view.spans(), disk, &mut iovecs);
    assert!(iovecs[0].iov_base.is_null() && iovecs[0].iov_len == 5, "somebody else's piece was changed");
    let status = match &parsed {
        Parsed::Request(request) => {
            let pieces = &iovecs[request.iovecs.clone()];
            assert_eq!((request.iovecs.start >= 1, request.iovecs.end), (true, iovecs.len()));
            let bytes: u64 = pieces.iter().map(|piece| piece.iov_len as u64).sum();
            assert!(pieces.len() <= MAX_IOVECS && bytes <= MAX_DATA);
            pieces.iter().for_each(|piece| inside(memory, piece));
            let end = request.offset.checked_add(request.len).expect("a range past the last byte");
            match request.kind {
                Kind::Flush => assert_eq!((request.len, bytes), (0, 0)),
                Kind::GetId => {
                    assert!(request.len > 0 && bytes >= request.len);
                    // SAFETY: the pieces are those of a GetId, and the memory is alive.
                    assert_eq!(unsafe { put_id(pieces, &[7; 20]) } as u64, request.len);
                }
                Kind::Read => assert_eq!(bytes, request.len),
                Kind::Write => assert_eq!((bytes, disk.read_only), (request.len, false)),
                Kind::Discard | Kind::WriteZeroes { .. } => assert_eq!((bytes, disk.read_only), (0, false)),
            }
            if !matches!(request.kind, Kind::Flush | Kind::GetId) {
                assert!(request.len > 0 && end <= disk.capacity);
                assert!(request.offset.is_multiple_of(SECTOR) && request.len.is_multiple_of(SECTOR));
            }
            Some(request.status)
        }
        Parsed::Answer { status, .. } => Some(*status),
        Parsed::Broken => None,
    };
    if !matches!(parsed, Parsed::Request(_)) {
        assert_eq!(iovecs.len(), 1, "what is no request leaves nothing behind");
    }
    if let Some(status) = status {
        // SAFETY: the memory is alive.
        unsafe { status.write(0x5a) };
        assert_eq!(memory.read_obj::<u8>(status.guest).unwrap(), 0x5a, "the status went elsewhere");
    }
}

/// All of a piece lies in mapped guest memory; regions may be neighbours in the host, so ends count, not regions.
fn inside(memory: &GuestMemoryMmap, piece: &iovec) {
    assert!(piece.iov_len > 0, "an empty piece");
    let mut at = piece.iov_base.addr();
    let end = at.checked_add(piece.iov_len).expect("a piece past the last address");
    while at < end {
        let mut ranges = memory.iter().map(|region| {
            let start = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap().addr();
            start..start + region.len() as usize
        });
        at = ranges.find(|range| range.contains(&at)).expect("a piece outside of guest memory").end;
    }
}

/// A table of 16 descriptors, then guest memory from its 256th byte on, the table included.
pub fn request(data: &[u8]) {
    let Some((disk, bytes)) = disk(data) else { return };
    judged(&view(bytes), 0, &disk);
}

/// The same with an available ring at 0x100, all of which is taken and answered; the first byte says besides where the ring
/// begins, and whether with EVENT_IDX.
pub fn ring(data: &[u8]) {
    let Some((disk, bytes)) = disk(data) else { return };
    let (event_idx, begin) = (data[0] & 8 != 0, u16::from(data[0] >> 4));
    let (desc, avail, used) = (GuestAddress(0), GuestAddress(AVAIL), GuestAddress(USED));
    let place = RingPlace { size: ENTRIES, desc, avail, used, next_avail: begin, next_used: begin, event_idx };
    let view = view(bytes);
    let mut ring = SplitRing::new(place, &view).unwrap();
    let heads = oracle(bytes, &place);
    let mut taken = Vec::new();
    let end = loop {
        match ring.pop() {
            Ok(Some(head)) => taken.push(head),
            end => break end,
        }
        assert!(taken.len() <= usize::from(ENTRIES), "more chains than entries");
    };
    assert_eq!(end.is_ok(), heads.is_some(), "{end:?}");
    let heads = heads.unwrap_or_default();
    assert!(taken.iter().eq(heads.iter().map(|(head, _)| head)));
    for (head, expected) in &heads {
        let walked = Chain::new(view.spans(), desc, ENTRIES, *head);
        let walked: Vec<_> = walked.map(|d| (d.addr().0, d.len(), d.flags(), d.next())).collect();
        assert_eq!(&walked, expected, "the chain of head {head}");
    }
    taken.iter().for_each(|head| judged(&view, *head, &disk));
    let _ = ring.ask_for_kick();
    taken.iter().for_each(|head| ring.push(*head, 77));
    let shown = ring.publish();
    assert_eq!(shown, begin.wrapping_add(taken.len() as u16));
    for (head, at) in taken.iter().zip(begin..) {
        let entry = USED + 4 + 8 * u64::from(at % ENTRIES);
        let entry: [u32; 2] = [entry, entry + 4].map(|at| view.memory().read_obj(GuestAddress(at)).unwrap());
        assert_eq!(entry, [u32::from(*head), 77]);
    }
    assert_eq!(view.memory().read_obj::<u16>(GuestAddress(USED + 2)).unwrap(), shown);
    let _ = ring.needs_signal();
    ring.forgo_kicks();
    assert_eq!(ring.next_avail(), begin.wrapping_add(taken.len() as u16));
}

/// What `virtio-queue` takes from the same ring: heads and their chains; `None` if the ring makes no sense to it.
#[allow(clippy::type_complexity)]
fn oracle(bytes: &[u8], place: &RingPlace) -> Option<Vec<(u16, Vec<(u64, u32, u16, u16)>)>> {
    let memory = memory(bytes);
    let mut queue = Queue::new(place.size).unwrap();
    queue.set_event_idx(place.event_idx);
    queue.try_set_desc_table_address(place.desc).unwrap();
    queue.try_set_avail_ring_address(place.avail).unwrap();
    queue.try_set_used_ring_address(place.used).unwrap();
    queue.set_next_avail(place.next_avail);
    queue.set_ready(true);
    let chains = queue.iter(&memory).ok()?;
    let raw = |d: virtio_queue::desc::split::Descriptor| (d.addr().0, d.len(), d.flags(), d.next());
    Some(chains.map(|chain| (chain.head_index(), chain.map(raw).collect())).collect())
}
