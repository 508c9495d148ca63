//! The promise: a virtio-blk driver written by others gets from blkmark what it gets from QEMU.
//!
//! The `blkio` crate reads, writes, flushes, discards and writes zeroes over one and several queues, one request at a
//! time and in batches; each result is compared with a plain model of the disk and, at the end, with the file. The same
//! story is told to `qemu-storage-daemon`.

use std::fs;

use anyhow::{Context, Result, ensure};
use blkmark_tests::blkio_client::{BlkioClient, Op};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::lab::{Disk, Lab, MIB};

const SIZE: u64 = 32 * MIB;
const KIB: u64 = 1024;

#[test]
fn blkio_gets_from_blkmark_what_the_disk_holds() -> Result<()> {
    a_second_front_end(Kind::Blkmark)
}

#[test]
fn blkio_gets_from_qemu_storage_daemon_what_the_disk_holds() -> Result<()> {
    a_second_front_end(Kind::Qsd)
}

#[test]
fn blkio_is_told_of_a_read_only_disk_of_blkmark() -> Result<()> {
    a_read_only_disk(Kind::Blkmark)
}

#[test]
fn blkio_is_told_of_a_read_only_disk_of_qemu_storage_daemon() -> Result<()> {
    a_read_only_disk(Kind::Qsd)
}

fn a_second_front_end(kind: Kind) -> Result<()> {
    const QUEUES: u16 = 4;
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?.with_queues(QUEUES);
    let mut model = disk.content()?;
    let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let mut client = BlkioClient::connect(&disk.socket, QUEUES)?;
    ensure!(client.capacity()? == SIZE, "capacity {}", client.capacity()?);
    ensure!(!client.read_only()?, "a writable disk is shown as read-only");

    // What the file held is what is read, at both ends too.
    for (offset, length) in [(0, 512), (SIZE - 512, 512), (512 * 7, 4096 * 3), (5 * MIB, 1 << 20)] {
        expect(&model, offset, &client.read(offset, length)?)?;
    }

    // Single requests of odd places and lengths.
    for (index, (offset, length)) in
        [(512u64, 512usize), (4096, 4096), (3 * MIB + 512, 70 * 512), (8 * MIB, 1 << 20)].into_iter().enumerate()
    {
        write(&mut client, &mut model, offset, vec![index as u8 + 1; length])?;
        expect(&model, offset, &client.read(offset, length)?)?;
    }
    client.one(0, Op::Flush)?;

    // Batches on every queue, deep, of neighbouring and scattered blocks.
    for queue in 0..usize::from(QUEUES) {
        let mut ops = Vec::new();
        for index in 0..64u64 {
            let block = (index * 37 + queue as u64 * 64) % 4096;
            let data = vec![(queue * 64) as u8 ^ index as u8 ^ 0x5a; 4096];
            put(&mut model, block * 4096, &data);
            ops.push(Op::Write { offset: block * 4096, data });
        }
        for outcome in client.batch(queue, &ops)? {
            ensure!(outcome.is_ok(), "a write of a batch failed: {outcome:?}");
        }
    }
    let reads: Vec<Op> = (0..128).map(|block| Op::Read { offset: block * 32 * KIB, length: 32 << 10 }).collect();
    for (op, outcome) in reads.iter().zip(client.batch(3, &reads)?) {
        let (Op::Read { offset, .. }, Ok(data)) = (op, outcome) else { anyhow::bail!("{op:?} failed") };
        expect(&model, *offset, &data)?;
    }

    // Zeroes read back as zeroes, freed or not, and leave their neighbours alone.
    for (offset, length, unmap) in [(12 * MIB + 512, 3 * 512, false), (13 * MIB, 256 * KIB, true)] {
        client.one(1, Op::WriteZeroes { offset, length, unmap })?;
        put(&mut model, offset, &vec![0; length as usize]);
        expect(&model, offset - 512, &client.read(offset - 512, length as usize + 1024)?)?;
    }

    // A discard promises nothing of what it covers, and everything of what is beside it.
    let (offset, length) = (16 * MIB, 2 * MIB);
    client.one(2, Op::Discard { offset, length })?;
    expect(&model, offset - 4096, &client.read(offset - 4096, 4096)?)?;
    expect(&model, offset + length, &client.read(offset + length, 4096)?)?;
    let discarded = client.read(offset, 1 << 20)?;
    put(&mut model, offset, &discarded);
    let discarded = client.read(offset + MIB, 1 << 20)?;
    put(&mut model, offset + MIB, &discarded);

    past_the_end(&mut client)?;
    client.one(0, Op::Flush)?;

    // A second connection finds what the first wrote.
    drop(client);
    let mut client = BlkioClient::connect(&disk.socket, 1)?;
    expect(&model, 0, &client.read(0, 8 << 20)?)?;
    drop(client);
    daemon.stop()?;
    ensure!(fs::read(&disk.path)? == model, "the file differs from what was written");
    Ok(())
}

/// Requests beyond the disk fail, and those after them do not.
fn past_the_end(client: &mut BlkioClient) -> Result<()> {
    let beyond = [
        Op::Read { offset: SIZE, length: 512 },
        Op::Read { offset: SIZE - 512, length: 1024 },
        Op::Write { offset: SIZE - 512, data: vec![1; 1024] },
        Op::Write { offset: u64::MAX / 512 * 512 - 4095 * 512, data: vec![1; 512] },
        Op::WriteZeroes { offset: SIZE - 4096, length: 8192, unmap: true },
        Op::Discard { offset: SIZE, length: 4096 },
    ];
    for op in beyond {
        let outcome = client.attempt(0, op.clone())?;
        ensure!(outcome.is_err(), "{op:.60?} past the end of the disk succeeded");
    }
    client.read(SIZE - 512, 512)?;
    Ok(())
}

fn a_read_only_disk(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = Disk { readonly: true, ..lab.filled_disk("drive0", 4 * MIB)? };
    let before = disk.content()?;
    let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    // A driver that means to write is told at once; one that does not can read.
    let refused = BlkioClient::connect(&disk.socket, 1).err().context("a read-only disk was attached for writing")?;
    ensure!(format!("{refused:#}").contains("read-only"), "{refused:#}");
    let mut client = BlkioClient::connect_read_only(&disk.socket, 1)?;
    ensure!(client.read_only()?, "a read-only disk is shown as writable");
    expect(&before, MIB, &client.read(MIB, 4096)?)?;
    drop(client);
    daemon.stop()?;
    ensure!(disk.content()? == before, "a read-only disk was changed");
    Ok(())
}

fn write(client: &mut BlkioClient, model: &mut [u8], offset: u64, data: Vec<u8>) -> Result<()> {
    put(model, offset, &data);
    client.write(offset, &data)
}

fn put(model: &mut [u8], offset: u64, data: &[u8]) {
    let start = offset as usize;
    model[start..start + data.len()].copy_from_slice(data);
}

fn expect(model: &[u8], offset: u64, found: &[u8]) -> Result<()> {
    let start = offset as usize;
    let wanted = &model[start..start + found.len()];
    if let Some(at) = wanted.iter().zip(found).position(|(wanted, found)| wanted != found) {
        anyhow::bail!("byte {} of the disk is {:#x}, not {:#x}", offset + at as u64, found[at], wanted[at]);
    }
    Ok(())
}
