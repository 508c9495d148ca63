//! What of a disk is allocated: where it holds data and not a hole. Nothing is read.
//!
//! Invariant: what is not in the answer reads as zeroes and takes no space, unless it was written meanwhile.

use super::worker::insist;
use super::{CompareError, OnError};
use crate::copy::{CopyControl, Side};
use crate::source::{BlockStatus, Source};
use blkmark_bitmap::{Bits, ByteRange};

/// What is asked about at once, so that others can steer in between.
const STRETCH: u64 = 1 << 30;

/// The blocks of `plan`, in its granularity, that hold data. Blocks beside the plan may be in the answer as well.
pub fn allocated(
    disk: &dyn Source,
    plan: &Bits,
    control: &CopyControl,
    on_error: OnError<'_>,
) -> Result<Bits, CompareError> {
    control.expect(plan.runs().map(|run| run.len()).sum());
    let mut found = Bits::new(plan.granularity(), plan.size());
    for run in plan.runs() {
        let mut at = run.start();
        while at < run.end() {
            control.admit(0)?;
            let limit = (run.end() - at).min(STRETCH);
            let (status, len) = insist(control, on_error, Side::Source, at, || disk.block_status(at, limit))?;
            let range = ByteRange::new(at, len.clamp(1, limit));
            if status == BlockStatus::Data {
                found.set(range);
            }
            control.done(&[range]);
            at = range.end();
        }
    }
    Ok(found)
}
