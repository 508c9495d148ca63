//! Promise: whatever is done to a store's files, it opens, and no bitmap claims less than the truth: damaged, cut short, swapped,
//! older or newer files make it inconsistent or wider, or leave nothing of it.
#![cfg(not(any(loom, shuttle)))]

#[path = "crash/medium.rs"]
#[allow(dead_code, reason = "the crash test uses all of it")]
mod medium;

use blkmark_bitmap::store::{Place, Stamp};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{Bits, ByteRange, Granularity, Mask, Tracker, commit};
use medium::{Faults, Files, Random, SimMaps, SimMedium};
use std::sync::Arc;
use std::time::Instant;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
/// What was written while each of the bitmaps recorded.
const WRITTEN: [u64; 4] = [0, 33 * MIB, 40 * MIB, 255 * MIB];
const AFTER: u64 = 100 * MIB;
/// And in an extent that is still hot.
const LAST: u64 = 200 * MIB;

fn stamp() -> Stamp {
    Stamp { block_device: false, device: 1, inode: 2, size: SIZE, changed: 3, touched: 4, boot: Uuid::nil(), name: 0 }
}

fn open(medium: &Arc<SimMedium>, disk: Stamp) -> Arc<Tracker> {
    open_to_resume(medium, &SimMaps::default(), disk, Vec::new())
}

fn open_to_resume(medium: &Arc<SimMedium>, maps: &SimMaps, disk: Stamp, resume: Vec<Uuid>) -> Arc<Tracker> {
    let (medium, maps) = (Arc::clone(medium) as _, Box::new(maps.clone()));
    Tracker::open_idle(Place { medium, maps, disk, flush: Arc::new(|| Ok(())), resume }, 1, 4)
}

fn write(tracker: &Arc<Tracker>, offset: u64) {
    let mut lane = tracker.lane(0).unwrap();
    loop {
        let admitted = lane.enter().admit(0, ByteRange::new(offset, 4096));
        match admitted {
            Admitted::Go => return lane.finish(0),
            Admitted::Held(gate) => {
                gate.hold(ByteRange::new(offset, 4096), Instant::now(), Box::new(|_| {}));
                assert!(tracker.serve_store());
            }
            Admitted::Beyond => unreachable!(),
        }
    }
}

/// A store with a bitmap that records and one that does not any more; and the same a few commands earlier.
fn store(clean: bool) -> (Files, Files) {
    store_of(stamp(), clean)
}

/// The same of a disk.
fn store_of(disk: Stamp, clean: bool) -> (Files, Files) {
    let medium = SimMedium::new(Files::default(), 1, Faults::None, None);
    let tracker = open(&medium, disk);
    let edit = |change: &dyn Fn(&mut blkmark_bitmap::named::Draft)| {
        let mut begun = tracker.begin();
        change(&mut begun.draft);
        commit(vec![begun]).unwrap();
    };
    edit(&|draft| {
        for name in ["on", "off"] {
            draft.add(name, Granularity::DEFAULT, false).unwrap();
            draft.keep(name).unwrap();
        }
    });
    let early = medium.state.lock().unwrap().clone();
    WRITTEN.iter().for_each(|offset| write(&tracker, *offset));
    edit(&|draft| draft.disable("off").unwrap());
    write(&tracker, AFTER);
    tracker.cool();
    tracker.cool();
    write(&tracker, LAST);
    if clean {
        tracker.close(disk).unwrap();
    }
    let files = medium.state.lock().unwrap().clone();
    (files, early)
}

/// Opens it and looks whether anything lies; answers how many bitmaps are still consistent.
fn look(files: Files, disk: Stamp, what: &str) -> usize {
    let medium = SimMedium::new(files, 1, Faults::None, None);
    let tracker = open(&medium, disk);
    let consistent: Vec<_> = tracker.list().into_iter().filter(|info| !info.inconsistent).collect();
    for info in &consistent {
        let bits = tracker.bits(&info.name).unwrap();
        let lost = WRITTEN.iter().find(|offset| !bits.any(ByteRange::new(**offset, 1)));
        assert!(lost.is_none(), "{what}: {} lost {lost:?}", info.name);
        match info.name.as_str() {
            "on" => {
                let since = [AFTER, LAST].iter().all(|offset| bits.any(ByteRange::new(*offset, 1)));
                assert!(info.recording && since, "{what}");
            }
            "off" if !info.recording => assert_eq!(bits.set_bits(), WRITTEN.len() as u64, "{what}"),
            // Of before the command: wider.
            "off" => {}
            other => panic!("{what}: a bitmap '{other}' came from nowhere"),
        }
    }
    consistent.len()
}

