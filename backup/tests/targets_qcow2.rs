//! What a qcow2 target promises, with QEMU's tools as the judge.

mod targets_common;

use blkmark_backup::target::{self, CreateOptions, Format, Policy, Target, os_text};
use proptest::prelude::*;
use targets_common::*;

#[test]
fn a_concluded_image_is_clean_and_holds_what_was_written() {
    let dir = dir();
    let path = dir.path().join("full.qcow2");
    let size = 8 * MIB;
    let mut expected = vec![0; size as usize];
    let target = create(&path, Format::Qcow2, size);
    assert!(target.reads_zero());
    assert_eq!((target.size(), target.cluster_size()), (size, 64 * KIB));
    for (i, offset) in [0, MIB, 3 * MIB + 64 * KIB, size - 64 * KIB].into_iter().enumerate() {
        let data = pattern(i as u64, 64 * KIB as usize);
        target.write_at(&data, offset).unwrap();
        expected[offset as usize..][..data.len()].copy_from_slice(&data);
    }
    target.conclude().unwrap();
    drop(target);
    check_clean(&path);
    assert!(qemu_reads(&path, "qcow2") == expected);
    let info = ok("qemu-img", &["info", s(&path)]);
    assert!(info.contains("corrupt: false"), "{info}");
    // Qemu may write it again: nothing is left of the mark.
    ok("qemu-io", &["-f", "qcow2", "-c", "write 0 64k", s(&path)]);
}

#[test]
fn an_image_that_was_not_concluded_is_refused_by_everyone() {
    let dir = dir();
    let path = dir.path().join("killed.qcow2");
    let target = create(&path, Format::Qcow2, MIB);
    target.write_at(&pattern(1, 64 << 10), 0).unwrap();
    target.flush().unwrap();
    drop(target);
    for args in [
        vec!["check", "-f", "qcow2", s(&path)],
        vec!["check", "-r", "all", "-f", "qcow2", s(&path)],
        vec!["info", "-f", "qcow2", s(&path)],
        vec!["convert", "-f", "qcow2", "-O", "raw", s(&path), "/dev/null"],
        vec!["map", "-f", "qcow2", s(&path)],
    ] {
        let complaint = fails("qemu-img", &args);
        assert!(complaint.contains("unfinished backup"), "{args:?}: {complaint}");
    }
    let e = refusal(target::open(&path, Format::Qcow2, &Policy::default()));
    assert!(e.to_string().contains("unfinished backup"), "{e}");
    let e = target::image::Image::open(&path, Format::Qcow2, &Policy::default()).unwrap_err();
    assert!(e.to_string().contains("unfinished backup"), "{e}");
    // The corrupt bit is there too.
    let header = std::fs::read(&path).unwrap();
    assert_eq!((header[72], header[79]), (0x80, 0x02));
}

#[test]
fn even_an_image_that_was_only_created_is_marked() {
    let dir = dir();
    let path = dir.path().join("empty.qcow2");
    drop(create(&path, Format::Qcow2, MIB));
    fails("qemu-img", &["info", "-f", "qcow2", s(&path)]);
}

