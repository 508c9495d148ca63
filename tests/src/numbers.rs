//! A client that writes n to disk A, waits, writes n to disk B, waits, and goes on with n + 1; and what images of the two then tell
//! of the instant that they are of.
//!
//! Number n goes to slot n modulo [`SLOTS`], so an image tells not only the last number but whether every slot is of that same
//! instant. Disks have [`SIZE`] bytes and begin with zeroes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::Disk;

use crate::beside::Stop;
use crate::lab::MIB;
use crate::process::GIVE_UP;

/// Bytes of each disk.
pub const SIZE: u64 = 16 * MIB;
/// Places that numbers go to, one after the other.
pub const SLOTS: u64 = 1024;
const STRIDE: u64 = SIZE / SLOTS;
const BLOCK: usize = 4096;

/// What the writing client tells of itself.
#[derive(Debug, Default)]
pub struct Progress {
    /// The last number that was begun on A.
    issued: AtomicU64,
    /// The last number that both disks have acknowledged.
    acked: AtomicU64,
}

/// Writes n to A, waits, writes n to B, waits, and so on; number n goes to slot n modulo [`SLOTS`].
pub fn write_numbers(disks: &mut [Disk; 2], progress: &Progress, stop: &Stop) -> Result<()> {
    for n in 1u64.. {
        if stop.is_due() {
            break;
        }
        let block = n.to_le_bytes().repeat(BLOCK / 8);
        progress.issued.store(n, Ordering::SeqCst);
        for disk in disks.iter_mut() {
            disk.write_at(&block, n % SLOTS * STRIDE)?;
        }
        progress.acked.store(n, Ordering::SeqCst);
    }
    Ok(())
}

impl Progress {
    /// The last number that was begun.
    pub fn issued(&self) -> u64 {
        self.issued.load(Ordering::SeqCst)
    }

    /// The last number that is on both disks.
    pub fn acked(&self) -> u64 {
        self.acked.load(Ordering::SeqCst)
    }

    /// Lets the client write some more numbers.
    pub fn await_writes(&self, more: u64) -> Result<()> {
        let goal = self.acked() + more;
        let deadline = Instant::now() + GIVE_UP;
        while self.acked() < goal {
            ensure!(Instant::now() < deadline, "the writer makes no progress");
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// The numbers in the slots of an image, which has to be of one instant; the last of them.
pub fn last_number(bytes: &[u8]) -> Result<u64> {
    let mut slots = Vec::new();
    for slot in 0..SLOTS {
        let block = &bytes[(slot * STRIDE) as usize..][..BLOCK];
        let words: Vec<u64> =
            block.chunks_exact(8).map(|word| word.try_into().map(u64::from_le_bytes)).collect::<Result<_, _>>()?;
        ensure!(words.iter().all(|word| *word == words[0]), "slot {slot} is torn");
        slots.push(words[0]);
    }
    let last = slots.iter().copied().max().unwrap_or(0);
    for (slot, &found) in (0..SLOTS).zip(&slots) {
        let wanted = last.saturating_sub((last + SLOTS - slot) % SLOTS);
        ensure!(found == wanted, "the last number is {last}, but slot {slot} holds {found}, not {wanted}");
    }
    Ok(last)
}

/// The last numbers of images of A and of B, which have to be of one instant.
pub fn same_instant(a: &[u8], b: &[u8]) -> Result<(u64, u64)> {
    let a = last_number(a).context("disk A")?;
    let b = last_number(b).context("disk B")?;
    ensure!(a >= b && b + 1 >= a, "A is of number {a}, B of {b}");
    Ok((a, b))
}
