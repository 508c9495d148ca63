//! Reading a point for a job: each cluster once, in any order, and what of it the point then need not keep any more.
//!
//! Called by the copy engine, and by jobs that follow the guest's writes. The order is disk, then index, as the header of `point`
//! argues; what is read of a point that is kept, or that outlives the process, is not settled here.

use super::{Point, PointError};
use crate::cbw::{Saved, State};
use crate::pulse::Pulse;
use crate::source::{BlockStatus, Source};
use blkmark_bitmap::ByteRange;
use blkmark_bitmap::sync::{MutexGuard, lock};
use std::io;
use std::sync::Arc;

impl Point {
    pub(super) fn wait_for_pre_cut(&self, range: ByteRange) {
        let pre_cut = lock(&self.owner().pre_cut).clone();
        if let Some(pre_cut) = pre_cut {
            pre_cut.wait(range);
        }
    }

    pub(super) fn units(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        let (unit, size) = (self.cbw.unit(), self.size());
        unit.cover(range).map(move |index| unit.range(index..index + 1, size))
    }

    /// Reads `range`, which consists of whole wanted clusters, as of the point in time. Unless the point is kept, what was
    /// read is the caller's from then on; if some of it cannot be read, the point gives up none of it, so it can be tried again.
    /// Several readers at a time take disjoint ranges.
    pub fn take(&self, range: ByteRange, buf: &mut [u8]) -> Result<(), PointError> {
        self.wait_for_pre_cut(range);
        let mut at = range.start();
        while at < range.end() {
            // What is saved already needs no look at the disk; the rest is read in as large pieces as there are.
            let (from_scratch, end) = {
                let state = self.readable()?;
                let index = &state.points[&self.face.key].index;
                let first_saved = index.range(at..range.end()).next().map(|(start, _)| *start);
                if first_saved == Some(at) {
                    let ahead = ByteRange::between(at, range.end());
                    let gap = self.units(ahead).find(|unit| !index.contains_key(&unit.start()));
                    (true, gap.map_or(range.end(), |unit| unit.start()))
                } else {
                    (false, first_saved.unwrap_or(range.end()))
                }
            };
            let piece = ByteRange::between(at, end);
            let part = &mut buf[(at - range.start()) as usize..(end - range.start()) as usize];
            if !from_scratch {
                self.node
                    .source
                    .read_at(part, at)
                    .map_err(|error| PointError::Source { offset: at, error: Arc::new(error) })?;
            }
            for (unit, saved) in self.saved_in(piece)? {
                let part = &mut part[(unit.start() - at) as usize..(unit.end() - at) as usize];
                match &saved {
                    None => part.fill(0),
                    Some(block) => block.load(part).map_err(|error| PointError::Scratch(Arc::new(error)))?,
                }
            }
            at = end;
        }
        if !self.waits_for_release() {
            for (unit, _) in self.settle_read(range)? {
                self.forget(unit);
            }
        }
        Ok(())
    }

    /// What of `piece` is kept at this moment: behind a read of the disk, what was read of it does not count.
    fn saved_in(&self, piece: ByteRange) -> Result<Vec<(ByteRange, Saved)>, PointError> {
        let state = self.readable()?;
        let saved = state.points[&self.face.key].index.range(piece.start()..piece.end());
        let (unit, size) = (self.cbw.unit(), self.size());
        let range = |start: u64| unit.range(unit.index(start)..unit.index(start) + 1, size);
        Ok(saved.map(|(start, block)| (range(*start), block.clone())).collect())
    }

    /// Lets `carry` bring what the disk holds of `range`, which consists of whole wanted clusters, to where the caller wants it;
    /// it answers whether it has. What was carried is as of the point in time, except for the units in the answer: a guest's
    /// write may have come before they were carried, so what was carried of them is to be thrown away and taken with
    /// [`Point::take`]. `None` if nothing was carried, or nothing of it counts.
    ///
    /// The order is that of `take`, with the same argument. A write to a unit that the point needs is submitted only after the unit
    /// is in the index or settled, and only a reader of this range or a saver settles it. So if the unit is not in the index behind
    /// the carrying, nothing was written to it before that look, and the disk held its value all the time. Whether the carrier
    /// copies bytes or shares blocks makes no difference: it is over when it answers, and writes that come later do not reach what
    /// it has made.
    pub fn carry(
        &self,
        range: ByteRange,
        carry: impl FnOnce(&dyn Source) -> bool,
    ) -> Result<Option<Vec<ByteRange>>, PointError> {
        self.wait_for_pre_cut(range);
        {
            // To carry what is in scratch already is of no use.
            let state = self.readable()?;
            if state.points[&self.face.key].index.range(range.start()..range.end()).next().is_some() {
                return Ok(None);
            }
        }
        if !carry(&*self.node.source) {
            return Ok(None);
        }
        let saved = self.settle_read(range)?;
        Ok(Some(saved.into_iter().map(|(unit, _)| unit).collect()))
    }

