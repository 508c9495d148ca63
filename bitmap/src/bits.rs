//! A plain set of dirty bits over one disk: what is left when recording is over.
//!
//! One owner at a time, no atomics. `tracker` folds closed generations into it, jobs walk its runs. A bit past the end
//! of the disk is never set, so counts and hashes are true as they stand.

use crate::units::{ByteRange, Granularity};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;

const WORD: u64 = 64;

/// The dirty bits of a disk of `size` bytes, one for each `granularity` bytes.
///
/// Memory is taken from the system zeroed and untouched: an empty map of a 64 TiB disk costs address space, not RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bits {
    granularity: Granularity,
    size: u64,
    words: Box<[u64]>,
}

/// The mask of bits `from..to` of one word, `from < to <= 64`.
pub(crate) fn mask(from: u64, to: u64) -> u64 {
    (u64::MAX << from) & (u64::MAX >> (WORD - to))
}

/// Splits a run of bits into `(word, mask)` pieces.
pub(crate) fn pieces(bits: std::ops::Range<u64>) -> impl Iterator<Item = (usize, u64)> {
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

pub(crate) fn words_for(granularity: Granularity, size: u64) -> usize {
    granularity.bits_for(size).div_ceil(WORD) as usize
}

impl Bits {
    /// No bit set.
    pub fn new(granularity: Granularity, size: u64) -> Self {
        Self { granularity, size, words: vec![0; words_for(granularity, size)].into() }
    }

    /// Every bit set.
    pub fn full(granularity: Granularity, size: u64) -> Self {
        let mut bits = Self::new(granularity, size);
        bits.set(ByteRange::new(0, size));
        bits
    }

    /// Takes over words that follow this type's layout; bits past the end are dropped.
    pub(crate) fn from_words(granularity: Granularity, size: u64, mut words: Box<[u64]>) -> Self {
        debug_assert_eq!(words.len(), words_for(granularity, size));
        let tail = granularity.bits_for(size) % WORD;
        if let (Some(last), true) = (words.last_mut(), tail != 0) {
            *last &= mask(0, tail);
        }
        Self { granularity, size, words }
    }

    /// Bytes a bit stands for.
    pub fn granularity(&self) -> Granularity {
        self.granularity
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn clamp(&self, range: ByteRange) -> std::ops::Range<u64> {
        self.granularity.cover(range.intersection(ByteRange::new(0, self.size)))
    }

    /// Sets every bit that `range` touches; what lies past the end of the disk is ignored.
    pub fn set(&mut self, range: ByteRange) {
        for (word, mask) in pieces(self.clamp(range)) {
            self.words[word] |= mask;
        }
    }

    /// Clears every bit that `range` touches. A caller that must not lose a neighbour aligns first.
    pub fn clear(&mut self, range: ByteRange) {
        for (word, mask) in pieces(self.clamp(range)) {
            self.words[word] &= !mask;
        }
    }

    /// Whether any bit that `range` touches is set.
    pub fn any(&self, range: ByteRange) -> bool {
        pieces(self.clamp(range)).any(|(word, mask)| self.words[word] & mask != 0)
    }

    /// Set bits times granularity, the last one counted whole: what QEMU calls `count`.
    pub fn dirty_bytes(&self) -> u64 {
        self.set_bits() * self.granularity.bytes()
    }

    /// Number of set bits.
    pub fn set_bits(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no bit is set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Adds every bit of `other`, whatever its granularity: a bit here is set if any byte of it is dirty there.
    /// What lies past the end of this disk is ignored: `other` may be of before a resize.
    pub fn union(&mut self, other: &Bits) {
        if self.granularity == other.granularity && self.size == other.size {
            for (word, add) in self.words.iter_mut().zip(&other.words) {
                // Test first: an untouched page of a sparse map stays untouched.
                if *add != 0 {
                    *word |= add;
                }
            }
        } else {
            for run in other.runs() {
                self.set(run);
            }
        }
    }

    /// The same set at another granularity: coarser loses detail outward, finer repeats each bit.
    pub fn at(&self, granularity: Granularity) -> Bits {
        let mut bits = Bits::new(granularity, self.size);
        bits.union(self);
        bits
    }

    fn next(&self, from: u64, value: bool) -> Option<u64> {
        let end = self.granularity.bits_for(self.size);
        let flip = if value { 0 } else { u64::MAX };
        let mut word = (from / WORD) as usize;
        let mut current = (self.words.get(word)? ^ flip) & (u64::MAX << (from % WORD));
        while current == 0 {
            word += 1;
            current = self.words.get(word)? ^ flip;
        }
        Some(word as u64 * WORD + u64::from(current.trailing_zeros())).filter(|&bit| bit < end)
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
        let mut buffer = Vec::with_capacity(8192);
        for chunk in self.words.chunks(1024) {
            buffer.clear();
            buffer.extend(chunk.iter().flat_map(|word| word.to_le_bytes()));
            hash.update(&buffer);
        }
        hash.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        })
    }
}
