//! The journal: what all guests have begun, what they were answered, what they read, in one order for all disks.
//!
//! Guests append, the torturer reads. A request is in the journal before the back end can see it, and an answer only after
//! it was seen, so whatever happens to a guest: what the journal says was answered was answered, and what it does not
//! know of was never asked. A record is one small `write` to a file, which a SIGKILL does not cut in two; the order in the
//! file is an order in time.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{FallocateFlags, fallocate};

use super::content::Version;

/// Bytes of a record.
const LEN: usize = 16;
/// So much is read before it is given back to the file system.
const PUNCH: u64 = 4 << 20;

/// What a guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// A write with this number begins.
    Write,
    /// Zeroes are about to be written.
    Zero,
    /// A discard begins: each sector holds what it held, or zeroes.
    Discard,
    /// The request with this number was answered with success.
    Done,
    /// A read found this version.
    Seen,
    /// A read found what nobody wrote.
    Foreign,
    /// The request with this number failed; `count` is its status.
    Failed,
}

const WORDS: [Word; 7] = [Word::Write, Word::Zero, Word::Discard, Word::Done, Word::Seen, Word::Foreign, Word::Failed];

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What is said.
    pub word: Word,
    /// Of which disk.
    pub disk: u8,
    /// How many sectors.
    pub count: u16,
    /// The first of them.
    pub sector: u32,
    /// The number of a request, or of the write that a sector is from.
    pub number: Version,
}

impl Record {
    fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0] = WORDS.iter().position(|word| *word == self.word).unwrap_or_default() as u8;
        bytes[1] = self.disk;
        bytes[2..4].copy_from_slice(&self.count.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..].copy_from_slice(&self.number.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Record> {
        let mut number = [0; 8];
        number.copy_from_slice(&bytes[8..16]);
        let Some(word) = WORDS.get(usize::from(bytes[0])) else { bail!("a damaged journal") };
        Ok(Record {
            word: *word,
            disk: bytes[1],
            count: u16::from_le_bytes([bytes[2], bytes[3]]),
            sector: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            number: u64::from_le_bytes(number),
        })
    }
}

/// A guest's end of the journal.
pub struct Writer {
    file: File,
}

impl Writer {
    /// Opens the journal that the torturer made.
    pub fn open(path: &Path) -> io::Result<Writer> {
        Ok(Writer { file: OpenOptions::new().append(true).open(path)? })
    }

    /// Appends records, in one piece.
    pub fn say(&mut self, records: &[Record]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let bytes: Vec<u8> = records.iter().flat_map(Record::encode).collect();
        self.file.write_all(&bytes)
    }
}

/// The torturer's end.
pub struct Reader {
    file: File,
    next: u64,
    punched: u64,
}

impl Reader {
    /// Makes an empty journal.
    pub fn create(path: &Path) -> Result<Reader> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = file.with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Reader { file, next: 0, punched: 0 })
    }

    /// How many records there are now. What is answered by now is among them.
    pub fn end(&self) -> Result<u64> {
        Ok(self.file.metadata()?.size() / LEN as u64)
    }

    /// The next records up to `end`, with the place of the first; empty: there are no more.
    pub fn next(&mut self, end: u64) -> Result<(u64, Vec<Record>)> {
        let first = self.next;
        let count = end.saturating_sub(first).min(4096);
        let mut bytes = vec![0; count as usize * LEN];
        self.file.read_exact_at(&mut bytes, first * LEN as u64)?;
        self.next += count;
        let read = self.next * LEN as u64;
        if read - self.punched >= PUNCH {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // Where that is not possible the journal takes more room.
            let _ = fallocate(&self.file, hole, self.punched, read - self.punched);
            self.punched = read;
        }
        Ok((first, bytes.chunks_exact(LEN).map(Record::decode).collect::<Result<_>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let mut reader = Reader::create(&path).unwrap();
        let mut writer = Writer::open(&path).unwrap();
        let record = |n: u64| Record { word: WORDS[n as usize % 7], disk: 3, count: 256, sector: n as u32, number: n };
        let all: Vec<Record> = (0..10_000).map(record).collect();
        writer.say(&all[..1]).unwrap();
        writer.say(&all[1..]).unwrap();
        let end = reader.end().unwrap();
        let mut read = Vec::new();
        while read.len() < all.len() {
            let (first, records) = reader.next(end).unwrap();
            assert_eq!(first as usize, read.len());
            read.extend(records);
        }
        assert_eq!(read, all);
        assert!(reader.next(end).unwrap().1.is_empty());
    }
}
