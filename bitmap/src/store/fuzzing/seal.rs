//! Checksums made to fit, so that what lies behind them is reached.

use super::memory::Files;
use crate::store::record::{MAGIC, Record, SLOTS, VERSION};
use crate::store::table::SECTOR;
use crate::store::{object, table};
use sha2::{Digest, Sha256};

/// Bytes of a slot before the body, of an object before what its checksum covers, of a map's header in all.
const SLOT: usize = 48;
const OBJECT: usize = 16;
const MAP: std::ops::Range<usize> = 16..88;

/// The file as if blkmark had written it with this content.
pub(super) fn seal(name: &str, bytes: &mut Vec<u8>) {
    if SLOTS.contains(&name) {
        slot(bytes);
    } else if let Some((number, sequence)) = object::parse_file(name) {
        object_file(number, sequence, bytes);
    } else if let Some(number) = table::parse_file(name) {
        for sector in bytes.chunks_exact_mut(SECTOR) {
            sector[..4].copy_from_slice(b"BMIH");
            sector[24..32].copy_from_slice(&number.to_le_bytes());
            let checksum = crc32fast::hash(&sector[8..]);
            sector[4..8].copy_from_slice(&checksum.to_le_bytes());
        }
    }
}

/// All that is there is the body, unless the length that is told is less.
fn slot(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().max(SLOT), 0);
    let room = bytes.len() - SLOT;
    let told = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let len = if told <= room { told } else { room };
    bytes[..8].copy_from_slice(MAGIC);
    bytes[12..16].copy_from_slice(&(len as u32).to_le_bytes());
    let sum = Sha256::digest(&bytes[SLOT..SLOT + len]);
    bytes[16..SLOT].copy_from_slice(&sum);
    for version in 1..=VERSION {
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        if Record::decode(bytes).is_ok() {
            break;
        }
    }
}

fn object_file(number: u64, sequence: u64, bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().max(72), 0);
    bytes[..8].copy_from_slice(b"BLKMKOBJ");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    bytes[32..40].copy_from_slice(&number.to_le_bytes());
    bytes[40..48].copy_from_slice(&sequence.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[OBJECT..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
}

/// The header of a live map.
pub(super) fn map(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().max(MAP.end), 0);
    bytes[..8].copy_from_slice(b"BLKMKMAP");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    let checksum = crc32fast::hash(&bytes[MAP]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
}

/// The record, if there is a good one, names objects as they lie there; they, the table and the maps name its store and its run.
pub(super) fn bind(files: &mut Files, maps: &mut Files) {
    let found = SLOTS.iter().find_map(|slot| Record::decode(files.get(*slot)?).ok());
    let Some(mut record) = found else { return };
    let live = record.live.iter_mut().filter_map(|live| live.synced.as_mut());
    for named in record.objects.iter_mut().chain(live) {
        if let Some(bytes) = files.get_mut(&named.file()) {
            object_file(named.number, named.sequence, bytes);
            bytes[16..32].copy_from_slice(record.store.as_bytes());
            object_file(named.number, named.sequence, bytes);
            named.len = bytes.len() as u64;
            named.checksum = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
        }
    }
    for (name, bytes) in files.iter_mut().filter(|(name, _)| table::parse_file(name).is_some()) {
        bytes.chunks_exact_mut(SECTOR).for_each(|sector| sector[8..24].copy_from_slice(record.run.as_bytes()));
        seal(name, bytes);
    }
    SLOTS.iter().for_each(|slot| drop(files.insert((*slot).to_owned(), record.encode())));
    for (number, mut bytes) in (0..).zip(std::mem::take(maps).into_values()) {
        bytes.resize(bytes.len().max(MAP.end), 0);
        bytes[16..32].copy_from_slice(record.store.as_bytes());
        bytes[32..48].copy_from_slice(record.run.as_bytes());
        map(&mut bytes);
        let name = format!("blkmark.{}.{}.{number}", record.store.simple(), record.run.simple());
        maps.insert(name, bytes);
    }
}
