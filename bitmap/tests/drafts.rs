//! Promise: an operation on bitmaps happens whole or not at all, and leaves the states that the contract names.
#![cfg(not(any(loom, shuttle)))]

use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{BitmapError, ByteRange, Granularity, Tracker, commit};
use std::sync::Arc;

const G: Granularity = Granularity::DEFAULT;
const MIB: u64 = 1 << 20;

fn tracker() -> Arc<Tracker> {
    Tracker::new(64 * MIB, 1, 8)
}

fn write(tracker: &Arc<Tracker>, offset: u64) {
    let mut lane = tracker.lane(0).unwrap();
    let admitted = lane.enter().admit(0, ByteRange::new(offset, 4096));
    assert!(matches!(admitted, Admitted::Go));
    lane.finish(0);
}

fn dirty(tracker: &Tracker, name: &str) -> Vec<u64> {
    tracker.bits(name).unwrap().runs().flat_map(|r| (r.start()..r.end()).step_by(65536)).collect()
}

macro_rules! edit {
    ($tracker:expr, $($op:ident($($arg:expr),*)),+) => {{
        let mut change = $tracker.begin();
        let result = (|| { $(change.draft.$op($($arg),*)?;)+ Ok::<_, BitmapError>(()) })();
        if result.is_ok() { commit(vec![change]).unwrap(); }
        result
    }};
}

#[test]
fn a_bitmap_records_between_enable_and_disable_only() {
    let t = tracker();
    write(&t, 0);
    edit!(t, add("b", G, false)).unwrap();
    write(&t, MIB);
    edit!(t, disable("b")).unwrap();
    write(&t, 2 * MIB);
    edit!(t, enable("b")).unwrap();
    write(&t, 3 * MIB);
    assert_eq!(dirty(&t, "b"), [MIB, 3 * MIB]);
    edit!(t, clear("b")).unwrap();
    assert_eq!(dirty(&t, "b"), []);
    write(&t, 4 * MIB);
    assert_eq!(dirty(&t, "b"), [4 * MIB]);
}

#[test]
fn freeze_then_abdicate_keeps_the_successor_and_reclaim_keeps_both() {
    for reclaim in [false, true] {
        let t = tracker();
        edit!(t, add("b", G, false)).unwrap();
        write(&t, 0);
        let mut change = t.begin();
        let frozen = change.draft.freeze("b").unwrap();
        let frozen = change.closing(frozen);
        commit(vec![change]).unwrap();
        write(&t, MIB);
        assert_eq!(frozen.bits().runs().next().unwrap(), ByteRange::new(0, 65536));
        let info = &t.list()[0];
        assert!(info.busy && info.recording && info.count == 65536);
        for refused in [
            edit!(t, remove("b")),
            edit!(t, clear("b")),
            edit!(t, enable("b")),
            edit!(t, disable("b")),
            edit!(t, freeze("b")),
        ] {
            assert_eq!(refused, Err(BitmapError::Busy("b".into())));
        }
        if reclaim {
            edit!(t, reclaim("b", frozen.id())).unwrap();
            assert_eq!(dirty(&t, "b"), [0, MIB]);
        } else {
            edit!(t, abdicate("b", frozen.id())).unwrap();
            assert_eq!(dirty(&t, "b"), [MIB]);
        }
        assert_eq!(edit!(t, abdicate("b", frozen.id())), Err(BitmapError::NotFrozen("b".into())));
        write(&t, 2 * MIB);
        assert!(dirty(&t, "b").contains(&(2 * MIB)));
    }
}

#[test]
fn a_disabled_bitmap_has_a_disabled_successor() {
    let t = tracker();
    edit!(t, add("b", G, false)).unwrap();
    write(&t, 0);
    edit!(t, disable("b")).unwrap();
    let mut change = t.begin();
    let id = change.draft.freeze("b").unwrap().id();
    commit(vec![change]).unwrap();
    write(&t, MIB);
    edit!(t, reclaim("b", id)).unwrap();
    assert_eq!(dirty(&t, "b"), [0]);
}

#[test]
fn what_is_refused_changes_nothing() {
    let t = tracker();
    edit!(t, add("a", G, false), add("b", G, true)).unwrap();
    write(&t, 0);
    let before = (t.list(), t.bits("a").unwrap().sha256());
    assert_eq!(edit!(t, clear("a"), add("c", G, false), remove("nope")), Err(BitmapError::NotFound("nope".into())));
    assert_eq!(edit!(t, clear("a"), add("b", G, false)), Err(BitmapError::Exists("b".into())));
    assert_eq!(edit!(t, add("", G, false)), Err(BitmapError::NameEmpty));
    assert_eq!(edit!(t, add(&"x".repeat(1024), G, false)), Err(BitmapError::NameTooLong("x".repeat(1024))));
    assert_eq!((t.list(), t.bits("a").unwrap().sha256()), before);
}

#[test]
fn merge_takes_what_the_source_holds_at_that_instant() {
    let t = tracker();
    let coarse = Granularity::new(MIB).unwrap();
    edit!(t, add("fine", G, false), add("coarse", coarse, false)).unwrap();
    write(&t, 5 * MIB);
    edit!(t, add("sum", G, true)).unwrap();
    let mut change = t.begin();
    let set = change.draft.dirty_set("coarse").unwrap();
    change.draft.merge("sum", &set).unwrap();
    commit(vec![change]).unwrap();
    write(&t, 9 * MIB);
    // A coarse source dirties whole cells of the finer target, as it does in QEMU.
    assert_eq!(t.bits("sum").unwrap().runs().collect::<Vec<_>>(), [ByteRange::new(5 * MIB, MIB)]);
    let mut change = t.begin();
    let set = change.draft.dirty_set("fine").unwrap();
    change.draft.merge("fine", &set).unwrap();
    commit(vec![change]).unwrap();
    assert_eq!(dirty(&t, "fine"), [5 * MIB, 9 * MIB]);
}

