//! What a compressed qcow2 target promises, with QEMU's tools as the judge: the image is clean, is what was written, is smaller
//! where the data allows it, and is readable and writable again by everybody, here included.

mod targets_common;

use blkmark_backup::source::Source;
use blkmark_backup::target::{self, CreateOptions, Format, Policy, Target, image::Image};
use std::path::Path;
use targets_common::*;

const CLUSTER: u64 = 64 * KIB;

/// Text of sorts, with repetitions that lie 1 and about 40 KiB apart.
fn text(seed: u64, len: usize) -> Vec<u8> {
    let line = pattern(seed, 40_000);
    (0..len).map(|i| if i / 1000 % 3 == 0 { (i / 1000) as u8 | 1 } else { line[i % line.len()] }).collect()
}

fn compressing(path: &Path, options: &CreateOptions) -> Box<dyn Target> {
    let target = target::create(path, Format::Qcow2, options, &Policy::default()).unwrap();
    assert!(target.compresses());
    target.set_compression(true);
    target
}

/// Both QEMU and the reader of chains see these bytes, and QEMU's check sees nothing.
fn assert_image(path: &Path, expected: &[u8]) {
    check_clean(path);
    assert!(qemu_reads(path, "qcow2") == expected, "QEMU reads something else");
    let image = Image::open(path, Format::Qcow2, &Policy::default()).unwrap();
    let mut bytes = vec![0; expected.len()];
    image.read_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected, "the reader of chains reads something else");
}

/// Writes all in pieces of a mebibyte from four threads, as a copy does.
fn pour(target: &dyn Target, data: &[u8]) {
    let pieces: Vec<_> = data.chunks(MIB as usize).enumerate().collect();
    std::thread::scope(|scope| {
        for worker in 0..4 {
            let pieces = &pieces;
            scope.spawn(move || {
                for (i, piece) in pieces.iter().skip(worker).step_by(4) {
                    target.write_at(piece, *i as u64 * MIB).unwrap();
                }
            });
        }
    });
}

#[test]
fn what_compresses_takes_less_and_what_does_not_takes_no_more() {
    let dir = dir();
    for (cluster, size) in [
        (CLUSTER, 8 * MIB),
        (CLUSTER, 3 * MIB + 37 * 512),
        (512, MIB + 512),
        (4096, 2 * MIB + 512),
        (2 * MIB, 9 * MIB + 512),
    ] {
        let half = (size / 2) as usize;
        let mut mixed = text(3, half);
        mixed.extend(pattern(4, size as usize - half));
        for (kind, data, most) in [
            ("text", text(1, size as usize), size * 17 / 20),
            ("zero", vec![0; size as usize], size / 10),
            ("random", pattern(7, size as usize).iter().map(|byte| byte.rotate_left(3) ^ 5).collect(), u64::MAX),
            ("mixed", mixed, u64::MAX),
        ] {
            let path = dir.path().join(format!("{kind}-{cluster}-{size}.qcow2"));
            let options = CreateOptions { cluster_size: Some(cluster), ..CreateOptions::new(size) };
            let target = compressing(&path, &options);
            pour(&*target, &data);
            target.conclude().unwrap();
            drop(target);
            assert_image(&path, &data);
            let len = std::fs::metadata(&path).unwrap().len();
            let overhead = 64 * KIB.max(cluster) + size / 32;
            let small = cluster >= 4096;
            assert!(!small || len <= most.saturating_add(overhead), "{kind}, {cluster}, {size}: {len} bytes");
            assert!(len <= size + size / 8 + 8 * cluster + overhead, "{kind}, {cluster}, {size}: {len} bytes");
        }
    }
}

#[test]
fn compressed_layers_stand_on_each_other() {
    let dir = dir();
    let size = 5 * MIB + 512;
    let mut expected = text(1, size as usize);
    let base = dir.path().join("0.qcow2");
    let target = compressing(&base, &CreateOptions::new(size));
    pour(&*target, &expected);
    target.conclude().unwrap();
    drop(target);
    let mut below = base;
    for level in 1..4u64 {
        let path = dir.path().join(format!("{level}.qcow2"));
        let target = compressing(&path, &over(&below, Format::Qcow2, size));
        let data = text(level + 10, 5 * CLUSTER as usize);
        let offset = level * 9 * CLUSTER;
        target.write_at(&data, offset).unwrap();
        target.write_zeroes_at(offset + CLUSTER, CLUSTER).unwrap();
        expected[offset as usize..][..data.len()].copy_from_slice(&data);
        expected[(offset + CLUSTER) as usize..][..CLUSTER as usize].fill(0);
        // Parts of clusters: they are completed from below, and from themselves.
        for (seed, offset, len) in [(1, 3 * MIB + 100, 1000), (2, 3 * MIB + 500, 70_000), (3, size - 700, 700)] {
            let data = text(level * 100 + seed, len);
            target.write_at(&data, offset).unwrap();
            expected[offset as usize..][..len].copy_from_slice(&data);
        }
        target.write_zeroes_at(offset + 3 * CLUSTER + 5, 100).unwrap();
        expected[(offset + 3 * CLUSTER + 5) as usize..][..100].fill(0);
        target.conclude().unwrap();
        drop(target);
        assert_image(&path, &expected);
        below = path;
    }
}

