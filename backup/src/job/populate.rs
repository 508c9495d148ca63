//! One populate: what a job of that type works with, and what it leaves in its bitmap.
//!
//! Made by `control` before the commit that freezes the bitmap, run by the job's own thread, settled by `life`.
//!
//! | | success | failure or cancel |
//! |---|---|---|
//! | a bitmap that was there | mask(old, found) ∪ S | old ∪ S; a disabled one: old |
//! | one that the same transaction made | mask(nothing, found) ∪ S | gone |
//!
//! S is what was written since the freeze, also if the bitmap is disabled, and across a kill. Invariant: after success the bitmap holds every block
//! in which the disk differs from the older image at the moment of the end (unless the mask is `difference`, which is to make
//! it hold less), and, if it records, at any later one. For a block without a write from the freeze to the end was
//! compared as it still is, and a block with one is in S: see `bitmap::fill`. A bitmap that holds only a part of that must not
//! look like one that holds all of it, and so one made for this goes with a failure (`Draft::reclaim`).
//!
//! After a kill the search begins anew over the same freeze, and all of the above holds: it sees the disk as it is then, and what
//! was written since the freeze, before the kill or after it, is in S.

use super::backup::{Failure, Outcome};
use crate::compare::{self, CompareError};
use crate::copy::{Action, CopyControl, Side};
use crate::node::Node;
use crate::resume::Sought;
use crate::source::{FileId, Source};
use blkmark_bitmap::named::Draft;
use blkmark_bitmap::{BitmapError, Bits, Frozen, Granularity, Mask};
use serde_json::Value;
use std::any::Any;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use uuid::Uuid;

/// What is looked for.
#[derive(Clone)]
pub enum Pattern {
    /// Every block.
    All,
    /// Blocks that the disk itself holds, not those that are holes.
    Allocated,
    /// Blocks in which the disk differs from this older image, which has its size.
    Differing(Arc<dyn Source>),
}

/// How to find an older image again, for the process that comes after a kill.
#[derive(Clone, Debug, PartialEq)]
pub enum Older {
    /// A file or device that the command named.
    Path {
        /// Where it is.
        path: PathBuf,
        /// Its format.
        format: String,
        /// Which file that was.
        file: Option<FileId>,
    },
    /// A node that `blockdev-add` made.
    Node {
        /// Its name.
        name: String,
        /// What `blockdev-add` was given to make it, those beneath it first.
        options: Vec<Value>,
        /// Which file that was, if it was one.
        file: Option<FileId>,
    },
    /// A point in time with a name, by its ledger.
    Point(Uuid),
}

/// All that a populate works with, until its job is over.
pub struct Populate {
    /// The disk.
    pub node: Arc<Node>,
    /// Its bitmap.
    pub bitmap: String,
    /// What that held; frozen so that writes are recorded.
    pub frozen: Frozen,
    /// What is looked for.
    pub pattern: Pattern,
    /// How the older image is found again, if there is one and it can be.
    pub older: Option<Older>,
    /// How it gets into the bitmap.
    pub mask: Mask,
    /// What its slip is called.
    pub slip: Uuid,
    /// Whatever has to be kept while the job is there, for instance the claim on a node.
    pub claim: Option<Box<dyn Any + Send + Sync>>,
    found: Mutex<Option<Bits>>,
}

impl Populate {
    /// Of the bitmap that `frozen` was taken from.
    pub fn new(node: Arc<Node>, bitmap: String, frozen: Frozen, pattern: Pattern, mask: Mask) -> Self {
        let (older, slip, claim) = (None, Uuid::new_v4(), None);
        Self { node, bitmap, frozen, pattern, older, mask, slip, claim, found: Mutex::default() }
    }

    /// What somebody would have to look for who goes on with it.
    pub(super) fn sought(&self) -> Option<Sought> {
        match &self.pattern {
            Pattern::All => Some(Sought::All),
            Pattern::Allocated => Some(Sought::Allocated),
            Pattern::Differing(_) => self.older.clone().map(Sought::Differing),
        }
    }

    /// The blocks whose being found changes what is in the bitmap in the end.
    fn plan(&self) -> Bits {
        let old = self.frozen.bits();
        let mut plan = Bits::full(old.granularity(), old.size());
        match self.mask {
            Mask::Overwrite => {}
            Mask::Union => plan.subtract(&old),
            Mask::Difference => plan = old,
        }
        plan
    }

    fn find(
        &self,
        plan: &Bits,
        control: &CopyControl,
        on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync),
    ) -> Result<Bits, CompareError> {
        let disk = &*self.node.source;
        match &self.pattern {
            Pattern::All => {
                let all: Vec<_> = plan.runs().collect();
                control.expect(all.iter().map(|run| run.len()).sum());
                control.admit(0)?;
                control.done(&all);
                Ok(plan.at(plan.granularity()))
            }
            Pattern::Allocated => compare::allocated(disk, plan, control, on_error),
            Pattern::Differing(image) => compare::differing(disk, &**image, plan, control, on_error),
        }
    }

    /// Looks until it is done, or over otherwise. Blocks. `on_error` decides about a failed read; the older image is the
    /// target's side.
    pub(super) fn run(&self, control: &CopyControl, on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync)) -> Outcome {
        let plan = self.plan();
        let result = match self.find(&plan, control, on_error) {
            Ok(found) => {
                *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
                Ok(())
            }
            Err(CompareError::Cancelled) => Err(Failure::Cancelled),
            Err(error) => Err(Failure::Error(error.to_string())),
        };
        Outcome { result, uncopied: nothing() }
    }

    /// Lets go of what was read.
    pub(super) fn close(mut self) -> Self {
        self.pattern = Pattern::All;
        self
    }

    /// Leaves in the bitmap what the table above says.
    pub(super) fn settle(&self, draft: &mut Draft, success: bool) -> Result<(), BitmapError> {
        let (name, freeze) = (&self.bitmap, self.frozen.id());
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        match &*found {
            Some(found) if success => draft.fill(name, freeze, found, self.mask),
            _ => draft.reclaim(name, freeze),
        }
    }
}

/// A populate leaves nothing uncopied.
fn nothing() -> Bits {
    Bits::new(Granularity::MAX, 0)
}

impl fmt::Debug for Populate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Populate").field("node", &self.node).field("bitmap", &self.bitmap).finish_non_exhaustive()
    }
}
