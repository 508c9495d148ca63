//! A ledger that is read is what was written, or it is refused: after every kill, with every byte flipped, and cut short anywhere.

use super::*;
use std::path::Path;

const DISK: FileId = FileId { device: 7, inode: 9 };
const UNIT: u64 = 64 << 10;

fn haven(directory: &Path) -> Haven {
    Haven::new(&[Path::new("/dev/shm")], directory, directory, DISK, Uuid::new_v4()).unwrap()
}

fn plan(size: u64) -> Plan {
    Plan { scratch: Uuid::new_v4(), disk: DISK, size, unit: Granularity::new(UNIT).unwrap() }
}

fn unit(index: u64) -> ByteRange {
    ByteRange::new(index * UNIT, UNIT)
}

fn block(slot: u32) -> Place {
    Place::Block { in_memory: slot.is_multiple_of(2), slot, checksum: slot ^ 0x5555 }
}

type Content = (Phase, Vec<(u64, Place)>, Vec<ByteRange>);

fn read(haven: &Haven, id: Uuid) -> io::Result<Content> {
    let loaded = Loaded::read(haven.open(id, Kind::Ledger)?, id, DISK)?;
    Ok((loaded.phase, loaded.saved.clone(), loaded.in_target().runs().collect()))
}

fn written(haven: &Haven) -> (Ledger, Content) {
    let ledger = Ledger::create(haven, plan(100 * UNIT - 512)).unwrap();
    for index in [0, 3, 64, 99] {
        ledger.saved(unit(index), block(index as u32)).unwrap();
    }
    ledger.saved(unit(70), Place::Zero).unwrap();
    ledger.held(ByteRange::between(60 * UNIT, 66 * UNIT)).unwrap();
    let saved = [0, 3, 99].map(|index| (index * UNIT, block(index as u32)));
    let saved = vec![saved[0], saved[1], (70 * UNIT, Place::Zero), saved[2]];
    (ledger, (Phase::Running, saved, vec![ByteRange::between(60 * UNIT, 66 * UNIT)]))
}

#[test]
fn what_is_read_is_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let haven = haven(directory.path());
    let (ledger, content) = written(&haven);
    assert_eq!(read(&haven, ledger.id()).unwrap(), content);
    ledger.set_phase(Phase::Broken).unwrap();
    // To the end of the disk, which is no whole unit, and over several batches of nothing.
    ledger.held(ByteRange::between(0, 100 * UNIT - 512)).unwrap();
    let all = vec![ByteRange::between(0, 100 * UNIT - 512)];
    assert_eq!(read(&haven, ledger.id()).unwrap(), (Phase::Broken, Vec::new(), all));
    let id = ledger.id();
    drop(ledger);
    assert_eq!(read(&haven, id).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn many_ranges_are_held_as_if_one_by_one() {
    let directory = tempfile::tempdir().unwrap();
    let haven = haven(directory.path());
    let (some, size) = ([0..3, 63..66, 120..121, 200..300], 300 * UNIT - 512);
    let mut clusters = Bits::new(Granularity::new(UNIT).unwrap(), size);
    for units in &some {
        clusters.set(ByteRange::between(units.start * UNIT, size.min(units.end * UNIT)));
    }
    let ledger = Ledger::create(&haven, plan(size)).unwrap();
    ledger.held(unit(2)).unwrap();
    ledger.hold_all(&clusters).unwrap();
    assert_eq!(read(&haven, ledger.id()).unwrap().2, clusters.runs().collect::<Vec<_>>());
    ledger.held(unit(3)).unwrap();
    clusters.set(unit(3));
    assert_eq!(read(&haven, ledger.id()).unwrap().2, clusters.runs().collect::<Vec<_>>());
    // Nothing at all.
    let ledger = Ledger::create(&haven, plan(size)).unwrap();
    ledger.hold_all(&Bits::new(Granularity::new(UNIT).unwrap(), size)).unwrap();
    assert_eq!(read(&haven, ledger.id()).unwrap().2, Vec::new());
}

#[test]
fn a_flipped_byte_is_noticed_or_without_meaning() {
    let directory = tempfile::tempdir().unwrap();
    let haven = haven(directory.path());
    let (ledger, content) = written(&haven);
    let mut noticed = 0;
    for at in 0..ledger.plan.len() {
        for mask in [0x01, 0x80, 0xff] {
            let mut byte = [0];
            ledger.file.read_exact_at(&mut byte, at).unwrap();
            ledger.file.write_all_at(&[byte[0] ^ mask], at).unwrap();
            match read(&haven, ledger.id()) {
                Ok(found) => assert_eq!(found, content, "byte {at:#x}"),
                Err(_) => noticed += 1,
            }
            ledger.file.write_all_at(&byte, at).unwrap();
        }
    }
    // The header, the phase, and both tables, whether something was written there or not.
    assert_eq!(noticed, 3 * (HEADER as u64 + 8 + (2 + 100) * PLACE));
    assert_eq!(read(&haven, ledger.id()).unwrap(), content);
}

#[test]
fn a_ledger_that_was_cut_short_or_grew_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let haven = haven(directory.path());
    let (ledger, _) = written(&haven);
    for len in (0..ledger.plan.len()).rev().chain([ledger.plan.len() + 1]) {
        ledger.file.set_len(len).unwrap();
        assert!(read(&haven, ledger.id()).is_err(), "{len} bytes");
    }
}

#[test]
fn a_ledger_of_another_disk_or_point_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let haven = haven(directory.path());
    let (ledger, _) = written(&haven);
    let open = || haven.open(ledger.id(), Kind::Ledger).unwrap();
    assert!(Loaded::read(open(), Uuid::new_v4(), DISK).is_err());
    assert!(Loaded::read(open(), ledger.id(), FileId { inode: 10, ..DISK }).is_err());
}
