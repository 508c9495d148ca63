//! Locks that QEMU's tools and ours both respect.

mod targets_common;

use blkmark_backup::file_lock::{self, LockMode};
use blkmark_backup::target::{self, CreateOptions, Format, Policy};
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use targets_common::*;

#[test]
fn a_disk_that_is_served_is_kept_from_writers_and_plain_readers() {
    let dir = dir();
    let other = dir.path().join("other.raw");
    std::fs::write(&other, vec![0; 1 << 20]).unwrap();
    for format in ["raw", "qcow2"] {
        let disk = dir.path().join(format);
        ok("qemu-img", &["create", "-f", format, s(&disk), "1M"]);
        let file = File::options().read(true).write(true).open(&disk).unwrap();
        file_lock::lock(&file, LockMode::Writer).unwrap();

        let mut refused = vec![
            vec!["convert", "-f", format, "-O", "raw", s(&disk), s(&other)],
            vec!["resize", "-f", format, s(&disk), "2M"],
        ];
        if format == "qcow2" {
            // Over raw, QEMU's comparing and looking do not mind a writer.
            refused.push(vec!["compare", "-f", format, "-F", "raw", s(&disk), s(&other)]);
            refused.push(vec!["info", "-f", format, s(&disk)]);
        }
        for args in refused {
            let complaint = fails("qemu-img", &args);
            assert!(complaint.contains("Failed to get"), "{args:?}: {complaint}");
        }
        fails("qemu-io", &["-f", format, "-c", "write 0 512", s(&disk)]);
        // Who asks to share, may look.
        ok("qemu-img", &["convert", "-U", "-f", format, "-O", "raw", s(&disk), s(&other)]);
        ok("qemu-img", &["info", "-U", "-f", format, s(&disk)]);
        ok("qemu-img", &["compare", "-U", "-f", format, "-F", "raw", s(&disk), s(&other)]);

        file_lock::unlock(&file).unwrap();
        ok("qemu-img", &["compare", "-f", format, "-F", "raw", s(&disk), s(&other)]);
        ok("qemu-io", &["-f", format, "-c", "write 0 512", s(&disk)]);
    }
}

/// qemu-io with an image open, until dropped.
struct QemuIo(Child);

impl QemuIo {
    fn holding(path: &str, format: &str, read_only: bool) -> Self {
        let mut command = Command::new("qemu-io");
        if read_only {
            command.arg("-r");
        }
        let mut child =
            command.args(["-f", format, path]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        // Its answer says that the image is open, and so locked.
        let mut line = String::new();
        while !line.contains("MiB") {
            line.clear();
            let n = BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
            assert!(n > 0, "qemu-io ended before it had opened {path}");
        }
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

#[test]
fn a_file_that_qemu_uses_is_not_taken_as_a_target() {
    let dir = dir();
    for format in [Format::Raw, Format::Qcow2] {
        let path = dir.path().join(format.name());
        ok("qemu-img", &["create", "-f", format.name(), s(&path), "1M"]);
        let before = std::fs::read(&path).unwrap();
        let holder = QemuIo::holding(s(&path), format.name(), false);
        let options = CreateOptions { overwrite: true, ..CreateOptions::new(MIB) };
        for e in [
            refusal(target::create(&path, format, &options, &Policy::default())),
            refusal(target::open(&path, format, &Policy::default())),
        ] {
            let text = e.to_string();
            // QEMU's writers of raw files put up with other writers; we do not put up with them.
            let words = match format {
                Format::Raw => "Failed to get shared \"write\" lock",
                Format::Qcow2 => "Failed to get \"write\" lock",
            };
            assert_eq!(text, words);
        }
        assert!(std::fs::read(&path).unwrap() == before);
        drop(holder);
        target::open(&path, format, &Policy::default()).unwrap();
    }
}

#[test]
fn a_reader_of_qemu_and_a_reader_of_ours_share_an_image() {
    let dir = dir();
    let path = dir.path().join("x.qcow2");
    ok("qemu-img", &["create", "-f", "qcow2", s(&path), "1M"]);
    let _holder = QemuIo::holding(s(&path), "qcow2", true);
    let image = target::image::Image::open(&path, Format::Qcow2, &Policy::default()).unwrap();
    ok("qemu-img", &["check", "-f", "qcow2", s(&path)]);
    drop(image);
}

#[test]
fn a_target_is_locked_while_it_is_written_and_its_base_against_writers() {
    let dir = dir();
    let (base, path) = (dir.path().join("base.raw"), dir.path().join("x.qcow2"));
    std::fs::write(&base, vec![1; 1 << 20]).unwrap();
    let options = over(&base, Format::Raw, MIB);
    let target = target::create(&path, Format::Qcow2, &options, &Policy::default()).unwrap();
    refusal(target::open(&path, Format::Qcow2, &Policy::default()));
    refusal(target::open(&base, Format::Raw, &Policy::default()));
    fails("qemu-io", &["-f", "raw", "-c", "write 0 512", s(&base)]);
    ok("qemu-io", &["-r", "-f", "raw", "-c", "read 0 512", s(&base)]);
    target.conclude().unwrap();
    drop(target);
    ok("qemu-io", &["-f", "qcow2", "-c", "write 0 512", s(&path)]);
    ok("qemu-io", &["-f", "raw", "-c", "write 0 512", s(&base)]);
}

#[test]
fn of_many_that_create_the_same_file_at_most_one_has_it_and_keeps_it() {
    let dir = dir();
    let path = dir.path().join("wanted");
    for round in 0..100 {
        let format = [Format::Raw, Format::Qcow2][round % 2];
        let start = std::sync::Barrier::new(4);
        let winners = std::sync::Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let options = CreateOptions { overwrite: true, ..CreateOptions::new(MIB) };
                    start.wait();
                    if let Ok(t) = target::create(&path, format, &options, &Policy::default()) {
                        winners.lock().unwrap().push(t);
                    }
                });
            }
        });
        let winners = winners.into_inner().unwrap();
        assert!(winners.len() <= 1);
        for winner in winners {
            winner.write_at(&[7; 512], 0).unwrap();
            winner.conclude().unwrap();
            drop(winner);
            assert!(qemu_reads(&path, format.name())[..512] == [7; 512]);
        }
        let _ = std::fs::remove_file(&path);
    }
}
