//! The promise: a backup does not push what others read out of the host's page cache, whether its target is a file or a block
//! device.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::loop_device::Loop;
use blkmark_tests::page_cache::cached_bytes;
use serde_json::json;

const SIZE: u64 = 32 * MIB;

#[test]
fn a_file() -> Result<()> {
    let lab = Lab::new()?;
    let target = lab.path("full.raw");
    fs::File::create(&target)?.set_len(SIZE)?;
    back_up(&lab, &target)
}

#[test]
fn a_block_device() -> Result<()> {
    let lab = Lab::new()?;
    let file = lab.path("device.img");
    fs::File::create(&file)?.set_len(SIZE)?;
    let device = Loop::over(&file, 512)?;
    back_up(&lab, device.path())
}

fn back_up(lab: &Lab, target: &Path) -> Result<()> {
    let disk = lab.filled_disk("drive0", SIZE)?;
    // What is cached of a block device goes when nobody has it open.
    let _open = fs::File::open(target)?;
    let daemon = Daemon::blkmark(lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let arguments =
        json!({ "device": "drive0", "target": target, "format": "raw", "mode": "existing", "sync": "full" });
    qmp.run("drive-backup", arguments)?;
    qmp.job_completed("drive0")?;
    let cached = cached_bytes(target)?;
    ensure!(cached <= SIZE / 16, "{cached} bytes of the target are in the page cache");
    ensure!(fs::read(target)? == disk.content()?, "the backup is not the disk");
    ensure!(cached_bytes(target)? == SIZE, "what was read is in the page cache, so that the check above could fail");
    ensure!(daemon.stop()?.success());
    Ok(())
}