#[test]
fn what_nobody_touched_is_whole() {
    for clean in [false, true] {
        assert_eq!(look(store(clean).0, stamp(), "untouched"), 2);
    }
}

#[test]
fn a_flipped_bit_makes_nothing_lie() {
    let mut random = Random(7);
    for clean in [false, true] {
        let (files, _) = store(clean);
        for name in files.names() {
            let len = files.clone().bytes_of(&name).unwrap().len();
            // Slots are mostly room.
            for at in 0..len.min(3000) {
                let mut files = files.clone();
                let flip = 1 << random.below(8);
                files.bytes_of(&name).unwrap()[at] ^= flip;
                look(files.clone(), stamp(), &format!("{name}[{at}] ^ {flip}"));
                if name == "slot.0" && at < 700 {
                    files.bytes_of("slot.1").unwrap()[at] ^= flip;
                    look(files, stamp(), &format!("both slots [{at}] ^ {flip}"));
                }
            }
        }
    }
}

#[test]
fn what_is_cut_short_or_missing_makes_nothing_lie() {
    for clean in [false, true] {
        let (files, _) = store(clean);
        for name in files.names() {
            let len = files.clone().bytes_of(&name).unwrap().len();
            for keep in [0, 1, 7, 16, 47, 48, 100, 511, 512, len / 2, len - 1] {
                let mut files = files.clone();
                files.bytes_of(&name).unwrap().truncate(keep);
                look(files.clone(), stamp(), &format!("{name} cut to {keep}"));
                if name == "slot.0" {
                    files.bytes_of("slot.1").unwrap().truncate(keep);
                    look(files, stamp(), &format!("both slots cut to {keep}"));
                }
            }
        }
    }
}

#[test]
fn files_in_each_others_place_make_nothing_lie() {
    for clean in [false, true] {
        let (files, early) = store(clean);
        for one in files.names() {
            for other in files.names() {
                let mut swapped = files.clone();
                *swapped.bytes_of(&one).unwrap() = files.clone().bytes_of(&other).unwrap().clone();
                look(swapped, stamp(), &format!("{other} in the place of {one}"));
            }
            // What it held earlier.
            let mut older = files.clone();
            if let Some(bytes) = early.clone().bytes_of(&one) {
                *older.bytes_of(&one).unwrap() = bytes.clone();
                look(older, stamp(), &format!("an older {one}"));
            }
        }
        let mut older = files.clone();
        for slot in ["slot.0", "slot.1"] {
            *older.bytes_of(slot).unwrap() = early.clone().bytes_of(slot).unwrap().clone();
        }
        assert_eq!(look(older, stamp(), "both slots older"), 0, "an older record was believed");
    }
}

/// What a full disk leaves to the start is the room that was kept, after a kill too.
#[test]
fn a_start_without_room_costs_nothing() {
    for clean in [false, true] {
        let (mut files, _) = store(clean);
        for round in 0..3 {
            let medium = SimMedium::new(files, round, Faults::NoRoom, None);
            let tracker = open(&medium, stamp());
            assert!(
                tracker.list().iter().all(|info| !info.inconsistent),
                "clean={clean}, round {round}: {:?}",
                tracker.list()
            );
            write(&tracker, LAST);
            if clean {
                tracker.close(stamp()).unwrap();
            }
            files = medium.state.lock().unwrap().clone();
            assert_eq!(look(files.clone(), stamp(), "after a start without room"), 2);
        }
    }
}

