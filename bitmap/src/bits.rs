//! A plain set of dirty bits over one disk: what is left when recording is over.
//!
//! One owner at a time, no atomics. `tracker` folds closed generations into it, jobs walk its runs. A bit past the end
//! of the disk is never set, so counts and hashes are true as they stand.

use crate::units::{ByteRange, Granularity};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::ops::Range;

const WORD: u64 = 64;

/// Words of a block, the unit in which it is noted where bits are set at all, or all of them: 512 bytes of bits.
const BLOCK: usize = 64;

/// Bits of a block.
const BLOCK_BITS: u64 = BLOCK as u64 * WORD;

/// The words of a block of which every bit is set.
static WHOLE: [u64; BLOCK] = [u64::MAX; BLOCK];

/// The dirty bits of a disk of `size` bytes, one for each `granularity` bytes.
///
/// Memory is taken from the system zeroed and untouched: an empty map of a 64 TiB disk costs address space, not RAM. A
/// summary notes which blocks of words may hold a bit, so that whatever walks the set (counts, copies, unions, runs)
/// costs what is dirty and not what there is. Another notes blocks of which every bit is set: they take no memory either, so
/// what is dirty everywhere costs as little as what is clean.
///
/// **Invariant.** A whole block is a full one that `blocks` notes, and its words are zero. So nobody reads `words` without a
/// look at `whole`: that is what `word` and `words_of` are for.
#[derive(Debug)]
pub struct Bits {
    granularity: Granularity,
    size: u64,
    words: Box<[u64]>,
    /// One bit a block. A set bit may stand over a block that was cleared; a clear one never over a bit.
    blocks: Box<[u64]>,
    /// One bit a block: every bit of it is set.
    whole: Box<[u64]>,
}

/// The mask of bits `from..to` of one word, `from < to <= 64`.
#[inline]
pub(crate) fn mask(from: u64, to: u64) -> u64 {
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

/// The piece of a run that lies in one word.
#[inline]
pub(crate) fn only_piece(bits: &Range<u64>) -> Option<(usize, u64)> {
    let word = bits.start / WORD;
    (bits.start < bits.end && bits.end <= (word + 1) * WORD)
        .then(|| (word as usize, mask(bits.start % WORD, bits.end - word * WORD)))
}

/// A run of bits as what lies before the full blocks in it, the numbers of those blocks, and what lies behind them.
fn split(bits: Range<u64>) -> (Range<u64>, Range<usize>, Range<u64>) {
    let (first, last) = (bits.start.div_ceil(BLOCK_BITS), bits.end / BLOCK_BITS);
    if first >= last {
        return (bits, 0..0, 0..0);
    }
    (bits.start..first * BLOCK_BITS, first as usize..last as usize, last * BLOCK_BITS..bits.end)
}

pub(crate) fn words_for(granularity: Granularity, size: u64) -> usize {
    granularity.bits_for(size).div_ceil(WORD) as usize
}

/// Words of a summary over `words` words.
pub(crate) fn summary_for(words: usize) -> usize {
    words.div_ceil(BLOCK).div_ceil(WORD as usize)
}

/// Where in a summary a word's block is noted: `(word of the summary, mask)`.
pub(crate) fn note(word: usize) -> (usize, u64) {
    let block = word / BLOCK;
    (block / WORD as usize, 1 << (block % WORD as usize))
}

/// The words of the blocks that one word of a summary notes.
pub(crate) fn noted(at: usize, mut summary: u64, words: usize) -> impl Iterator<Item = Range<usize>> {
    std::iter::from_fn(move || {
        if summary == 0 {
            return None;
        }
        let start = (at * WORD as usize + summary.trailing_zeros() as usize) * BLOCK;
        summary &= summary - 1;
        Some(start..(start + BLOCK).min(words))
    })
}

impl Clone for Bits {
    fn clone(&self) -> Self {
        let mut bits = Bits::new(self.granularity, self.size);
        for words in self.touched() {
            bits.add_block(words.start, self.words_of(words));
        }
        bits
    }
}

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        let same = |words: Range<usize>| self.words_of(words.clone()) == other.words_of(words);
        (self.granularity, self.size) == (other.granularity, other.size)
            && self.touched().all(same)
            && other.touched().all(same)
    }
}

impl Eq for Bits {}

impl Bits {
    /// No bit set.
    pub fn new(granularity: Granularity, size: u64) -> Self {
        let words = words_for(granularity, size);
        let summary = || vec![0; summary_for(words)].into();
        Self { granularity, size, words: vec![0; words].into(), blocks: summary(), whole: summary() }
    }

    /// Every bit set.
    pub fn full(granularity: Granularity, size: u64) -> Self {
        let mut bits = Self::new(granularity, size);
        bits.set(ByteRange::new(0, size));
        bits
    }

