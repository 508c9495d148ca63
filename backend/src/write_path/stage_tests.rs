//! Promise: whatever the kernel answers on the way (short, interrupted, not supported), a request moves all of its bytes to
//! the right place, or fails; it never counts as done before.

use super::stage::{Outcome, Rules, Stage};
use crate::device::request::Kind;
use crate::disk::Operation;
use blkmark_bitmap::ByteRange;
use libc::iovec;
use proptest::prelude::*;

const SIZE: usize = 4 << 20;

/// A disk in memory that does of an operation what `mood` says.
struct Fake {
    bytes: Vec<u8>,
    holes: bool,
    zero_range: bool,
    memory_alignment: usize,
}

impl Fake {
    /// # Safety
    /// The operation's pieces point to live memory.
    unsafe fn carry_out(&mut self, operation: Operation, mood: u8) -> i32 {
        if mood == 0 {
            return -libc::EINTR;
        }
        let mut moved = 0;
        match operation {
            Operation::Read { offset, iovecs, count } | Operation::Write { offset, iovecs, count, .. } => {
                // SAFETY: our caller's promise.
                let pieces = unsafe { std::slice::from_raw_parts(iovecs, count as usize) };
                let total: usize = pieces.iter().map(|piece| piece.iov_len).sum();
                // Short more often than not, and sometimes in the middle of a piece.
                let short = total * usize::from(mood) / 200;
                let unit = self.memory_alignment;
                let limit = if mood < 200 { (short - short % unit).max(unit).min(total) } else { total };
                for piece in pieces {
                    assert!(piece.iov_base.addr().is_multiple_of(self.memory_alignment), "memory as the disk wants it");
                    let n = piece.iov_len.min(limit - moved);
                    let at = offset as usize + moved;
                    // SAFETY: likewise.
                    let memory = unsafe { std::slice::from_raw_parts_mut(piece.iov_base.cast::<u8>(), n) };
                    if matches!(operation, Operation::Read { .. }) {
                        memory.copy_from_slice(&self.bytes[at..at + n]);
                    } else {
                        self.bytes[at..at + n].copy_from_slice(memory);
                    }
                    moved += n;
                }
            }
            Operation::PunchHole { .. } if !self.holes => return -libc::EOPNOTSUPP,
            Operation::ZeroRange { .. } if !self.zero_range => return -libc::EOPNOTSUPP,
            Operation::PunchHole { offset, len } | Operation::ZeroRange { offset, len } => {
                self.bytes[offset as usize..(offset + len) as usize].fill(0);
            }
            Operation::Sync => {}
        }
        moved as i32
    }
}

fn run(stage: &mut Stage, iovecs: &[iovec], disk: &mut Fake, moods: &[u8]) -> Outcome {
    for mood in moods.iter().copied().chain(std::iter::repeat(255)).take(10_000) {
        // SAFETY: the tests keep what the iovecs point to.
        let outcome = unsafe {
            let operation = stage.operation(iovecs);
            let result = disk.carry_out(operation, mood);
            stage.completed(result, iovecs)
        };
        if outcome != Outcome::Again {
            return outcome;
        }
    }
    panic!("no end");
}

fn rules(memory_alignment: u32) -> Rules {
    Rules { memory_alignment, write_through: false }
}

