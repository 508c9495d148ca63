//! Deals a plan out to the workers, in order: pieces to be read, and holes of both sides whole.
//!
//! Each side is asked where its holes are, once an extent and not once a piece. What the disk calls a hole read as zeroes at
//! that moment; if the guest has filled it since, it was recorded.

use super::UNIT;
use crate::source::{BlockStatus, Source};
use blkmark_bitmap::{Bits, ByteRange};

/// Data shorter than this is read together with what follows: asking and reading again costs more.
const WORTH_ASKING: u64 = 256 << 10;

/// What a worker is dealt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hand {
    /// To be read, but for a side that is known to be a hole.
    Piece { range: ByteRange, disk_is_hole: bool, image_is_hole: bool },
    /// Holes on both sides, of any length.
    Equal(ByteRange),
    /// There is nothing left.
    Nothing,
}

/// What one side said last.
struct Side<'a> {
    source: &'a dyn Source,
    is_hole: bool,
    until: u64,
}

impl<'a> Side<'a> {
    fn new(source: &'a dyn Source) -> Self {
        Self { source, is_hole: false, until: 0 }
    }

    /// Asks about what begins at `at`, unless it is known.
    fn look(&mut self, at: u64, end: u64) {
        if at < self.until {
            return;
        }
        let (is_hole, until) = match self.source.block_status(at, end - at) {
            Ok((BlockStatus::Hole, len)) if at.saturating_add(len) >= end => (true, end),
            Ok((BlockStatus::Hole, len)) if len >= UNIT.bytes() => (true, at + whole(len)),
            // A hole of less than a piece.
            Ok((BlockStatus::Hole, _)) => (false, at + UNIT.bytes()),
            Ok((BlockStatus::Data, len)) => {
                (false, at.saturating_add(len.max(1).checked_next_multiple_of(UNIT.bytes()).unwrap_or(u64::MAX)))
            }
            // Whoever reads it will see what is wrong with it.
            Err(_) => (false, end),
        };
        (self.is_hole, self.until) = (is_hole, until.min(end));
    }

    /// How far a piece from `at` on may go.
    fn reach(&self, at: u64) -> u64 {
        let known = self.until - at;
        if self.is_hole { known } else { known.max(WORTH_ASKING) }
    }
}

fn whole(len: u64) -> u64 {
    len & !(UNIT.bytes() - 1)
}

/// What is left of a plan.
pub(super) struct Deal<'a> {
    disk: Side<'a>,
    image: Side<'a>,
    runs: Box<dyn Iterator<Item = ByteRange> + Send + 'a>,
    rest: ByteRange,
}

impl<'a> Deal<'a> {
    /// Of a plan whose granularity is a multiple of `UNIT`.
    pub(super) fn new(disk: &'a dyn Source, image: &'a dyn Source, plan: &'a Bits) -> Self {
        Self { disk: Side::new(disk), image: Side::new(image), runs: Box::new(plan.runs()), rest: ByteRange::default() }
    }

    /// Nobody gets anything any more.
    pub(super) fn close(&mut self) {
        self.runs = Box::new(std::iter::empty());
        self.rest = ByteRange::default();
    }

    /// A piece of at most `most` bytes (at least a unit), or a hole.
    pub(super) fn next(&mut self, most: u64) -> Hand {
        if self.rest.is_empty() {
            match self.runs.next() {
                Some(run) => self.rest = run,
                None => return Hand::Nothing,
            }
        }
        let (at, end) = (self.rest.start(), self.rest.end());
        self.disk.look(at, end);
        self.image.look(at, end);
        let (disk_is_hole, image_is_hole) = (self.disk.is_hole, self.image.is_hole);
        let reach = self.disk.reach(at).min(self.image.reach(at)).min(end - at);
        let len = if disk_is_hole && image_is_hole { reach } else { reach.min(whole(most).max(UNIT.bytes())) };
        let range = ByteRange::new(at, len);
        self.rest = ByteRange::between(range.end(), end);
        match (disk_is_hole, image_is_hole) {
            (true, true) => Hand::Equal(range),
            _ => Hand::Piece { range, disk_is_hole, image_is_hole },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FileId;
    use std::io;

    /// Data where the runs say, holes elsewhere; a unit is 64 KiB.
    struct Map(u64, Vec<ByteRange>);

    impl Source for Map {
        fn size(&self) -> u64 {
            self.0
        }
        fn alignment(&self) -> u32 {
            4096
        }
        fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
            Ok(())
        }
        fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
            let inside = self.1.iter().find(|run| (run.start()..run.end()).contains(&offset));
            Ok(match inside {
                Some(run) => (BlockStatus::Data, limit.min(run.end() - offset)),
                None => {
                    let next = self.1.iter().map(|run| run.start()).filter(|start| *start > offset).min();
                    (BlockStatus::Hole, limit.min(next.unwrap_or(self.0) - offset))
                }
            })
        }
        fn file_id(&self) -> Option<FileId> {
            None
        }
    }

    fn map(units: u64, tail: u64, data: &[(u64, u64)]) -> Map {
        let unit = UNIT.bytes();
        Map(units * unit + tail, data.iter().map(|(from, to)| ByteRange::between(from * unit, to * unit)).collect())
    }

    #[test]
    fn every_byte_of_the_plan_is_dealt_once_and_nothing_that_may_differ_is_skipped() {
        let (units, tail) = (400, 512);
        let disk = map(units, tail, &[(10, 11), (40, 90), (200, 201), (399, 401)]);
        let image = map(units, tail, &[(0, 3), (50, 60), (100, 150)]);
        for most in [1, UNIT.bytes(), 1 << 20] {
            let mut plan = Bits::full(UNIT, disk.size());
            plan.clear(ByteRange::new(20 * UNIT.bytes(), 25 * UNIT.bytes()));
            let mut deal = Deal::new(&disk, &image, &plan);
            let mut dealt = Vec::new();
            loop {
                let (range, holes) = match deal.next(most) {
                    Hand::Nothing => break,
                    Hand::Equal(range) => (range, (true, true)),
                    Hand::Piece { range, disk_is_hole, image_is_hole } => (range, (disk_is_hole, image_is_hole)),
                };
                assert!(range.start().is_multiple_of(UNIT.bytes()) && !range.is_empty());
                assert!(holes == (true, true) || range.len() <= most.max(UNIT.bytes()));
                assert!(!holes.0 || !disk.1.iter().any(|data| data.intersects(range)), "{range:?} of the disk");
                assert!(!holes.1 || !image.1.iter().any(|data| data.intersects(range)), "{range:?} of the image");
                dealt.push(range);
            }
            let mut left = plan.clone();
            for range in &dealt {
                left.clear(*range);
            }
            assert!(left.is_empty());
            assert!(dealt.windows(2).all(|pair| pair[0].end() <= pair[1].start()), "in order, none twice");
            let total: u64 = plan.runs().map(|run| run.len()).sum();
            assert_eq!(dealt.iter().map(|range| range.len()).sum::<u64>(), total);
        }
    }
}
