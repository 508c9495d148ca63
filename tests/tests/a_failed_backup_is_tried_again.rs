//! The promise: a backup whose target ran full can be tried again, elsewhere and later, and gives the disk as it was when it was
//! first ordered, byte for byte, although the guest wrote all the while; the next increment starts from there.
//!
//! Told through what people have: the command line (`backup --keep`, `job retry`), a guest front end that overwrites the
//! whole disk in between, and `qemu-img`.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use blkmark::frontend::{Guest, Options};
use blkmark_tests::daemon::{Daemon, blkmark_binary};
use blkmark_tests::images;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::small_fs::SmallFileSystem;
use blkmark_tests::tools::{Answer, answer};

const SIZE: u64 = 32 * MIB;

#[test]
fn a_failed_backup_is_tried_again() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let small = SmallFileSystem::mount(8 * MIB)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let ask = |words: &[&str], paths: &[&Path]| blkmark(daemon.control(), words, paths);
    let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let first_order = disk.content()?;

    let full = ask(
        &["backup", "full", "--disk", "drive0", "--bitmap", "b", "--keep", "--target"],
        &[&small.folder().join("full.qcow2")],
    )?;
    ensure!(full.code == 1, "{full:?}");
    ensure!(full.text.contains("No space left on device"), "{full:?}");

    // Everything changes, more than once.
    for round in 1..=2u8 {
        for mib in 0..SIZE / MIB {
            guest.write_at(&vec![round.wrapping_mul(16) ^ mib as u8; MIB as usize], mib * MIB)?;
        }
    }
    guest.flush()?;

    // Again into the same full file system: the same end, and nothing is lost by it.
    let same = ask(&["job", "retry", "drive0"], &[])?;
    ensure!(same.code == 1 && same.text.contains("No space left on device"), "{same:?}");

    let elsewhere = lab.path("full.qcow2");
    let retried = ask(&["job", "retry", "drive0", "--target"], &[&elsewhere])?;
    ensure!(retried.code == 0, "{retried:?}");
    images::assert_sound(&elsewhere)?;
    ensure!(fs::read(images::restore(&elsewhere)?)? == first_order, "not the disk of the first order");

    guest.write_at(&[7; 4096], 5 * MIB)?;
    guest.flush()?;
    let increment = lab.path("increment.qcow2");
    let next = ask(
        &["backup", "incremental", "--disk", "drive0", "--bitmap", "b", "--backing"],
        &[&elsewhere, Path::new("--target"), &increment],
    )?;
    ensure!(next.code == 0, "{next:?}");
    drop(guest);
    ensure!(daemon.stop()?.success());
    images::assert_sound(&increment)?;
    images::assert_equal(&increment, &disk.path)
}

fn blkmark(control: &Path, words: &[&str], paths: &[&Path]) -> Result<Answer> {
    answer(Command::new(blkmark_binary()?).arg("--control").arg(control).args(words).args(paths))
}
