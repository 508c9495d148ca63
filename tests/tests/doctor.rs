//! The promise: where a test needs something of the machine that is not there, this says so first, and by name.
//!
//! Nothing is skipped for want of a part: the tests that need it fail too.

use anyhow::{Context, Result, ensure};
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::{daemon, guest, tools};

#[test]
fn the_tools_are_installed() -> Result<()> {
    tools::require_all()
}

#[test]
fn a_guest_can_be_made() -> Result<()> {
    guest::require()
}

#[test]
fn the_python_clients_are_installed() -> Result<()> {
    let version = tools::run(
        tools::python("python")?.args(["-c", "from importlib.metadata import version; print(version('qemu.qmp'))"]),
    )?;
    ensure!(version.trim() == "0.0.6", "qemu.qmp 0.0.6 is needed, this is {version}: run scripts/setup");
    tools::python("qmp-shell").map(drop)
}

#[test]
fn blkmark_is_built() -> Result<()> {
    let binary = daemon::blkmark_binary()?;
    let said = tools::run(std::process::Command::new(binary).arg("--version"))?;
    ensure!(said.starts_with("blkmark "), "this is no blkmark: {said}");
    Ok(())
}

#[test]
fn the_kernel_offers_what_blkmark_uses() -> Result<()> {
    let switch = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_else(|_| "0".to_owned());
    ensure!(switch.trim() == "0", "io_uring is switched off: sysctl kernel.io_uring_disabled is {switch}");
    rustix::fs::memfd_create("doctor", rustix::fs::MemfdFlags::ALLOW_SEALING).context("no sealed memfd")?;
    Ok(())
}

#[test]
fn there_is_space_to_test_in() -> Result<()> {
    let lab = Lab::new()?;
    let space = rustix::fs::statvfs(lab.folder())?;
    let free = space.f_bavail * space.f_frsize;
    ensure!(free > 2048 * MIB, "only {} MiB free in {}: set TMPDIR", free / MIB, lab.folder().display());
    Ok(())
}