#[test]
fn a_newer_version_is_left_alone() {
    let (mut files, _) = store(true);
    for slot in ["slot.0", "slot.1"] {
        files.bytes_of(slot).unwrap()[8] = 99;
    }
    let before = files.clone().bytes_of("slot.0").unwrap().clone();
    let medium = SimMedium::new(files, 1, Faults::None, None);
    let tracker = open(&medium, stamp());
    assert!(tracker.list().is_empty());
    let refused = tracker.persistence().unwrap_err().to_string();
    assert!(refused.contains("has version 99"), "{refused}");
    assert_eq!(*medium.state.lock().unwrap().bytes_of("slot.0").unwrap(), before);
}

#[test]
fn another_disk_or_a_changed_one_makes_bitmaps_inconsistent() {
    let (clean, _) = store(true);
    let (killed, _) = store(false);
    let differ = [
        ("another file", Stamp { inode: 9, ..stamp() }, true),
        ("another device", Stamp { device: 9, ..stamp() }, true),
        ("a device, not a file", Stamp { block_device: true, ..stamp() }, true),
        ("another size", Stamp { size: 2 * SIZE, ..stamp() }, true),
        ("written to", Stamp { changed: 9, ..stamp() }, false),
        ("replaced", Stamp { touched: 9, ..stamp() }, false),
    ];
    for (what, disk, always) in differ {
        assert_eq!(look(clean.clone(), disk, what), 0, "{what} after a clean end");
        assert_eq!(look(killed.clone(), disk, what), if always { 0 } else { 2 }, "{what} after a crash");
    }
    // Another boot may call the device by another number.
    let rebooted = Stamp { device: 9, boot: Uuid::max(), ..stamp() };
    assert_eq!(look(clean, rebooted, "another boot"), 2);
}

#[test]
fn a_bitmap_that_waits_for_a_job_is_of_no_worth_without_it() {
    let medium = SimMedium::new(Files::default(), 1, Faults::None, None);
    let tracker = open(&medium, stamp());
    let mut begun = tracker.begin();
    begun.draft.add("b", Granularity::DEFAULT, false).unwrap();
    begun.draft.keep("b").unwrap();
    let freeze = begun.draft.freeze_recording("b").unwrap().id();
    begun.draft.await_fill("b").unwrap();
    commit(vec![begun]).unwrap();
    let after_a_crash = || {
        let files = medium.state.lock().unwrap().clone();
        open(&SimMedium::new(files, 1, Faults::None, None), stamp()).list()
    };
    assert!(after_a_crash()[0].inconsistent);
    let mut begun = tracker.begin();
    let found = Bits::new(Granularity::DEFAULT, SIZE);
    begun.draft.fill("b", freeze, &found, Mask::Union).unwrap();
    commit(vec![begun]).unwrap();
    assert!(!after_a_crash()[0].inconsistent);
}

