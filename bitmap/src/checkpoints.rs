//! Checkpoints of one disk: points in time that are named for change tracking alone.
//!
//! The chain, oldest first, is a part of a [`Draft`], so that a checkpoint comes into force in the same commit as anything
//! else. Each one holds what was written between it and the next, as `Layers`; the last one holds what is being
//! written now. So the changes between two of them are the union of the segments in between, and a checkpoint that is
//! deleted leaves its segment to the one before it. Invariant: whatever is deleted, the changes between two that are left
//! stay the same.

use crate::bits::Bits;
use crate::layers::Layers;
use crate::live::LiveMap;
use crate::named::{BitmapError, Draft, MOST_BITS, NAME_MAX};
use crate::tracker::Tracker;
use crate::units::Granularity;
use std::sync::Arc;
use uuid::Uuid;

/// What a checkpoint is called and known by; the same on all disks that it was made of at one instant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointMark {
    /// Its name.
    pub name: String,
    /// Never used again, unlike the name.
    pub id: Uuid,
    /// When it was made, in microseconds since 1970.
    pub created: u64,
}

/// What queries tell of a checkpoint of one disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointInfo {
    /// What it is called.
    pub mark: CheckpointMark,
    /// Bytes that the disk had.
    pub size: u64,
    /// Bytes a bit of its changes stands for.
    pub granularity: Granularity,
}

/// A checkpoint and what was written between it and the next.
#[derive(Clone, Debug)]
pub(crate) struct Checkpoint {
    pub(crate) mark: CheckpointMark,
    pub(crate) size: u64,
    pub(crate) layers: Layers,
}

/// All of one disk, oldest first.
#[derive(Clone, Debug, Default)]
pub(crate) struct Checkpoints(pub(crate) Vec<Checkpoint>);

impl Checkpoints {
    fn position(&self, name: &str) -> Result<usize, BitmapError> {
        let found = self.0.iter().position(|checkpoint| checkpoint.mark.name == name);
        found.ok_or_else(|| BitmapError::CheckpointNotFound(name.to_owned()))
    }

    /// What the last one records at.
    pub(crate) fn recording_granularity(&self) -> Option<Granularity> {
        self.0.last().map(|last| last.layers.granularity())
    }

    /// Refused if the bits of a disk of `size` bytes would take too much.
    pub(crate) fn check_size(&self, size: u64) -> Result<(), BitmapError> {
        match self.0.iter().find(|checkpoint| checkpoint.layers.granularity().bits_for(size) > MOST_BITS) {
            Some(checkpoint) => Err(BitmapError::TooLarge(checkpoint.mark.name.clone())),
            None => Ok(()),
        }
    }

    pub(crate) fn resize(&mut self, size: u64) {
        let last = self.0.len().saturating_sub(1);
        for (at, checkpoint) in self.0.iter_mut().enumerate() {
            checkpoint.layers.resize(size, at == last);
        }
    }

    /// The draft comes into force; only the last one records on.
    pub(crate) fn settle(&mut self, cut: bool, closed: Option<&Arc<LiveMap>>) {
        let last = self.0.len().saturating_sub(1);
        for (at, checkpoint) in self.0.iter_mut().enumerate() {
            if cut {
                checkpoint.layers.close(closed);
            }
            checkpoint.layers.record(at == last);
            checkpoint.layers.compact();
        }
    }

    fn changes(&self, from: &str, to: Option<&str>, live: Option<&Arc<LiveMap>>) -> Result<Bits, BitmapError> {
        let first = self.position(from)?;
        let end = match to {
            Some(to) => self.position(to)?,
            None => self.0.len(),
        };
        let Some(segments) = self.0.get(first..end).filter(|segments| !segments.is_empty()) else {
            let (from, to) = (from.to_owned(), to.unwrap_or_default().to_owned());
            return Err(BitmapError::CheckpointOrder { from, to });
        };
        let granularity = segments.iter().map(|segment| segment.layers.granularity()).min();
        let mut all = Layers::empty(granularity.unwrap_or(Granularity::DEFAULT), segments[0].layers.size());
        segments.iter().for_each(|segment| all.absorb(&segment.layers));
        Ok(all.bits(live))
    }
}

impl Draft {
    /// Makes the commit's instant the newest checkpoint; what is written from then on is its segment.
    pub fn add_checkpoint(&mut self, mark: CheckpointMark, granularity: Granularity) -> Result<(), BitmapError> {
        if mark.name.is_empty() {
            return Err(BitmapError::CheckpointNameEmpty);
        }
        if mark.name.len() > NAME_MAX {
            return Err(BitmapError::CheckpointNameTooLong(mark.name));
        }
        if self.checkpoints.position(&mark.name).is_ok() {
            return Err(BitmapError::CheckpointExists(mark.name));
        }
        let size = self.size();
        self.end_generation();
        self.checkpoints.0.push(Checkpoint { mark, size, layers: Layers::empty(granularity, size) });
        Ok(())
    }

    /// Forgets a checkpoint. What was written since it counts as written since the one before, if there is one.
    pub fn remove_checkpoint(&mut self, name: &str) -> Result<(), BitmapError> {
        let at = self.checkpoints.position(name)?;
        self.end_generation();
        let gone = self.checkpoints.0.remove(at);
        if let Some(before) = at.checked_sub(1) {
            self.checkpoints.0[before].layers.absorb(&gone.layers);
        }
        Ok(())
    }

    /// Its checkpoints, oldest first.
    pub fn list_checkpoints(&self) -> Vec<CheckpointInfo> {
        let info = |checkpoint: &Checkpoint| CheckpointInfo {
            mark: checkpoint.mark.clone(),
            size: checkpoint.size,
            granularity: checkpoint.layers.granularity(),
        };
        self.checkpoints.0.iter().map(info).collect()
    }
}

impl Tracker {
    /// Its checkpoints, oldest first.
    pub fn checkpoints(&self) -> Vec<CheckpointInfo> {
        self.draft().0.list_checkpoints()
    }

    /// What was written between checkpoint `from` and the later one `to`, or until now. Whole bits: what was written in
    /// part is in it whole. Takes no lane and holds no lock while it looks.
    pub fn changes(&self, from: &str, to: Option<&str>) -> Result<Bits, BitmapError> {
        let (draft, live) = self.draft();
        draft.checkpoints.changes(from, to, live.as_ref())
    }
}
