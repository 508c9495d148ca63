//! Reading a ledger that a killed process left: all of it, or an error.
//!
//! Called by [`super::super::Haven::find`]. Invariant: a place that is not as it was written makes the whole ledger one that nobody goes
//! on with, for it may have named what is nowhere else.

use super::{BATCH, GROUP, HEADER, HELD, Kind, PAGE, PHASE_AT, PLACE, Phase, Place, Plan, SAVED, SLOT, place};
use crate::source::FileId;
use blkmark_bitmap::{Bits, Granularity};
use rustix::fs::SeekFrom;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use uuid::Uuid;

/// What a ledger says that a killed process left.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) id: Uuid,
    pub(crate) plan: Plan,
    pub(crate) phase: Phase,
    /// The saved units that the target does not hold, by their start.
    pub(crate) saved: Vec<(u64, Place)>,
    pub(super) held: Vec<u64>,
    pub(super) file: File,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{what} is damaged"))
}

fn word64(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn word32(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_le_bytes)
}

impl Loaded {
    /// All of it, or an error: a place that is not as it was written may have named what is nowhere else.
    pub(crate) fn read(file: File, id: Uuid, disk: FileId) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let uuid = |at: usize| Uuid::from_slice(&header[at..at + 16]).unwrap_or_default();
        let word = |at: usize| word64(&header[at..at + 8]);
        let unit = Granularity::new(word(72)).ok_or_else(|| damaged("the header"))?;
        let found = FileId { device: word(48), inode: word(56) };
        let plan = Plan { scratch: uuid(32), disk: found, size: word(64), unit };
        if plan.header(id) != header || plan.size == 0 || plan.disk != disk {
            return Err(damaged("the header"));
        }
        if unit.bits_for(plan.size) > u64::from(SLOT) << 2 || file.metadata()?.len() != plan.len() {
            return Err(damaged("the length"));
        }
        let mut phase = [0; 8];
        file.read_exact_at(&mut phase, PHASE_AT)?;
        let phase = Phase::of(u64::from_le_bytes(phase)).ok_or_else(|| damaged("the phase"))?;
        let mut loaded = Self { id, plan, phase, saved: Vec::new(), held: vec![0; plan.groups() as usize], file };
        loaded.read_held()?;
        loaded.read_saved()?;
        Ok(loaded)
    }

    /// Every place of a table that is not zero, whole.
    fn places(
        &self,
        (kind, at, count): (Kind, u64, u64),
        mut found: impl FnMut(u64, [u8; 8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = at + count * PLACE;
        let mut buffer = vec![0; BATCH * PLACE as usize];
        let mut from = at;
        while from < end {
            // The file is mostly a hole.
            from = match rustix::fs::seek(&self.file, SeekFrom::Data(from)) {
                Ok(data) => data.max(from) / PLACE * PLACE,
                Err(rustix::io::Errno::NXIO) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            if from >= end {
                return Ok(());
            }
            let part = &mut buffer[..((end - from).min((BATCH as u64) * PLACE)) as usize];
            self.file.read_exact_at(part, from)?;
            for (i, bytes) in part.chunks_exact(PLACE as usize).enumerate() {
                if bytes.iter().all(|byte| *byte == 0) {
                    continue;
                }
                let index = (from - at) / PLACE + i as u64;
                let body: [u8; 8] = bytes[..8].try_into().unwrap_or_default();
                if bytes != place(self.id, kind, index, body) {
                    return Err(damaged("a place"));
                }
                found(index, body)?;
            }
            from += part.len() as u64;
        }
        Ok(())
    }

    fn read_held(&mut self) -> io::Result<()> {
        let mut held = std::mem::take(&mut self.held);
        self.places((HELD, PAGE, self.plan.groups()), |group, body| {
            held[group as usize] = u64::from_le_bytes(body);
            Ok(())
        })?;
        self.held = held;
        Ok(())
    }

    fn read_saved(&mut self) -> io::Result<()> {
        let mut saved = Vec::new();
        self.places((SAVED, self.plan.saved_at(), self.plan.units()), |unit, body| {
            let place = Place::of(word32(&body[..4]), word32(&body[4..])).ok_or_else(|| damaged("a place"))?;
            if self.held[(unit / GROUP) as usize] >> (unit % GROUP) & 1 == 0 {
                saved.push((unit * self.plan.unit.bytes(), place));
            }
            Ok(())
        })?;
        self.saved = saved;
        Ok(())
    }

    /// The units that the target holds.
    pub(crate) fn in_target(&self) -> Bits {
        let mut bits = Bits::new(self.plan.unit, self.plan.size);
        for (group, word) in self.held.iter().enumerate().filter(|(_, word)| **word != 0) {
            for bit in (0..GROUP).filter(|bit| word >> bit & 1 != 0) {
                let unit = group as u64 * GROUP + bit;
                bits.set(self.plan.unit.range(unit..unit + 1, self.plan.size));
            }
        }
        bits
    }
}
