//! What a raw target promises.

mod targets_common;

use blkmark_backup::source::FileId;
use blkmark_backup::target::{self, CreateOptions, Format, Policy, os_text};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use targets_common::*;

fn open(path: &Path) -> Box<dyn target::Target> {
    target::open(path, Format::Raw, &Policy::default()).unwrap()
}

#[test]
fn a_new_image_is_sparse_private_and_of_the_right_size() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let size = 10 * MIB + 512;
    let target = create(&path, Format::Raw, size);
    assert!(target.reads_zero());
    assert_eq!(target.size(), size);
    target.write_at(&pattern(1, 5000), MIB).unwrap();
    target.conclude().unwrap();
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), size);
    assert!(meta.blocks() * 512 < MIB);
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert_eq!(target.file_id(), Some(FileId { device: meta.dev(), inode: meta.ino() }));
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes[MIB as usize..][..5000] == pattern(1, 5000));
    assert_eq!(bytes.iter().filter(|b| **b != 0).count(), 5000);
}

#[test]
fn zeroes_replace_data_and_free_its_space() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let size = 4 * MIB;
    std::fs::write(&path, pattern(2, size as usize)).unwrap();
    let target = open(&path);
    assert!(!target.reads_zero());
    let mut expected = pattern(2, size as usize);
    for (offset, len) in [(0, 1), (511, 2), (4095, 4098), (MIB, 2 * MIB), (size - 3, 3), (9, 0)] {
        target.write_zeroes_at(offset, len).unwrap();
        expected[offset as usize..][..len as usize].fill(0);
    }
    target.conclude().unwrap();
    assert!(std::fs::read(&path).unwrap() == expected);
    let used = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(used <= 2 * MIB + 64 * KIB, "{used} bytes in use");
}

#[test]
fn nothing_is_written_past_the_end() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let size = MIB - 512;
    let target = create(&path, Format::Raw, size);
    target.write_at(&[1], size - 1).unwrap();
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (0, size as usize + 1)] {
        let e = target.write_at(&vec![1; len], offset).unwrap_err();
        assert_eq!(e.kind(), std::io::ErrorKind::InvalidInput);
        assert!(target.write_zeroes_at(offset, len as u64).is_err());
    }
    target.conclude().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), size);
}

#[test]
fn workers_write_disjoint_ranges_at_once() {
    let dir = dir();
    let path = dir.path().join("disk.raw");
    let unit = 48 * KIB as usize;
    let target = create(&path, Format::Raw, 600 * unit as u64);
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let target = &target;
            scope.spawn(move || {
                for i in (worker..600).step_by(6) {
                    target.write_at(&pattern(i, unit), i * unit as u64).unwrap();
                }
            });
        }
    });
    target.conclude().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    for (i, got) in bytes.chunks(unit).enumerate() {
        assert!(got == pattern(i as u64, unit), "unit {i}");
    }
}

#[test]
fn a_full_file_system_is_told_as_such() {
    let dir = dir();
    let small = SmallFs::mount(&dir.path().join("small"), 4 * MIB);
    let path = small.0.join("disk.raw");
    let target = create(&path, Format::Raw, 16 * MIB);
    let error =
        (0..256).find_map(|i| target.write_at(&[1; 64 << 10], i * 64 * KIB).err()).expect("16 MiB do not fit into 4");
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(os_text(&error), "No space left on device");
    // Zeroes give the space back.
    target.write_zeroes_at(0, 16 * MIB).unwrap();
    target.write_at(&[2; 64 << 10], 8 * MIB).unwrap();
    target.conclude().unwrap();
}

#[test]
fn a_block_device_is_written_as_it_is() {
    let dir = dir();
    let file = dir.path().join("behind.img");
    std::fs::write(&file, pattern(4, 4 << 20)).unwrap();
    let device = ok("losetup", &["--find", "--show", s(&file)]).trim().to_owned();
    struct Detach<'a>(&'a str);
    impl Drop for Detach<'_> {
        fn drop(&mut self) {
            run("losetup", &["-d", self.0]);
        }
    }
    let _detach = Detach(&device);
    let device = Path::new(&device);

    // Also when asked to create: a device is neither emptied nor removed.
    let options = CreateOptions { overwrite: true, ..CreateOptions::new(4 * MIB) };
    let target = target::create(device, Format::Raw, &options, &Policy::default()).unwrap();
    assert_eq!(target.size(), 4 * MIB);
    assert!(!target.reads_zero());
    let meta = std::fs::metadata(device).unwrap();
    assert_eq!(target.file_id(), Some(FileId { device: 0, inode: meta.rdev() }));
    target.write_at(&pattern(5, 64 << 10), MIB).unwrap();
    target.write_zeroes_at(2 * MIB, MIB).unwrap();
    target.write_zeroes_at(100, 7).unwrap();
    target.abandon().unwrap();
    target.conclude().unwrap();
    drop(target);
    assert!(std::fs::metadata(device).unwrap().file_type().is_block_device());

    // A link in a directory that root alone can write, as LVM makes them, is as good as the device.
    let link = dir.path().join("volume");
    std::os::unix::fs::symlink(device, &link).unwrap();
    drop(open(&link));

    let mut expected = pattern(4, 4 << 20);
    expected[MIB as usize..][..64 << 10].copy_from_slice(&pattern(5, 64 << 10));
    expected[2 * MIB as usize..][..MIB as usize].fill(0);
    expected[100..107].fill(0);
    let mut got = Vec::new();
    std::io::Read::read_to_end(&mut std::fs::File::open(device).unwrap(), &mut got).unwrap();
    assert!(got == expected);

    // But not where anybody could have put it.
    let open_to_all = dir.path().join("open");
    std::fs::create_dir(&open_to_all).unwrap();
    std::fs::set_permissions(&open_to_all, PermissionsExt::from_mode(0o1777)).unwrap();
    let planted = open_to_all.join("volume");
    std::os::unix::fs::symlink(device, &planted).unwrap();
    let e = refusal(target::open(&planted, Format::Raw, &Policy::default()));
    assert!(e.to_string().ends_with("Too many levels of symbolic links"), "{e}");
}
