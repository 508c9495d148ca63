//! The live map: the bits that queue threads set while guests write.
//!
//! Many threads mark, nobody clears: a generation only grows until a flip closes it, and from then on it is immutable.
//! Orderings are relaxed throughout. What makes a mark visible to the flip is the marker's leaving of its critical
//! section (`admission`); a reader beside live marking (a query) sees a subset that only grows.

use crate::bits::{Bits, note, noted, pieces, summary_for, words_for};
use crate::sync::{AtomicU64, Ordering};
use crate::units::{ByteRange, Granularity};
use std::fmt;

/// Dirty bits shared by all writers of one disk.
pub struct LiveMap {
    granularity: Granularity,
    size: u64,
    words: Box<[AtomicU64]>,
    /// One bit a block of words that may hold a bit, as in [`Bits`].
    blocks: Box<[AtomicU64]>,
}

#[cfg(not(any(loom, shuttle)))]
fn zeroed(words: usize) -> Box<[AtomicU64]> {
    // SAFETY: an AtomicU64 has the layout of a u64, for which all bytes zero is a value. Asking for zeroed memory
    // keeps the pages of a large map untouched until they are marked.
    unsafe { Box::new_zeroed_slice(words).assume_init() }
}

#[cfg(any(loom, shuttle))]
fn zeroed(words: usize) -> Box<[AtomicU64]> {
    (0..words).map(|_| AtomicU64::new(0)).collect()
}

impl LiveMap {
    /// No bit set.
    pub fn new(granularity: Granularity, size: u64) -> Self {
        let words = words_for(granularity, size);
        Self { granularity, size, words: zeroed(words), blocks: zeroed(summary_for(words)) }
    }

    /// Bytes a bit stands for.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    fn clamp(&self, range: ByteRange) -> std::ops::Range<u64> {
        self.granularity.cover(range.intersection(ByteRange::new(0, self.size)))
    }

    /// Sets every bit that `range` touches. Allocates nothing, waits for nothing.
    #[inline]
    pub fn mark(&self, range: ByteRange) {
        for (index, mask) in pieces(self.clamp(range)) {
            let word = &self.words[index];
            // Test before setting: a write to a block that is dirty already must not take the cache line away from
            // the other threads.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
                // Who finds the bit set need not look here: whoever set it does, before it leaves its section.
                let (at, block) = note(index);
                if self.blocks[at].load(Ordering::Relaxed) & block == 0 {
                    self.blocks[at].fetch_or(block, Ordering::Relaxed);
                }
            }
        }
    }

    /// Whether any bit that `range` touches is set.
    #[inline]
    pub fn any(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).any(|(word, mask)| self.words[word].load(Ordering::Relaxed) & mask != 0)
    }

    /// Whether every bit that `range` touches is set; true for an empty range.
    #[inline]
    pub fn all(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).all(|(word, mask)| self.words[word].load(Ordering::Relaxed) & mask == mask)
    }

    /// A plain copy at the map's own granularity. Only what was marked is looked at, and takes memory in the copy.
    pub fn to_bits(&self) -> Bits {
        let mut bits = Bits::new(self.granularity, self.size);
        for (at, summary) in self.blocks.iter().enumerate() {
            for word in noted(at, summary.load(Ordering::Relaxed), self.words.len()).flatten() {
                let mask = self.words[word].load(Ordering::Relaxed);
                if mask != 0 {
                    bits.set_in_word(word, mask);
                }
            }
        }
        bits
    }

    /// Adds every bit to `bits`, whatever its granularity.
    pub fn fold_into(&self, bits: &mut Bits) {
        bits.union(&self.to_bits());
    }
}

impl fmt::Debug for LiveMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveMap").field("granularity", &self.granularity).field("size", &self.size).finish()
    }
}
