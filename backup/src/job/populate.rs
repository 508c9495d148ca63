//! One populate: what a job of that type works with, and what it leaves in its bitmap.
//!
//! Made by `control` before the commit that freezes the bitmap, run by the job's own thread, settled by `life`.
//!
//! | | success | failure or cancel |
//! |---|---|---|
//! | a bitmap that was there | mask(old, found) ∪ S | old ∪ S; a disabled one: old |
//! | one that the same transaction made | mask(nothing, found) ∪ S | gone |
//!
//! S is what was written since the freeze, also if the bitmap is disabled. Invariant: after success the bitmap holds every block
//! in which the disk differs from the older image at the moment of the end (unless the mask is `difference`, which is to make
//! it hold less), and, if it records, at any later one. For a block without a write from the freeze to the end was
//! compared as it still is, and a block with one is in S: see `bitmap::fill`. A bitmap that holds only a part of that must not
//! look like one that holds all of it, and so one made for this goes with a failure.

use super::backup::{Failure, Outcome};
use crate::compare::{self, CompareError};
use crate::copy::{Action, CopyControl, Side};
use crate::node::Node;
use crate::source::Source;
use blkmark_bitmap::named::Draft;
use blkmark_bitmap::{BitmapError, Bits, Frozen, Granularity, Mask};
use std::any::Any;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

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
    /// How it gets into the bitmap.
    pub mask: Mask,
    /// The bitmap was made in the same transaction.
    pub fresh: bool,
    /// Whatever has to be kept while the job is there, for instance the claim on a node.
    pub claim: Option<Box<dyn Any + Send + Sync>>,
    found: Mutex<Option<Bits>>,
}

impl Populate {
    /// Of the bitmap that `frozen` was taken from.
    pub fn new(node: Arc<Node>, bitmap: String, frozen: Frozen, pattern: Pattern, mask: Mask, fresh: bool) -> Self {
        Self { node, bitmap, frozen, pattern, mask, fresh, claim: None, found: Mutex::default() }
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
            _ if self.fresh => draft.remove_frozen(name, freeze),
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
