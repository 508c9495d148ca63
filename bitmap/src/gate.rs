//! What the write path asks before a write may go: the seam between marking here and copy-before-write in `backup`.

use crate::units::ByteRange;
use std::time::Instant;

/// What becomes of a held write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It asks every gate again, from the start.
    Again,
    /// It fails: its old data could not be kept, and the operator would rather lose the write than the point in time.
    Refused,
}

/// Called once, on any thread, when it is decided what becomes of a held write.
pub type Resume = Box<dyn FnOnce(Verdict) + Send>;

/// Something that may hold a write back until the old data is safe.
pub trait Gate: Send + Sync {
    /// Whether a change of `range` may go now. Asked inside a critical section: no wait, no system call, no allocation.
    /// Once true for a range, it stays true for that range.
    fn admits(&self, range: ByteRange) -> bool;

    /// Asks, outside of any critical section, to make `range` admissible; does not wait. `resume` is called when that is
    /// done or given up by policy, perhaps before this returns. The write then asks every gate again. `since`: when it was found
    /// that the write has to wait.
    fn hold(&self, range: ByteRange, since: Instant, resume: Resume);
}
