//! Saving what a held write is about to change, unit by unit: claimed, so that nobody else saves it too; read and kept; settled.
//!
//! Savers wait where they have to: for writes that were in flight at a point's instant, for another who saves the same unit, for
//! disk and scratch. The queue thread that hands a write in must wait for nothing. But where the disk and its scratch are memory a
//! save is two copies, done sooner than somebody else is woken for it, who first needs a processor that others have: then it
//! saves at once, and leaves to the savers what it cannot, and all that fails.

use super::{CopyBeforeWrite, Saved, State, let_go};
use crate::buffer::{AlignedBuffer, is_zero};
use crate::resume::Place;
use crate::scratch::{Block, Scratch, ScratchError};
use blkmark_bitmap::{ByteRange, PreCut, Verdict};
use std::sync::Arc;
use std::time::Instant;

/// A write that touches more units is left to the savers: the thread that hands it in has other requests to answer.
const FEW: u64 = 4;

/// What a unit that has to be saved for a point is found as.
enum Claim {
    /// It need not be saved any more.
    Needless,
    /// Somebody else is at it.
    Taken,
    /// It is the caller's, for these points.
    Ours(Vec<(u64, Arc<PreCut>)>),
}

impl State {
    fn claim(&mut self, point: u64, unit: ByteRange) -> Claim {
        let open: Vec<_> = self.in_force(unit).map(|(key, kept)| (key, Arc::clone(&kept.pre_cut))).collect();
        if !open.iter().any(|(key, _)| *key == point) {
            return Claim::Needless;
        }
        if self.is_saving(unit) {
            return Claim::Taken;
        }
        self.saving.push(unit);
        Claim::Ours(open)
    }

    fn let_go_of(&mut self, unit: ByteRange) {
        self.saving.retain(|other| *other != unit);
    }
}

impl CopyBeforeWrite {
    /// Makes the oldest held write admissible and lets it go. `buffer` has room for a unit. Answers whether there was
    /// one to be taken. Called by the savers; by nobody else but models.
    pub fn save_one(&self, buffer: &mut [u8]) -> bool {
        let (id, point, range) = {
            let mut state = self.state();
            if !state.has_work() {
                return false;
            }
            let Some(id) = state.queue.pop_front() else { return false };
            let Some(held) = state.held.get(&id) else { return true };
            (id, held.point, held.range)
        };
        for unit in self.units(range) {
            if let Err(error) = self.save(point, unit, buffer) {
                self.fail(point, Some(id), error);
                return true;
            }
        }
        let mut state = self.state();
        let held = state.held.remove(&id);
        if let Some(held) = &held {
            state.longest_hold = state.longest_hold.max(held.since.elapsed());
        }
        drop(state);
        let_go(held.into_iter().collect(), Verdict::Again);
        true
    }

    fn units(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> + use<> {
        let (unit, size) = (self.unit, self.size);
        unit.cover(range).map(move |index| unit.range(index..index + 1, size))
    }

    fn save(&self, point: u64, unit: ByteRange, buffer: &mut [u8]) -> Result<(), ScratchError> {
        let points = {
            let mut state = self.state();
            loop {
                match state.claim(point, unit) {
                    Claim::Needless => return Ok(()),
                    Claim::Ours(points) => break points,
                    // What the other one does serves this write too.
                    Claim::Taken => state = self.saved.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner()),
                }
            }
        };
        let began = Instant::now();
        let data = &mut buffer[..unit.len() as usize];
        points.iter().for_each(|(_, pre_cut)| pre_cut.wait(unit));
        let result = self.read_and_keep(unit, data, Scratch::keep);
        self.settle(unit, &points, began, result)
    }

    /// Saves what a write of `range` needs saved for `point`, if nothing has to be waited for. If not, part of it may be saved.
    pub(super) fn save_at_once(&self, point: u64, range: ByteRange, since: Instant) -> bool {
        let units = self.unit.cover(range);
        if !self.source.is_memory() || units.end - units.start > FEW {
            return false;
        }
        let spare = {
            let mut state = self.state();
            // Its commit is in force, but the writes that it left in flight are not known here yet.
            if !state.points.contains_key(&point) {
                return false;
            }
            state.spare.take()
        };
        let mut buffer = spare.unwrap_or_else(|| AlignedBuffer::new(self.unit.bytes() as usize));
        let done = self.units(range).all(|unit| self.save_unit_at_once(point, unit, &mut buffer));
        let mut state = self.state();
        state.spare = Some(buffer);
        if done {
            state.longest_hold = state.longest_hold.max(since.elapsed());
        }
        done
    }

    fn save_unit_at_once(&self, point: u64, unit: ByteRange, buffer: &mut [u8]) -> bool {
        let points = match self.state().claim(point, unit) {
            Claim::Needless => return true,
            Claim::Taken => return false,
            Claim::Ours(points) => points,
        };
        let began = Instant::now();
        let data = &mut buffer[..unit.len() as usize];
        let waits = points.iter().any(|(_, pre_cut)| pre_cut.pending(unit));
        // A saver's try at what fails here tells why, and decides what that means.
        let kept = if waits { None } else { self.read_and_keep(unit, data, Scratch::keep_in_memory).ok() };
        let Some(saved) = kept else {
            self.state().let_go_of(unit);
            self.saved.notify_all();
            return false;
        };
        self.settle(unit, &points, began, Ok(saved)).is_ok()
    }

    /// What was in flight at the instants of those that want it has to be over.
    fn read_and_keep(
        &self,
        unit: ByteRange,
        data: &mut [u8],
        keep: impl FnOnce(&Scratch, &[u8]) -> Result<Block, ScratchError>,
    ) -> Result<Saved, ScratchError> {
        self.source.read_at(data, unit.start())?;
        if is_zero(data) { Ok(None) } else { Ok(Some(Arc::new(keep(&self.scratch, data)?))) }
    }

    /// What was saved is put down for the points that wanted it before and still want it, and the claim goes.
    fn settle(
        &self,
        unit: ByteRange,
        points: &[(u64, Arc<PreCut>)],
        began: Instant,
        result: Result<Saved, ScratchError>,
    ) -> Result<(), ScratchError> {
        let mut state = self.state();
        state.crew.last_save = began.elapsed();
        state.longest_save = state.longest_save.max(state.crew.last_save);
        state.let_go_of(unit);
        let outcome = result.and_then(|saved| {
            let after: Vec<u64> = state.in_force(unit).map(|(key, _)| key).collect();
            let place = saved.as_ref().map_or(Place::Zero, |block| block.place());
            let mut first = Ok(());
            for (key, _) in points.iter().filter(|(key, _)| after.contains(key)) {
                if let Some(kept) = state.points.get_mut(key) {
                    // Before the unit is settled, and so before a write to it goes: whoever comes after a kill must not take
                    // what the disk holds then.
                    if let Some(ledger) = &kept.ledger
                        && let Err(error) = ledger.saved(unit, place)
                    {
                        first = Err(ScratchError::Ledger(error));
                        continue;
                    }
                    kept.index.insert(unit.start(), saved.clone());
                    kept.blocks += u64::from(saved.is_some());
                    kept.face.settle(unit);
                }
            }
            first
        });
        drop(state);
        self.saved.notify_all();
        outcome
    }
}
