//! Promise: a commit over several stores happens on all of them or on none, whenever the machine stops: one record decides.
#![cfg(not(any(loom, shuttle)))]

#[path = "crash/medium.rs"]
#[allow(dead_code, reason = "the crash test uses all of it")]
mod medium;

use blkmark_bitmap::store::{Place, Stamp};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Granularity, Tracker, commit};
use medium::{Faults, Files, Random, SimMaps, SimMedium};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;
const NAMES: [&str; 3] = ["a", "b", "c"];

type Disks = Vec<(Arc<SimMedium>, SimMaps)>;

thread_local! {
    static LOOKING: RefCell<Option<Looking>> = const { RefCell::new(None) };
}

struct Looking {
    disks: Disks,
    random: Random,
    /// How many disks had come through, at each stop.
    seen: Vec<usize>,
}

fn open(medium: &Arc<SimMedium>, maps: &SimMaps) -> Arc<Tracker> {
    let disk = Stamp {
        block_device: false,
        device: 1,
        inode: 2,
        size: SIZE,
        changed: 3,
        touched: 4,
        boot: Uuid::nil(),
        name: 0,
    };
    Tracker::open_idle(
        Place {
            medium: Arc::clone(medium) as _,
            maps: Box::new(maps.clone()),
            disk,
            flush: Arc::new(|| Ok(())),
            resume: Vec::new(),
        },
        1,
        2,
    )
}

/// What the frozen set holds, and what was written since.
const FROZEN: ByteRange = ByteRange::new(0, 4096);
const SINCE: ByteRange = ByteRange::new(MIB, 4096);

/// The machine stops before this change of a directory: all disks are opened again, in any order.
fn stop(_: &str) {
    let Some(mut looking) = LOOKING.take() else { return };
    for kill in [false, true] {
        let left: Disks = (looking.disks.iter())
            .map(|(medium, maps)| {
                let state = medium.state.lock().unwrap();
                let files = if kill { state.clone() } else { state.power_cut(&mut looking.random) };
                let maps = if kill { maps.killed() } else { SimMaps::default() };
                // They find each other by the names they had.
                (SimMedium::named(&medium.name, files, 1, Faults::None, None), maps)
            })
            .collect();
        let mut order: Vec<usize> = (0..left.len()).collect();
        order.rotate_left(looking.random.below(left.len() as u64) as usize);
        let mut done = 0;
        for at in order {
            let tracker = open(&left[at].0, &left[at].1);
            let bits = tracker.bits("b").unwrap();
            assert!(bits.any(SINCE), "kill={kill}: what was written since the freeze is lost");
            // A power cut widens both to the whole extent.
            done += usize::from(!bits.any(FROZEN));
        }
        if kill {
            assert!(done == 0 || done == left.len(), "{done} of {} disks came through", left.len());
            looking.seen.push(done);
        }
    }
    for (medium, _) in &looking.disks {
        medium.make_known();
    }
    LOOKING.set(Some(looking));
}

fn write(tracker: &Arc<Tracker>, range: ByteRange) {
    let mut lane = tracker.lane(0).unwrap();
    loop {
        let admitted = lane.enter().admit(0, range);
        match admitted {
            Admitted::Go => return lane.finish(0),
            Admitted::Held(gate) => {
                gate.hold(range, Instant::now(), Box::new(|_| {}));
                assert!(tracker.serve_store());
            }
            Admitted::Beyond => unreachable!(),
        }
    }
}

/// A persistent bitmap that has recorded something.
fn record(tracker: &Arc<Tracker>) {
    let mut begun = tracker.begin();
    begun.draft.add("b", Granularity::DEFAULT, false).unwrap();
    begun.draft.keep("b").unwrap();
    commit(vec![begun]).unwrap();
    write(tracker, FROZEN);
}

#[test]
fn a_group_ends_on_all_disks_or_on_none() {
    for seed in 0..40 {
        let disks: Disks = (NAMES.iter())
            .map(|name| {
                let medium = SimMedium::named(name, Files::default(), seed, Faults::None, Some(stop));
                (medium, SimMaps::default())
            })
            .collect();
        let trackers: Vec<_> = disks.iter().map(|(medium, maps)| open(medium, maps)).collect();
        let mut freezes = Vec::new();
        for tracker in &trackers {
            record(tracker);
            let mut begun = tracker.begin();
            freezes.push(begun.draft.freeze("b").unwrap().id());
            commit(vec![begun]).unwrap();
            write(tracker, SINCE);
        }
        LOOKING.set(Some(Looking { disks: disks.clone(), random: Random(seed), seen: Vec::new() }));
        let begun = trackers.iter().zip(&freezes).map(|(tracker, freeze)| {
            let mut begun = tracker.begin();
            begun.draft.abdicate("b", *freeze).unwrap();
            begun
        });
        commit(begun.collect()).unwrap();
        stop("");
        let seen = LOOKING.take().unwrap().seen;
        assert_eq!((seen.first(), seen.last()), (Some(&0), Some(&3)), "{seen:?}");
        assert!(seen.is_sorted(), "what was decided was taken back: {seen:?}");
    }
}

#[test]
fn a_group_that_one_store_has_no_room_for_is_refused_and_costs_no_bitmap() {
    for full in 0..NAMES.len() {
        let disks: Disks = (NAMES.iter())
            .map(|name| (SimMedium::named(name, Files::default(), 1, Faults::None, None), SimMaps::default()))
            .collect();
        let trackers: Vec<_> = disks.iter().map(|(medium, maps)| open(medium, maps)).collect();
        for tracker in &trackers {
            record(tracker);
        }
        let disable = || {
            let begun = trackers.iter().map(|tracker| {
                let mut begun = tracker.begin();
                begun.draft.disable("b").unwrap();
                begun
            });
            commit(begun.collect())
        };
        disks[full].0.full.store(true, Ordering::SeqCst);
        for _ in 0..3 {
            let refused = disable().unwrap_err().to_string();
            assert!(refused.contains("No space left on device"), "{refused}");
        }
        let good = |trackers: &[Arc<Tracker>], recording: bool, what: &str| {
            for (at, tracker) in trackers.iter().enumerate() {
                let info = &tracker.list()[0];
                assert!(!info.inconsistent && info.recording == recording, "{full} is full, {what}: {at}: {info:?}");
                assert!(tracker.bits("b").unwrap().any(FROZEN), "{full} is full, {what}: {at} lost a write");
            }
        };
        good(&trackers, true, "while served");
        let killed = disks.iter().map(|(medium, maps)| {
            let files = medium.state.lock().unwrap().clone();
            (SimMedium::named(&medium.name, files, 1, Faults::None, None), maps.killed())
        });
        let killed: Disks = killed.collect();
        let reopened: Vec<_> = killed.iter().map(|(medium, maps)| open(medium, maps)).collect();
        good(&reopened, true, "after a kill");
        disks.iter().for_each(|(medium, _)| medium.make_known());
        disks[full].0.full.store(false, Ordering::SeqCst);
        disable().unwrap();
        good(&trackers, false, "with room again");
    }
}
