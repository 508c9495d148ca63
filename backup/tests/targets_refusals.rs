//! What is refused when a target is made or opened, with which words, and that nothing is left behind or changed.

mod targets_common;

use blkmark_backup::source::FileId;
use blkmark_backup::target::{self, CreateOptions, Format, Policy, TargetError};
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use targets_common::*;

const FORMATS: [Format; 2] = [Format::Raw, Format::Qcow2];

fn overwriting(size: u64) -> CreateOptions {
    CreateOptions { overwrite: true, ..CreateOptions::new(size) }
}

fn create_err(path: &Path, format: Format, options: &CreateOptions) -> TargetError {
    refusal(target::create(path, format, options, &Policy::default()))
}

fn open_err(path: &Path, format: Format) -> TargetError {
    refusal(target::open(path, format, &Policy::default()))
}

fn id(path: &Path) -> FileId {
    let meta = std::fs::metadata(path).unwrap();
    FileId { device: meta.dev(), inode: meta.ino() }
}

fn entries(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn the_words_are_those_of_qemu() {
    let e = "spaghetti".parse::<Format>().unwrap_err();
    assert_eq!(e.to_string(), "Unknown file format 'spaghetti'");
    let complaint = fails("qemu-img", &["create", "-f", "spaghetti", "/dev/null/x", "1M"]);
    assert!(complaint.contains(&e.to_string()), "{complaint}");

    for format in FORMATS {
        let e = create_err(Path::new("/nope/x"), format, &overwriting(MIB));
        assert_eq!(e.to_string(), "Could not create '/nope/x': No such file or directory");
        let complaint = fails("qemu-img", &["create", "-f", format.name(), "/nope/x", "1M"]);
        assert!(complaint.contains(&e.to_string()), "{complaint}");

        let e = open_err(Path::new("/nope/x"), format);
        assert_eq!(e.to_string(), "Could not open '/nope/x': No such file or directory");
        let complaint = fails("qemu-img", &["info", "-f", format.name(), "/nope/x"]);
        assert!(complaint.contains(&e.to_string()), "{complaint}");
    }
}

#[test]
fn an_existing_file_is_never_created_over_unasked() {
    let dir = dir();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    for format in FORMATS {
        let e = create_err(&path, format, &CreateOptions::new(MIB));
        assert_eq!(e.to_string(), format!("Could not create '{}': File exists", path.display()));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}

#[test]
fn asked_to_it_replaces_the_file_when_it_is_accepted_and_no_sooner() {
    let dir = dir();
    for format in FORMATS {
        let path = dir.path().join("reused");
        let old = vec![7; 3 << 20];
        std::fs::write(&path, &old).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let create = || target::create(&path, format, &overwriting(MIB), &Policy::default());
        // Refused after all, in one way or the other: nothing is left, and nothing was changed.
        create().unwrap().abandon().unwrap();
        drop(create().unwrap());
        assert!(std::fs::read(&path).unwrap() == old);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

        let target = create().unwrap();
        assert!(target.reads_zero());
        assert!(std::fs::read(&path).unwrap() == old);
        let again = create().map(|_| ()).unwrap_err();
        assert!(matches!(again, TargetError::Locked(_)), "{again}");
        target.accept().unwrap();
        assert_eq!(target.file_id(), Some(id(&path)));
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        target.conclude().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        // It was there before: abandoning does not remove it.
        target.abandon().unwrap();
        drop(target);
        assert!(qemu_reads(&path, format.name()) == vec![0; 1 << 20]);
    }
}

#[test]
fn the_source_is_never_overwritten_under_any_name() {
    let dir = dir();
    let disk = dir.path().join("disk.raw");
    std::fs::write(&disk, pattern(1, 1 << 20)).unwrap();
    let alias = dir.path().join("alias.raw");
    std::fs::hard_link(&disk, &alias).unwrap();
    let policy = Policy { forbidden: vec![id(&disk)], ..Policy::default() };
    for format in FORMATS {
        for path in [&disk, &alias] {
            for e in [
                refusal(target::create(path, format, &overwriting(MIB), &policy)),
                refusal(target::open(path, format, &policy)),
            ] {
                assert_eq!(e.to_string(), "Source and target cannot be the same");
            }
        }
    }
    assert!(std::fs::read(&disk).unwrap() == pattern(1, 1 << 20));

    // Nor may it be hidden in the chain of the target.
    let over = dir.path().join("over.qcow2");
    let backing = ["create", "-f", "qcow2", "-b", s(&alias), "-F", "raw", s(&over)];
    ok("qemu-img", &backing);
    let e = refusal(target::open(&over, Format::Qcow2, &policy));
    assert!(matches!(e, TargetError::Forbidden), "{e}");
    let new = dir.path().join("new.qcow2");
    let options = targets_common::over(&alias, Format::Raw, MIB);
    let e = refusal(target::create(&new, Format::Qcow2, &options, &policy));
    assert!(matches!(e, TargetError::Forbidden), "{e}");
    assert!(!new.exists());
}

#[test]
fn a_target_is_not_its_own_backing() {
    let dir = dir();
    let path = dir.path().join("base.raw");
    std::fs::write(&path, pattern(1, 1 << 20)).unwrap();
    let options = CreateOptions { overwrite: true, ..over(&path, Format::Raw, MIB) };
    let e = create_err(&path, Format::Qcow2, &options);
    assert!(matches!(e, TargetError::Forbidden), "{e}");
    assert!(std::fs::read(&path).unwrap() == pattern(1, 1 << 20));

    let (a, b) = (dir.path().join("a.qcow2"), dir.path().join("b.qcow2"));
    ok("qemu-img", &["create", "-f", "qcow2", s(&a), "1M"]);
    ok("qemu-img", &["create", "-f", "qcow2", "-b", s(&a), "-F", "qcow2", s(&b)]);
    ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", s(&b), "-F", "qcow2", s(&a)]);
    assert!(matches!(open_err(&a, Format::Qcow2), TargetError::Forbidden));
    let e = target::image::Image::open(&a, Format::Qcow2, &Policy::default()).unwrap_err();
    assert!(e.to_string().contains("no end"), "{e}");
}

#[test]
fn a_link_planted_in_the_last_component_is_not_followed() {
    let dir = dir();
    let victim = dir.path().join("victim");
    std::fs::write(&victim, "data").unwrap();
    let dangling = dir.path().join("dangling");
    for (name, to) in [("link", &victim), ("to-nowhere", &dangling)] {
        let link = dir.path().join(name);
        symlink(to, &link).unwrap();
        for format in FORMATS {
            for e in [
                create_err(&link, format, &CreateOptions::new(MIB)),
                create_err(&link, format, &overwriting(MIB)),
                open_err(&link, format),
            ] {
                let text = e.to_string();
                assert!(text.ends_with("File exists") || text.ends_with("Too many levels of symbolic links"), "{text}");
            }
        }
    }
    assert_eq!(std::fs::read(&victim).unwrap(), b"data");
    assert!(!dangling.exists());
}

#[test]
fn only_files_and_block_devices_are_targets() {
    let dir = dir();
    let fifo = dir.path().join("fifo");
    ok("mkfifo", &[s(&fifo)]);
    for format in FORMATS {
        for path in [Path::new("/dev/zero"), &fifo, dir.path(), Path::new("/"), Path::new("")] {
            open_err(path, format);
            create_err(path, format, &overwriting(MIB));
        }
    }
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn options_without_meaning_leave_nothing() {
    let dir = dir();
    let path = dir.path().join("new");
    let base = dir.path().join("base.raw");
    std::fs::write(&base, "x").unwrap();
    for format in FORMATS {
        create_err(&path, format, &CreateOptions::new(1000));
    }
    let e = create_err(&path, Format::Raw, &over(&base, Format::Raw, MIB));
    assert!(e.to_string().contains("Backing file not supported"), "{e}");
    create_err(&path, Format::Qcow2, &CreateOptions::new(1 << 62));
    create_err(&path, Format::Raw, &CreateOptions::new(u64::MAX - 511));
    for name in ["nope.raw", "json:{}", "nbd://host/x", "", "fat:rw:/"] {
        create_err(&path, Format::Qcow2, &over(Path::new(name), Format::Raw, MIB));
    }
    // A raw file is no qcow2, and is not taken for one.
    create_err(&path, Format::Qcow2, &over(&base, Format::Qcow2, MIB));
    assert_eq!(entries(dir.path()), 1);
}

#[test]
fn paths_outside_of_the_allowed_roots_are_refused() {
    let dir = dir();
    let (inside, outside) = (dir.path().join("in"), dir.path().join("out"));
    std::fs::create_dir_all(inside.join("deep")).unwrap();
    std::fs::create_dir(&outside).unwrap();
    symlink(&outside, inside.join("door")).unwrap();
    let policy = Policy { roots: vec![inside.clone()], ..Policy::default() };
    let make = |path: &Path, format| target::create(path, format, &CreateOptions::new(MIB), &policy);
    for format in FORMATS {
        for path in [outside.join("x"), inside.join("../out/x"), inside.join("door/x"), inside.join("deep/../../out/x")]
        {
            let e = refusal(make(&path, format));
            assert!(e.to_string().contains("not below an allowed directory"), "{e}");
        }
        make(&inside.join(format.name()), format).unwrap().conclude().unwrap();
        make(&inside.join("deep/../deep").join(format.name()), format).unwrap();
    }
    assert_eq!(entries(&outside), 0);

    // Nor does an image reach out through the name of its backing file.
    let secret = outside.join("secret.raw");
    std::fs::write(&secret, vec![1; 1 << 20]).unwrap();
    let path = inside.join("reaching.qcow2");
    ok("qemu-img", &["create", "-f", "qcow2", "-b", s(&secret), "-F", "raw", s(&path)]);
    let e = refusal(target::open(&path, Format::Qcow2, &policy));
    assert!(e.to_string().contains("not below an allowed directory"), "{e}");
    assert!(target::image::Image::open(&path, Format::Qcow2, &policy).is_err());
}

#[test]
fn images_that_cannot_be_kept_right_are_refused_untouched() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    let data = dir.path().join("data");
    let secret = "--object=secret,id=s,data=geheim";
    let cases: [(&[&str], &str); 6] = [
        (&["-o", "compat=0.10"], "version 2"),
        (&["-o", "extended_l2=on"], "extended L2"),
        (&["-o", "compression_type=zstd"], "compression type"),
        (&["-o", &format!("data_file={}", data.display())], "External data files"),
        (&[secret, "-o", "encrypt.format=luks,encrypt.key-secret=s"], "Encrypted"),
        (&[secret, "-o", "encrypt.format=aes,encrypt.key-secret=s"], "Encrypted"),
    ];
    for (options, reason) in cases {
        let mut args = vec!["create", "-f", "qcow2"];
        args.extend(options);
        args.extend([s(&path), "1M"]);
        if !run("qemu-img", &args).status.success() {
            // Newer tools no longer make the AES kind.
            assert!(options.contains(&"encrypt.format=aes,encrypt.key-secret=s"), "{args:?}");
            continue;
        }
        let before = std::fs::read(&path).unwrap();
        let e = open_err(&path, Format::Qcow2);
        assert!(e.to_string().contains(reason), "{e}");
        assert!(std::fs::read(&path).unwrap() == before);
        std::fs::remove_file(&path).unwrap();
    }
    for (byte, bit, reason) in [(79, 1, "corrupt"), (79, 2, "is corrupt"), (75, 8, "Unsupported")] {
        ok("qemu-img", &["create", "-f", "qcow2", s(&path), "1M"]);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[byte] |= bit;
        std::fs::write(&path, &bytes).unwrap();
        let e = open_err(&path, Format::Qcow2).to_string();
        let dirty = bit == 1 && e.contains("not closed cleanly");
        assert!(dirty || e.contains(reason), "{e}");
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
    std::fs::write(&path, "not an image at all").unwrap();
    assert!(open_err(&path, Format::Qcow2).to_string().contains("not in qcow2 format"));
    std::fs::write(&path, "").unwrap();
    assert!(open_err(&path, Format::Qcow2).to_string().contains("not in qcow2 format"));
}

#[test]
fn headers_that_ask_for_absurd_tables_are_refused() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    ok("qemu-img", &["create", "-f", "qcow2", s(&path), "1M"]);
    let good = std::fs::read(&path).unwrap();
    let cases: [(usize, &[u8]); 9] = [
        (20, &[0, 0, 0, 40]),
        (20, &[0, 0, 0, 8]),
        (24, &[0xff; 8]),
        (36, &[0xff; 4]),
        (40, &[0xff; 8]),
        (48, &[0, 0, 0, 0, 0, 0, 0, 1]),
        (56, &[0xff; 4]),
        (96, &[0xff; 4]),
        (100, &[0xff; 4]),
    ];
    for (at, bytes) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        open_err(&path, Format::Qcow2);
        let read = target::image::Image::open(&path, Format::Qcow2, &Policy::default());
        assert!(read.is_err(), "field at {at}");
        assert!(std::fs::read(&path).unwrap() == bad);
    }
}

#[test]
fn backing_names_that_are_no_file_names_are_refused() {
    let dir = dir();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    let path = dir.path().join("x.qcow2");
    let json = format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}", s(&base));
    ok("qemu-img", &["create", "-f", "qcow2", s(&path), "1M"]);
    for name in [json.as_str(), "nbd://127.0.0.1:1/x"] {
        ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", s(&path)]);
        let before = std::fs::read(&path).unwrap();
        let e = open_err(&path, Format::Qcow2);
        assert!(e.to_string().contains("not a plain file name"), "{e}");
        assert!(std::fs::read(&path).unwrap() == before);
    }
    // Formats are never guessed.
    ok("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", s(&base), "-F", "vmdk", s(&path)]);
    assert_eq!(open_err(&path, Format::Qcow2).to_string(), "Unknown file format 'vmdk'");
    let mut bytes = std::fs::read(&path).unwrap();
    let magic = [0xe2, 0x79, 0x2a, 0xca];
    let at = bytes.windows(4).position(|w| w == magic).unwrap();
    bytes[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    std::fs::write(&path, bytes).unwrap();
    let e = open_err(&path, Format::Qcow2);
    assert!(e.to_string().contains("does not say which format"), "{e}");
}
