//! Dirty bitmaps: which bytes of a disk changed since a point in time.
//!
//! The ground that everything else stands on; it imports nothing of the workspace. From the bottom up:
//!
//! - [`units`]: byte ranges, granularity; all rounding.
//! - `table`, `blocks`, `places`: how sets of bits lie in memory, and who has which part of it.
//! - [`bits`]: a plain set of dirty bits. [`live`]: the shared one that queue threads mark.
//! - [`admission`]: how queue threads pass a value that one control thread may change while all are outside.
//! - [`inflight`]: which writes are on their way. [`gate`]: what may hold a write back.
//! - [`checkpoints`]: points in time that are named for change tracking alone.
//! - [`named`]: named bitmaps and their states, as drafts that a commit puts in force.
//! - [`fill`]: how what a job found out gets into a bitmap.
//! - [`store`]: what survives the process, and the machine. `upkeep`: what is done for it meanwhile.
//! - [`tracker`]: one disk's marking. [`flip`]: one instant for many disks.
//!
//! Invariants I1, I2 and I4 of `ARCHITECTURE.md` live here, and the half of I3 that waits for writes of before a cut.

pub mod admission;
pub mod bits;
mod blocks;
pub mod checkpoints;
pub mod fill;
pub mod flip;
#[cfg(all(any(test, fuzzing), not(any(loom, shuttle))))]
pub mod fuzzing;
pub mod gate;
pub mod inflight;
mod layers;
pub mod live;
pub mod named;
mod places;
pub mod store;
pub mod sync;
mod table;
pub mod tracker;
pub mod units;
mod upkeep;

pub use bits::Bits;
pub use checkpoints::{CheckpointInfo, CheckpointMark};
pub use fill::Mask;
pub use flip::{Commit, CommitError, commit};
pub use gate::{Gate, Resume, Verdict};
pub use inflight::PreCut;
pub use live::LiveMap;
pub use named::{BitmapError, BitmapInfo, Frozen, Owner};
pub use store::StoreError;
pub use tracker::{Lane, Tracker};
pub use units::{ByteRange, Granularity, SECTOR};
