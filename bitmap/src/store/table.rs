//! The intent table: which extents of the disk may have changes that no durable bit tells of.
//!
//! A file of 512-byte sectors, each with its own checksum, made anew for every run of a daemon before the record that names
//! it. A sector is always written as a whole: whatever a torn or rotten one held, it counts as hot from end to end, which
//! costs copying and loses nothing.
//!
//! | bytes | what |
//! |---|---|
//! | 4, 4 | magic `BMIH`, CRC-32 of all that follows |
//! | 16 | the run |
//! | 8, 8 | the table's number; how many sectors were written before this one |
//! | 8 | the sector's place |
//! | 464 | a bit an extent: may have changed |

use super::codec::{Damage, MOST_NUMBER};
use uuid::Uuid;

/// Bytes of an extent.
pub const EXTENT: u64 = 32 << 20;
/// Bytes of a sector.
pub(crate) const SECTOR: usize = 512;
const HEADER: usize = 48;
const MAGIC: u32 = u32::from_le_bytes(*b"BMIH");
/// Extents that a sector tells of.
pub(crate) const PER_SECTOR: u64 = ((SECTOR - HEADER) * 8) as u64;
/// A table has room for a disk of this size at least, so that most can grow while they are served.
const LEAST: u64 = 1 << 40;

/// Sectors of the table of a disk.
pub(crate) fn sectors_for(size: u64) -> u64 {
    size.saturating_mul(2).max(LEAST).div_ceil(EXTENT).div_ceil(PER_SECTOR)
}

pub(crate) fn file(number: u64) -> String {
    format!("intent.{number}")
}

pub(crate) fn parse_file(name: &str) -> Option<u64> {
    let number = name.strip_prefix("intent.")?.parse().ok()?;
    (number <= MOST_NUMBER && file(number) == name).then_some(number)
}

/// One sector's bits.
pub(crate) type Extents = [u8; SECTOR - HEADER];

pub(crate) fn encode(run: Uuid, number: u64, written: u64, place: u64, extents: &Extents) -> [u8; SECTOR] {
    let mut sector = [0; SECTOR];
    sector[..4].copy_from_slice(&MAGIC.to_le_bytes());
    sector[8..24].copy_from_slice(run.as_bytes());
    sector[24..32].copy_from_slice(&number.to_le_bytes());
    sector[32..40].copy_from_slice(&written.to_le_bytes());
    sector[40..48].copy_from_slice(&place.to_le_bytes());
    sector[HEADER..].copy_from_slice(extents);
    let checksum = crc32fast::hash(&sector[8..]);
    sector[4..8].copy_from_slice(&checksum.to_le_bytes());
    sector
}

fn decode(run: Uuid, number: u64, place: u64, sector: &[u8]) -> Option<(u64, Extents)> {
    let word = |at: usize| Some(u64::from_le_bytes(sector.get(at..at + 8)?.try_into().ok()?));
    let sound = sector.len() == SECTOR
        && sector[..4] == MAGIC.to_le_bytes()
        && sector[4..8] == crc32fast::hash(&sector[8..]).to_le_bytes()
        && sector[8..24] == *run.as_bytes()
        && word(24) == Some(number)
        && word(40) == Some(place);
    sound.then_some(())?;
    Some((word(32)?, sector[HEADER..].try_into().ok()?))
}

/// What a table says after a crash.
#[derive(Debug)]
pub struct Found {
    /// The hot extents in ascending order.
    pub hot: Vec<u64>,
    /// How many sectors cannot be trusted, and count as hot.
    pub damaged: u64,
}

/// Reads a whole table. `written`: how many sectors had been written when the record was, so that an older table in the place
/// of this one shows.
pub(crate) fn read(run: Uuid, number: u64, written: u64, size: u64, bytes: &[u8]) -> Result<Found, Damage> {
    let mut found = Found { hot: Vec::new(), damaged: 0 };
    let mut newest = None;
    let extents = size.div_ceil(EXTENT);
    if (bytes.len() / SECTOR) as u64 * PER_SECTOR < extents {
        return Err(Damage::Short);
    }
    for (place, sector) in (0..).zip(bytes.chunks_exact(SECTOR)) {
        let decoded = decode(run, number, place, sector);
        found.damaged += u64::from(decoded.is_none());
        newest = newest.max(decoded.map(|(written, _)| written));
        let first = place * PER_SECTOR;
        found.hot.extend((first..extents.min(first + PER_SECTOR)).filter(|extent| {
            let bit = (extent - first) as usize;
            decoded.is_none_or(|(_, extents)| extents[bit / 8] >> (bit % 8) & 1 != 0)
        }));
    }
    // A damaged sector may have been the newest.
    if found.damaged == 0 && newest.is_some_and(|newest| newest < written) {
        return Err(Damage::Another);
    }
    Ok(found)
}
