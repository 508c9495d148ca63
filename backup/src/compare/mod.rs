//! Finds out where a live disk differs from an older image, or what of it is allocated.
//!
//! Called by jobs. Workers take pieces of a plan one after another (`deal`), read both sides, and note the blocks that differ
//! (`worker`). Others steer it as they steer a copy, and the guest's own latency bounds how much is under way. Knows
//! nothing of bitmaps by name: the answer is plain bits.
//!
//! Invariant: a block that nobody writes to meanwhile is in the answer if and only if the two sides differ in it (a block that
//! the caller's plan leaves out is in no answer). Of a block that is written meanwhile the answer says nothing: a read beside a
//! write may be torn. That is why the caller records what is written, from before this begins.

mod allocated;
mod deal;
mod worker;

use crate::copy::{Action, CopyControl, CopyError, Pace, Side};
use crate::source::Source;
use crate::target::os_text;
pub use allocated::allocated;
use blkmark_bitmap::{Bits, Granularity};
use deal::Deal;
use std::io;
use std::sync::{Mutex, PoisonError};
use thiserror::Error;
use worker::Shared;

/// Workers. More does not help one disk, and each costs two buffers of `CHUNK`.
const WORKERS: u64 = 4;

/// Most bytes that a worker reads of each side at once.
const CHUNK: u64 = 1 << 20;

/// Pieces begin and end at multiples of this, whatever the bitmap's granularity: every source can read such pieces.
const UNIT: Granularity = Granularity::DEFAULT;

/// Decides what a failed read leads to; the older image is the target's side.
pub type OnError<'a> = &'a (dyn Fn(Side, &io::Error) -> Action + Sync);

/// Why a comparison ended before it was done.
#[derive(Debug, Error)]
pub enum CompareError {
    /// It was told to.
    #[error("the job was cancelled")]
    Cancelled,
    /// The disk cannot be read.
    #[error("could not read the disk at {offset:#x}: {}", os_text(error))]
    Disk {
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        error: io::Error,
    },
    /// The older image cannot be read.
    #[error("could not read the older image at {offset:#x}: {}", os_text(error))]
    Image {
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        error: io::Error,
    },
}

impl From<CopyError> for CompareError {
    /// Of what steers a copy, a comparison only meets its end.
    fn from(_: CopyError) -> Self {
        CompareError::Cancelled
    }
}

/// The bytes of `plan` as pieces that can be read.
fn readable(plan: &Bits) -> Bits {
    plan.at(plan.granularity().max(UNIT))
}

/// In which blocks of `plan`, in its granularity, `disk` differs from `image`, which has its size. Blocks until it is done,
/// cancelled or has failed. Blocks beside the plan may be in the answer as well.
pub fn differing(
    disk: &dyn Source,
    image: &dyn Source,
    plan: &Bits,
    control: &CopyControl,
    on_error: OnError<'_>,
) -> Result<Bits, CompareError> {
    let granularity = plan.granularity();
    let plan = readable(plan);
    let total = plan.runs().map(|run| run.len()).sum::<u64>();
    control.expect(total);
    let workers = WORKERS.min(total.div_ceil(CHUNK)).max(1);
    let shared = Shared {
        disk,
        image,
        control,
        on_error,
        deal: Mutex::new(Deal::new(disk, image, &plan)),
        pace: Pace::new(disk.pulse(), control, CHUNK, workers),
        found: Mutex::new(Bits::new(granularity, plan.size())),
    };
    let failure: Mutex<Option<CompareError>> = Mutex::new(None);
    let work = || {
        if let Err(error) = worker::run(&shared) {
            // The first failure ends the others.
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            shared.deal().close();
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..workers {
            scope.spawn(work);
        }
        work();
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(shared.found.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}