    /// The state, if the point is whole and in the books.
    pub(super) fn readable(&self) -> Result<MutexGuard<'_, State>, PointError> {
        let state = self.cbw.state();
        match state.points.get(&self.face.key) {
            Some(kept) => match &kept.broken {
                Some(broken) => Err(PointError::Broken(Arc::clone(broken))),
                None => Ok(state),
            },
            None => unreachable!("a point is read between its beginning and its drop"),
        }
    }

    /// The second look at the index, behind a read of `piece`: what is in it is answered and counts, the rest is settled,
    /// except for what a saver is reading, and unless the point is kept.
    fn settle_read(&self, piece: ByteRange) -> Result<Vec<(ByteRange, Saved)>, PointError> {
        let state = self.readable()?;
        let index = &state.points[&self.face.key].index;
        if index.range(piece.start()..piece.end()).next().is_none() && !state.is_saving(piece) {
            // The usual case: nobody has overwritten any of it, and nobody is about to.
            if !self.waits_for_release() {
                self.face.settle(piece);
            }
            return Ok(Vec::new());
        }
        let mut saved = Vec::new();
        for unit in self.units(piece) {
            match index.get(&unit.start()) {
                Some(block) => saved.push((unit, block.clone())),
                None if self.waits_for_release() || state.is_saving(unit) => {}
                None => self.face.settle(unit),
            }
        }
        Ok(saved)
    }

    fn forget(&self, unit: ByteRange) {
        let mut state = self.cbw.state();
        let block = state.points.get_mut(&self.face.key).and_then(|kept| kept.index.remove(&unit.start()));
        drop(state);
        // Gives its space back, without the lock.
        drop(block);
    }

    /// How many of the bytes of `range`, which begins at a cluster and consists of wanted ones, were a hole at the
    /// point in time: whole units from its start, taken as if they had been read. 0 if the first must be read.
    pub fn take_hole(&self, range: ByteRange) -> Result<u64, PointError> {
        self.wait_for_pre_cut(range);
        let (status, len) = self
            .node
            .source
            .block_status(range.start(), range.len())
            .map_err(|error| PointError::Source { offset: range.start(), error: Arc::new(error) })?;
        let end = (range.start() + len).min(range.end());
        // Whole clusters only, the last one of the disk counts as whole.
        let end = if end == self.size() { end } else { end & !(self.cluster.bytes() - 1) };
        if status == BlockStatus::Data || end <= range.start() {
            return Ok(0);
        }
        let state = self.readable()?;
        let hole = ByteRange::between(range.start(), end);
        let index = &state.points[&self.face.key].index;
        let saved = index.range(hole.start()..hole.end()).next().map(|(start, _)| *start);
        let end = [Some(end), saved, state.first_saving(hole)].into_iter().flatten().min().unwrap_or(end);
        let end = if end == self.size() { end } else { end & !(self.cluster.bytes() - 1) };
        if !self.waits_for_release() {
            self.face.settle(ByteRange::between(range.start(), end));
        }
        Ok(end.saturating_sub(range.start()))
    }

    /// The next unit that was saved, in order of offset, for a job that copies nothing else (sync=none). Waits until
    /// there is one; `None` once the point has ended and all are taken.
    pub fn next_saved(&self) -> Result<Option<ByteRange>, PointError> {
        let mut state = self.readable()?;
        loop {
            let kept = &state.points[&self.face.key];
            if let Some((&start, _)) = kept.index.first_key_value() {
                let unit = self.cbw.unit();
                let index = unit.index(start);
                return Ok(Some(unit.range(index..index + 1, self.size())));
            }
            if kept.ended {
                return Ok(None);
            }
            if let Some(broken) = &kept.broken {
                return Err(PointError::Broken(Arc::clone(broken)));
            }
            state = self.cbw.saved.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}

/// What the copy engine asks besides.
impl Point {
    /// What the disk says of the beginning of `range` at this moment: a hint on how to go about it, no more.
    pub fn status(&self, range: ByteRange) -> io::Result<(BlockStatus, u64)> {
        self.node.source.block_status(range.start(), range.len())
    }

    /// How the guest of the disk fares.
    pub fn pulse(&self) -> Option<&Pulse> {
        self.node.source.pulse()
    }
}
