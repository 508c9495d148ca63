//! One worker of a copy: takes a hand, reads it as of the point, finds out what of it is zero, and writes.
//!
//! Invariant: what is taken from the point gets to the target or is reported as not copied; so pause and speed are asked
//! about before the point is touched.

use super::control::CopyControl;
use super::deal::{Deal, Hand};
use super::pace::Pace;
use super::{Action, CopyError, IN_A_ROW, LONG, RETRY_PAUSE, Side};
use crate::buffer::{AlignedBuffer, is_zero};
use crate::point::{Point, PointError};
use crate::source::Source;
use crate::target::Target;
use crate::turns::yield_to_others;
use blkmark_bitmap::ByteRange;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Most runs in a hand: a worker that is told to stop finishes its hand first.
const HAND: usize = 64;

/// It is noted now and then what the target holds, so that another process could go on: a target that holds things back (a qcow2 its
/// tables, an NBD server what it has not flushed) brings them out, and the point lets go. So much longer than that takes it does
/// something else.
const SELDOM: u32 = 8;

/// Steps of a copy whose speed is bounded, if clusters are small enough.
pub(crate) const STEPS_A_SECOND: u64 = 10;

/// What the target holds where it is about to be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Below {
    /// What it held when the copy began.
    Untouched,
    /// Perhaps something newer than the point in time, which it has taken from the disk.
    Unknown,
}

/// What all workers of a copy share.
pub(super) struct Shared<'a> {
    pub(super) point: &'a Point,
    pub(super) target: &'a dyn Target,
    pub(super) control: &'a CopyControl,
    pub(super) on_error: &'a (dyn Fn(Side, &io::Error) -> Action + Sync),
    pub(super) deal: Mutex<Deal<'a>>,
    pub(super) pace: Pace<'a>,
    /// Bytes of the largest hand.
    pub(super) chunk: u64,
    /// What is in the target and not yet released, and until when that may wait.
    pub(super) unreleased: Mutex<(Vec<ByteRange>, Instant)>,
}

impl<'a> Shared<'a> {
    pub(super) fn deal(&self) -> MutexGuard<'_, Deal<'a>> {
        self.deal.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// These are in the target. Once a killed process would take nothing of them away, the point need not keep them. It hears of
    /// that in batches: to write each block down by itself costs about as much as to copy it.
    fn release(&self, done: &[ByteRange]) {
        if !self.point.is_released() {
            return;
        }
        let ranges = {
            let mut unreleased = self.unreleased.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            unreleased.0.extend_from_slice(done);
            let now = Instant::now();
            if now < unreleased.1 {
                return;
            }
            unreleased.1 = now + self.target.noted_every();
            std::mem::take(&mut unreleased.0)
        };
        // Only what was written before it.
        let began = Instant::now();
        let noted = self.target.note_down();
        let next = Instant::now() + began.elapsed() * SELDOM;
        let mut unreleased = self.unreleased.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        unreleased.1 = unreleased.1.max(next);
        drop(unreleased);
        match noted {
            Ok(()) => self.point.release(&ranges),
            // The point keeps it for longer; the next write, or the end, meets the error.
            Err(error) => tracing::debug!(%error, "a target could not be noted down"),
        }
    }
}

/// One worker.
pub(super) struct Worker<'w, 'a> {
    shared: &'w Shared<'a>,
    buffer: AlignedBuffer,
    /// What is in the target and not yet reported.
    done: Vec<ByteRange>,
    /// How many of its last pieces took long, one after the other.
    long: u32,
}

impl<'w, 'a> Worker<'w, 'a> {
    pub(super) fn new(shared: &'w Shared<'a>) -> Self {
        Self { shared, buffer: AlignedBuffer::new(shared.chunk as usize), done: Vec::new(), long: 0 }
    }

