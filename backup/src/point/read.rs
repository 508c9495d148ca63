//! Reading a kept point as if it were a disk: any range, any number of times, by many at once, and what of it was a hole.
//!
//! Used by exports and comparisons through [`PointSource`]. The order is that of
//! `take`: the disk first, then the index, for whoever is in the index had a write behind it that may have come meanwhile. And
//! the point is looked at after each read: one that broke in between is an error, never the disk of today.

use super::{Point, PointError};
use crate::buffer::AlignedBuffer;
use crate::pulse::Pulse;
use crate::source::{BlockStatus, FileId, Source};
use blkmark_bitmap::ByteRange;
use std::fmt;
use std::io;
use std::sync::Arc;

/// Most units of the index that one question for the status walks over, since nobody else gets at it meanwhile.
const UNITS_WALKED: usize = 4096;

/// What a point costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PointCost {
    /// Bytes of the disk, in whole units, that were overwritten since and are kept.
    pub overwritten: u64,
    /// Bytes of scratch that these take; what was zero takes none.
    pub scratch: u64,
}

impl Point {
    /// What it costs at this moment.
    pub fn cost(&self) -> PointCost {
        let state = self.cbw.state();
        let unit = self.cbw.unit().bytes();
        match state.points.get(&self.face.key) {
            Some(kept) if kept.broken.is_none() => {
                PointCost { overwritten: kept.index.len() as u64 * unit, scratch: kept.blocks * unit }
            }
            _ => PointCost::default(),
        }
    }

    /// Fills `buf` with what stood at `offset` at the instant. The point must be kept.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), PointError> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let unit = self.cbw.unit();
        let mask = unit.bytes() - 1;
        // The whole units in the middle at once, and the pieces at both ends by themselves.
        let first = (range.start() + mask) & !mask;
        let last = if range.end() == self.size() { range.end() } else { range.end() & !mask };
        if first >= last {
            let mut at = range.start();
            while at < range.end() {
                let end = ((at | mask) + 1).min(range.end());
                let part = &mut buf[(at - offset) as usize..(end - offset) as usize];
                self.read_within_unit(ByteRange::between(at, end), part)?;
                at = end;
            }
            return Ok(());
        }
        let (head, rest) = buf.split_at_mut((first - offset) as usize);
        let (middle, tail) = rest.split_at_mut((last - first) as usize);
        if !head.is_empty() {
            self.read_within_unit(ByteRange::between(offset, first), head)?;
        }
        self.take(ByteRange::between(first, last), middle)?;
        if !tail.is_empty() {
            self.read_within_unit(ByteRange::between(last, range.end()), tail)?;
        }
        Ok(())
    }

    fn read_within_unit(&self, range: ByteRange, buf: &mut [u8]) -> Result<(), PointError> {
        let unit = self.cbw.unit();
        let index = unit.index(range.start());
        let whole = unit.range(index..index + 1, self.size());
        self.wait_for_pre_cut(range);
        let look = || Ok::<_, PointError>(self.readable()?.points[&self.face.key].index.get(&whole.start()).cloned());
        let mut saved = look()?;
        if saved.is_none() {
            self.node
                .source
                .read_at(buf, range.start())
                .map_err(|error| PointError::Source { offset: range.start(), error: Arc::new(error) })?;
            saved = look()?;
        }
        match saved {
            None => {}
            Some(None) => buf.fill(0),
            Some(Some(block)) => {
                let mut old = AlignedBuffer::new(whole.len() as usize);
                let old = &mut old[..whole.len() as usize];
                block.load(old).map_err(|error| PointError::Scratch(Arc::new(error)))?;
                let skip = (range.start() - whole.start()) as usize;
                buf.copy_from_slice(&old[skip..skip + buf.len()]);
            }
        }
        Ok(())
    }

    /// What stood at the beginning of `range` at the instant, and for how many bytes, at least one. The point must be kept.
    pub fn status_then(&self, range: ByteRange) -> Result<(BlockStatus, u64), PointError> {
        self.wait_for_pre_cut(range);
        loop {
            if let Some(saved) = self.status_saved(range)? {
                return Ok(saved);
            }
            let (status, len) = self
                .node
                .source
                .block_status(range.start(), range.len())
                .map_err(|error| PointError::Source { offset: range.start(), error: Arc::new(error) })?;
            let now = ByteRange::new(range.start(), len.clamp(1, range.len().max(1)));
            let unit = self.cbw.unit();
            let first = unit.range(unit.cover(now), self.size()).start();
            let state = self.readable()?;
            let saved = state.points[&self.face.key].index.range(first..now.end()).next().map(|(start, _)| *start);
            match saved {
                // Whatever stands there now has come since, perhaps before the question.
                Some(start) if start <= now.start() => {}
                Some(start) => return Ok((status, start - now.start())),
                None => return Ok((status, now.len())),
            }
        }
    }

    /// The same from the index, if the first unit is in it.
    fn status_saved(&self, range: ByteRange) -> Result<Option<(BlockStatus, u64)>, PointError> {
        let unit = self.cbw.unit();
        let first = unit.range(unit.cover(ByteRange::new(range.start(), 1)), self.size()).start();
        let state = self.readable()?;
        let mut saved = state.points[&self.face.key].index.range(first..range.end()).take(UNITS_WALKED);
        let Some((&start, block)) = saved.next().filter(|(start, _)| **start == first) else { return Ok(None) };
        let is_zero = block.is_none();
        let mut end = start + unit.bytes();
        for (&start, block) in saved {
            if start != end || block.is_none() != is_zero {
                break;
            }
            end += unit.bytes();
        }
        let status = if is_zero { BlockStatus::Hole } else { BlockStatus::Data };
        Ok(Some((status, end.min(range.end()) - range.start())))
    }
}

/// A kept point as a disk that does not change.
pub struct PointSource(Arc<Point>);

impl PointSource {
    /// Reads `point`, which must be kept.
    pub fn new(point: Arc<Point>) -> Self {
        debug_assert!(point.keep, "only a kept point can be read again");
        Self(point)
    }
}

fn io_error(error: PointError) -> io::Error {
    match &error {
        PointError::Source { error, .. } if error.raw_os_error().is_some() => {
            io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
        }
        _ => io::Error::other(error),
    }
}

impl Source for PointSource {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn alignment(&self) -> u32 {
        self.0.node.source.alignment()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read(buf, offset).map_err(io_error)
    }

    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        let limit = limit.min(self.size().saturating_sub(offset)).max(1);
        self.0.status_then(ByteRange::new(offset, limit)).map_err(io_error)
    }

    fn file_id(&self) -> Option<FileId> {
        self.0.node.source.file_id()
    }

    fn pulse(&self) -> Option<&Pulse> {
        self.0.node.source.pulse()
    }
}

impl fmt::Debug for PointSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PointSource").field(&self.0).finish()
    }
}
