//! What a table of regions promises to whoever looks through it.

use std::fs::File;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{MAX_REGIONS, MemoryError, MemoryTable, RegionSpec};

fn memfd(size: u64) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

fn spec(guest: u64, size: u64, user: u64) -> RegionSpec {
    RegionSpec { guest, size, user, file_offset: 0 }
}

#[test]
fn what_the_front_end_writes_is_seen_and_answered() {
    let file = memfd(0x4000);
    let other = file.try_clone().unwrap();
    let mut table = MemoryTable::default();
    let at = RegionSpec { guest: 0x10_0000, size: 0x2000, user: 0x7000_0000, file_offset: 0x1000 };
    table.set(&[at], vec![file]).unwrap();
    std::os::unix::fs::FileExt::write_at(&other, b"hello", 0x1000).unwrap();
    let mut seen = [0; 5];
    let snapshot = table.snapshot();
    snapshot.read_slice(&mut seen, GuestAddress(0x10_0000)).unwrap();
    assert_eq!(&seen, b"hello");
    snapshot.write_slice(b"world", GuestAddress(0x10_0000)).unwrap();
    std::os::unix::fs::FileExt::read_at(&other, &mut seen, 0x1000).unwrap();
    assert_eq!(&seen, b"world");
}

#[test]
fn user_addresses_translate_within_one_region_only() {
    let mut table = MemoryTable::default();
    let (a, b) = (spec(0x10_000, 0x1000, 0xa000), spec(0x0, 0x1000, 0xb000));
    table.set(&[a, b], vec![memfd(0x1000), memfd(0x1000)]).unwrap();
    assert_eq!(table.translate(0xa010, 0x10), Some(GuestAddress(0x10_010)));
    assert_eq!(table.translate(0xb000, 0x1000), Some(GuestAddress(0)));
    assert_eq!(table.translate(0xaff8, 0x10), None, "neighbours in user space only");
    assert_eq!(table.translate(0x9fff, 1), None);
    assert_eq!(table.translate(0xc000, 1), None);
    assert_eq!(table.translate(u64::MAX, 2), None);
}

#[test]
fn a_bad_region_is_refused_and_changes_nothing() {
    let mut table = MemoryTable::default();
    table.add(spec(0x1000, 0x1000, 0xa000), memfd(0x1000)).unwrap();
    let mut refused = |s: RegionSpec, file: File| table.add(s, file).unwrap_err();
    let at_end = RegionSpec { file_offset: u64::MAX - 10, ..spec(0x8000, 0x1000, 0) };
    let unaligned_in_file = RegionSpec { file_offset: 0x10, ..spec(0x8000, 0x1000, 0) };
    use MemoryError::*;
    assert!(matches!(refused(spec(0x8000, 0, 0), memfd(0x1000)), Empty(_)));
    assert!(matches!(refused(spec(!0xfff, 0x2000, 0), memfd(0x2000)), Overflow { .. }));
    assert!(matches!(refused(spec(0x8000, 0x2000, !0xfff), memfd(0x2000)), Overflow { .. }));
    assert!(matches!(refused(at_end, memfd(0x1000)), Overflow { .. }));
    assert!(matches!(refused(spec(0x8001, 0x1000, 0), memfd(0x1000)), Unaligned(_)));
    assert!(matches!(refused(spec(0x8000, 0x2000, 0), memfd(0x1000)), FileTooShort { .. }));
    assert!(matches!(refused(spec(0x1000, 0x1000, 0), memfd(0x1000)), Overlap(_)));
    assert!(matches!(refused(spec(0x0, 0x2000, 0), memfd(0x2000)), Overlap(_)));
    assert!(matches!(refused(unaligned_in_file, memfd(0x3000)), Map { .. }));
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(refused(spec(0x8000, 0x1000, 0), null), NotAFile(_)));
    let files = vec![memfd(0x1000)];
    assert!(matches!(table.set(&[], files), Err(FileCount { .. })));
    assert_eq!(table.regions().len(), 1);
    assert_eq!(table.translate(0xa000, 1), Some(GuestAddress(0x1000)));
}

#[test]
fn regions_come_and_go_under_a_snapshot() {
    let mut table = MemoryTable::default();
    let shared = table.memory();
    let (a, b) = (spec(0x0, 0x1000, 0xa000), spec(0x1000, 0x1000, 0xb000));
    table.add(b, memfd(0x1000)).unwrap();
    table.add(a, memfd(0x1000)).unwrap();
    let before = table.snapshot();
    assert_eq!(before.num_regions(), 2);
    table.remove(b).unwrap();
    assert!(matches!(table.remove(b), Err(MemoryError::Unknown(0x1000))));
    table.remove(a).unwrap();
    use vm_memory::GuestAddressSpace;
    assert_eq!(shared.memory().num_regions(), 0);
    before.write_slice(b"still mapped", GuestAddress(0xffa)).unwrap();
    table.set(&[], vec![]).unwrap();
}

#[test]
fn the_number_of_regions_is_bounded() {
    let mut table = MemoryTable::default();
    let file = memfd(0x1000);
    for i in 0..MAX_REGIONS as u64 {
        let at = spec(i * 0x1000, 0x1000, i * 0x1000);
        table.add(at, file.try_clone().unwrap()).unwrap();
    }
    let one_more = spec(1 << 40, 0x1000, 0);
    assert!(matches!(table.add(one_more, file), Err(MemoryError::TooMany)));
}

#[test]
fn it_is_known_whether_memory_can_shrink() {
    let (open, sealed) = (memfd(0x1000), memfd(0x1000));
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::SHRINK).unwrap();
    let mut table = MemoryTable::default();
    let (a, b) = (spec(0x0, 0x1000, 0xa000), spec(0x1000, 0x1000, 0xb000));
    table.set(&[a, b], vec![open, sealed]).unwrap();
    let seals: Vec<_> = table.regions().iter().map(|r| r.sealed).collect();
    assert_eq!(seals, [false, true]);
}