    /// Works until there is nothing left. Calls `hire` where more hands would help.
    pub(super) fn run(&mut self, hire: &dyn Fn()) -> Result<(), CopyError> {
        yield_to_others();
        let mut pieces = Vec::new();
        loop {
            let speed = self.shared.control.admit(0)?;
            let permit = self.shared.pace.enter();
            let hand = match speed {
                0 => self.shared.deal().next(permit.bytes, HAND, &mut pieces),
                // A bounded copy goes in small steps, not in rare bursts.
                speed => self.shared.deal().next(permit.bytes.min(speed / STEPS_A_SECOND), 1, &mut pieces),
            };
            let result = match hand {
                Hand::Nothing => Ok(()),
                Hand::Hole(hole) => self.hole(hole),
                Hand::Data => self.pieces(&pieces, hire),
            };
            self.report();
            self.shared.pace.leave(permit);
            result?;
            if matches!(hand, Hand::Nothing) {
                return Ok(());
            }
        }
    }

    fn report(&mut self) {
        if !self.done.is_empty() {
            self.shared.release(&self.done);
            self.shared.control.done(&self.done);
            self.done.clear();
        }
    }

    fn pieces(&mut self, pieces: &[ByteRange], hire: &dyn Fn()) -> Result<(), CopyError> {
        self.shared.control.admit(pieces.iter().map(|piece| piece.len()).sum())?;
        if self.shared.target.writes_in_turns() && !self.shared.control.is_sharing() {
            return self.bundle(pieces, hire);
        }
        for piece in pieces {
            let began = Instant::now();
            self.copy(*piece)?;
            self.took(began.elapsed(), hire);
        }
        Ok(())
    }

    fn took(&mut self, time: Duration, hire: &dyn Fn()) {
        self.long = if time > LONG { self.long + 1 } else { 0 };
        if self.long >= IN_A_ROW {
            hire();
        }
    }

    /// Reads all pieces, then writes them in one turn, while another worker reads. If each were written by itself, two workers would
    /// be in each other's way at every one of them, and one of them asleep most of the time.
    fn bundle(&mut self, pieces: &[ByteRange], hire: &dyn Fn()) -> Result<(), CopyError> {
        let mut read = 0;
        for (at, piece) in pieces.iter().enumerate() {
            let (began, end) = (Instant::now(), read + piece.len() as usize);
            if let Err(error) = self.shared.point.take(*piece, &mut self.buffer[read..end]) {
                // What was read does not wait for a disk that fails.
                self.write_bundle(&pieces[..at])?;
                let mut first = Some(error);
                self.insist(|_| first.take().map_or(Ok(()), |error| Err(error.into())))?;
                self.copy(*piece)?;
                return self.bundle(&pieces[at + 1..], hire);
            }
            self.took(began.elapsed(), hire);
            read = end;
        }
        self.write_bundle(pieces)
    }

    /// Writes pieces that lie one behind the other in the buffer.
    fn write_bundle(&mut self, pieces: &[ByteRange]) -> Result<(), CopyError> {
        let (mut parts, mut begin) = (Vec::with_capacity(pieces.len()), 0);
        for piece in pieces {
            let end = begin + piece.len() as usize;
            for (part, zero) in self.parts(begin..end) {
                let range = ByteRange::new(piece.start() + (part.start - begin) as u64, part.len() as u64);
                if zero {
                    self.zeroes(range, Below::Untouched)?;
                } else {
                    parts.push((range.start(), part));
                }
            }
            begin = end;
        }
        let mut written = 0;
        self.insist(|worker| {
            let left: Vec<(u64, &[u8])> =
                parts[written..].iter().map(|(offset, part)| (*offset, &worker.buffer[part.clone()])).collect();
            worker.shared.target.write_all_at(&left).map_err(|(done, error)| {
                written += done;
                CopyError::Target { offset: left[done].0, error }
            })
        })?;
        self.done.extend_from_slice(pieces);
        Ok(())
    }

    /// Divides whole clusters in the buffer into such that are all zero and others.
    fn parts(&self, all: Range<usize>) -> Vec<(Range<usize>, bool)> {
        let cluster = self.shared.point.cluster().bytes() as usize;
        let next = |at: usize| (at + cluster).min(all.end);
        let (mut parts, mut at) = (Vec::new(), all.start);
        while at < all.end {
            let zero = is_zero(&self.buffer[at..next(at)]);
            let mut until = next(at);
            while until < all.end && is_zero(&self.buffer[until..next(until)]) == zero {
                until = next(until);
            }
            parts.push((at..until, zero));
            at = until;
        }
        parts
    }