#[test]
fn an_image_that_exists_goes_on_compressed() {
    let dir = dir();
    let size = 6 * MIB;
    for options in [&[][..], &["-o", "refcount_bits=1"], &["-o", "refcount_bits=4"], &["-o", "cluster_size=4k"]] {
        let path = dir.path().join("x.qcow2");
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(options);
        args.extend([s(&path), "6M"]);
        ok("qemu-img", &args);
        let mut expected = vec![0; size as usize];
        for round in 0..4u64 {
            let target = target::open(&path, Format::Qcow2, &Policy::default()).unwrap();
            target.set_compression(round % 2 == 0);
            let data = text(round, MIB as usize);
            // Over what the rounds before wrote, and beyond.
            for offset in [round * MIB, round * MIB + 3 * CLUSTER / 2, 5 * MIB] {
                target.write_at(&data[..MIB as usize - 5000], offset).unwrap();
                expected[offset as usize..][..MIB as usize - 5000].copy_from_slice(&data[..MIB as usize - 5000]);
            }
            target.conclude().unwrap();
            drop(target);
            assert_image(&path, &expected);
        }
        // QEMU overwrites it.
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 9 100k 2M", s(&path)]);
        expected[100 * KIB as usize..][..2 * MIB as usize].fill(9);
        assert_image(&path, &expected);
    }
}

#[test]
fn room_that_is_given_back_is_used_again() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    let target = compressing(&path, &CreateOptions::new(4 * MIB));
    // The table comes first. The file is as long as what lies last in it, which would be the table if several writers were there before.
    target.write_at(&text(0, 64 * KIB as usize), 0).unwrap();
    let mut last = Vec::new();
    for round in 0..20 {
        target.set_compression(round % 3 != 2);
        last = text(round, 4 * MIB as usize);
        pour(&*target, &last);
    }
    target.conclude().unwrap();
    // The target has the lock on the image itself.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    assert_image(&copy, &last);
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 12 * MIB, "twenty rounds over 4 MiB take {len} bytes");
    // Concluded, it may be written again.
    target.write_zeroes_at(0, 4 * MIB).unwrap();
    fails("qemu-img", &["info", "-U", "-f", "qcow2", s(&path)]);
    target.conclude().unwrap();
    drop(target);
    assert_image(&path, &vec![0; 4 * MIB as usize]);
    assert!(std::fs::metadata(&path).unwrap().len() < MIB, "what became zero still takes room");
}

#[test]
fn a_full_file_system_is_told_as_such_and_the_rest_stays_sound() {
    let dir = dir();
    let small = SmallFs::mount(&dir.path().join("small"), 4 * MIB);
    let path = small.0.join("full.qcow2");
    let data = text(5, 16 * MIB as usize);
    let target = compressing(&path, &CreateOptions::new(16 * MIB));
    let pieces: Vec<_> = data.chunks(256 * KIB as usize).collect();
    let write = |i: usize| target.write_at(pieces[i], i as u64 * 256 * KIB);
    let failed = (0..pieces.len()).find(|i| write(*i).is_err()).expect("16 MiB went into 4 MiB");
    assert!(failed >= 8, "only {failed} pieces fit");
    // Whoever tries again and again takes no more room for it.
    for _ in 0..200 {
        let error = write(failed).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    }
    ok("mount", &["-o", "remount,size=64m", s(&small.0)]);
    (failed..pieces.len()).for_each(|i| write(i).unwrap());
    target.conclude().unwrap();
    drop(target);
    assert_image(&path, &data);
    let len = std::fs::metadata(&path).unwrap().len();
    assert!(len < 16 * MIB, "{len} bytes");
}

#[test]
fn a_raw_image_cannot_be_compressed() {
    let dir = dir();
    let target = create(&dir.path().join("x.raw"), Format::Raw, MIB);
    assert!(!target.compresses());
}
