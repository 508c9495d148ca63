//! The units that everybody shares: byte ranges of a disk and the granularity of a bitmap. Rounding lives here alone.

use std::fmt;
use std::ops::Range;

/// Bytes of one sector, the unit of virtio-blk and the finest granularity there is.
pub const SECTOR: u64 = 512;

/// A range of bytes of a disk. `start + len` never overflows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ByteRange {
    start: u64,
    len: u64,
}

impl ByteRange {
    /// The `len` bytes from `start`, cut short at the end of the address space.
    pub const fn new(start: u64, len: u64) -> Self {
        let room = u64::MAX - start;
        Self { start, len: if len > room { room } else { len } }
    }

    /// The bytes from `start` up to, not including, `end`; empty if `end` comes first.
    pub const fn between(start: u64, end: u64) -> Self {
        Self { start, len: end.saturating_sub(start) }
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Number of bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// First byte behind the range.
    pub const fn end(self) -> u64 {
        self.start + self.len
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether the two share a byte.
    pub const fn intersects(self, other: Self) -> bool {
        self.start < other.end() && other.start < self.end() && self.len > 0 && other.len > 0
    }

    /// What the two share.
    pub fn intersection(self, other: Self) -> Self {
        Self::between(self.start.max(other.start), self.end().min(other.end()))
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.start, self.len)
    }
}

/// Bytes that one bit of a bitmap stands for: a power of two, 512 B to 2 GiB.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Granularity {
    shift: u8,
}

impl Granularity {
    /// What a bitmap has when nobody asks for another.
    pub const DEFAULT: Self = Self { shift: 16 };
    /// 512 B.
    pub const MIN: Self = Self { shift: 9 };
    /// 2 GiB.
    pub const MAX: Self = Self { shift: 31 };

    /// `None` unless `bytes` is a power of two from 512 to 2^31.
    pub const fn new(bytes: u64) -> Option<Self> {
        if bytes.is_power_of_two() && bytes >= SECTOR && bytes <= 1 << 31 {
            Some(Self { shift: bytes.trailing_zeros() as u8 })
        } else {
            None
        }
    }

    /// Size in bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// Bits that cover `size` bytes, the last of them perhaps in part.
    pub const fn bits_for(self, size: u64) -> u64 {
        size.div_ceil(1 << self.shift)
    }

    /// The bit that `offset` falls into.
    pub const fn index(self, offset: u64) -> u64 {
        offset >> self.shift
    }

    /// The bits that `range` touches: rounded outward.
    pub const fn cover(self, range: ByteRange) -> Range<u64> {
        if range.len == 0 {
            return 0..0;
        }
        (range.start >> self.shift)..(((range.end() - 1) >> self.shift) + 1)
    }

    /// The bit that `range` touches, if it touches exactly one.
    #[inline]
    pub const fn only(self, range: ByteRange) -> Option<u64> {
        // Of an empty range the last byte is before the first one, and of one at byte 0 it is nowhere.
        let (first, last) = (range.start >> self.shift, range.end().wrapping_sub(1) >> self.shift);
        if first == last && range.len > 0 { Some(first) } else { None }
    }

    /// The bytes of bits `bits`, cut at `size`.
    pub fn range(self, bits: Range<u64>, size: u64) -> ByteRange {
        ByteRange::between((bits.start << self.shift).min(size), (bits.end << self.shift).min(size))
    }
}

impl fmt::Debug for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}B", self.bytes())
    }
}