    /// What turns out to be data after all is copied.
    fn hole(&mut self, mut rest: ByteRange) -> Result<(), CopyError> {
        while !rest.is_empty() {
            let hole = self.insist(|worker| Ok(worker.shared.point.take_hole(rest)?))?;
            let passed = if hole > 0 {
                let hole = ByteRange::new(rest.start(), hole);
                self.zeroes(hole, Below::Untouched)?;
                self.done.push(hole);
                hole
            } else {
                let piece = ByteRange::new(rest.start(), rest.len().min(self.shared.chunk));
                self.shared.control.admit(piece.len())?;
                self.copy(piece)?;
                piece
            };
            rest = ByteRange::between(passed.end(), rest.end());
        }
        Ok(())
    }

    /// Brings a piece to the target, whichever way.
    fn copy(&mut self, piece: ByteRange) -> Result<(), CopyError> {
        match self.shared.control.is_sharing() {
            true => self.carry(piece)?,
            false => self.write(piece, Below::Untouched)?,
        }
        self.done.push(piece);
        Ok(())
    }

    /// Lets the target take a piece from the disk's file, and writes what it could not take, or took too late.
    fn carry(&mut self, piece: ByteRange) -> Result<(), CopyError> {
        let Shared { point, target, .. } = self.shared;
        let mut below = Below::Untouched;
        let take = |source: &dyn Source| {
            source.file().is_some_and(|file| {
                below = Below::Unknown;
                target.take_from(file, piece.start(), piece.len())
            })
        };
        match point.carry(piece, take)? {
            None => self.write(piece, below),
            Some(overwritten) => overwritten.into_iter().try_for_each(|unit| self.write(unit, below)),
        }
    }

    /// Reads a piece as of the point, and writes it.
    fn write(&mut self, piece: ByteRange, below: Below) -> Result<(), CopyError> {
        let len = piece.len() as usize;
        self.insist(|worker| Ok(worker.shared.point.take(piece, &mut worker.buffer[..len])?))?;
        for (part, zero) in self.parts(0..len) {
            let range = ByteRange::new(piece.start() + part.start as u64, part.len() as u64);
            if zero {
                self.zeroes(range, below)?;
            } else {
                self.put(range, |worker| worker.shared.target.write_at(&worker.buffer[part.clone()], range.start()))?;
            }
        }
        Ok(())
    }

    fn zeroes(&mut self, range: ByteRange, below: Below) -> Result<(), CopyError> {
        self.put(range, |worker| match worker.shared.target {
            target if below == Below::Untouched && target.reads_zero() => Ok(()),
            target => target.write_zeroes_at(range.start(), range.len()),
        })
    }

    fn put(&mut self, range: ByteRange, write: impl Fn(&mut Self) -> io::Result<()>) -> Result<(), CopyError> {
        self.insist(|worker| write(worker).map_err(|error| CopyError::Target { offset: range.start(), error }))
    }

    /// Tries until it works or the policy gives up.
    fn insist<T>(&mut self, mut attempt: impl FnMut(&mut Self) -> Result<T, CopyError>) -> Result<T, CopyError> {
        loop {
            let error = match attempt(self) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            // It may take long from here, and somebody may look.
            self.report();
            let shared = self.shared;
            let action = match &error {
                CopyError::Point(PointError::Source { error, .. }) => (shared.on_error)(Side::Source, error),
                CopyError::Target { error, .. } => (shared.on_error)(Side::Target, error),
                // A broken point stays broken.
                _ => Action::Report,
            };
            match action {
                Action::Report => return Err(error),
                Action::Retry => shared.control.rest(RETRY_PAUSE),
                Action::Stop => shared.control.pause(),
            }
            shared.control.admit(0)?;
        }
    }
}

#[cfg(test)]
mod tests;
