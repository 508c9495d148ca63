//! How a set of bits lies in memory: in blocks of 512 bytes, of which only those exist that hold some bits and not all.
//!
//! The ground of `bits` (one owner) and of `live` (many who mark), which share the geometry: bits in words, words in blocks,
//! summaries with a bit a block. A thousand bits that are scattered over a large disk take a thousand blocks, which lie side by
//! side in a pool, eight a page; spread over their places in one large table they would take a page each, and to get, clear
//! and give back a page costs far more than all else that is done with such a set.

use crate::table::Table;
use crate::units::Granularity;
use std::ops::Range;

pub(crate) const WORD: u64 = 64;

/// Words of a block. In a model one, so that a map has several blocks and few atomics.
pub(crate) const BLOCK: usize = if cfg!(any(loom, shuttle)) { 1 } else { 64 };

/// Bits of a block.
pub(crate) const BLOCK_BITS: u64 = BLOCK as u64 * WORD;

/// The words of a block of which every bit is set, and of one of which none is.
static WHOLE: [u64; BLOCK] = [u64::MAX; BLOCK];
static EMPTY: [u64; BLOCK] = [0; BLOCK];

/// The mask of bits `from..to` of one word, `from < to <= 64`.
#[inline]
fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (WORD - to))
}

/// Splits a run of bits into `(word, mask)` pieces.
pub(crate) fn pieces(bits: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let mut at = bits.start;
    std::iter::from_fn(move || {
        if at >= bits.end {
            return None;
        }
        let word = at / WORD;
        let to = bits.end.min((word + 1) * WORD);
        let piece = (word as usize, mask(at % WORD, to - word * WORD));
        at = to;
        Some(piece)
    })
}

/// A run of bits as what lies before the full blocks in it, the numbers of those blocks, and what lies behind them.
pub(crate) fn split(bits: Range<u64>) -> (Range<u64>, Range<usize>, Range<u64>) {
    let (first, last) = (bits.start.div_ceil(BLOCK_BITS), bits.end / BLOCK_BITS);
    if first >= last {
        return (bits, 0..0, 0..0);
    }
    (bits.start..first * BLOCK_BITS, first as usize..last as usize, last * BLOCK_BITS..bits.end)
}

pub(crate) fn words_for(granularity: Granularity, size: u64) -> usize {
    granularity.bits_for(size).div_ceil(WORD) as usize
}

/// Words of a summary over `blocks` blocks.
pub(crate) fn summary_for(blocks: usize) -> usize {
    blocks.div_ceil(WORD as usize)
}

/// Where in a summary a block is noted: `(word of the summary, mask)`.
#[inline]
pub(crate) fn note(block: usize) -> (usize, u64) {
    (block / WORD as usize, 1 << (block % WORD as usize))
}

/// The blocks that word `at` of a summary notes.
pub(crate) fn noted(at: usize, mut summary: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let block = (summary != 0).then(|| at * WORD as usize + summary.trailing_zeros() as usize)?;
        summary &= summary - 1;
        Some(block)
    })
}

/// The words of one set, block by block.
///
/// **Invariant.** A block that is not noted holds no bit; one that is `whole` holds all of its bits and is a full one. Exactly those
/// that are noted and not whole have a place in the pool, each another one. So what is clean everywhere, or dirty, takes no memory
/// but that of the summaries.
#[derive(Debug)]
pub(crate) struct Blocks {
    words: usize,
    /// One bit a block: it may hold a bit.
    noted: Table<u64>,
    /// One bit a block: every bit of it is set.
    whole: Table<u64>,
    /// The place of each block, counted from 1.
    places: Table<u32>,
    /// The places, as many as there are blocks; those that were never taken are zero, and take no memory.
    pool: Table<u64>,
    /// Places that were ever taken: the first ones.
    used: u32,
    /// Those of them that are free again, and hold anything.
    free: Vec<u32>,
}

impl Blocks {
    /// No bit set in `words` words.
    pub(crate) fn new(words: usize) -> Self {
        let blocks = words.div_ceil(BLOCK);
        let (noted, whole) = (Table::new(summary_for(blocks)), Table::new(summary_for(blocks)));
        let (places, pool) = (Table::new(blocks), Table::new(blocks * BLOCK));
        Self { words, noted, whole, places, pool, used: 0, free: Vec::new() }
    }

    /// Number of words.
    pub(crate) fn words(&self) -> usize {
        self.words
    }

    /// Number of blocks.
    pub(crate) fn count(&self) -> usize {
        self.places.len()
    }

    /// The words of a block: 64, or as many as there are in the last one.
    pub(crate) fn range(&self, block: usize) -> Range<usize> {
        block * BLOCK..((block + 1) * BLOCK).min(self.words)
    }

