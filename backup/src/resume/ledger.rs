//! The ledger of a point in time: where each unit that was overwritten is in scratch, and which units the target holds.
//!
//! A file on tmpfs, made in full length and sparse, written at fixed places: what a killed process wrote of it is there, and
//! no place is ever needed twice. Every place carries a checksum over itself, its number and the point's id, and what was never
//! written is zero.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8, 4, 4 | magic `BLKMKLDG`, version, CRC-32 of bytes 16 to 80 |
//! | 16 | 16, 16 | the point, the scratch |
//! | 48 | 8, 8, 8, 8 | device and inode of the disk, its size, bytes of a unit |
//! | 2048 | 8 | the phase |
//! | 4096 | 16 for each 64 units | which of them the target holds (8), CRC-32 (4), 0 (4) |
//! | next page | 16 for each unit | kind and place in scratch (4), CRC-32 of the data (4), CRC-32 (4), 0 (4) |
//!
//! The copy of a point that belongs to somebody else has a ledger of the first table alone, in which what is not to be copied counts as
//! held from the start.
//!
//! A place never crosses a page, so a kill leaves it whole: the kernel looks for signals between pages.

mod load;
#[cfg(test)]
mod tests;

pub(crate) use load::Loaded;

use super::announce::Announcement;
use super::{Haven, Kind, Note, Notice};
use crate::source::FileId;
use blkmark_bitmap::{Bits, ByteRange, Granularity};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"BLKMKLDG";
const VERSION: u32 = 1;
const HEADER: usize = 80;
const PHASE_AT: u64 = 2048;
const PAGE: u64 = 4096;
const PLACE: u64 = 16;
/// Units that one place of the first table tells of.
const GROUP: u64 = 64;
/// Places written or read at once.
const BATCH: usize = 4096;

/// How far the job of a point has come. The values are such that no flipped bit makes one of another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub(crate) enum Phase {
    /// The point is in force.
    Running = 0x5d1e_0a37_c4b8_9601,
    /// All is in the target, durably, and what that means for bitmaps is being committed.
    Committing = 0x2f93_6ce0_187d_b5aa,
    /// It is over.
    Over = 0xb86a_15f4_e32c_0d77,
    /// It cannot be read any more, since old data could not be kept.
    Broken = 0x71c7_d80b_5f46_ea1c,
}

impl Phase {
    fn of(word: u64) -> Option<Self> {
        [Phase::Running, Phase::Committing, Phase::Over, Phase::Broken].into_iter().find(|phase| *phase as u64 == word)
    }
}

/// Where a saved unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// Nowhere: it was all zero.
    Zero,
    /// In a block of scratch.
    Block {
        /// Of its memory, not of its file.
        in_memory: bool,
        /// Which one.
        slot: u32,
        /// CRC-32 of the data.
        checksum: u32,
    },
}

const SLOT: u32 = (1 << 30) - 1;

impl Place {
    fn words(self) -> (u32, u32) {
        match self {
            Place::Zero => (1 << 30, 0),
            Place::Block { in_memory, slot, checksum } => {
                ((if in_memory { 2 } else { 3 }) << 30 | slot & SLOT, checksum)
            }
        }
    }

    fn of(word: u32, checksum: u32) -> Option<Self> {
        match (word >> 30, word & SLOT) {
            (1, 0) if checksum == 0 => Some(Place::Zero),
            (kind @ (2 | 3), slot) => Some(Place::Block { in_memory: kind == 2, slot, checksum }),
            _ => None,
        }
    }
}

/// What a ledger is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The scratch that its units are in.
    pub(crate) scratch: Uuid,
    pub(crate) disk: FileId,
    pub(crate) size: u64,
    pub(crate) unit: Granularity,
}

impl Plan {
    fn units(&self) -> u64 {
        self.unit.bits_for(self.size)
    }

    fn groups(&self) -> u64 {
        self.units().div_ceil(GROUP)
    }

