//! Promise: for any guest, well-behaved or not, this ring takes, answers, asks and signals as rust-vmm's `virtio-queue`
//! does, and touches nothing outside of the ring.

use super::*;
use proptest::prelude::*;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const DESC: u64 = 0x1000;
const AVAIL: u64 = 0x2002;
const USED: u64 = 0x3004;
const END: usize = 0x4000;

type Atomic = GuestMemoryAtomic<GuestMemoryMmap>;

fn memory() -> Atomic {
    Atomic::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), END)]).unwrap())
}

fn view(memory: &Atomic) -> Rc<View> {
    Rc::new(View::new(memory.memory()))
}

fn place(size: u16, at: u16, event_idx: bool) -> RingPlace {
    RingPlace {
        size,
        desc: GuestAddress(DESC),
        avail: GuestAddress(AVAIL),
        used: GuestAddress(USED),
        next_avail: at,
        next_used: at,
        event_idx,
    }
}

/// What guest and device do, one after the other.
#[derive(Clone, Debug)]
enum Step {
    /// The guest makes so many more heads available.
    Offer(Vec<u16>),
    /// The guest writes any index.
    Jump(u16),
    /// The guest wants a signal when the used index passes this, counted from the last one.
    Event(u16),
    /// The device takes up to so many.
    Take(u16),
    /// The device answers so many.
    Answer(u16),
    /// The device asks whether to signal.
    Signal,
    /// The device asks for a kick.
    Kick,
    /// The memory table is replaced by the same memory.
    Move,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => prop::collection::vec(0u16..40, 0..6).prop_map(Step::Offer),
        1 => prop_oneof![0u16..4, any::<u16>()].prop_map(Step::Jump),
        3 => prop_oneof![Just(0u16), 0u16..9, any::<u16>()].prop_map(Step::Event),
        6 => (0u16..9).prop_map(Step::Take),
        6 => (0u16..9).prop_map(Step::Answer),
        4 => Just(Step::Signal),
        3 => Just(Step::Kick),
        1 => Just(Step::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn it_does_what_virtio_queue_does(
        exponent in 0u32..5, event_idx: bool,
        start in prop_oneof![Just(0u16), Just(u16::MAX - 3), any::<u16>()],
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let size = 1u16 << exponent;
        let (ours, theirs) = (memory(), memory());
        let mut ring = SplitRing::new(place(size, start, event_idx), &view(&ours)).unwrap();
        let mut oracle = Queue::try_from(QueueState {
            max_size: size, size, ready: true, event_idx_enabled: event_idx,
            desc_table: DESC, avail_ring: AVAIL, used_ring: USED, next_avail: start, next_used: start,
        }).unwrap();
        oracle.set_next_used(start);
        let both = |address: u64, value: u16| {
            ours.memory().write_obj(value.to_le(), GuestAddress(address)).unwrap();
            theirs.memory().write_obj(value.to_le(), GuestAddress(address)).unwrap();
        };
        let (mut offered, mut taken, mut answered) = (start, Vec::new(), start);
        both(AVAIL + 2, offered);
        both(USED + 2, answered);
        for step in steps {
            match step {
                Step::Offer(heads) => {
                    for head in heads {
                        both(AVAIL + 4 + 2 * u64::from(offered % size), head);
                        offered = offered.wrapping_add(1);
                    }
                    both(AVAIL + 2, offered);
                }
                Step::Jump(ahead) => {
                    offered = oracle.next_avail().wrapping_add(ahead);
                    both(AVAIL + 2, offered);
                }
                Step::Event(after) => both(AVAIL + 4 + 2 * u64::from(size), answered.wrapping_add(after)),
                Step::Take(most) => for _ in 0..most {
                    let memory = theirs.memory();
                    let expected = match oracle.iter(&*memory) {
                        Ok(mut chains) => Ok(chains.next().map(|chain| chain.head_index())),
                        Err(_) => Err(()),
                    };
                    // Ours looks at the index only when it has taken all that it has seen: what the guest takes back
                    // or spoils in between, it sees later.
                    let seen_before = ring.next_avail() != ring.seen_avail && ring.seen_avail != offered;
                    let got = ring.pop();
                    if seen_before {
                        prop_assert!(matches!(got, Ok(Some(_))));
                        oracle.set_next_avail(ring.next_avail());
                        continue;
                    }
                    prop_assert_eq!(got.map_err(|_| ()), expected);
                    if let Ok(Some(head)) = got { taken.push(head % size); }
                },
                Step::Answer(count) => {
                    for _ in 0..count.min(size) {
                        let Some(head) = taken.pop() else { break };
                        ring.push(head, u32::from(head) * 3);
                        oracle.add_used(&*theirs.memory(), head, u32::from(head) * 3).unwrap();
                        answered = answered.wrapping_add(1);
                    }
                    prop_assert_eq!(ring.publish(), oracle.next_used());
                }
                Step::Signal => {
                    let expected = oracle.needs_notification(&*theirs.memory()).unwrap();
                    prop_assert_eq!(ring.needs_signal(), expected);
                }
                Step::Kick => {
                    let expected = oracle.enable_notification(&*theirs.memory()).unwrap();
                    prop_assert_eq!(ring.ask_for_kick(), expected);
                }
                Step::Move => {
                    let same = GuestMemoryMmap::clone(&ours.memory());
                    ours.lock().unwrap().replace(same);
                    ring.move_to(&view(&ours)).unwrap();
                }
            }
            prop_assert_eq!(ring.next_avail(), oracle.next_avail());
            let bytes = |memory: &Atomic| {
                let mut all = vec![0u8; END];
                memory.memory().read_slice(&mut all, GuestAddress(0)).unwrap();
                all
            };
            prop_assert!(bytes(&ours) == bytes(&theirs), "guest memory differs");
        }
    }
}

/// `virtio-queue` cannot: it signals whether the guest wants it or not.
#[test]
fn a_guest_without_event_idx_is_signalled_when_it_wants_to_be() {
    let memory = memory();
    let mut ring = SplitRing::new(place(4, 0, false), &view(&memory)).unwrap();
    ring.push(0, 0);
    ring.publish();
    memory.memory().write_obj(1u16.to_le(), GuestAddress(AVAIL)).unwrap();
    assert!(!ring.needs_signal());
    memory.memory().write_obj(0u16, GuestAddress(AVAIL)).unwrap();
    assert!(ring.needs_signal());
    ring.forgo_kicks();
    assert_eq!(u16::from_le(memory.memory().read_obj(GuestAddress(USED)).unwrap()), 1);
    ring.ask_for_kick();
    assert_eq!(u16::from_le(memory.memory().read_obj(GuestAddress(USED)).unwrap()), 0);
}

#[test]
fn nothing_is_shown_before_it_is_published() {
    let memory = memory();
    let mut ring = SplitRing::new(place(4, 7, true), &view(&memory)).unwrap();
    let shown = || u16::from_le(memory.memory().load(GuestAddress(USED + 2), Ordering::Acquire).unwrap());
    ring.push(1, 8);
    ring.push(2, 9);
    assert_eq!(shown(), 0);
    assert_eq!(ring.publish(), 9);
    assert_eq!(shown(), 9);
}

#[test]
fn an_index_that_is_too_far_ahead_is_an_error() {
    let memory = memory();
    let mut ring = SplitRing::new(place(4, u16::MAX, true), &view(&memory)).unwrap();
    memory.memory().write_obj(4u16.to_le(), GuestAddress(AVAIL + 2)).unwrap();
    assert_eq!(ring.pop(), Err(RingError::AvailableIndex { index: 4, ahead: 5, size: 4 }));
    memory.memory().write_obj(3u16.to_le(), GuestAddress(AVAIL + 2)).unwrap();
    assert!((0..4).all(|_| ring.pop() == Ok(Some(0))) && ring.pop() == Ok(None));
}

#[test]
fn a_ring_that_is_not_inside_one_region_is_refused() {
    let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(0x3000), 0x1000)];
    let memory = Atomic::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    assert_eq!(memory.memory().iter().map(|region| region.len()).sum::<u64>(), 0x3000);
    let there = RingPlace {
        size: 256,
        desc: GuestAddress(0),
        avail: GuestAddress(0x1000),
        used: GuestAddress(0x3000),
        next_avail: 0,
        next_used: 0,
        event_idx: true,
    };
    let outcome = |place| SplitRing::new(place, &view(&memory)).err();
    assert_eq!(outcome(there), None);
    let outside = Some(RingError::Outside);
    assert_eq!(outcome(RingPlace { desc: GuestAddress(0x1010), ..there }), outside);
    // The last two bytes, the event index, are part of it.
    assert_eq!(outcome(RingPlace { avail: GuestAddress(0x2000 - 518), ..there }), None);
    assert_eq!(outcome(RingPlace { avail: GuestAddress(0x2000 - 516), ..there }), outside);
    assert_eq!(outcome(RingPlace { used: GuestAddress(0x4000 - 2056), ..there }), None);
    assert_eq!(outcome(RingPlace { used: GuestAddress(0x4000 - 2052), ..there }), outside);
    assert_eq!(outcome(RingPlace { used: GuestAddress(u64::MAX - 3), ..there }), outside);
    for place in [
        RingPlace { desc: GuestAddress(8), ..there },
        RingPlace { avail: GuestAddress(0x1001), ..there },
        RingPlace { used: GuestAddress(0x3002), ..there },
        RingPlace { size: 0, ..there },
        RingPlace { size: 3, ..there },
    ] {
        assert_eq!(outcome(place), Some(RingError::Misplaced));
    }
}