    /// The words that may hold bits, block by block.
    fn touched(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let words = self.words.len();
        self.blocks.iter().enumerate().flat_map(move |(at, summary)| noted(at, *summary, words))
    }

    fn is_whole(&self, word: usize) -> bool {
        let (at, block) = note(word);
        self.whole[at] & block != 0
    }

    /// A word, as it counts.
    fn word(&self, word: usize) -> u64 {
        if self.is_whole(word) { u64::MAX } else { self.words[word] }
    }

    /// The words of one block, as they count.
    fn words_of(&self, words: Range<usize>) -> &[u64] {
        if self.is_whole(words.start) { &WHOLE } else { &self.words[words] }
    }

    /// Sets every bit of the full block that begins with `word`.
    fn fill_block(&mut self, word: usize) {
        let (at, block) = note(word);
        if self.blocks[at] & block != 0 && self.whole[at] & block == 0 {
            self.words[word..word + BLOCK].fill(0);
        }
        self.blocks[at] |= block;
        self.whole[at] |= block;
    }

    /// The words of the block that `word` is in are to be changed one by one.
    fn break_up(&mut self, word: usize) {
        let (at, block) = note(word);
        if self.whole[at] & block != 0 {
            self.whole[at] &= !block;
            let first = word / BLOCK * BLOCK;
            self.words[first..first + BLOCK].fill(u64::MAX);
        }
    }

    /// Clears every bit of the block with these words.
    fn empty_block(&mut self, words: Range<usize>) {
        let (at, block) = note(words.start);
        if self.whole[at] & block != 0 {
            self.whole[at] &= !block;
        } else if self.blocks[at] & block != 0 {
            self.words[words].fill(0);
        }
    }

    /// Adds the bits of a block that begins with word `first`; none of them may lie past the end.
    pub(crate) fn add_block(&mut self, first: usize, words: &[u64]) {
        if *words == WHOLE {
            return self.fill_block(first);
        }
        for (word, value) in (first..).zip(words) {
            // Test first: an untouched page of a sparse map stays untouched.
            if *value != 0 {
                self.set_in_word(word, *value);
            }
        }
    }