    /// Where the second table begins.
    fn saved_at(&self) -> u64 {
        (PAGE + self.groups() * PLACE).next_multiple_of(PAGE)
    }

    fn len(&self) -> u64 {
        self.saved_at() + self.units() * PLACE
    }

    fn header(&self, id: Uuid) -> [u8; HEADER] {
        let mut body = Vec::with_capacity(HEADER - 16);
        body.extend(id.into_bytes());
        body.extend(self.scratch.into_bytes());
        for word in [self.disk.device, self.disk.inode, self.size, self.unit.bytes()] {
            body.extend(word.to_le_bytes());
        }
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&crc32fast::hash(&body).to_le_bytes());
        header[16..].copy_from_slice(&body);
        header
    }
}

fn check(id: Uuid, kind: Kind, index: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&id.into_bytes());
    hasher.update(kind.name().as_bytes());
    hasher.update(&index.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// Both tables have places of eight bytes, their checksum and zeroes. `kind` keeps those of one out of the other.
fn place(id: Uuid, kind: Kind, index: u64, body: [u8; 8]) -> [u8; PLACE as usize] {
    let mut place = [0; PLACE as usize];
    place[..8].copy_from_slice(&body);
    place[8..12].copy_from_slice(&check(id, kind, index, &body).to_le_bytes());
    place
}

/// The tables, as kinds for their checksums.
const HELD: Kind = Kind::Note;
const SAVED: Kind = Kind::Memory;

struct Inner {
    /// A bit for each unit that the target holds.
    held: Vec<u64>,
    /// Nobody will go on with the point after a kill, and nothing is written any more.
    given_up: bool,
    ended: bool,
}

/// A ledger that is kept.
pub(crate) struct Ledger {
    haven: Haven,
    id: Uuid,
    plan: Plan,
    file: File,
    inner: Mutex<Inner>,
    word: Arc<Announcement>,
}

impl Ledger {
    /// A new one, of a point that is about to be in force. Until there is a note, nobody reads it.
    pub(crate) fn create(haven: &Haven, plan: Plan) -> io::Result<Self> {
        let id = Uuid::new_v4();
        let file = haven.create(id, Kind::Ledger)?;
        let held = vec![0; plan.groups() as usize];
        // From here on its drop takes the file away.
        let ledger = Self::of(haven, id, plan, file, held, false);
        ledger.file.set_len(plan.len())?;
        ledger.file.write_all_at(&plan.header(id), 0)?;
        ledger.set_phase(Phase::Running)?;
        Ok(ledger)
    }

    /// Goes on with one that was read.
    pub(crate) fn reopen(haven: &Haven, loaded: Loaded) -> Self {
        let Loaded { id, plan, file, held, .. } = loaded;
        Self::of(haven, id, plan, file, held, true)
    }

    fn of(haven: &Haven, id: Uuid, plan: Plan, file: File, held: Vec<u64>, announced: bool) -> Self {
        let inner = Mutex::new(Inner { held, given_up: false, ended: false });
        let word = Announcement::of(haven, id, announced);
        Self { haven: haven.clone(), id, plan, file, inner, word }
    }

    /// The point.
    pub(crate) fn id(&self) -> Uuid {
        self.id
    }

    /// The scratch.
    pub(crate) fn scratch(&self) -> Uuid {
        self.plan.scratch
    }

    /// Where it lies.
    pub(crate) fn haven(&self) -> &Haven {
        &self.haven
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A unit is in scratch: to be called before a write to it goes. An error: the point has to break, for the next process would
    /// believe what is not so.
    pub(crate) fn saved(&self, unit: ByteRange, at: Place) -> io::Result<()> {
        let index = self.plan.unit.index(unit.start());
        let (kind, checksum) = at.words();
        let mut body = [0; 8];
        body[..4].copy_from_slice(&kind.to_le_bytes());
        body[4..].copy_from_slice(&checksum.to_le_bytes());
        let place = place(self.id, SAVED, index, body);
        self.write(&place, self.plan.saved_at() + index * PLACE)
    }

    /// The target holds `range`, whole units, so that a killed process takes nothing of it away: to be called before what the
    /// point keeps of it is given up.
    pub(crate) fn held(&self, range: ByteRange) -> io::Result<()> {
        self.hold(std::iter::once(range))
    }

    /// The same for many ranges, of the granularity of the ledger or a coarser one; or to have them left out from the start.
    pub(crate) fn hold_all(&self, clusters: &Bits) -> io::Result<()> {
        self.hold(clusters.runs())
    }

    fn hold(&self, ranges: impl Iterator<Item = ByteRange>) -> io::Result<()> {
        let mut inner = self.inner();
        let (mut first, mut end) = (u64::MAX, 0);
        for range in ranges.filter(|range| !range.is_empty()) {
            let units = self.plan.unit.cover(range);
            let groups = units.start / GROUP..(units.end - 1) / GROUP + 1;
            (first, end) = (first.min(groups.start), end.max(groups.end));
            for group in groups {
                let (first, end) = (units.start.max(group * GROUP), units.end.min((group + 1) * GROUP));
                let bits = u64::MAX >> (GROUP - (end - first)) << (first % GROUP);
                inner.held[group as usize] |= bits;
            }
        }
        for first in (first..end).step_by(BATCH) {
            let end = end.min(first + BATCH as u64);
            let mut places = Vec::with_capacity((end - first) as usize * PLACE as usize);
            for group in first..end {
                places.extend(place(self.id, HELD, group, inner.held[group as usize].to_le_bytes()));
            }
            if inner.given_up {
                return Ok(());
            }
            if let Err(error) = self.file.write_all_at(&places, PAGE + first * PLACE) {
                return self.give_up_after(&mut inner, &error);
            }
        }
        Ok(())
    }

    /// Says how far it is.
    pub(crate) fn set_phase(&self, phase: Phase) -> io::Result<()> {
        self.write(&(phase as u64).to_le_bytes(), PHASE_AT)
    }

    fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.given_up {
            return Ok(());
        }
        match self.file.write_all_at(bytes, at) {
            Ok(()) => Ok(()),
            Err(error) => self.give_up_after(&mut inner, &error),
        }
    }

    /// The file system is full, say: the point goes on as one that ends with the process.
    fn give_up_after(&self, inner: &mut Inner, error: &io::Error) -> io::Result<()> {
        tracing::warn!(point = %self.id, %error, "a point in time will end with the process: its ledger cannot be written");
        self.haven.remove(self.id, Kind::Note)?;
        self.haven.remove(self.id, Kind::Ledger)?;
        // What is left of it for the case of a power cut says nothing that is wrong: it goes with the point.
        inner.given_up = true;
        Ok(())
    }

    /// Replaces the note. If that fails, the point goes on as one that ends with the process.
    pub(crate) fn set_note(&self, note: &Note) {
        let mut inner = self.inner();
        if inner.given_up {
            return;
        }
        if let Err(error) = self.haven.replace(self.id, Kind::Note, &note.encode(), false)
            && let Err(error) = self.give_up_after(&mut inner, &error)
        {
            tracing::error!(point = %self.id, %error, "nor can what was noted be taken away");
        }
    }

    /// Says durably that there is such a point, some time soon.
    pub(crate) fn announce(&self, notice: Notice) {
        self.word.make(notice);
    }
}

impl Ledger {
    /// The point is gone: nobody will go on with it.
    pub(crate) fn end(&self) {
        // The phase stands in for the removal, should that fail.
        let told = self.set_phase(Phase::Over);
        if std::mem::replace(&mut self.inner().ended, true) {
            return;
        }
        self.inner().given_up = true;
        if let Err(error) = told {
            tracing::warn!(point = %self.id, %error, "a ledger cannot say that its point is gone");
        }
        self.haven.take_away(self.id, Kind::Note);
        self.haven.take_away(self.id, Kind::Ledger);
        self.word.withdraw();
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Debug for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").field("id", &self.id).finish_non_exhaustive()
    }
}
