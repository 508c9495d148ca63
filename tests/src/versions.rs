//! A guest that keeps writing numbered versions of its blocks, and a record of them, so that an image that was taken beside it
//! can be held against the instant that it is of.
//!
//! Each block of 4 KiB says which one it is and which version. A version is noted as issued before it is submitted, and as
//! acknowledged after its completion. So an image of an instant between two looks at the record has, of each block, a version
//! that is no older than what was acknowledged at the first, and no newer than what was issued at the second. Blocks
//! are whole, since a killed process leaves pages whole.
//!
//! The guest goes through a kill of its daemon as through a pause: told by `Reborn`, it goes on over its inflight region.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkmark::frontend::{Buffer, FrontendError, Guest, Options, Queue, Request, Wait};

use crate::beside::Stop;
use crate::lab::{Disk, Lab};
use crate::process::GIVE_UP;
use crate::random::Random;

const BLOCK: usize = 4096;
const DEPTH: usize = 12;
/// Most blocks of a request.
const LONGEST: usize = 16;

/// Which versions of a disk's blocks were written.
#[derive(Debug)]
pub struct Record {
    issued: Vec<AtomicU64>,
    acknowledged: Vec<AtomicU64>,
    /// Completions.
    done: AtomicU64,
    reborn: Reborn,
}

/// Tells a guest that its daemon is there again.
#[derive(Debug, Default)]
struct Reborn {
    count: Mutex<u64>,
    changed: Condvar,
}

fn block(index: usize, version: u64) -> Vec<u8> {
    let mut bytes = (index as u64).to_le_bytes().to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.repeat(BLOCK / 16)
}

impl Record {
    /// A new disk, whose blocks all have version 1.
    pub fn of_new_disk(lab: &Lab, id: &str, bytes: u64) -> Result<(Disk, Record)> {
        let disk = lab.disk(id, bytes)?;
        let file = OpenOptions::new().write(true).open(&disk.path)?;
        let blocks = bytes as usize / BLOCK;
        for first in (0..blocks).step_by(256) {
            let data: Vec<u8> = (first..blocks.min(first + 256)).flat_map(|index| block(index, 1)).collect();
            file.write_all_at(&data, (first * BLOCK) as u64)?;
        }
        let ones = || (0..blocks).map(|_| AtomicU64::new(1)).collect();
        let record =
            Record { issued: ones(), acknowledged: ones(), done: AtomicU64::new(0), reborn: Reborn::default() };
        Ok((disk, record))
    }

    /// What is certainly in an image of any later instant.
    pub fn acknowledged(&self) -> Vec<u64> {
        self.acknowledged.iter().map(|version| version.load(Ordering::SeqCst)).collect()
    }

    /// What is at most in an image of any earlier instant.
    pub fn issued(&self) -> Vec<u64> {
        self.issued.iter().map(|version| version.load(Ordering::SeqCst)).collect()
    }

    /// Waits for so many more completions.
    pub fn wait_for(&self, more: u64) -> Result<()> {
        let until = self.done.load(Ordering::Relaxed) + more;
        let deadline = Instant::now() + GIVE_UP;
        while self.done.load(Ordering::Relaxed) < until {
            ensure!(Instant::now() < deadline, "the guest makes no progress");
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Connects the guest again, and lets it go on.
    pub fn reconnect(&self, guest: &mut Guest, disk: &Disk) -> Result<()> {
        guest.reconnect(&disk.socket)?;
        *self.reborn.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.reborn.changed.notify_all();
        Ok(())
    }

    /// Holds a raw image against the record as of an instant between the two looks.
    pub fn check(&self, image: &Path, from: &[u64], to: &[u64]) -> Result<()> {
        let file = File::open(image).with_context(|| image.display().to_string())?;
        let mut data = vec![0; BLOCK];
        for (index, (from, to)) in from.iter().zip(to).enumerate() {
            file.read_exact_at(&mut data, (index * BLOCK) as u64)?;
            let version = u64::from_le_bytes(data[8..16].try_into()?);
            if data != block(index, version) {
                bail!("{}: block {index} is of no version: {:?}", image.display(), &data[..16]);
            }
            if version < *from || version > *to {
                bail!("{}: block {index} has version {version}, not one of {from} to {to}", image.display());
            }
        }
        Ok(())
    }

    /// The guest's options: its requests outlive the daemon.
    pub fn options() -> Options {
        Options { inflight: true, data_size: DEPTH * LONGEST * BLOCK, ..Options::default() }
    }

    /// Writes until the story ends.
    pub fn keep_writing(&self, mut queue: Queue, stop: &Stop, seed: u64) -> Result<()> {
        let mut random = Random(seed | 1);
        let part = self.issued.len() / DEPTH;
        let mut slots: Vec<Option<(usize, Vec<u64>)>> = vec![None; DEPTH];
        let mut completions = Vec::new();
        loop {
            for (slot, pending) in slots.iter_mut().enumerate() {
                if pending.is_some() || stop.is_due() {
                    continue;
                }
                let count = 1 + random.below(LONGEST as u64) as usize;
                let first = slot * part + random.below((part - count) as u64) as usize;
                let range = first..first + count;
                let versions: Vec<u64> =
                    range.clone().map(|index| self.issued[index].fetch_add(1, Ordering::SeqCst) + 1).collect();
                let data: Vec<u8> = range.zip(&versions).flat_map(|(index, version)| block(index, *version)).collect();
                let buffer = Buffer { offset: slot * LONGEST * BLOCK, len: data.len() };
                queue.write_data(buffer.offset, &data)?;
                queue.submit(Request::Write { sector: (first * BLOCK / 512) as u64, buffer }, slot as u64)?;
                *pending = Some((first, versions));
            }
            if queue.in_flight() == 0 {
                return Ok(());
            }
            queue.kick()?;
            let seen = *self.reborn.count.lock().unwrap_or_else(PoisonError::into_inner);
            match queue.wait(Some(GIVE_UP)) {
                Ok(Wait::Ready) => {}
                Ok(Wait::TimedOut) => bail!("{} requests were not answered", queue.in_flight()),
                Err(FrontendError::BackendGone) => {
                    self.wait_past(seen, stop)?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            queue.completions(&mut completions)?;
            for completion in completions.drain(..) {
                ensure!(completion.status.is_ok(), "a write ended with {}", completion.status);
                let (first, versions) = slots[completion.token as usize].take().context("a completion of nothing")?;
                for (index, version) in versions.into_iter().enumerate() {
                    self.acknowledged[first + index].store(version, Ordering::SeqCst);
                }
                self.done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn wait_past(&self, seen: u64, stop: &Stop) -> Result<()> {
        let mut count = self.reborn.count.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = Instant::now() + GIVE_UP;
        while *count == seen {
            ensure!(!stop.is_due() && Instant::now() < deadline, "the daemon did not come back");
            let waited = self.reborn.changed.wait_timeout(count, Duration::from_millis(100));
            count = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}