    /// The blocks that hold bits, each with its number and up to 64 words: what there is to be written down.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, &[u64])> {
        let blocks = self.touched().map(|words| ((words.start / BLOCK) as u64, self.words_of(words)));
        blocks.filter(|(_, words)| words.iter().any(|word| *word != 0))
    }

    /// Puts a block that [`Bits::blocks`] gave back. `false`: it has a place or bits that this set does not have.
    pub(crate) fn put_block(&mut self, block: u64, words: &[u64]) -> bool {
        let bits = self.granularity.bits_for(self.size);
        let Some(first) = usize::try_from(block).ok().and_then(|block| block.checked_mul(BLOCK)) else { return false };
        let expected = self.words.len().saturating_sub(first).min(BLOCK);
        if expected == 0 || words.len() != expected {
            return false;
        }
        for (word, value) in (first..).zip(words) {
            let room = bits.saturating_sub(word as u64 * WORD).min(WORD);
            if room < WORD && value >> room != 0 {
                return false;
            }
        }
        self.add_block(first, words);
        true
    }

    /// Sets the bits of `mask` in word `word`; none of them may lie past the end.
    fn set_in_word(&mut self, word: usize, mask: u64) {
        let (at, block) = note(word);
        if self.whole[at] & block == 0 {
            self.words[word] |= mask;
            self.blocks[at] |= block;
        }
    }

    /// Bytes a bit stands for.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn clamp(&self, range: ByteRange) -> Range<u64> {
        self.granularity.cover(range.intersection(ByteRange::new(0, self.size)))
    }

    /// Sets every bit that `range` touches; what lies past the end of the disk is ignored.
    pub fn set(&mut self, range: ByteRange) {
        let (before, blocks, after) = split(self.clamp(range));
        for (word, mask) in pieces(before).chain(pieces(after)) {
            self.set_in_word(word, mask);
        }
        for block in blocks {
            self.fill_block(block * BLOCK);
        }
    }

    /// Clears every bit that `range` touches. A caller that must not lose a neighbour aligns first.
    pub fn clear(&mut self, range: ByteRange) {
        let (before, blocks, after) = split(self.clamp(range));
        for (word, mask) in pieces(before).chain(pieces(after)) {
            self.clear_in_word(word, mask);
        }
        for block in blocks {
            self.empty_block(block * BLOCK..(block + 1) * BLOCK);
        }
    }

    fn clear_in_word(&mut self, word: usize, mask: u64) {
        if self.word(word) & mask != 0 {
            self.break_up(word);
            self.words[word] &= !mask;
        }
    }

    /// Whether any bit that `range` touches is set.
    pub fn any(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).any(|(word, mask)| self.word(word) & mask != 0)
    }

    /// Set bits times granularity, the last one counted whole: what QEMU calls `count`.
    pub fn dirty_bytes(&self) -> u64 {
        self.set_bits() * self.granularity.bytes()
    }

    /// Number of set bits.
    pub fn set_bits(&self) -> u64 {
        let of_block = |words| match self.words_of(words) {
            words if std::ptr::eq(words, &WHOLE) => BLOCK_BITS,
            words => words.iter().map(|word| u64::from(word.count_ones())).sum(),
        };
        self.touched().map(of_block).sum()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.touched().flat_map(|words| self.words_of(words)).all(|&word| word == 0)
    }

    /// Adds every bit of `other`, whatever its granularity: a bit here is set if any byte of it is dirty there.
    /// What lies past the end of this disk is ignored: `other` may be of before a resize.
    pub fn union(&mut self, other: &Bits) {
        if self.granularity == other.granularity && self.size == other.size {
            for words in other.touched() {
                self.add_block(words.start, other.words_of(words));
            }
        } else {
            for run in other.runs() {
                self.set(run);
            }
        }
    }

    /// Takes away every bit whose bytes are all in `other`.
    pub fn subtract(&mut self, other: &Bits) {
        if self.granularity == other.granularity && self.size == other.size {
            for words in other.touched() {
                if other.is_whole(words.start) {
                    self.empty_block(words);
                    continue;
                }
                for word in words {
                    self.clear_in_word(word, other.words[word]);
                }
            }
            return;
        }
        let cell = self.granularity.bytes();
        for run in other.runs() {
            let end = if run.end() >= self.size { self.size } else { run.end() / cell * cell };
            self.clear(ByteRange::between(run.start().next_multiple_of(cell), end));
        }
    }

    /// The same set at another granularity: coarser loses detail outward, finer repeats each bit.
    pub fn at(&self, granularity: Granularity) -> Bits {
        let mut bits = Bits::new(granularity, self.size);
        bits.union(self);
        bits
    }

    /// The first bit from `from` on that is `value`.
    fn next(&self, from: u64, value: bool) -> Option<u64> {
        let end = self.granularity.bits_for(self.size);
        let flip = if value { 0 } else { u64::MAX };
        let mut word = (from / WORD) as usize;
        let at = |word: usize| (word < self.words.len()).then(|| self.word(word) ^ flip);
        let mut current = at(word)? & (u64::MAX << (from % WORD));
        while current == 0 {
            word = if value { self.next_touched(word + 1)? } else { self.next_in_part(word + 1) };
            current = at(word)?;
        }
        Some(word as u64 * WORD + u64::from(current.trailing_zeros())).filter(|&bit| bit < end)
    }

    /// `word`, or the first word of the next block that is not whole, or is none.
    fn next_in_part(&self, mut word: usize) -> usize {
        while word < self.words.len() && self.is_whole(word) {
            word = (word / BLOCK + 1) * BLOCK;
        }
        word
    }

    /// `word`, or the first word of the next block that may hold a bit.
    fn next_touched(&self, word: usize) -> Option<usize> {
        let (mut at, block) = note(word);
        let mut summary = *self.blocks.get(at)?;
        if summary & block != 0 {
            return Some(word);
        }
        // Blocks behind this one.
        summary &= !(block | (block - 1));
        while summary == 0 {
            at += 1;
            summary = *self.blocks.get(at)?;
        }
        noted(at, summary, self.words.len()).next().map(|words| words.start)
    }

    /// The maximal dirty ranges in ascending order, the last cut at the end of the disk.
    pub fn runs(&self) -> impl Iterator<Item = ByteRange> + '_ {
        let end = self.granularity.bits_for(self.size);
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            at = self.next(start, false).unwrap_or(end);
            Some(self.granularity.range(start..at, self.size))
        })
    }

    /// Whether the bit of byte `offset` is set, and where the run of bits like it ends: at the end of the disk at the latest.
    /// `None` past the end.
    pub fn run_at(&self, offset: u64) -> Option<(bool, u64)> {
        if offset >= self.size {
            return None;
        }
        let bit = offset / self.granularity.bytes();
        let dirty = self.next(bit, true);
        let set = dirty == Some(bit);
        let next = if set { self.next(bit, false) } else { dirty };
        Some((set, next.map_or(self.size, |next| next * self.granularity.bytes())))
    }

    /// SHA-256 in hex over the bits as 64-bit words: for little-endian hosts the value that QEMU's
    /// `x-debug-block-dirty-bitmap-sha256` gives for the same bits.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        let mut buffer = Vec::with_capacity(BLOCK * 8);
        for first in (0..self.words.len()).step_by(BLOCK) {
            let words = self.words_of(first..(first + BLOCK).min(self.words.len()));
            buffer.clear();
            buffer.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            hash.update(&buffer);
        }
        hash.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}
