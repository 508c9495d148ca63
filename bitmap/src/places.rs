//! Which place in a pool each block of a live map has: given out by any number of threads that mark, without a lock.
//!
//! Used by `live` alone. A thread that marks is inside its critical section, where it may neither wait nor allocate: the pool has as
//! many places as there are blocks, and what this room does is to say which of them is whose.
//!
//! **Invariant.** A block that was marked has one place, which stays, and no two have the same. It follows from the order in
//! `give`: `last` names the newest pair of place and block, and changes only by a compare-and-swap from a pair that is in `of`
//! already. So whoever swaps has seen, by the acquire of `last`, all pairs that there were, and did not find the block among them;
//! and if another pair came in between, the swap fails. Writing down the newest pair may be anybody's work, any number of times
//! and however late, since a pair never changes. Places are given in order and none is wasted, so the pool is never too small.
//! Nobody waits for anybody: a swap fails only because another one succeeded.

use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::table::Table;

/// The places of a map's blocks.
pub(crate) struct Places {
    /// Of each block, counted from 1; 0: it has none.
    of: Table<AtomicU32>,
    /// The place that was given last in the upper half, and to which block in the lower one; 0: none was.
    last: AtomicU64,
    /// Each block has the place of its number, as in a file that others read.
    fixed: bool,
}

impl Places {
    /// For so many blocks, none of which has a place.
    pub(crate) fn new(blocks: usize, fixed: bool) -> Self {
        Self { of: Table::new(blocks), last: AtomicU64::new(0), fixed }
    }

    /// The place of a block, counted from 1; 0 if it has none.
    #[inline]
    pub(crate) fn of(&self, block: usize) -> usize {
        // Relaxed: what lies in the pool was zero before anybody could know this map, and is only touched by atomics.
        self.of[block].load(Ordering::Relaxed) as usize
    }

    /// The place of a block, which gets one if it has none.
    #[cold]
    pub(crate) fn give(&self, block: usize) -> usize {
        if self.fixed {
            self.of[block].store(block as u32 + 1, Ordering::Relaxed);
            return block + 1;
        }
        loop {
            let last = self.last.load(Ordering::Acquire);
            let place = (last >> 32) as u32;
            if place != 0 {
                self.of[last as u32 as usize].store(place, Ordering::Relaxed);
            }
            let found = self.of(block);
            if found != 0 {
                return found;
            }
            let next = u64::from(place + 1) << 32 | block as u64;
            // Release: who sees this pair sees the one before it in `of`.
            if self.last.compare_exchange(last, next, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                self.of[block].store(place + 1, Ordering::Relaxed);
                return place as usize + 1;
            }
        }
    }
}
