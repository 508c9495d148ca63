//! The promise: a raw file, also one in memory, and a block device, past the host's page cache or through it, with blocks of
//! 512 or 4096 bytes, are served, tracked and backed up alike.
//!
//! Each is written over two queues (writes, zeroes, discards, flushes) and read back against a plain model; a full backup and
//! an incremental are taken in between, and each restores to what the model was at that moment. Block devices are
//! loop devices over files of the test.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};
use blkmark::frontend::{Disk as GuestDisk, Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_device::Loop;
use blkmark_tests::small_fs::SmallFileSystem;
use serde_json::json;

const SIZE: u64 = 24 * MIB;

#[test]
fn a_raw_file_past_the_page_cache() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?.with_direct(true);
    serve_and_back_up(&lab, disk, 512)
}

#[test]
fn a_raw_file_through_the_page_cache() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?.with_direct(false);
    serve_and_back_up(&lab, disk, 512)
}

/// On tmpfs queue threads copy themselves, instead of asking io_uring to.
#[test]
fn a_raw_file_in_memory() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let memory = SmallFileSystem::mount(2 * SIZE)?;
    let path = memory.folder().join("drive0.raw");
    fs::copy(&disk.path, &path)?;
    serve_and_back_up(&lab, Disk { path, ..disk }, 512)
}

#[test]
fn a_block_device_past_the_page_cache() -> Result<()> {
    block_device(512, true)
}

#[test]
fn a_block_device_through_the_page_cache() -> Result<()> {
    block_device(512, false)
}

#[test]
fn a_block_device_of_large_blocks() -> Result<()> {
    block_device(4096, true)
}

fn block_device(sector: u32, direct: bool) -> Result<()> {
    let lab = Lab::new()?;
    let file = lab.filled_disk("drive0", SIZE)?;
    let device = Loop::over(&file.path, sector)?;
    let disk = Disk { path: device.path().to_owned(), ..file.with_direct(direct) };
    serve_and_back_up(&lab, disk, sector)
}

fn serve_and_back_up(lab: &Lab, disk: Disk, block: u32) -> Result<()> {
    let disk = disk.with_queues(2);
    let daemon = Daemon::blkmark(lab, std::slice::from_ref(&disk))?;
    let mut guest = Guest::connect(&disk.socket, Options { queues: 2, ..Options::default() })?;
    ensure!(guest.config().blk_size == block, "a block of {} bytes is shown", guest.config().blk_size);
    let mut model = disk_content(&disk.path)?;
    let mut queues: Vec<GuestDisk> = guest.take_queues().into_iter().map(|queue| GuestDisk::new(queue, None)).collect();

    change(&mut queues, &mut model, 1, block.into())?;
    let mut qmp = daemon.qmp()?;
    let full = lab.path("full.qcow2");
    qmp.run(
        "transaction",
        json!({ "actions": [
            { "type": "block-dirty-bitmap-add", "data": { "node": "drive0", "name": "b", "persistent": false } },
            { "type": "drive-backup",
              "data": { "device": "drive0", "target": full, "format": "qcow2", "sync": "full" } },
        ] }),
    )?;
    let at_full = model.clone();
    change(&mut queues, &mut model, 2, block.into())?;
    qmp.job_completed("drive0")?;

    let increment = lab.path("increment.qcow2");
    images::create_on_top(&full, "qcow2", &increment)?;
    qmp.run(
        "drive-backup",
        json!({ "device": "drive0", "target": increment, "format": "qcow2", "mode": "existing", "sync": "incremental",
                "bitmap": "b" }),
    )?;
    let at_increment = model.clone();
    change(&mut queues, &mut model, 3, block.into())?;
    qmp.job_completed("drive0")?;

    for (image, moment) in [(&full, &at_full), (&increment, &at_increment)] {
        images::assert_sound(image)?;
        let restored = fs::read(images::restore(image)?)?;
        ensure!(restored == *moment, "{} is not the disk of its moment", image.display());
    }
    let mut bytes = vec![0; SIZE as usize];
    for (index, part) in bytes.chunks_mut(MIB as usize).enumerate() {
        queues[index % 2].read_at(part, index as u64 * MIB)?;
    }
    ensure!(bytes == model, "the guest reads something else than it wrote");
    drop(queues);
    drop(guest);
    ensure!(daemon.stop()?.success());
    ensure!(disk_content(&disk.path)? == model, "the disk holds something else than the guest wrote");
    Ok(())
}

/// Changes disk and model alike, here and there; each round in other places.
fn change(queues: &mut [GuestDisk], model: &mut [u8], round: u64, block: u64) -> Result<()> {
    for step in 0..40u64 {
        let queue = &mut queues[(step % 2) as usize];
        let offset = (step * 977 + round * 131) * 4096 % (SIZE - MIB) / block * block;
        let len = (1 + step % 9) * 4096;
        let range = offset as usize..(offset + len) as usize;
        match step % 5 {
            3 => {
                queue.write_zeroes(offset, len, step % 2 == 0)?;
                model[range].fill(0);
            }
            // What a discarded range holds is not promised: it is written again at once.
            4 => {
                queue.discard(offset, len)?;
                let bytes = vec![(round * 40 + step) as u8; len as usize];
                queue.write_at(&bytes, offset)?;
                model[range].copy_from_slice(&bytes);
            }
            _ => {
                let bytes = vec![(round * 40 + step) as u8; len as usize];
                queue.write_at(&bytes, offset)?;
                model[range].copy_from_slice(&bytes);
            }
        }
    }
    queues[0].flush()?;
    Ok(())
}

fn disk_content(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = vec![0; SIZE as usize];
    fs::File::open(path)?.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
