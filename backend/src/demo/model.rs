//! What the guest knows of its disk: for each block the stamp of the last write, and from that every byte.
//!
//! A block's content is a pure function of its number and its stamp, so a table of stamps *is* a disk: copying the table
//! takes a millisecond, and the checksum that a backup has to have can be computed from the copy at any later time. The
//! writers keep the table, `prove` compares images with copies of it.
//!
//! Invariants: a block has one owner among the writers and one request in flight at a time, so its stamps only grow; a
//! stamp is entered as issued before its request is submitted, and as acknowledged after its completion was seen.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Bytes of a block, the unit that the guest stamps.
pub const BLOCK: usize = 4096;

/// The stamp of what lay on the disk before the guest began.
pub const FIRST_STAMP: u32 = 1;

/// Begins every block that holds data, so that strange bytes are known as such.
const MAGIC: u32 = 0x6b6d_6c62;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing but zeroes: never written, discarded or zeroed.
    Zeroes,
    /// The bytes that belong to a stamp.
    Data(u32),
}

/// The last request for a block: its stamp, and the stamp of the last request that zeroed the block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark(u64);

impl Mark {
    /// Stamp 0 is that of a block nobody wrote, which holds zeroes.
    pub fn new(stamp: u32, zeroed: u32) -> Self {
        Mark(u64::from(stamp) << 32 | u64::from(zeroed))
    }

    /// The last request's stamp.
    pub fn stamp(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// The stamp of the last request that zeroed the block.
    pub fn zeroed(self) -> u32 {
        self.0 as u32
    }

    /// What the block holds after the last request.
    pub fn content(self) -> Content {
        if self.stamp() == self.zeroed() { Content::Zeroes } else { Content::Data(self.stamp()) }
    }
}

/// Writes what `block` holds into `bytes`, which has the length of a block.
pub fn fill(block: u64, content: Content, bytes: &mut [u8]) {
    let Content::Data(stamp) = content else { return bytes.fill(0) };
    let (head, body) = bytes.split_at_mut(16);
    head[..4].copy_from_slice(&MAGIC.to_le_bytes());
    head[4..8].copy_from_slice(&stamp.to_le_bytes());
    head[8..].copy_from_slice(&block.to_le_bytes());
    let mut state = mix(block ^ u64::from(stamp) << 40);
    for word in body.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&(state ^ state >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9).to_le_bytes());
    }
}

/// A good mixture of a number's bits (the finisher of splitmix64).
pub fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// What `block` holds, told from its bytes; `None` if they are no whole content of that block.
pub fn read(block: u64, bytes: &[u8]) -> Option<Content> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(Content::Zeroes);
    }
    let content = Content::Data(head(bytes)?.0);
    let mut whole = [0; BLOCK];
    fill(block, content, &mut whole);
    (whole == *bytes).then_some(content)
}

/// The stamp and the block number that the first bytes speak of.
pub fn head(bytes: &[u8]) -> Option<(u32, u64)> {
    let (magic, rest) = bytes.split_first_chunk::<4>()?;
    let (stamp, rest) = rest.split_first_chunk::<4>()?;
    let (block, _) = rest.split_first_chunk::<8>()?;
    (u32::from_le_bytes(*magic) == MAGIC).then(|| (u32::from_le_bytes(*stamp), u64::from_le_bytes(*block)))
}

/// The stamps of all blocks, kept by the writers while they write.
pub struct Table {
    issued: Box<[AtomicU64]>,
    acknowledged: Box<[AtomicU32]>,
}

impl Table {
    /// Of a disk of `blocks` blocks, of which those hold data for which `filled` says so.
    pub fn new(blocks: u64, filled: impl Fn(u64) -> bool) -> Self {
        let first = |block| if filled(block) { FIRST_STAMP } else { 0 };
        Table {
            issued: (0..blocks).map(|block| AtomicU64::new(Mark::new(first(block), 0).0)).collect(),
            acknowledged: (0..blocks).map(|block| AtomicU32::new(first(block))).collect(),
        }
    }

    /// A request is about to be submitted. Only the owner of the blocks calls this.
    pub fn issue(&self, blocks: Range<u64>, stamp: u32, zeroes: bool) {
        for mark in &self.issued[blocks.start as usize..blocks.end as usize] {
            let zeroed = if zeroes { stamp } else { Mark(mark.load(Ordering::Relaxed)).zeroed() };
            mark.store(Mark::new(stamp, zeroed).0, Ordering::Release);
        }
    }