#[test]
fn merge_between_disks_needs_one_size_and_one_instant() {
    let (a, b, small) = (tracker(), tracker(), Tracker::new(MIB, 1, 1));
    edit!(a, add("x", G, false)).unwrap();
    edit!(b, add("y", G, false)).unwrap();
    edit!(small, add("z", G, false)).unwrap();
    write(&a, MIB);
    write(&b, 2 * MIB);
    let (mut from, mut to) = (a.begin(), b.begin());
    let set = from.draft.dirty_set("x").unwrap();
    let set = from.foreign(set);
    to.draft.merge("y", &set).unwrap();
    commit(vec![from, to]).unwrap();
    write(&a, 3 * MIB);
    assert_eq!(dirty(&b, "y"), [MIB, 2 * MIB]);
    let set = a.begin().draft.dirty_set("x").unwrap();
    let wrong = small.begin().draft.merge("z", &set);
    assert_eq!(wrong, Err(BitmapError::Sizes { destination: MIB, source_size: 64 * MIB }));
}

#[test]
fn many_flips_lose_nothing_and_generations_are_never_reused() {
    let t = tracker();
    edit!(t, add("b", G, false)).unwrap();
    let mut last = t.generation();
    for i in 0..40 {
        write(&t, i * MIB);
        edit!(t, add("other", Granularity::MIN, false)).unwrap();
        edit!(t, remove("other")).unwrap();
        assert!(t.generation() > last);
        last = t.generation();
    }
    assert_eq!(dirty(&t, "b"), (0..40).map(|i| i * MIB).collect::<Vec<_>>());
}

#[test]
fn a_write_in_flight_at_the_flip_is_dirty_on_both_sides_and_waited_for() {
    let t = tracker();
    edit!(t, add("b", G, false)).unwrap();
    let mut lane = t.lane(0).unwrap();
    assert!(matches!(lane.enter().admit(3, ByteRange::new(MIB, 512)), Admitted::Go));
    let mut change = t.begin();
    let frozen = change.draft.freeze("b").unwrap();
    let frozen = change.closing(frozen);
    let cut = commit(vec![change]).unwrap().remove(0);
    assert!(frozen.any(ByteRange::new(MIB, 512)));
    edit!(t, abdicate("b", frozen.id())).unwrap();
    assert_eq!(dirty(&t, "b"), [MIB]);
    assert!(cut.pre_cut.pending(ByteRange::new(MIB + 511, 1)));
    assert!(!cut.pre_cut.pending(ByteRange::new(0, MIB)));
    let waiter = std::thread::spawn(move || cut.pre_cut.wait(ByteRange::new(0, 64 * MIB)));
    lane.finish(3);
    waiter.join().unwrap();
}

#[test]
fn a_lane_has_one_owner_at_a_time() {
    let t = tracker();
    let lane = t.lane(0).unwrap();
    assert!(t.lane(0).is_none() && t.lane(1).is_none());
    drop(lane);
    assert!(t.lane(0).is_some());
}

#[test]
fn a_resize_cuts_marks_what_was_added_and_spares_what_does_not_record() {
    let t = tracker();
    edit!(t, add("on", G, false), add("off", G, false)).unwrap();
    // In a closed generation, in the current one, and past the new end.
    write(&t, 0);
    edit!(t, disable("off")).unwrap();
    write(&t, MIB);
    write(&t, 63 * MIB);
    edit!(t, resize(2 * MIB + 512)).unwrap();
    assert_eq!((t.size(), dirty(&t, "on"), dirty(&t, "off")), (2 * MIB + 512, vec![0, MIB, 2 * MIB], vec![0]));
    let mut lane = t.lane(0).unwrap();
    assert!(matches!(lane.enter().admit(0, ByteRange::new(2 * MIB, 1024)), Admitted::Beyond));
    assert!(matches!(lane.enter().admit(0, ByteRange::new(2 * MIB, 512)), Admitted::Go));
    lane.finish(0);
    drop(lane);
    edit!(t, clear("on"), resize(2 * MIB + 131_072)).unwrap();
    assert_eq!(dirty(&t, "on"), [2 * MIB, 2 * MIB + 65536]);
    write(&t, 2 * MIB + 65536);
    edit!(t, enable("off")).unwrap();
    write(&t, 65536);
    assert_eq!(dirty(&t, "off"), [0, 65536]);
    assert_eq!(t.bits("off").unwrap().size(), 2 * MIB + 131_072);
}

#[test]
fn a_busy_bitmap_or_one_that_grew_too_large_keeps_its_size() {
    let t = tracker();
    edit!(t, add("b", Granularity::MIN, false)).unwrap();
    assert_eq!(edit!(t, resize(1 << 60)), Err(BitmapError::TooLarge("b".into())));
    let mut change = t.begin();
    change.draft.freeze("b").unwrap();
    commit(vec![change]).unwrap();
    assert_eq!(edit!(t, resize(MIB)), Err(BitmapError::Busy("b".into())));
    assert_eq!(t.size(), 64 * MIB);
}
