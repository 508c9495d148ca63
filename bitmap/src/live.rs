//! The live map: the bits that queue threads set while guests write.
//!
//! Many threads mark, nobody clears: a generation only grows until a flip closes it, and from then on it is immutable.
//! Orderings are relaxed throughout. What makes a mark visible to the flip is the marker's leaving of its critical
//! section (`admission`); a reader beside live marking (a query) sees a subset that only grows.

use crate::bits::{Bits, note, noted, only_piece, pieces, summary_for, words_for};
#[cfg(not(any(loom, shuttle)))]
use crate::store::mapping::Mapping;
use crate::sync::{AtomicU64, Ordering};
use crate::units::{ByteRange, Granularity};
use std::fmt;
use std::ops::Deref;
#[cfg(not(any(loom, shuttle)))]
use std::sync::Arc;

/// The words of a live map: memory of this process, or of a file on tmpfs that outlives it. Either way a pointer and a
/// length, so that marking costs the same.
struct Words {
    first: *const AtomicU64,
    count: usize,
    _owner: Owner,
}

#[allow(dead_code, reason = "kept for what it owns")]
enum Owner {
    Process(Box<[AtomicU64]>),
    #[cfg(not(any(loom, shuttle)))]
    Mapping(Arc<Mapping>),
}

// SAFETY: what it points to are atomics that live as long as `_owner`, which is bound to no thread.
unsafe impl Send for Words {}
// SAFETY: likewise; atomics may be shared.
unsafe impl Sync for Words {}

impl Words {
    fn own(words: Box<[AtomicU64]>) -> Self {
        Self { first: words.as_ptr(), count: words.len(), _owner: Owner::Process(words) }
    }
}

impl Deref for Words {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        // SAFETY: `_owner` has `count` words from `first` on, does not move them, and is dropped with `self` alone.
        unsafe { std::slice::from_raw_parts(self.first, self.count) }
    }
}

/// Dirty bits shared by all writers of one disk.
pub struct LiveMap {
    granularity: Granularity,
    size: u64,
    words: Words,
    /// One bit a block of words that may hold a bit, as in [`Bits`].
    blocks: Box<[AtomicU64]>,
    /// How many blocks are noted.
    noted: AtomicU64,
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
        let (blocks, noted) = (zeroed(summary_for(words)), AtomicU64::new(0));
        Self { granularity, size, words: Words::own(zeroed(words)), blocks, noted }
    }

    /// Bytes of the words of a map.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn bytes_for(granularity: Granularity, size: u64) -> u64 {
        words_for(granularity, size) as u64 * 8
    }

    /// No bit set, with the words in `mapping` from byte `at` on, which are zero.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn mapped(granularity: Granularity, size: u64, mapping: Arc<Mapping>, at: usize) -> Self {
        let count = words_for(granularity, size);
        let first = mapping.words(at, count);
        let words = Words { first, count, _owner: Owner::Mapping(mapping) };
        Self { granularity, size, words, blocks: zeroed(summary_for(count)), noted: AtomicU64::new(0) }
    }

    /// Bytes a bit stands for.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of the disk that it was made for.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn clamp(&self, range: ByteRange) -> std::ops::Range<u64> {
        self.granularity.cover(range.intersection(ByteRange::new(0, self.size)))
    }

    /// Sets every bit that `range` touches. Allocates nothing, waits for nothing.
    #[inline]
    pub fn mark(&self, range: ByteRange) {
        let bits = self.clamp(range);
        // Most writes touch a granule or two.
        match only_piece(&bits) {
            Some((index, mask)) => self.mark_word(index, mask),
            None => pieces(bits).for_each(|(index, mask)| self.mark_word(index, mask)),
        }
    }

    #[inline]
    fn mark_word(&self, index: usize, mask: u64) {
        let word = &self.words[index];
        // Test before setting: a write to a block that is dirty already must not take the cache line away from
        // the other threads.
        if word.load(Ordering::Relaxed) & mask != mask {
            self.mark_new(index, mask);
        }
    }

    fn mark_new(&self, index: usize, mask: u64) {
        self.words[index].fetch_or(mask, Ordering::Relaxed);
        // Who finds the bit set need not look here: whoever set it does, before it leaves its section.
        let (at, block) = note(index);
        if self.blocks[at].load(Ordering::Relaxed) & block == 0
            && self.blocks[at].fetch_or(block, Ordering::Relaxed) & block == 0
        {
            self.noted.fetch_add(1, Ordering::Relaxed);
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

    /// Bytes of memory that its bits take, about.
    pub(crate) fn weight(&self) -> u64 {
        self.noted.load(Ordering::Relaxed) * 512
    }

    /// A plain copy at the map's own granularity. Only what was marked is looked at, and takes memory in the copy.
    pub fn to_bits(&self) -> Bits {
        let mut bits = Bits::new(self.granularity, self.size);
        let mut block = Vec::with_capacity(64);
        for (at, summary) in self.blocks.iter().enumerate() {
            for words in noted(at, summary.load(Ordering::Relaxed), self.words.len()) {
                block.clear();
                block.extend(self.words[words.clone()].iter().map(|word| word.load(Ordering::Relaxed)));
                bits.add_block(words.start, &block);
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