    /// Its completion was seen.
    pub fn acknowledge(&self, blocks: Range<u64>, stamp: u32) {
        for acknowledged in &self.acknowledged[blocks.start as usize..blocks.end as usize] {
            acknowledged.store(stamp, Ordering::Release);
        }
    }

    /// What was issued last, for each block.
    pub fn issued(&self) -> Snapshot {
        Snapshot { marks: self.issued.iter().map(|mark| Mark(mark.load(Ordering::Acquire))).collect() }
    }

    /// The last acknowledged stamp of each block.
    pub fn acknowledged(&self) -> Vec<u32> {
        self.acknowledged.iter().map(|stamp| stamp.load(Ordering::Acquire)).collect()
    }
}

/// A copy of the table. If nothing was in flight when it was made, it is the disk at that instant.
#[derive(Clone, Debug)]
pub struct Snapshot {
    marks: Vec<Mark>,
}

impl Snapshot {
    /// For each block its mark.
    pub fn marks(&self) -> &[Mark] {
        &self.marks
    }

    /// Whether every request was answered: then, and only then, the contents are certain.
    pub fn is_settled(&self, acknowledged: &[u32]) -> bool {
        self.marks.iter().map(|mark| mark.stamp()).eq(acknowledged.iter().copied())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        (self.marks.len() * BLOCK) as u64
    }

    /// The disk's bytes from `offset` on; both in whole blocks, within the disk.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) {
        let first = offset / BLOCK as u64;
        for (block, bytes) in (first..).zip(bytes.chunks_exact_mut(BLOCK)) {
            fill(block, self.marks[block as usize].content(), bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(block: u64, content: Content) -> Vec<u8> {
        let mut bytes = vec![0xaa; BLOCK];
        fill(block, content, &mut bytes);
        bytes
    }

    #[test]
    fn a_block_tells_its_stamp_only_if_it_is_whole_and_in_its_place() {
        for stamp in [1, 2, 77, u32::MAX] {
            let bytes = content(5, Content::Data(stamp));
            assert_eq!(read(5, &bytes), Some(Content::Data(stamp)));
            assert_eq!(read(6, &bytes), None, "it belongs to block 5");
            for at in [0, 4, 8, 15, 16, 2000, BLOCK - 1] {
                let mut broken = bytes.clone();
                broken[at] ^= 1;
                assert_eq!(read(5, &broken), None, "byte {at} is wrong");
            }
            let mut torn = bytes.clone();
            torn[BLOCK / 2..].copy_from_slice(&content(5, Content::Data(stamp ^ 8))[BLOCK / 2..]);
            assert_eq!(read(5, &torn), None);
        }
        assert_eq!(read(5, &content(5, Content::Zeroes)), Some(Content::Zeroes));
    }

    #[test]
    fn blocks_and_stamps_differ_in_every_word() {
        let bytes = content(1, Content::Data(2));
        for other in [content(1, Content::Data(3)), content(2, Content::Data(2)), content(2, Content::Data(1))] {
            assert!(bytes[16..].chunks(8).zip(other[16..].chunks(8)).all(|(a, b)| a != b));
        }
    }

    #[test]
    fn the_table_is_the_disk_that_the_requests_leave() {
        let table = Table::new(6, |block| block < 2);
        table.issue(1..4, 2, false);
        table.issue(3..5, 3, true);
        table.issue(4..5, 4, false);
        table.acknowledge(1..4, 2);
        table.acknowledge(3..5, 3);
        let snapshot = table.issued();
        let contents: Vec<_> = snapshot.marks().iter().map(|mark| mark.content()).collect();
        let (data, zeroes) = (Content::Data, Content::Zeroes);
        assert_eq!(contents, [data(1), data(2), data(2), zeroes, data(4), zeroes]);
        assert!(!snapshot.is_settled(&table.acknowledged()), "block 4 is in flight");
        table.acknowledge(4..5, 4);
        assert!(snapshot.is_settled(&table.acknowledged()));
        assert_eq!(snapshot.marks()[4].zeroed(), 3, "the zeroing before it is remembered");

        let mut bytes = vec![0; 3 * BLOCK];
        snapshot.read_at(&mut bytes, 2 * BLOCK as u64);
        let expected = [content(2, data(2)), content(3, zeroes), content(4, data(4))].concat();
        assert_eq!(bytes, expected);
    }
}
