//! How what a job found out gets into a bitmap, while the guest goes on writing.
//!
//! The job freezes the bitmap with [`Draft::freeze_recording`], looks at the disk for as long as it likes, and hands what it
//! found to [`Draft::fill`]. What was written since the freeze (S) is in the bitmap afterwards, whatever was found.
//!
//! Invariant: a block that is not in S had no write in flight from the flip of the freeze to the flip of the fill, for a
//! write that is in flight at a flip is marked in the generation that begins there (I1). So the job read of such a block
//! what the block still holds at the end, and what it found out about it is true. Of a block in S it may have read
//! anything, torn halves included; that is why S is added last.

use crate::bits::Bits;
use crate::named::{BitmapError, Draft, Frozen};
use uuid::Uuid;

/// How what was found meets what the bitmap held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// The bitmap holds what was found, and nothing of what it held.
    Overwrite,
    /// It holds both.
    Union,
    /// It holds what it held, less what was found.
    Difference,
}

impl Draft {
    /// [`Draft::freeze`], whose successor records what is written also where the bitmap is disabled.
    pub fn freeze_recording(&mut self, name: &str) -> Result<Frozen, BitmapError> {
        let frozen = self.freeze(name)?;
        let index = self.position(name)?;
        let bitmap = &mut self.bitmaps[index];
        bitmap.for_job = !bitmap.records();
        Ok(frozen)
    }

    /// The bitmap, which is frozen, was made for what the job is to find: a failure takes it away, and should the process end and
    /// the job not go on, it is inconsistent, for an empty bitmap would say that nothing differs.
    pub fn await_fill(&mut self, name: &str) -> Result<(), BitmapError> {
        let index = self.position(name)?;
        self.bitmaps[index].unfilled = true;
        Ok(())
    }

    /// Ends freeze `id`: the bitmap holds what `mask` says of what it held and of `found`, and all that was written since.
    pub fn fill(&mut self, name: &str, id: Uuid, found: &Bits, mask: Mask) -> Result<(), BitmapError> {
        // What was written since has to be in a closed generation: a disabled bitmap records no longer.
        self.end_generation();
        let (bitmap, frozen) = self.thaw(name, id)?;
        (bitmap.for_job, bitmap.unfilled) = (false, false);
        match mask {
            Mask::Overwrite => bitmap.layers.add(found),
            Mask::Union => {
                bitmap.layers.absorb(frozen.layers());
                bitmap.layers.add(found);
            }
            Mask::Difference => {
                let mut left = frozen.bits();
                left.subtract(found);
                bitmap.layers.add(&left);
            }
        }
        Ok(())
    }
}
