//! Room in the file system, taken ahead: so that only a broken disk can refuse a record, and a full one costs no bitmap at the next start.

use super::super::record::SLOTS;
use super::super::table;
use super::Keeper;
use crate::blocks::words_for;
use crate::checkpoints::CheckpointMark;
use crate::layers::Layers;
use crate::named::Draft;
use crate::units::Granularity;
use std::io;

/// Slots are given room in these steps.
const ROOM: u64 = 16 << 10;

/// Room that is kept for the next start, so that a file system that is full by then costs nothing; for objects twice this at the most.
const RESERVE: &str = "reserve";
const MOST_RESERVED: u64 = 8 << 20;

/// What a file system may want free before it makes a file; XFS does, for an inode and directory that hardly ever need it.
const TO_MAKE_A_FILE: u64 = 512 << 10;

/// File systems give room in such pieces.
const BLOCK: u64 = 4096;

impl Keeper {
    /// Lets the slots grow to what a record of `drafts` may take, so that only a broken disk can refuse it.
    pub(super) fn make_room(&mut self, drafts: &[&Draft]) -> io::Result<()> {
        let needed: u64 = 4096 + drafts.iter().map(|draft| bound(draft)).sum::<u64>();
        self.let_slots_hold(needed)
    }

    pub(super) fn let_slots_hold(&mut self, needed: u64) -> io::Result<()> {
        if needed <= self.room {
            return Ok(());
        }
        let room = needed.next_multiple_of(ROOM);
        for slot in SLOTS {
            self.medium.allocate(slot, room)?;
            self.medium.sync(slot)?;
        }
        self.medium.sync_dir()?;
        self.room = room;
        Ok(())
    }

    /// Keeps room for what an end and the next start write before they can take anything away: a table, and an object a bitmap.
    /// Twice the latter, less what `objects` have by now: so what is taken for new ones comes back from old ones, and the whole
    /// of it never grows.
    pub(super) fn reserve(&mut self, draft: &Draft, objects: impl Iterator<Item = u64>) {
        let object = |granularity: Granularity| {
            let words = words_for(granularity, draft.size()) as u64;
            (80 + words * 8 + words.div_ceil(64) * 8).next_multiple_of(BLOCK)
        };
        let bitmaps = draft.kept().map(|bitmap| object(bitmap.layers().granularity()));
        let checkpoints = draft.checkpoints.0.iter().map(|checkpoint| object(checkpoint.layers.granularity()));
        let most = bitmaps.chain(checkpoints).sum::<u64>().min(MOST_RESERVED);
        let there = objects.map(|len| len.next_multiple_of(BLOCK)).sum::<u64>().min(most);
        let table = table::sectors_for(draft.size()) * table::SECTOR as u64;
        let needed = TO_MAKE_A_FILE + table.next_multiple_of(BLOCK) + 2 * most - there;
        if needed > self.reserved {
            match self.medium.allocate(RESERVE, needed) {
                Ok(()) => self.reserved = needed,
                Err(error) => tracing::debug!(%error, needed, "no room is kept for the next start"),
            }
        }
    }

    /// Gives up the room that was kept; `false`: there is none.
    pub(crate) fn take_reserve(&mut self) -> bool {
        self.reserved = 0;
        self.medium.remove(RESERVE).is_ok()
    }
}

/// Bytes that a draft may take in a record.
fn bound(draft: &Draft) -> u64 {
    // A place in the list of objects, and one in the layers.
    let layers = |layers: &Layers| 64 + (1 + layers.parts().1.len() as u64) * 40;
    let bitmaps = draft.kept().map(|bitmap| {
        64 + bitmap.name().len() as u64
            + layers(bitmap.layers())
            + bitmap.frozen().map_or(0, |(_, frozen)| 64 + layers(frozen))
            + 80
    });
    let checkpoints = draft.checkpoints.0.iter().map(|checkpoint| {
        let CheckpointMark { name, .. } = &checkpoint.mark;
        64 + name.len() as u64 + layers(&checkpoint.layers) + 80
    });
    bitmaps.chain(checkpoints).sum()
}
