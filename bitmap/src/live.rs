//! The live map: the bits that queue threads set while guests write.
//!
//! Many threads mark, nobody clears: a generation only grows until a flip closes it, and from then on it is immutable.
//! Orderings are relaxed throughout. What makes a mark visible to the flip is the marker's leaving of its critical
//! section (`admission`); a reader beside live marking (a query) sees a subset that only grows.

use crate::bits::{Bits, pieces, words_for};
use crate::sync::{AtomicU64, Ordering};
use crate::units::{ByteRange, Granularity};
use std::fmt;

/// Dirty bits shared by all writers of one disk.
pub struct LiveMap {
    granularity: Granularity,
    size: u64,
    words: Box<[AtomicU64]>,
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
        Self { granularity, size, words: zeroed(words_for(granularity, size)) }
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
        for (word, mask) in pieces(self.clamp(range)) {
            let word = &self.words[word];
            // Test before setting: a write to a block that is dirty already must not take the cache line away from
            // the other threads.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
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

    /// A plain copy at the map's own granularity.
    pub fn to_bits(&self) -> Bits {
        // Pages of a sparse map that were never marked are read, not written, so they stay without memory here; the
        // copy is written only where there is something to write.
        let mut bits = vec![0u64; self.words.len()].into_boxed_slice();
        for (bit, word) in bits.iter_mut().zip(&self.words) {
            let word = word.load(Ordering::Relaxed);
            if word != 0 {
                *bit = word;
            }
        }
        Bits::from_words(self.granularity, self.size, bits)
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
