//! Reading chains without QEMU, and that it sees what QEMU sees.

mod targets_common;

use blkmark_backup::source::{BlockStatus, Source};
use blkmark_backup::target::image::{Allocation, Image, flatten};
use blkmark_backup::target::{Format, Policy, TargetError};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use targets_common::*;

fn open(path: &Path, format: Format) -> Image {
    Image::open(path, format, &Policy::default()).unwrap()
}

/// raw <- qcow2 <- qcow2 with data, zeroes, compressed clusters and a base that is shorter than the disk.
fn chain(dir: &Path) -> PathBuf {
    let (base, middle, top) = (dir.join("base.raw"), dir.join("middle.qcow2"), dir.join("top.qcow2"));
    ok("qemu-img", &["create", "-f", "raw", s(&base), "2M"]);
    ok("qemu-io", &["-f", "raw", "-c", "write -P 1 100k 1M", s(&base)]);
    let relative = ["create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", s(&middle), "4195840"];
    ok("qemu-img", &relative);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 2 512k 64k", s(&middle)]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 3 4195328 512", s(&middle)]);
    let above = ["create", "-f", "qcow2", "-b", s(&middle), "-F", "qcow2", s(&top)];
    ok("qemu-img", &above);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -z 576k 64k", s(&top)]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -c -P 4 1M 64k", s(&top)]);
    top
}

#[test]
fn a_chain_reads_as_qemu_reads_it() {
    let dir = dir();
    let top = chain(dir.path());
    let expected = qemu_reads(&top, "qcow2");
    let image = open(&top, Format::Qcow2);
    assert_eq!(image.size(), expected.len() as u64);
    assert_eq!(image.file_ids().len(), 3);
    let mut whole = vec![0xee; expected.len()];
    image.read_at(&mut whole, 0).unwrap();
    assert!(whole == expected);
    let mut piece = vec![0xee; 100_001];
    for at in (0..expected.len() - piece.len()).step_by(77_777) {
        image.read_at(&mut piece, at as u64).unwrap();
        assert!(piece == expected[at..][..piece.len()], "at {at}");
    }
    assert!(image.read_at(&mut [0], image.size()).is_err());
    assert!(image.read_at(&mut [0, 0], image.size() - 1).is_err());
    assert!(image.block_status(image.size(), 1).is_err());
}

#[test]
fn the_status_of_blocks_is_true_and_ends_where_it_should() {
    let dir = dir();
    let top = chain(dir.path());
    let image = open(&top, Format::Qcow2);
    let expected = qemu_reads(&top, "qcow2");
    let (mut at, mut holes) = (0, 0);
    while at < image.size() {
        let (status, len) = image.block_status(at, image.size() - at).unwrap();
        assert!(len > 0 && len <= image.size() - at);
        if status == BlockStatus::Hole {
            assert!(expected[at as usize..][..len as usize].iter().all(|b| *b == 0), "at {at}");
            holes += len;
        }
        at += len;
    }
    assert!(holes > 2 * MIB, "only {holes} bytes of holes");
    let what = |at| image.allocation(at, 4096).unwrap();
    assert_eq!(what(0), (Allocation::Backing, 4096));
    assert_eq!(what(576 * KIB), (Allocation::Zero, 4096));
    assert_eq!(what(MIB), (Allocation::Data, 4096));
    let small = image.block_status(MIB, 1).unwrap();
    assert_eq!(small, (BlockStatus::Data, 1));
}

#[test]
fn a_flattened_chain_is_the_disk_and_sparse() {
    let dir = dir();
    let top = chain(dir.path());
    let out = dir.path().join("restored.raw");
    let mut heard = Vec::new();
    let policy = Policy::default();
    let done = flatten(&top, Format::Qcow2, &out, &policy, |at, all| heard.push((at, all))).unwrap();
    let expected = qemu_reads(&top, "qcow2");
    assert!(std::fs::read(&out).unwrap() == expected);
    assert_eq!((done.size, done.layers), (expected.len() as u64, 3));
    assert!(done.written < 2 * MIB);
    assert!(std::fs::metadata(&out).unwrap().blocks() * 512 < 2 * MIB);
    assert_eq!(heard.first(), Some(&(0, done.size)));
    assert_eq!(heard.last(), Some(&(done.size, done.size)));
    assert!(heard.windows(2).all(|w| w[0].0 < w[1].0));
    ok("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", s(&top), s(&out)]);
}

#[test]
fn what_we_wrote_flattens_to_what_qemu_converts() {
    let dir = dir();
    let size = 6 * MIB + 512;
    let mut below: Option<PathBuf> = None;
    for level in 0..3u64 {
        let path = dir.path().join(format!("{level}.qcow2"));
        let target = match &below {
            None => create(&path, Format::Qcow2, size),
            Some(below) => blkmark_backup::target::create(
                &path,
                Format::Qcow2,
                &over(below, Format::Qcow2, size),
                &Policy::default(),
            )
            .unwrap(),
        };
        target.write_at(&pattern(level, 1 << 20), level * 700_000).unwrap();
        target.write_zeroes_at(level * 900_000, 200_000).unwrap();
        target.conclude().unwrap();
        below = Some(path);
    }
    let (top, out) = (below.unwrap(), dir.path().join("out.raw"));
    flatten(&top, Format::Qcow2, &out, &Policy::default(), |_, _| {}).unwrap();
    assert!(std::fs::read(&out).unwrap() == qemu_reads(&top, "qcow2"));
}

#[test]
fn a_failed_restore_leaves_nothing_and_overwrites_nothing() {
    let dir = dir();
    let top = chain(dir.path());
    let policy = Policy::default();
    let existing = dir.path().join("existing");
    std::fs::write(&existing, "data").unwrap();
    flatten(&top, Format::Qcow2, &existing, &policy, |_, _| {}).unwrap_err();
    assert_eq!(std::fs::read(&existing).unwrap(), b"data");

    let small = SmallFs::mount(&dir.path().join("small"), 512 * KIB);
    let out = small.0.join("out.raw");
    let e = flatten(&top, Format::Qcow2, &out, &policy, |_, _| {}).unwrap_err();
    assert!(e.to_string().ends_with("No space left on device"), "{e}");
    assert!(!out.exists());

    // A chain with a link missing is not restored as if that were zeroes.
    std::fs::remove_file(dir.path().join("base.raw")).unwrap();
    let out = dir.path().join("out.raw");
    let e = flatten(&top, Format::Qcow2, &out, &policy, |_, _| {}).unwrap_err();
    assert!(matches!(e, TargetError::Open { .. }), "{e}");
    assert!(e.to_string().contains("base.raw': No such file"), "{e}");
    assert!(!out.exists());
}

#[test]
fn a_raw_image_is_read_as_it_is() {
    let dir = dir();
    let path = dir.path().join("x.raw");
    // It begins like a qcow2, as a guest could make it, and has an odd size.
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    bytes.resize(100_001, 7);
    std::fs::write(&path, &bytes).unwrap();
    let out = dir.path().join("out.raw");
    flatten(&path, Format::Raw, &out, &Policy::default(), |_, _| {}).unwrap();
    assert!(std::fs::read(&out).unwrap() == bytes);
}
