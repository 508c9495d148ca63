//! A plain set of dirty bits over one disk: what is left when recording is over.
//!
//! One owner at a time, no atomics. `tracker` folds closed generations into it, jobs walk its runs. A bit past the end
//! of the disk is never set, so counts and hashes are true as they stand. How it lies in memory is the affair of `blocks`.

use crate::blocks::{BLOCK, BLOCK_BITS, Blocks, WORD, pieces, split, words_for};
use crate::units::{ByteRange, Granularity};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::ops::Range;

/// The dirty bits of a disk of `size` bytes, one for each `granularity` bytes.
///
/// What is walked (counts, copies, unions, runs) costs what is dirty and not what there is, and so does the memory: blocks of
/// bits that are all clear, or all set, take none.
#[derive(Debug)]
pub struct Bits {
    granularity: Granularity,
    size: u64,
    blocks: Box<Blocks>,
}

impl Clone for Bits {
    fn clone(&self) -> Self {
        let mut bits = Bits::new(self.granularity, self.size);
        bits.add_blocks(self);
        bits
    }
}

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        let same = |block: usize| self.blocks.of(block) == other.blocks.of(block);
        (self.granularity, self.size) == (other.granularity, other.size)
            && self.blocks.noted().all(same)
            && other.blocks.noted().all(same)
    }
}

impl Eq for Bits {}

impl Bits {
    /// No bit set.
    pub fn new(granularity: Granularity, size: u64) -> Self {
        Self { granularity, size, blocks: Box::new(Blocks::new(words_for(granularity, size))) }
    }

    /// Every bit set.
    pub fn full(granularity: Granularity, size: u64) -> Self {
        let mut bits = Self::new(granularity, size);
        bits.set(ByteRange::new(0, size));
        bits
    }

    /// Adds the bits of a set that is over the same disk, at the same granularity.
    fn add_blocks(&mut self, other: &Bits) {
        for block in other.blocks.noted() {
            self.blocks.add(block, other.blocks.of(block));
        }
    }

    /// Adds the bits of a block; none of them may lie past the end.
    pub(crate) fn add_block(&mut self, block: usize, words: &[u64]) {
        self.blocks.add(block, words);
    }

    /// The blocks that hold bits, each with its number and up to 64 words: what there is to be written down.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = (u64, &[u64])> {
        let blocks = self.blocks.noted().map(|block| (block as u64, self.blocks.of(block)));
        blocks.filter(|(_, words)| words.iter().any(|word| *word != 0))
    }

    /// Puts a block that [`Bits::blocks`] gave back. `false`: it has a place or bits that this set does not have.
    pub(crate) fn put_block(&mut self, block: u64, words: &[u64]) -> bool {
        let bits = self.granularity.bits_for(self.size);
        let Some(block) = usize::try_from(block).ok().filter(|block| *block < self.blocks.count()) else {
            return false;
        };
        let place = self.blocks.range(block);
        if words.len() != place.len() {
            return false;
        }
        for (word, value) in place.zip(words) {
            let room = bits.saturating_sub(word as u64 * WORD).min(WORD);
            if room < WORD && value >> room != 0 {
                return false;
            }
        }
        self.blocks.add(block, words);
        true
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
            self.blocks.set(word, mask);
        }
        for block in blocks {
            self.blocks.fill(block);
        }
    }

    /// Clears every bit that `range` touches. A caller that must not lose a neighbour aligns first.
    pub fn clear(&mut self, range: ByteRange) {
        let (before, blocks, after) = split(self.clamp(range));
        for (word, mask) in pieces(before).chain(pieces(after)) {
            self.blocks.clear(word, mask);
        }
        for block in blocks {
            self.blocks.empty(block);
        }
    }

    /// Whether any bit that `range` touches is set.
    pub fn any(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).any(|(word, mask)| self.blocks.word(word) & mask != 0)
    }

    /// Set bits times granularity, the last one counted whole: what QEMU calls `count`.
    pub fn dirty_bytes(&self) -> u64 {
        self.set_bits() * self.granularity.bytes()
    }

    /// Number of set bits.
    pub fn set_bits(&self) -> u64 {
        let of_block = |block| match self.blocks.is_whole(block) {
            true => BLOCK_BITS,
            false => self.blocks.of(block).iter().map(|word| u64::from(word.count_ones())).sum(),
        };
        self.blocks.noted().map(of_block).sum()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.blocks().next().is_none()
    }

    /// Adds every bit of `other`, whatever its granularity: a bit here is set if any byte of it is dirty there.
    /// What lies past the end of this disk is ignored: `other` may be of before a resize.
    pub fn union(&mut self, other: &Bits) {
        if (self.granularity, self.size) == (other.granularity, other.size) {
            self.add_blocks(other);
        } else {
            for run in other.runs() {
                self.set(run);
            }
        }
    }

    /// Takes away every bit whose bytes are all in `other`.
    pub fn subtract(&mut self, other: &Bits) {
        if (self.granularity, self.size) == (other.granularity, other.size) {
            for block in other.blocks.noted() {
                if other.blocks.is_whole(block) {
                    self.blocks.empty(block);
                    continue;
                }
                for (word, mask) in other.blocks.range(block).zip(other.blocks.of(block)) {
                    self.blocks.clear(word, *mask);
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

    /// The same, of a set that is not needed any more: nothing is copied where the granularity is that already.
    pub fn into_at(self, granularity: Granularity) -> Bits {
        if self.granularity == granularity { self } else { self.at(granularity) }
    }

    /// The first bit from `from` on that is `value`.
    fn next(&self, from: u64, value: bool) -> Option<u64> {
        let (end, flip) = (self.granularity.bits_for(self.size), if value { 0 } else { u64::MAX });
        let mut word = (from / WORD) as usize;
        let mut mask = u64::MAX << (from % WORD);
        while word < self.blocks.words() {
            let (block, at) = (word / BLOCK, word % BLOCK);
            if value {
                let next = self.blocks.next_noted(block)?;
                if next != block {
                    (word, mask) = (self.blocks.range(next).start, u64::MAX);
                    continue;
                }
            }
            if value || !self.blocks.is_whole(block) {
                for (word, bits) in (word..).zip(&self.blocks.of(block)[at..]) {
                    let found = (bits ^ flip) & mask;
                    if found != 0 {
                        return Some(word as u64 * WORD + u64::from(found.trailing_zeros())).filter(|&bit| bit < end);
                    }
                    mask = u64::MAX;
                }
            }
            (word, mask) = (self.blocks.range(block).end, u64::MAX);
        }
        None
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
        let mut buffer = Vec::new();
        for block in 0..self.blocks.count() {
            buffer.clear();
            buffer.extend(self.blocks.of(block).iter().flat_map(|word| word.to_le_bytes()));
            hash.update(&buffer);
        }
        hash.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}