#[test]
fn an_existing_image_is_marked_only_while_it_is_being_written() {
    let dir = dir();
    let path = dir.path().join("old.qcow2");
    ok("qemu-img", &["create", "-f", "qcow2", s(&path), "4M"]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 1M", s(&path)]);
    let before = std::fs::read(&path).unwrap();

    let target = target::open(&path, Format::Qcow2, &Policy::default()).unwrap();
    assert!(!target.reads_zero());
    drop(target);
    assert!(std::fs::read(&path).unwrap() == before, "opening alone changed the image");

    let target = target::open(&path, Format::Qcow2, &Policy::default()).unwrap();
    target.write_at(&[9; 4096], MIB).unwrap();
    target.conclude().unwrap();
    // Concluded, and then written once more and left: refused.
    ok("qemu-img", &["info", "-U", "-f", "qcow2", s(&path)]);
    target.write_at(&[8; 4096], 2 * MIB).unwrap();
    fails("qemu-img", &["info", "-U", "-f", "qcow2", s(&path)]);
    // What a kill -9 would leave now.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    fails("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", s(&copy), "/dev/null"]);
    target.conclude().unwrap();
    drop(target);
    check_clean(&path);
    let bytes = qemu_reads(&path, "qcow2");
    let (old, new) = bytes.split_at(MIB as usize);
    assert!(old.iter().all(|b| *b == 7));
    assert!(new[..4096].iter().all(|b| *b == 9));
    assert!(new[MIB as usize..][..4096].iter().all(|b| *b == 8));
    assert_eq!(new.iter().filter(|b| **b != 0).count(), 8192);
    let names = String::from_utf8_lossy(&std::fs::read(&path).unwrap()[..4096]).into_owned();
    assert!(!names.contains("unfinished"), "the table of feature names was not put back");
}

#[test]
fn zeroes_hide_what_the_backing_file_holds() {
    let dir = dir();
    let base = dir.path().join("base.raw");
    // The backing file is shorter than the disk, and neither ends at a cluster.
    let size = 2 * MIB + 3 * 512;
    std::fs::write(&base, vec![5; (MIB + 512) as usize]).unwrap();
    for (offset, len) in [
        (0, size),
        (0, 64 * KIB),
        (512, 64 * KIB),
        (64 * KIB - 1, 2),
        (MIB - 1000, 5000),
        (size - 700, 700),
        (3, 1),
        (0, 0),
    ] {
        let path = dir.path().join("over.qcow2");
        let options = CreateOptions { overwrite: true, ..over(&base, Format::Raw, size) };
        let target = target::create(&path, Format::Qcow2, &options, &Policy::default()).unwrap();
        assert!(!target.reads_zero());
        target.write_zeroes_at(offset, len).unwrap();
        target.conclude().unwrap();
        drop(target);
        check_clean(&path);
        let mut expected = vec![5; (MIB + 512) as usize];
        expected.resize(size as usize, 0);
        expected[offset as usize..][..len as usize].fill(0);
        assert!(qemu_reads(&path, "qcow2") == expected, "zeroes at {offset}+{len}");
    }
}

#[test]
fn zeroes_take_no_space() {
    let dir = dir();
    let path = dir.path().join("zeroes.qcow2");
    let size = 64 * MIB;
    let target = create(&path, Format::Qcow2, size);
    target.write_at(&pattern(3, 4 << 20), MIB).unwrap();
    target.write_zeroes_at(0, size).unwrap();
    target.conclude().unwrap();
    drop(target);
    check_clean(&path);
    let map = ok("qemu-img", &["map", "--output=json", "-f", "qcow2", s(&path)]);
    assert!(!map.contains("\"data\": true"), "{map}");
    assert!(qemu_reads(&path, "qcow2").iter().all(|b| *b == 0));
}

#[test]
fn a_disk_that_ends_inside_a_cluster_keeps_its_tail() {
    let dir = dir();
    for size in [512, 65024, 64 * KIB + 512, 3 * MIB - 512] {
        let path = dir.path().join(format!("{size}.qcow2"));
        let target = create(&path, Format::Qcow2, size);
        let data = pattern(size, size as usize);
        target.write_at(&data, 0).unwrap();
        // One byte further is refused and changes nothing.
        for (offset, len) in [(size, 1), (size - 1, 2), (0, size as usize + 1), (u64::MAX, 1)] {
            let e = target.write_at(&vec![1; len], offset).unwrap_err();
            assert_eq!(e.kind(), std::io::ErrorKind::InvalidInput);
            assert!(target.write_zeroes_at(offset, len as u64).is_err());
        }
        target.conclude().unwrap();
        drop(target);
        check_clean(&path);
        assert!(qemu_reads(&path, "qcow2") == data);
    }
}

#[test]
fn workers_write_disjoint_ranges_at_once() {
    let dir = dir();
    let path = dir.path().join("many.qcow2");
    let (workers, unit) = (8, 48 * KIB);
    let size = 32 * MIB;
    let units = size / unit;
    let target = create(&path, Format::Qcow2, size);
    std::thread::scope(|scope| {
        for worker in 0..workers {
            let target = &target;
            scope.spawn(move || {
                for i in (worker..units).step_by(workers as usize) {
                    if i % 5 == 4 {
                        target.write_zeroes_at(i * unit, unit).unwrap();
                    } else {
                        target.write_at(&pattern(i, unit as usize), i * unit).unwrap();
                    }
                }
            });
        }
    });
    target.conclude().unwrap();
    drop(target);
    check_clean(&path);
    let bytes = qemu_reads(&path, "qcow2");
    for i in 0..units {
        let got = &bytes[(i * unit) as usize..][..unit as usize];
        if i % 5 == 4 {
            assert!(got.iter().all(|b| *b == 0), "unit {i}");
        } else {
            assert!(got == pattern(i, unit as usize), "unit {i}");
        }
    }
}

#[test]
fn a_full_file_system_is_told_as_such_and_the_rest_stays_sound() {
    let dir = dir();
    let small = SmallFs::mount(&dir.path().join("small"), 4 * MIB);
    let path = small.0.join("full.qcow2");
    let target = create(&path, Format::Qcow2, 16 * MIB);
    let cluster = 64 * KIB;
    let mut written = 0;
    let error = loop {
        match target.write_at(&pattern(written, cluster as usize), written * cluster) {
            Ok(()) => written += 1,
            Err(e) => break e,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    assert_eq!(os_text(&error), "No space left on device");
    assert!(written > 32, "only {written} clusters fit");
    // Room is made: the job resumes where it stood, and the image is whole.
    ok("mount", &["-o", "remount,size=64m", s(&small.0)]);
    for i in written..256 {
        target.write_at(&pattern(i, cluster as usize), i * cluster).unwrap();
    }
    target.conclude().unwrap();
    drop(target);
    check_clean(&path);
    let bytes = qemu_reads(&path, "qcow2");
    for i in 0..256 {
        assert!(bytes[(i * cluster) as usize..][..cluster as usize] == pattern(i, cluster as usize));
    }
}

#[test]
fn a_creation_that_finds_no_space_leaves_nothing() {
    let dir = dir();
    let small = SmallFs::mount(&dir.path().join("small"), 64 * KIB);
    std::fs::write(small.0.join("filler"), vec![1; 60 << 10]).unwrap();
    let path = small.0.join("none.qcow2");
    let options = CreateOptions::new(MIB);
    let e = refusal(target::create(&path, Format::Qcow2, &options, &Policy::default()));
    let expected = format!("Could not create '{}': No space left on device", path.display());
    assert_eq!(e.to_string(), expected);
    assert!(!path.exists());
}

#[test]
fn a_chain_of_increments_is_what_qemu_makes_of_it() {
    let dir = dir();
    let size = 4 * MIB;
    let mut expected = vec![0; size as usize];
    let mut below: Option<std::path::PathBuf> = None;
    for level in 0..4u64 {
        let path = dir.path().join(format!("inc{level}.qcow2"));
        let options = match &below {
            // Relative names count from the new image.
            Some(below) => over(below.file_name().unwrap().as_ref(), Format::Qcow2, size),
            None => CreateOptions::new(size),
        };
        let target = target::create(&path, Format::Qcow2, &options, &Policy::default()).unwrap();
        assert_eq!(target.file_ids().len() as u64, level + 1);
        let data = pattern(level, 300_000);
        let offset = level * 777_216;
        target.write_at(&data, offset).unwrap();
        expected[offset as usize..][..data.len()].copy_from_slice(&data);
        target.write_zeroes_at(offset + 1000, 70_000).unwrap();
        expected[offset as usize + 1000..][..70_000].fill(0);
        target.conclude().unwrap();
        drop(target);
        check_clean(&path);
        assert!(qemu_reads(&path, "qcow2") == expected, "level {level}");
        below = Some(path);
    }
    let info = ok("qemu-img", &["info", s(&dir.path().join("inc3.qcow2"))]);
    assert!(info.contains("backing file: inc2.qcow2"), "{info}");
    assert!(info.contains("backing file format: qcow2"), "{info}");
}

#[test]
fn other_cluster_sizes_work() {
    let dir = dir();
    for cluster in [512, 4096, 2 * MIB] {
        let path = dir.path().join(format!("{cluster}.qcow2"));
        let options = CreateOptions { cluster_size: Some(cluster), ..CreateOptions::new(5 * MIB) };
        let target = target::create(&path, Format::Qcow2, &options, &Policy::default()).unwrap();
        assert_eq!(target.cluster_size(), cluster);
        let data = pattern(cluster, 3 << 20);
        target.write_at(&data, MIB).unwrap();
        target.conclude().unwrap();
        drop(target);
        check_clean(&path);
        assert!(qemu_reads(&path, "qcow2")[1 << 20..][..3 << 20] == data);
    }
    for cluster in [0, 256, 65535, 4 * MIB] {
        let path = dir.path().join("bad.qcow2");
        let options = CreateOptions { cluster_size: Some(cluster), ..CreateOptions::new(MIB) };
        refusal(target::create(&path, Format::Qcow2, &options, &Policy::default()));
        assert!(!path.exists());
    }
}

#[test]
fn a_big_disk_costs_little() {
    let dir = dir();
    let path = dir.path().join("big.qcow2");
    let size = 8 << 40;
    let target = create(&path, Format::Qcow2, size);
    target.write_at(&[1; 512], size - 512).unwrap();
    target.conclude().unwrap();
    drop(target);
    check_clean(&path);
    assert!(std::fs::metadata(&path).unwrap().len() < 8 * MIB);
}

#[test]
fn images_that_qemu_made_are_continued() {
    let dir = dir();
    let size = 4 * MIB;
    let cases: [&[&str]; 8] = [
        &[],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "refcount_bits=1"],
        &["-o", "refcount_bits=64"],
        &["-o", "lazy_refcounts=on"],
        &["-o", "preallocation=metadata"],
        &["-o", "preallocation=falloc"],
    ];
    for options in cases {
        let path = dir.path().join("x.qcow2");
        let mut args = vec!["create", "-f", "qcow2"];
        args.extend(options);
        args.extend([s(&path), "4M"]);
        ok("qemu-img", &args);
        ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 100k 1M", s(&path)]);
        ok("qemu-io", &["-f", "qcow2", "-c", "write -z 200k 64k", s(&path)]);
        let odd = ["cluster_size=2M", "refcount_bits=1", "preallocation"];
        if !odd.iter().any(|odd| options.iter().any(|o| o.starts_with(odd))) {
            // (Compressed clusters share a host cluster, which one bit cannot count.)
            ok("qemu-io", &["-f", "qcow2", "-c", "write -c -P 6 2M 64k", s(&path)]);
            ok("qemu-io", &["-f", "qcow2", "-c", "write -c -P 7 2112k 64k", s(&path)]);
        }
        let mut expected = qemu_reads(&path, "qcow2");

        let target = target::open(&path, Format::Qcow2, &Policy::default()).unwrap();
        assert_eq!(target.size(), size);
        for (seed, offset, len) in [(1, 0, 70_000), (2, 150_000, 300_000), (3, 2 << 20, 5000)] {
            let data = pattern(seed, len);
            target.write_at(&data, offset).unwrap();
            expected[offset as usize..][..len].copy_from_slice(&data);
        }
        target.write_zeroes_at(MIB, 70_001).unwrap();
        expected[MIB as usize..][..70_001].fill(0);
        target.conclude().unwrap();
        drop(target);
        check_clean(&path);
        assert!(qemu_reads(&path, "qcow2") == expected, "{options:?}");
    }
}

#[test]
fn bitmaps_of_others_are_declared_inconsistent_and_not_believed() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    ok("qemu-img", &["create", "-f", "qcow2", s(&path), "4M"]);
    ok("qemu-img", &["bitmap", "--add", "--enable", s(&path), "theirs"]);
    let target = target::open(&path, Format::Qcow2, &Policy::default()).unwrap();
    target.write_at(&pattern(1, 70_000), MIB).unwrap();
    target.conclude().unwrap();
    drop(target);
    let info = ok("qemu-img", &["info", "-f", "qcow2", s(&path)]);
    assert!(!info.contains("theirs"), "{info}");
    // The space that it took is lost until repaired; there is no error beyond that.
    let report = ok("qemu-img", &["check", "-r", "leaks", "-f", "qcow2", s(&path)]);
    assert!(report.contains("No errors were found"), "{report}");
    assert!(qemu_reads(&path, "qcow2")[1 << 20..][..70_000] == pattern(1, 70_000));
}

#[test]
fn an_image_whose_refcounts_lie_is_not_written() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    ok("qemu-img", &["create", "-f", "qcow2", s(&path), "4M"]);
    ok("qemu-io", &["-f", "qcow2", "-c", "write -P 5 0 1M", s(&path)]);
    let good = std::fs::read(&path).unwrap();
    let be64 = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let offset = |at: usize| be64(at) & 0x00ff_ffff_ffff_fe00;
    let (reftable, l1) = (be64(48), be64(40));
    let (block, l2) = (offset(reftable), offset(l1));
    let data = offset(l2) / 65536;
    let far = (0xffff_0000_0000u64 | 1 << 63).to_be_bytes();
    let cases: [(usize, &[u8]); 10] = [
        // A data cluster and an L2 table that may not be written in place, since they are said to have other users.
        (l2, &[0]),
        (l1, &[0]),
        // No count for the header, for a data cluster, for anything.
        (block, &[0, 0]),
        (block + 2 * data, &[0, 0]),
        (reftable, &[0; 8]),
        // A refcount block in the header; two owners of a data cluster; far outside; askew.
        (reftable, &[0; 7]),
        (l2 + 8, &good[l2..l2 + 8]),
        (l2, &far),
        (l1, &far),
        (l2 + 6, &[0x0e]),
    ];
    for (at, bytes) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        if bytes == [0; 7] {
            bad[at + 5] = 0;
        }
        if bad == good {
            continue;
        }
        std::fs::write(&path, &bad).unwrap();
        let e = refusal(target::open(&path, Format::Qcow2, &Policy::default()));
        assert!(e.to_string().contains("qemu-img check"), "byte {at}: {e}");
        assert!(std::fs::read(&path).unwrap() == bad);
    }
    std::fs::write(&path, &good).unwrap();
    ok("qemu-img", &["snapshot", "-c", "s", s(&path)]);
    let e = refusal(target::open(&path, Format::Qcow2, &Policy::default()));
    assert!(e.to_string().contains("internal snapshots"), "{e}");
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u64),
    Zero(u64, u64),
    Flush,
}

fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0..size, 1..200_000usize, any::<u64>()).prop_map(|(o, l, s)| Step::Write(o, l, s)),
        3 => (0..size, 1..400_000u64).prop_map(|(o, l)| Step::Zero(o, l)),
        1 => Just(Step::Flush),
    ];
    proptest::collection::vec(step, 1..25)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_writes_and_zeroes_reads_back(
        steps in steps(1_500_672),
        with_backing in any::<bool>(),
    ) {
        let dir = dir();
        let size = 1_500_672;
        let path = dir.path().join("any.qcow2");
        let mut expected = vec![0; size as usize];
        let options = if with_backing {
            let base = dir.path().join("base.raw");
            expected[..900_000].copy_from_slice(&pattern(77, 900_000));
            std::fs::write(&base, &expected[..900_000]).unwrap();
            over(&base, Format::Raw, size)
        } else {
            CreateOptions::new(size)
        };
        let target = target::create(&path, Format::Qcow2, &options, &Policy::default()).unwrap();
        for step in steps {
            match step {
                Step::Write(offset, len, seed) => {
                    let len = len.min((size - offset) as usize);
                    let data = pattern(seed, len);
                    target.write_at(&data, offset).unwrap();
                    expected[offset as usize..][..len].copy_from_slice(&data);
                }
                Step::Zero(offset, len) => {
                    let len = len.min(size - offset);
                    target.write_zeroes_at(offset, len).unwrap();
                    expected[offset as usize..][..len as usize].fill(0);
                }
                Step::Flush => target.flush().unwrap(),
            }
        }
        target.conclude().unwrap();
        drop(target);
        check_clean(&path);
        prop_assert!(qemu_reads(&path, "qcow2") == expected);
    }
}

#[test]
fn an_image_that_was_abandoned_is_gone() {
    let dir = dir();
    let path = dir.path().join("gone.qcow2");
    let target = create(&path, Format::Qcow2, MIB);
    assert!(path.exists());
    target.abandon().unwrap();
    target.abandon().unwrap();
    assert!(!path.exists());
    // Whoever took the name meanwhile keeps it.
    std::fs::write(&path, "mine").unwrap();
    target.abandon().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    let existing = create(&dir.path().join("kept.raw"), Format::Raw, MIB);
    drop(existing);
    let existing = target::open(&dir.path().join("kept.raw"), Format::Raw, &Policy::default()).unwrap();
    existing.abandon().unwrap();
    assert!(dir.path().join("kept.raw").exists());
}

#[test]
fn targets_can_be_shared_between_threads() {
    fn shared<T: Send + Sync + ?Sized>() {}
    shared::<dyn Target>();
}
