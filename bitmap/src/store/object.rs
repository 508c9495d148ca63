//! Objects: sets of bits that are written once, made durable, and only then named by a record.
//!
//! A header, then the blocks that hold bits; what is not there is clear. The record that names an object has its length and
//! its checksum, so neither a damaged object nor another one in its place is taken for it.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `BLKMKOBJ` |
//! | 4, 4 | version, CRC-32 of all that follows |
//! | 16 | the store's id |
//! | 8, 8 | the object's number; the sequence of the record it was made for |
//! | 8, 8 | granularity in bytes, size of the disk in bytes |
//! | 8 | number of blocks |
//! | each: 8 + 8 n | the block's number, its words: 64, or as many as there are in the last block |

use super::codec::{Damage, Decoder, Encoder, MOST_NUMBER};
use crate::bits::Bits;
use crate::blocks::words_for;
use crate::named::MOST_BITS;
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"BLKMKOBJ";
const VERSION: u32 = 1;
/// Words of a block, as in `bits`.
const BLOCK: u64 = 64;
/// Where the part that the checksum covers begins.
const COVERED: usize = 16;

/// How a record names an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ObjectRef {
    /// Its number, never used again in its store.
    pub number: u64,
    /// The sequence of the record that it was made for.
    pub sequence: u64,
    /// Bytes of its file.
    pub len: u64,
    /// Its CRC-32.
    pub checksum: u32,
}

impl ObjectRef {
    /// The name of its file.
    pub fn file(&self) -> String {
        file(self.number, self.sequence)
    }
}

pub(crate) fn file(number: u64, sequence: u64) -> String {
    format!("bits.{number}-{sequence}")
}

/// Number and sequence of the object that a file of this name is.
pub(crate) fn parse_file(name: &str) -> Option<(u64, u64)> {
    let (number, sequence) = name.strip_prefix("bits.")?.split_once('-')?;
    let parsed: (u64, u64) = (number.parse().ok()?, sequence.parse().ok()?);
    (parsed.0.max(parsed.1) <= MOST_NUMBER && file(parsed.0, parsed.1) == name).then_some(parsed)
}

/// Lays out `bits`; answers how a record names it.
pub(crate) fn encode(store: Uuid, number: u64, sequence: u64, bits: &Bits) -> (Vec<u8>, ObjectRef) {
    let mut out = Encoder::default();
    out.0.extend(MAGIC);
    out.u32(VERSION);
    out.u32(0);
    out.uuid(store);
    out.u64(number);
    out.u64(sequence);
    out.granularity(bits.granularity());
    out.u64(bits.size());
    let count = out.0.len();
    out.u64(0);
    let mut blocks = 0u64;
    for (block, words) in bits.blocks() {
        out.u64(block);
        words.iter().for_each(|word| out.u64(*word));
        blocks += 1;
    }
    let mut bytes = out.0;
    bytes[count..count + 8].copy_from_slice(&blocks.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[COVERED..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    let len = bytes.len() as u64;
    (bytes, ObjectRef { number, sequence, len, checksum })
}

/// The bits of the object that `named` names.
pub(crate) fn decode(store: Uuid, named: &ObjectRef, bytes: &[u8]) -> Result<Bits, Damage> {
    let mut input = Decoder(bytes);
    if input.take(8)? != MAGIC {
        return Err(Damage::Foreign);
    }
    let version = input.u32()?;
    if version != VERSION {
        return Err(Damage::Version(version));
    }
    let checksum = input.u32()?;
    if bytes.len() as u64 != named.len {
        return Err(if (bytes.len() as u64) < named.len { Damage::Short } else { Damage::Another });
    }
    if checksum != crc32fast::hash(&bytes[COVERED..]) {
        return Err(Damage::Checksum);
    }
    let there = (input.uuid()?, input.u64()?, input.u64()?, checksum);
    if there != (store, named.number, named.sequence, named.checksum) {
        return Err(Damage::Another);
    }
    let (granularity, size) = (input.granularity()?, input.u64()?);
    if granularity.bits_for(size) > MOST_BITS {
        return Err(Damage::Nonsense);
    }
    let words = words_for(granularity, size) as u64;
    let blocks = input.u64()?;
    if blocks > words.div_ceil(BLOCK) {
        return Err(Damage::Nonsense);
    }
    let mut bits = Bits::new(granularity, size);
    for _ in 0..blocks {
        let block = input.u64()?;
        let count = block.checked_mul(BLOCK).and_then(|first| words.checked_sub(first)).ok_or(Damage::Nonsense)?;
        let data = input.take(count.min(BLOCK) as usize * 8)?;
        let words: Vec<u64> = data
            .chunks_exact(8)
            .map(|word| word.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
            .collect();
        if !bits.put_block(block, &words) {
            return Err(Damage::Nonsense);
        }
    }
    input.end()?;
    Ok(bits)
}
