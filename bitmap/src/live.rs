//! The live map: the bits that queue threads set while guests write.
//!
//! Many threads mark, nobody clears: a generation only grows until a flip closes it, and from then on it is immutable.
//! Orderings are relaxed throughout. What makes a mark visible to the flip is the marker's leaving of its critical
//! section (`admission`); a reader beside live marking (a query) sees a subset that only grows.
//!
//! As in [`Bits`], only blocks that were marked take memory. In a file on tmpfs, which is allocated in full, every block has the
//! place of its number; a private table says of those, too, which were marked.

use crate::bits::Bits;
use crate::blocks::{BLOCK, WORD, note, noted, pieces, summary_for, words_for};
use crate::places::Places;
#[cfg(not(any(loom, shuttle)))]
use crate::store::mapping::Mapping;
use crate::sync::{AtomicU64, Ordering};
use crate::table::Table;
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
    Process(Table<AtomicU64>),
    #[cfg(not(any(loom, shuttle)))]
    Mapping(Arc<Mapping>),
}

// SAFETY: what it points to are atomics that live as long as `_owner`, which is bound to no thread.
unsafe impl Send for Words {}
// SAFETY: likewise; atomics may be shared.
unsafe impl Sync for Words {}

impl Words {
    fn own(words: Table<AtomicU64>) -> Self {
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
    /// Of each block, where in `pool` its words are.
    places: Places,
    pool: Words,
    /// One bit a block that may hold a bit.
    blocks: Table<AtomicU64>,
    /// How many blocks are noted.
    noted: AtomicU64,
}

impl LiveMap {
    /// No bit set.
    pub fn new(granularity: Granularity, size: u64) -> Self {
        let blocks = words_for(granularity, size).div_ceil(BLOCK);
        Self::with(granularity, size, Places::new(blocks, false), Words::own(Table::new(blocks * BLOCK)))
    }

    fn with(granularity: Granularity, size: u64, places: Places, pool: Words) -> Self {
        let blocks = words_for(granularity, size).div_ceil(BLOCK);
        Self { granularity, size, places, pool, blocks: Table::new(summary_for(blocks)), noted: AtomicU64::new(0) }
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
        let pool = Words { first, count, _owner: Owner::Mapping(mapping) };
        Self::with(granularity, size, Places::new(count.div_ceil(BLOCK), true), pool)
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
        // Most writes touch one granule.
        if let Some(bit) = self.granularity.only(range)
            && range.end() <= self.size
        {
            return self.mark_word((bit / WORD) as usize, 1 << (bit % WORD));
        }
        pieces(self.clamp(range)).for_each(|(index, mask)| self.mark_word(index, mask));
    }

    /// The word at `index`, if its block has a place.
    #[inline]
    fn word(&self, index: usize) -> Option<&AtomicU64> {
        match self.places.of(index / BLOCK) {
            0 => None,
            place => Some(&self.pool[(place - 1) * BLOCK + index % BLOCK]),
        }
    }

    /// A word's bits.
    #[inline]
    fn load(&self, index: usize) -> u64 {
        self.word(index).map_or(0, |word| word.load(Ordering::Relaxed))
    }

    #[inline]
    fn mark_word(&self, index: usize, mask: u64) {
        let Some(word) = self.word(index) else { return self.mark_first(index, mask) };
        // Test before setting: a write to a block that is dirty already must not take the cache line away from
        // the other threads.
        if word.load(Ordering::Relaxed) & mask != mask {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// The same in a block that had no mark so far.
    #[cold]
    fn mark_first(&self, index: usize, mask: u64) {
        // Who finds a place need not look here: whoever gives it notes the block before, and before it leaves its section.
        let (at, block) = note(index / BLOCK);
        if self.blocks[at].fetch_or(block, Ordering::Relaxed) & block == 0 {
            self.noted.fetch_add(1, Ordering::Relaxed);
        }
        let place = self.places.give(index / BLOCK);
        self.pool[(place - 1) * BLOCK + index % BLOCK].fetch_or(mask, Ordering::Relaxed);
    }

    /// Whether any bit that `range` touches is set.
    #[inline]
    pub fn any(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).any(|(word, mask)| self.load(word) & mask != 0)
    }

    /// Whether every bit that `range` touches is set; true for an empty range.
    #[inline]
    pub fn all(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).all(|(word, mask)| self.load(word) & mask == mask)
    }

    /// Bytes of memory that its bits take, about.
    pub(crate) fn weight(&self) -> u64 {
        self.noted.load(Ordering::Relaxed) * 512
    }

    /// A plain copy at the map's own granularity. Only what was marked is looked at, and takes memory in the copy.
    pub fn to_bits(&self) -> Bits {
        let mut bits = Bits::new(self.granularity, self.size);
        self.add_to(&mut bits);
        bits
    }

    /// Adds every bit to `bits`, whatever its granularity.
    pub fn fold_into(&self, bits: &mut Bits) {
        if (bits.granularity(), bits.size()) == (self.granularity, self.size) {
            self.add_to(bits);
        } else {
            bits.union(&self.to_bits());
        }
    }

    /// The same, of a set that is over the same disk, at the same granularity.
    fn add_to(&self, bits: &mut Bits) {
        let (mut copy, words) = ([0; BLOCK], words_for(self.granularity, self.size));
        for (at, summary) in self.blocks.iter().enumerate() {
            for block in noted(at, summary.load(Ordering::Relaxed)) {
                let place = self.places.of(block);
                if place == 0 {
                    // Its first mark is being made, and is seen by a later look.
                    continue;
                }
                let count = (words - block * BLOCK).min(BLOCK);
                let ours = &self.pool[(place - 1) * BLOCK..][..count];
                copy.iter_mut().zip(ours).for_each(|(copy, word)| *copy = word.load(Ordering::Relaxed));
                bits.add_block(block, &copy[..count]);
            }
        }
    }
}

impl fmt::Debug for LiveMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveMap").field("granularity", &self.granularity).field("size", &self.size).finish()
    }
}