    /// The blocks that may hold bits.
    pub(crate) fn noted(&self) -> impl Iterator<Item = usize> + '_ {
        self.noted.iter().enumerate().flat_map(|(at, summary)| noted(at, *summary))
    }

    /// The first block from `block` on that may hold a bit.
    pub(crate) fn next_noted(&self, block: usize) -> Option<usize> {
        let (mut at, first) = note(block);
        let mut summary = *self.noted.get(at)? & !(first - 1);
        while summary == 0 {
            at += 1;
            summary = *self.noted.get(at)?;
        }
        noted(at, summary).next()
    }

    fn is_noted(&self, block: usize) -> bool {
        let (at, mask) = note(block);
        self.noted[at] & mask != 0
    }

    /// Whether every bit of a full block is known to be set.
    pub(crate) fn is_whole(&self, block: usize) -> bool {
        let (at, mask) = note(block);
        self.whole[at] & mask != 0
    }

    /// The words of a block.
    pub(crate) fn of(&self, block: usize) -> &[u64] {
        let count = self.range(block).len();
        match self.places[block] as usize {
            0 if self.is_whole(block) => &WHOLE,
            0 => &EMPTY[..count],
            place => &self.pool[(place - 1) * BLOCK..][..count],
        }
    }

    /// A word.
    pub(crate) fn word(&self, word: usize) -> u64 {
        self.of(word / BLOCK)[word % BLOCK]
    }

    /// The words of a block, to be changed one by one.
    pub(crate) fn change(&mut self, block: usize) -> &mut [u64] {
        let count = self.range(block).len();
        if self.places[block] == 0 {
            let (at, mask) = note(block);
            let value = if self.whole[at] & mask != 0 { u64::MAX } else { 0 };
            let (place, fresh) = match self.free.pop() {
                Some(place) => (place, false),
                None => (self.used + 1, true),
            };
            self.used = self.used.max(place);
            let first = (place as usize - 1) * BLOCK;
            if value != 0 || !fresh {
                self.pool[first..first + BLOCK].fill(value);
            }
            self.whole[at] &= !mask;
            self.noted[at] |= mask;
            self.places[block] = place;
        }
        let first = (self.places[block] as usize - 1) * BLOCK;
        &mut self.pool[first..first + count]
    }

    fn give_back(&mut self, block: usize) {
        let place = self.places[block];
        if place != 0 {
            self.places[block] = 0;
            self.free.push(place);
        }
    }

    /// Sets every bit of a full block.
    pub(crate) fn fill(&mut self, block: usize) {
        self.give_back(block);
        let (at, mask) = note(block);
        self.noted[at] |= mask;
        self.whole[at] |= mask;
    }

    /// Clears every bit of a block.
    pub(crate) fn empty(&mut self, block: usize) {
        self.give_back(block);
        let (at, mask) = note(block);
        self.noted[at] &= !mask;
        self.whole[at] &= !mask;
    }

    /// Adds bits to a block, none of which may lie past the end.
    pub(crate) fn add(&mut self, block: usize, words: &[u64]) {
        if *words == WHOLE {
            self.fill(block);
        } else if !self.is_whole(block) && words.iter().any(|word| *word != 0) {
            if self.is_noted(block) {
                self.change(block).iter_mut().zip(words).for_each(|(word, more)| *word |= more);
            } else {
                self.change(block)[..words.len()].copy_from_slice(words);
            }
        }
    }

    /// Sets the bits of `mask` in a word; none of them may lie past the end.
    pub(crate) fn set(&mut self, word: usize, mask: u64) {
        if !self.is_whole(word / BLOCK) {
            self.change(word / BLOCK)[word % BLOCK] |= mask;
        }
    }

    /// Clears the bits of `mask` in a word.
    pub(crate) fn clear(&mut self, word: usize, mask: u64) {
        if self.word(word) & mask != 0 {
            self.change(word / BLOCK)[word % BLOCK] &= !mask;
        }
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    fn places(blocks: &Blocks) -> Vec<u32> {
        let mut places: Vec<u32> = blocks.places.iter().copied().filter(|place| *place != 0).collect();
        places.sort_unstable();
        places
    }

    #[test]
    fn what_is_given_back_is_taken_again_and_holds_nothing_of_what_it_held() {
        let mut blocks = Blocks::new(10 * BLOCK + 3);
        for block in [7, 2, 10, 5] {
            blocks.set(block * BLOCK + 2, 1 << block);
        }
        assert_eq!(places(&blocks), [1, 2, 3, 4]);
        blocks.empty(2);
        blocks.fill(7);
        blocks.set(9 * BLOCK, 1);
        blocks.clear(7 * BLOCK + 1, 2);
        assert_eq!(places(&blocks), [1, 2, 3, 4], "two were free");
        assert_eq!(blocks.noted().collect::<Vec<_>>(), [5, 7, 9, 10]);
        assert_eq!(blocks.of(9).iter().sum::<u64>(), 1);
        assert_eq!(blocks.of(10), [0, 0, 1 << 10]);
        let seven = blocks.of(7);
        assert_eq!((seven[0], seven[1]), (u64::MAX, !2));
        assert_eq!(seven.iter().map(|word| u64::from(word.count_ones())).sum::<u64>(), BLOCK_BITS - 1);
    }
}