/// Cuts `memory` into pieces at `cuts`, beginning `skew` bytes in.
fn pieces(memory: &mut [u8], cuts: &[usize]) -> Vec<iovec> {
    let mut rest = memory;
    let mut pieces = Vec::new();
    for cut in cuts {
        let (now, later) = rest.split_at_mut((*cut).min(rest.len()));
        pieces.push(iovec { iov_base: now.as_mut_ptr().cast(), iov_len: now.len() });
        rest = later;
    }
    pieces.push(iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
    pieces.retain(|piece| piece.iov_len > 0);
    pieces
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 7) as u8 ^ (i >> 9) as u8 ^ seed | 1).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_byte_arrives_whatever_the_kernel_answers(
        write: bool, direct: bool, offset in 0usize..2000, sectors in 1usize..2000, skew in 0usize..3,
        cuts in prop::collection::vec(1usize..300_000, 0..5), moods in prop::collection::vec(0u8..=255, 0..40),
    ) {
        let (offset, len) = (offset * 512, sectors * 512);
        let memory_alignment = if direct { 512 } else { 1 };
        let mut disk = Fake { bytes: pattern(SIZE, 3), holes: true, zero_range: true, memory_alignment };
        let before = disk.bytes.clone();
        let mut memory = pattern(len + 2, 8);
        let sent = memory[skew.min(2)..][..len].to_vec();
        let iovecs = pieces(&mut memory[skew.min(2)..][..len], &cuts);
        let kind = if write { Kind::Write } else { Kind::Read };
        let mut stage = Stage::idle();
        stage.begin(kind, ByteRange::new(offset as u64, len as u64), &iovecs, rules(memory_alignment as u32));
        prop_assert_eq!(run(&mut stage, &iovecs, &mut disk, &moods), Outcome::Done);
        let got = &memory[skew.min(2)..][..len];
        if write {
            prop_assert!(disk.bytes[offset..offset + len] == sent);
            disk.bytes[offset..offset + len].copy_from_slice(&before[offset..offset + len]);
        } else {
            prop_assert!(got == &before[offset..offset + len]);
        }
        prop_assert!(disk.bytes == before, "a byte outside of the request changed");
    }

    #[test]
    fn zeroes_are_zeroes_on_every_file_system(
        unmap: bool, holes: bool, zero_range: bool, offset in 0usize..2000, sectors in 1usize..5000,
        moods in prop::collection::vec(0u8..=255, 0..20),
    ) {
        let (offset, len) = (offset * 512, sectors * 512);
        let mut disk = Fake { bytes: pattern(SIZE, 3), holes, zero_range, memory_alignment: 512 };
        let before = disk.bytes.clone();
        let mut stage = Stage::idle();
        stage.begin(Kind::WriteZeroes { unmap }, ByteRange::new(offset as u64, len as u64), &[], rules(512));
        prop_assert_eq!(run(&mut stage, &[], &mut disk, &moods), Outcome::Done);
        prop_assert!(disk.bytes[offset..offset + len].iter().all(|byte| *byte == 0));
        disk.bytes[offset..offset + len].copy_from_slice(&before[offset..offset + len]);
        prop_assert!(disk.bytes == before);
    }
}

#[test]
fn errors_and_a_disk_that_ends_too_soon_fail_the_request() {
    let mut memory = vec![0u8; 4096];
    let iovecs = pieces(&mut memory, &[]);
    for kind in [Kind::Read, Kind::Write] {
        for (result, errno) in [(-libc::EIO, libc::EIO), (-libc::ENOSPC, libc::ENOSPC), (0, libc::EIO)] {
            let mut stage = Stage::idle();
            stage.begin(kind, ByteRange::new(0, 4096), &iovecs, rules(1));
            // SAFETY: nothing is carried out.
            let outcome = unsafe {
                stage.operation(&iovecs);
                stage.completed(result, &iovecs)
            };
            assert_eq!(outcome, Outcome::Failed(errno));
        }
    }
}

#[test]
fn a_discard_is_a_hint() {
    let mut disk = Fake { bytes: vec![1; 8192], holes: false, zero_range: false, memory_alignment: 1 };
    let mut stage = Stage::idle();
    stage.begin(Kind::Discard, ByteRange::new(0, 8192), &[], rules(1));
    assert_eq!(run(&mut stage, &[], &mut disk, &[]), Outcome::Done);
}

/// A guest that cannot flush takes an answer for durable.
#[test]
fn without_flush_an_answer_means_durable() {
    let mut memory = vec![0u8; 4096];
    let iovecs = pieces(&mut memory, &[]);
    let rules = Rules { memory_alignment: 1, write_through: true };
    let mut stage = Stage::idle();
    stage.begin(Kind::Write, ByteRange::new(0, 4096), &iovecs, rules);
    // SAFETY: nothing is carried out.
    let operation = unsafe { stage.operation(&iovecs) };
    assert!(matches!(operation, Operation::Write { durable: true, .. }));
    for kind in [Kind::Discard, Kind::WriteZeroes { unmap: true }, Kind::WriteZeroes { unmap: false }] {
        stage.begin(kind, ByteRange::new(0, 4096), &[], rules);
        // SAFETY: nothing is carried out.
        unsafe {
            assert!(!matches!(stage.operation(&[]), Operation::Sync));
            assert_eq!(stage.completed(0, &[]), Outcome::Again);
            assert!(matches!(stage.operation(&[]), Operation::Sync));
            assert_eq!(stage.completed(0, &[]), Outcome::Done);
        }
    }
}
