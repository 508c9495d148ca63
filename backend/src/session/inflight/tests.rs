//! Promise: whatever instruction a process is killed at, the next one resubmits exactly what was taken and not shown to the
//! guest, in the order in which it was taken; and no content of the region makes it do more than that, or panic.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use proptest::prelude::*;
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::VhostUserInflight;

use super::{Area, InflightError, InflightQueue, create};
use crate::memory::MemoryTable;

/// Ends a process before its n-th store: that one and all later ones do not happen.
#[derive(Clone, Debug)]
pub(super) struct Fuse(Arc<AtomicI64>);

impl Fuse {
    fn new(stores: i64) -> Self {
        Self(Arc::new(AtomicI64::new(stores)))
    }

    /// Asked once for each store.
    pub(super) fn is_blown(&self) -> bool {
        self.0.fetch_sub(1, Ordering::Relaxed) <= 0
    }

    fn was_blown(&self) -> bool {
        self.0.load(Ordering::Relaxed) < 0
    }
}

const SIZE: u16 = 8;

fn area(queues: u16, entries: u16) -> (Area, File) {
    let wish = VhostUserInflight::new(0, 0, queues, entries);
    let (told, file) = create(&wish, 64).unwrap();
    let kept = file.try_clone().unwrap();
    (Area::map(&told, file, 64, &MemoryTable::default()).unwrap(), kept)
}

/// What the guest sees, and what a process did that it cannot see.
struct Scene {
    area: Area,
    /// The used ring's index.
    used: u16,
    /// Taken and noted, not shown to the guest, in the order in which they were taken.
    in_flight: Vec<u16>,
    /// Heads that the guest may use; it takes them in this order.
    free: VecDeque<u16>,
    /// Made available and not taken for certain, in this order.
    available: VecDeque<u16>,
    /// All that were ever taken for certain: where the ring has to go on.
    taken: u16,
}

/// A process: its region with a fuse, which also guards the store of the used index.
struct Process {
    queue: InflightQueue,
    fuse: Fuse,
}

impl Scene {
    fn new(used: u16) -> Self {
        let (area, _) = area(1, SIZE);
        let free = (0..SIZE).collect();
        Self { area, used, in_flight: Vec::new(), free, available: VecDeque::new(), taken: used }
    }

    /// A process that will store so often; checks what it finds. It may die while it recovers.
    fn start(&self, stores: i64) -> Process {
        let fuse = Fuse::new(stores);
        let mut queue = self.area.queue(0).unwrap();
        queue.fuse = Some(fuse.clone());
        if let Some(left) = queue.recover(SIZE, self.used).unwrap() {
            assert_eq!(left, self.in_flight, "what is to be resubmitted");
            assert_eq!(self.used.wrapping_add(left.len() as u16), self.taken, "where the ring goes on");
        } else {
            assert!(self.in_flight.is_empty(), "a region that was used is fresh");
        }
        Process { queue, fuse }
    }

    fn submit(&mut self) {
        if let Some(head) = self.free.pop_front() {
            self.available.push_back(head);
        }
    }

    fn take(&mut self, process: &mut Process) {
        if let Some(head) = self.available.front().copied() {
            process.queue.begin(head);
            if !process.fuse.was_blown() {
                self.available.pop_front();
                self.in_flight.push(head);
                self.taken = self.taken.wrapping_add(1);
            }
        }
    }

    /// Answers requests anywhere in the order, as one batch.
    fn answer(&mut self, process: &mut Process, picks: &[usize]) {
        let mut waiting = self.in_flight.clone();
        let mut batch = Vec::new();
        for pick in picks {
            if !waiting.is_empty() {
                batch.push(waiting.remove(pick % waiting.len()));
            }
        }
        let next_used = self.used.wrapping_add(batch.len() as u16);
        let shown = process.queue.answer(&batch, || {
            // The one store that counts for the guest.
            if !process.fuse.is_blown() {
                self.used = next_used;
                self.in_flight = waiting;
                // The guest may use the heads again at once.
                self.free.extend(&batch);
            }
            Ok::<_, ()>(next_used)
        });
        assert_eq!(shown, Ok(next_used));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Submit,
    Take,
    Answer(Vec<usize>),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => Just(Step::Submit),
        3 => Just(Step::Take),
        3 => prop::collection::vec(0usize..64, 1..4).prop_map(Step::Answer),
    ]
}

