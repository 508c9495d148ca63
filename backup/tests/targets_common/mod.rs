//! What the tests of targets share: QEMU's tools as judges, scratch directories, patterns.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(missing_docs, reason = "test helpers")]

use blkmark_backup::target::{Backing, CreateOptions, Format, Policy, Target, TargetError};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;

/// A directory for one test, on the disk rather than on a tmpfs, so that fsync means something.
pub fn dir() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} is needed for this test: {e}"))
}

/// Runs a command that has to succeed and gives back what it printed.
pub fn ok(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(output.status.success(), "{program} {args:?}: {}", err(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs a command that has to fail and gives back its complaint.
pub fn fails(program: &str, args: &[&str]) -> String {
    let output = run(program, args);
    assert!(!output.status.success(), "{program} {args:?} should have failed");
    err(&output)
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub fn s(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// `qemu-img check` finds nothing, not even a leak.
pub fn check_clean(path: &Path) {
    let report = ok("qemu-img", &["check", "-f", "qcow2", s(path)]);
    assert!(report.contains("No errors were found"), "{report}");
}

/// The contents of an image as QEMU reads them.
pub fn qemu_reads(path: &Path, format: &str) -> Vec<u8> {
    let raw = path.with_extension("as-qemu-reads-it");
    ok("qemu-img", &["convert", "-f", format, "-O", "raw", s(path), s(&raw)]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// Bytes that differ from place to place and are never zero.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            (x >> 32) as u8 | 1
        })
        .collect()
}

pub fn create(path: &Path, format: Format, size: u64) -> Box<dyn Target> {
    blkmark_backup::target::create(path, format, &CreateOptions::new(size), &Policy::default()).unwrap()
}

pub fn over(backing: &Path, format: Format, size: u64) -> CreateOptions {
    let backing = Backing { path: backing.to_owned(), format };
    CreateOptions { backing: Some(backing), ..CreateOptions::new(size) }
}

/// The error of something that must not give a target.
pub fn refusal(result: Result<Box<dyn Target>, TargetError>) -> TargetError {
    match result {
        Ok(target) => panic!("{} should have been refused", target.name()),
        Err(e) => e,
    }
}

/// A tmpfs of the given size, unmounted on drop. Needs the right to mount, and says so.
pub struct SmallFs(pub PathBuf);

impl SmallFs {
    pub fn mount(at: &Path, bytes: u64) -> Self {
        std::fs::create_dir(at).unwrap();
        let size = format!("size={bytes}");
        let output = run("mount", &["-t", "tmpfs", "-o", &size, "tmpfs", s(at)]);
        assert!(output.status.success(), "this test mounts a small tmpfs and has to run as root: {}", err(&output));
        Self(at.to_owned())
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        run("umount", &["-l", s(&self.0)]);
    }
}
