//! One worker of a comparison: takes a hand, reads both sides, and notes the blocks that differ.
//!
//! Invariant: what was dealt is compared whole or the comparison fails; a read that failed is tried again or reported, never
//! taken for equal.

use super::deal::{Deal, Hand};
use super::{CHUNK, CompareError, OnError};
use crate::buffer::{AlignedBuffer, is_zero};
use crate::copy::{Action, CopyControl, Pace, RETRY_PAUSE, STEPS_A_SECOND, Side};
use crate::source::Source;
use crate::turns::yield_to_others;
use blkmark_bitmap::{Bits, ByteRange, Granularity};
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What all workers of a comparison share.
pub(super) struct Shared<'a> {
    pub(super) disk: &'a dyn Source,
    pub(super) image: &'a dyn Source,
    pub(super) control: &'a CopyControl,
    pub(super) on_error: OnError<'a>,
    pub(super) deal: Mutex<Deal<'a>>,
    pub(super) pace: Pace<'a>,
    pub(super) found: Mutex<Bits>,
}

impl<'a> Shared<'a> {
    pub(super) fn deal(&self) -> MutexGuard<'_, Deal<'a>> {
        self.deal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn found(&self) -> MutexGuard<'_, Bits> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Works until there is nothing left.
pub(super) fn run(shared: &Shared<'_>) -> Result<(), CompareError> {
    yield_to_others();
    let (mut ours, mut theirs) = (AlignedBuffer::new(CHUNK as usize), AlignedBuffer::new(CHUNK as usize));
    loop {
        let speed = shared.control.admit(0)?;
        let permit = shared.pace.enter();
        // A bounded job goes in small steps, not in rare bursts.
        let most = if speed == 0 { permit.bytes } else { permit.bytes.min(speed / STEPS_A_SECOND) };
        let hand = shared.deal().next(most);
        let result = match hand {
            Hand::Nothing => Ok(()),
            Hand::Equal(range) => {
                shared.control.done(&[range]);
                Ok(())
            }
            Hand::Piece { range, disk_is_hole, image_is_hole } => {
                piece(shared, range, (!disk_is_hole).then_some(&mut *ours), (!image_is_hole).then_some(&mut *theirs))
            }
        };
        shared.pace.leave(permit);
        result?;
        if hand == Hand::Nothing {
            return Ok(());
        }
    }
}

/// Compares one piece; a side without a buffer is a hole.
fn piece(
    shared: &Shared<'_>,
    range: ByteRange,
    ours: Option<&mut [u8]>,
    theirs: Option<&mut [u8]>,
) -> Result<(), CompareError> {
    shared.control.admit(range.len())?;
    let len = range.len() as usize;
    let read = |side, buffer: Option<&mut [u8]>| match buffer {
        None => Ok(()),
        Some(buffer) => {
            let source = if side == Side::Source { shared.disk } else { shared.image };
            insist(shared.control, shared.on_error, side, range.start(), || {
                source.read_at(&mut buffer[..len], range.start())
            })
        }
    };
    let (mut ours, mut theirs) = (ours, theirs);
    read(Side::Source, ours.as_deref_mut())?;
    read(Side::Target, theirs.as_deref_mut())?;
    let (ours, theirs) = (ours.map(|all| &all[..len]), theirs.map(|all| &all[..len]));
    if !equal(ours, theirs, 0..len) {
        let granularity = shared.found().granularity();
        let differ = different(ours, theirs, range, granularity);
        let mut found = shared.found();
        differ.into_iter().for_each(|block| found.set(block));
    }
    shared.control.done(&[range]);
    Ok(())
}

/// Whether both sides hold the same bytes in `part`; a side that is none holds zeroes.
fn equal(ours: Option<&[u8]>, theirs: Option<&[u8]>, part: std::ops::Range<usize>) -> bool {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) => ours[part.clone()] == theirs[part],
        (Some(bytes), None) | (None, Some(bytes)) => is_zero(&bytes[part]),
        (None, None) => true,
    }
}

/// The parts of `range` that differ, block by block, neighbours together.
fn different(ours: Option<&[u8]>, theirs: Option<&[u8]>, range: ByteRange, granularity: Granularity) -> Vec<ByteRange> {
    let mut differ: Vec<ByteRange> = Vec::new();
    for index in granularity.cover(range) {
        let block = granularity.range(index..index + 1, range.end()).intersection(range);
        let (from, to) = ((block.start() - range.start()) as usize, (block.end() - range.start()) as usize);
        if equal(ours, theirs, from..to) {
            continue;
        }
        match differ.last_mut() {
            Some(last) if last.end() == block.start() => *last = ByteRange::between(last.start(), block.end()),
            _ => differ.push(block),
        }
    }
    differ
}

/// Tries until it works or the policy gives up.
pub(super) fn insist<T>(
    control: &CopyControl,
    on_error: OnError<'_>,
    side: Side,
    offset: u64,
    mut attempt: impl FnMut() -> io::Result<T>,
) -> Result<T, CompareError> {
    loop {
        let error = match attempt() {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        match on_error(side, &error) {
            Action::Report if side == Side::Source => return Err(CompareError::Disk { offset, error }),
            Action::Report => return Err(CompareError::Image { offset, error }),
            Action::Retry => control.rest(RETRY_PAUSE),
            Action::Stop => control.pause(),
        }
        control.admit(0)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_differs_marks_its_block_and_no_other() {
        let start = 7 * 65536;
        let range = ByteRange::new(start, 65536 + 100);
        let ours = vec![1; range.len() as usize];
        for (granularity, at) in [(512, 0), (512, 511), (512, 512), (4096, 65535), (4096, 65536), (512, 65635)] {
            let mut theirs = ours.clone();
            theirs[at] = 2;
            let granularity = Granularity::new(granularity).unwrap();
            let cell = granularity
                .range(granularity.index(start + at as u64)..granularity.index(start + at as u64) + 1, range.end());
            assert_eq!(different(Some(&ours), Some(&theirs), range, granularity), [cell]);
        }
        let coarse = Granularity::new(1 << 20).unwrap();
        assert_eq!(different(Some(&ours), None, range, coarse), [range], "a piece of a block is noted as that piece");
        assert_eq!(different(Some(&vec![0; ours.len()]), None, range, coarse), []);
        assert!(equal(None, None, 0..10));
    }
}