/// Processes follow each other, each killed after so many stores, some of them while they recover.
fn run(first_used: u16, steps: &[Step], lives: &[i64]) -> usize {
    let mut scene = Scene::new(first_used);
    let mut lives = lives.iter().copied().chain(std::iter::once(i64::MAX));
    let mut deaths = 0;
    let mut process = scene.start(lives.next().unwrap());
    for step in steps {
        while process.fuse.was_blown() {
            deaths += 1;
            process = scene.start(lives.next().unwrap());
        }
        match step {
            Step::Submit => scene.submit(),
            Step::Take => scene.take(&mut process),
            Step::Answer(picks) => scene.answer(&mut process, picks),
        }
    }
    scene.start(i64::MAX);
    deaths + usize::from(process.fuse.was_blown())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn whatever_store_a_process_dies_before_exactly_the_unanswered_is_resubmitted(
        first_used: u16,
        steps in prop::collection::vec(step(), 1..80),
        lives in prop::collection::vec(0i64..60, 0..12),
    ) {
        run(first_used, &steps, &lives);
    }

    #[test]
    fn no_content_of_the_region_does_harm(
        seed: u64, holes in prop::collection::vec(any::<u8>(), 0..16), size in 0u32..9, ring_used: u16, sane: bool,
    ) {
        let entries = 256;
        let (area, file) = area(2, entries);
        let mut random = seed | 1;
        let mut bytes = vec![0u8; 2 * super::stride(entries)];
        for byte in &mut bytes {
            random ^= random << 13; random ^= random >> 7; random ^= random << 17;
            *byte = random as u8;
        }
        for (at, byte) in holes.iter().enumerate() {
            bytes[at] = *byte;
        }
        if sane {
            // A header that is believed, so that the rest is looked at.
            bytes[..12].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1]);
            bytes[14..16].copy_from_slice(&ring_used.wrapping_sub((seed % 300) as u16).to_ne_bytes());
        }
        file.write_all_at(&bytes, 0).unwrap();
        let size = 1u16 << size;
        let mut queue = area.queue(0).unwrap();
        if let Ok(Some(left)) = queue.recover(size, ring_used) {
            let mut unique = left.clone();
            unique.sort_unstable();
            unique.dedup();
            prop_assert_eq!(unique.len(), left.len(), "a head twice");
            prop_assert!(left.iter().all(|head| *head < size));
        }
        // Heads come from the guest's ring.
        for head in [0, size, entries, u16::MAX, seed as u16] {
            queue.begin(head);
            let _ = queue.answer(&[head], || Ok::<_, ()>(ring_used));
        }
        let mut after = vec![0; bytes.len()];
        file.read_exact_at(&mut after, 0).unwrap();
        prop_assert!(after[after.len() / 2..] == bytes[bytes.len() / 2..], "the other queue's part changed");
    }

    #[test]
    fn no_shape_leaves_the_file(size: u64, offset in prop_oneof![0u64..20_000, any::<u64>()], queues: u16, entries: u16, len in 0u64..20_000) {
        let told = VhostUserInflight::new(size, offset, queues % 8, entries);
        let fd = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(len).unwrap();
        if let Ok(area) = Area::map(&told, file, 4, &MemoryTable::default()) {
            prop_assert!(queues % 8 <= 4 && area.queue(queues % 8).is_none());
            prop_assert!(offset + (super::stride(entries) * usize::from(queues % 8)) as u64 <= len);
            let mut last = area.queue(queues % 8 - 1).unwrap();
            last.begin(entries - 1);
        }
    }
}

/// Every store of one completion, one after the other, so that no case is left to chance.
#[test]
fn a_death_at_each_store_of_a_batch() {
    let steps: Vec<Step> = [Step::Submit, Step::Submit, Step::Submit, Step::Take, Step::Take, Step::Take]
        .into_iter()
        .chain([Step::Answer(vec![1, 1]), Step::Submit, Step::Take, Step::Answer(vec![1])])
        .collect();
    // The first start stores 4 times, each take 2, each batch 3 for a request and 2 beside.
    let deaths: usize = (0..60).map(|life| run(65_534, &steps, &[life])).sum();
    assert_eq!(deaths, 4 + 4 * 2 + (3 * 2 + 2) + (3 + 2));
    for life in 0..60 {
        for second in 0..4 {
            run(65_534, &steps, &[life, second, second]);
        }
    }
}

