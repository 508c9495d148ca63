//! Deals what is left of a plan out to the workers: large pieces of long runs, bundles of short ones, holes whole.
//!
//! Where a run is long, it asks the disk where its holes are, once an extent and not once a piece. What it is told is a
//! hint that says how to go about a piece: a hole is looked at again when it is taken, data that is none by then is read
//! as zeroes.

use crate::point::Point;
use crate::source::BlockStatus;
use blkmark_bitmap::{Bits, ByteRange};

/// Runs shorter than this are read without asking whether they are holes: reading them is as cheap.
const WORTH_ASKING: u64 = 256 << 10;

/// What a worker is dealt.
pub(super) enum Hand {
    /// Pieces to be copied, in the caller's list.
    Data,
    /// Probably nothing but a hole, of any size.
    Hole(ByteRange),
    /// There is nothing left.
    Nothing,
}

/// What is left of a plan.
pub(super) struct Deal<'a> {
    point: &'a Point,
    runs: Box<dyn Iterator<Item = ByteRange> + Send + 'a>,
    rest: ByteRange,
    /// Up to here the disk has said that there is data.
    data_until: u64,
    /// Where long pieces end, so that others begin there: at its multiples. At least a cluster.
    stride: u64,
}

impl<'a> Deal<'a> {
    pub(super) fn new(point: &'a Point, plan: &'a Bits, stride: u64) -> Self {
        let stride = stride.max(point.cluster().bytes());
        Self { point, runs: Box::new(plan.runs()), rest: ByteRange::default(), data_until: 0, stride }
    }

    /// Nobody gets anything any more.
    pub(super) fn close(&mut self) {
        self.runs = Box::new(std::iter::empty());
        self.rest = ByteRange::default();
    }

    /// Fills `pieces` with at most `most` bytes (at least a cluster) in `count` pieces, or names a hole.
    pub(super) fn next(&mut self, most: u64, count: usize, pieces: &mut Vec<ByteRange>) -> Hand {
        pieces.clear();
        let mut room = self.whole(most).max(self.point.cluster().bytes());
        while pieces.len() < count {
            if self.rest.is_empty() {
                match self.runs.next() {
                    Some(run) => self.rest = run,
                    None => break,
                }
            }
            if self.rest.start() >= self.data_until && self.rest.len() >= WORTH_ASKING {
                if !pieces.is_empty() {
                    break;
                }
                if let Some(hole) = self.ask() {
                    self.rest = ByteRange::between(hole.end(), self.rest.end());
                    return Hand::Hole(hole);
                }
            }
            let mut len = self.rest.len().min(room);
            if self.rest.len() >= WORTH_ASKING {
                // Known data only, so that what follows is asked for.
                len = len.min(self.data_until - self.rest.start());
            }
            if len == 0 {
                break;
            }
            let beyond = if len >= self.stride { (self.rest.start() + len) % self.stride } else { 0 };
            len -= beyond;
            pieces.push(ByteRange::new(self.rest.start(), len));
            self.rest = ByteRange::between(self.rest.start() + len, self.rest.end());
            if beyond > 0 {
                // What follows begins where the target likes it to, with all of the next hand.
                break;
            }
            room -= len;
        }
        if pieces.is_empty() { Hand::Nothing } else { Hand::Data }
    }

    /// Asks about the beginning of the rest: the whole clusters of a hole there, or `None` and at least one cluster of
    /// data.
    fn ask(&mut self) -> Option<ByteRange> {
        let (start, end) = (self.rest.start(), self.rest.end());
        let cluster = self.point.cluster().bytes();
        let until = match self.point.status(self.rest) {
            Ok((BlockStatus::Hole, len)) => {
                let until = start + len.min(end - start);
                let until = if until == end { end } else { start + self.whole(until - start) };
                if until > start {
                    return Some(ByteRange::between(start, until));
                }
                start + cluster
            }
            Ok((BlockStatus::Data, len)) => start.saturating_add(len.div_ceil(cluster).saturating_mul(cluster)),
            // Whoever reads it will see what is wrong with it.
            Err(_) => end,
        };
        self.data_until = until.min(end);
        None
    }

    fn whole(&self, len: u64) -> u64 {
        len & !(self.point.cluster().bytes() - 1)
    }
}

#[cfg(test)]
mod tests;