/// Whatever a job that fills a bitmap has it record is there after a kill, for that job alone; nothing else sees it.
#[test]
fn a_freeze_that_waits_for_what_is_found_goes_on_after_a_kill_and_only_then() {
    const FOUND: u64 = 150 * MIB;
    for (disabled, made) in [(false, false), (true, false), (false, true), (true, true)] {
        let what = format!("disabled={disabled} made={made}");
        let (mut maps, mut medium) = (SimMaps::default(), SimMedium::new(Files::default(), 1, Faults::None, None));
        let mut tracker = open_to_resume(&medium, &maps, stamp(), Vec::new());
        let edit = |tracker: &Arc<Tracker>, change: &dyn Fn(&mut blkmark_bitmap::named::Draft)| {
            let mut begun = tracker.begin();
            change(&mut begun.draft);
            commit(vec![begun]).unwrap();
        };
        let add = |draft: &mut blkmark_bitmap::named::Draft| {
            draft.add("b", Granularity::DEFAULT, false).unwrap();
            draft.keep("b").unwrap();
        };
        if !made {
            edit(&tracker, &add);
            write(&tracker, WRITTEN[0]);
        }
        edit(&tracker, &|draft| {
            if made {
                add(draft);
            }
            if disabled {
                draft.disable("b").unwrap();
            }
            draft.freeze_recording("b").unwrap();
            if made {
                draft.await_fill("b").unwrap();
            }
        });
        let freeze = tracker.list()[0].frozen.unwrap();
        let own: Vec<u64> = WRITTEN[..1].iter().copied().filter(|_| !made).collect();
        let mut since = Vec::new();
        for (round, at) in WRITTEN[1..].iter().enumerate() {
            write(&tracker, *at);
            since.push(*at);
            let mut files = medium.state.lock().unwrap().clone();
            assert_eq!(files.bytes_of("slot.0").unwrap()[8], if disabled { 2 } else { 1 }, "{what}");
            let left = maps.killed();
            // Nobody goes on; or the machine went down, so that nobody can.
            for (maps, resume) in [(left.clone(), Vec::new()), (SimMaps::default(), vec![freeze])] {
                let (wide, medium) = (!resume.is_empty(), SimMedium::new(files.clone(), 1, Faults::None, None));
                let tracker = open_to_resume(&medium, &maps.killed(), stamp(), resume);
                let info = tracker.list().remove(0);
                assert_eq!((info.inconsistent, info.busy), (made, false), "{what}");
                if !made {
                    let bits = tracker.bits("b").unwrap();
                    let all = own.iter().chain(since.iter().filter(|_| !disabled));
                    let expected: Vec<u64> = all.copied().collect();
                    assert!(holds(&bits, &expected), "{what}");
                    assert!(wide && !disabled || bits.set_bits() == expected.len() as u64, "{what}");
                }
            }
            maps = left;
            medium = SimMedium::new(files, round as u64, Faults::None, None);
            tracker = open_to_resume(&medium, &maps, stamp(), vec![freeze]);
            let info = tracker.list().remove(0);
            assert_eq!((info.frozen, info.recording, info.inconsistent), (Some(freeze), !disabled, false), "{what}");
            let shown = tracker.bits("b").unwrap();
            assert!(holds(&shown, &own) && shown.set_bits() == own.len() as u64, "{what}");
        }
        write(&tracker, AFTER);
        let mut found = Bits::new(Granularity::DEFAULT, SIZE);
        found.set(ByteRange::new(FOUND, 1));
        edit(&tracker, &|draft| draft.fill("b", freeze, &found, Mask::Union).unwrap());
        write(&tracker, LAST);
        let mut expected: Vec<u64> = own.iter().chain(&since).copied().chain([AFTER, FOUND]).collect();
        if !disabled {
            expected.push(LAST);
        }
        let bits = tracker.bits("b").unwrap();
        assert!(holds(&bits, &expected) && bits.set_bits() == expected.len() as u64, "{what}");
        let mut files = medium.state.lock().unwrap().clone();
        assert_eq!(files.bytes_of("slot.0").unwrap()[8], 1, "{what}");
    }
}

fn holds(bits: &Bits, offsets: &[u64]) -> bool {
    offsets.iter().all(|offset| bits.any(ByteRange::new(*offset, 1)))
}

#[test]
fn a_device_is_known_by_its_name_or_by_its_place_in_one_boot() {
    let device = |name: u64, inode: u64, boot: Uuid| Stamp { block_device: true, inode, boot, name, ..stamp() };
    let (this, next) = (Uuid::nil(), Uuid::max());
    let known = [
        ("the same", device(0, 7, this), device(0, 7, this), true),
        ("attached anew, and nameless", device(0, 7, this), device(0, 8, this), false),
        ("nameless after a boot", device(0, 7, this), device(0, 7, next), false),
        ("attached anew", device(5, 7, this), device(5, 8, this), true),
        ("after a boot", device(5, 7, this), device(5, 2, next), true),
        ("another one in its place", device(5, 7, this), device(6, 7, this), false),
        ("one that lost its name", device(5, 7, this), device(0, 7, this), false),
    ];
    for (what, then, now, same) in known {
        assert_eq!(look(store_of(then, true).0, now, what), if same { 2 } else { 0 }, "{what} after a clean end");
        assert_eq!(look(store_of(then, false).0, now, what), if same { 2 } else { 0 }, "{what} after a crash");
    }
}