/// The layout is the specification's, byte by byte: regions travel between programs.
#[test]
fn the_layout_is_the_specifications() {
    let (area, file) = area(2, 5);
    let mut queue = area.queue(1).unwrap();
    assert!(queue.recover(4, 7).unwrap().is_none());
    queue.begin(3);
    queue.begin(1);
    queue.begin(2);
    assert_eq!(queue.answer(&[1, 2], || Ok::<_, ()>(9)), Ok(9));
    // 16 bytes of header and 5 entries, up to the next 64.
    assert_eq!(super::stride(5), 128);
    let mut bytes = [0; 128];
    file.read_exact_at(&mut bytes, 128).unwrap();
    let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    assert_eq!(
        [u16_at(8), u16_at(10), u16_at(12), u16_at(14)],
        [1, 5, 2, 9],
        "version, desc_num, last_batch_head, used_idx"
    );
    let entry = |n: usize| {
        let at = 16 + 16 * n;
        (bytes[at], u16_at(at + 6), u64::from_ne_bytes(bytes[at + 8..at + 16].try_into().unwrap()))
    };
    assert_eq!([entry(1), entry(2), entry(3)], [(0, 0, 1), (0, 1, 2), (1, 0, 0)], "inflight, next, counter");
}

/// What could not be shown to the guest is in flight still.
#[test]
fn an_answer_that_fails_is_none() {
    let (area, _) = area(1, 8);
    let mut queue = area.queue(0).unwrap();
    assert!(queue.recover(8, 0).unwrap().is_none());
    queue.begin(3);
    assert_eq!(queue.answer(&[3], || Err::<u16, _>("no")), Err("no"));
    assert_eq!(area.queue(0).unwrap().recover(8, 0).unwrap(), Some(vec![3]));
}

#[test]
fn what_makes_no_sense_is_refused() {
    let (area, file) = area(1, 8);
    let put = |at: u64, value: u16| file.write_all_at(&value.to_ne_bytes(), at).unwrap();
    let recover = |size, used| area.queue(0).unwrap().recover(size, used);
    assert!(matches!(recover(16, 0), Err(InflightError::Entries { .. })));
    assert!(recover(8, 0).unwrap().is_none());
    area.queue(0).unwrap().begin(2);
    assert_eq!(recover(8, 0).unwrap(), Some(vec![2]));
    assert!(matches!(recover(8, 9), Err(InflightError::UsedIndex { .. })));
    put(12, 8);
    assert!(matches!(recover(8, 1), Err(InflightError::Head { head: 8, size: 8 })));
    put(8, 2);
    assert!(matches!(recover(8, 0), Err(InflightError::Version { version: 2, .. })));
    put(8, 1);
    put(0, 1);
    assert!(matches!(recover(8, 0), Err(InflightError::Version { features: 1, .. })));
    put(0, 0);
    put(10, 4);
    assert!(matches!(recover(8, 0), Err(InflightError::Entries { .. })));
}

/// A driver that was reset begins at 0, in a region that remembers the one before.
#[test]
fn with_nothing_in_flight_the_ring_says_where_to_go_on() {
    let (area, _) = area(1, 8);
    let mut queue = area.queue(0).unwrap();
    assert!(queue.recover(8, 0).unwrap().is_none());
    for used in 1..=1000 {
        queue.begin(used % 8);
        assert_eq!(queue.answer(&[used % 8], || Ok::<_, ()>(used)), Ok(used));
    }
    assert_eq!(area.queue(0).unwrap().recover(8, 0).unwrap(), Some(vec![]));
    assert_eq!(area.queue(0).unwrap().recover(8, 0).unwrap(), Some(vec![]));
}

#[test]
fn a_region_can_neither_shrink_nor_grow_nor_lose_its_seals() {
    let (_, file) = area(1, 8);
    assert!(file.set_len(64).is_err());
    assert!(file.set_len(1 << 20).is_err());
    assert!(rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).is_err());
}

/// A front end's own memory may shrink; that ends its connection, not the process.
#[test]
fn a_region_that_shrinks_is_noticed() {
    let file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(4096).unwrap();
    let memory = MemoryTable::default();
    let told = VhostUserInflight::new(4096, 0, 1, 128);
    let area = Area::map(&told, file.try_clone().unwrap(), 1, &memory).unwrap();
    let mut queue = area.queue(0).unwrap();
    assert!(queue.recover(128, 0).unwrap().is_none());
    file.set_len(0).unwrap();
    assert!(!memory.lost().load(Ordering::SeqCst));
    queue.begin(5);
    assert!(memory.lost().load(Ordering::SeqCst));
}
