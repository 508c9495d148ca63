//! Opens a store that is there: what the process before left becomes this one's bitmaps, and a run begins.
//!
//! Nothing that is found is written over before it stands in both slots, and a disk is served whatever is found.

use super::super::reading::{self, Dirty, How, Reading, Slots};
use super::super::record::{Record, SLOTS};
use super::super::{Before, Place, table};
use super::error::{Failure, StoreError};
use super::writer::Layer;
use super::{Condition, Keeper, State};
use crate::checkpoints::Checkpoint;
use crate::layers::Layers;
use crate::live::LiveMap;
use crate::named::Draft;
use std::io;
use std::sync::Arc;

/// A store that was opened: who writes it, and what was in it.
pub(crate) struct Opened {
    pub(crate) keeper: Keeper,
    pub(crate) draft: Draft,
    pub(crate) generation: u64,
    pub(crate) live: Option<Arc<LiveMap>>,
}

impl Keeper {
    /// Opens what is there, brings it up to date and begins a run. Never fails: what is wrong with the store is not the
    /// disk's affair, and shows in the bitmaps.
    pub(crate) fn open(place: Place) -> Opened {
        let (disk, resume) = (place.disk, place.resume.clone());
        let mut keeper = Self::new(place);
        let mut draft = Draft::new(disk.size);
        let nothing = |keeper, draft| Opened { keeper, draft, generation: 0, live: None };
        if !keeper.medium.is_there() {
            return nothing(keeper, draft);
        }
        let store = keeper.medium.name();
        let (record, stale) = match reading::slots(&*keeper.medium) {
            Slots::Fresh => return nothing(keeper, draft),
            Slots::Newer(version) => {
                keeper.before = Before::Other;
                tracing::error!(store, version, "a newer blkmark made this store; it is left alone");
                keeper.condition = Condition::Off(format!(
                    "The bitmap store '{store}' has version {version}: use that blkmark, or move the store away"
                ));
                return nothing(keeper, draft);
            }
            Slots::Damaged(reason) => {
                keeper.before = Before::Other;
                match keeper.medium.put_aside() {
                    Ok(aside) => tracing::error!(
                        store,
                        reason,
                        aside,
                        "the bitmap store cannot be read: put aside, its bitmaps are gone; take full backups"
                    ),
                    Err(error) => {
                        tracing::error!(store, reason, %error, "the bitmap store cannot be read, nor put aside");
                        keeper.condition = Condition::Off(format!(
                            "The bitmap store '{store}' cannot be read ({reason}): move it away"
                        ));
                    }
                }
                return nothing(keeper, draft);
            }
            Slots::Found(record, stale) => (*record, stale),
        };
        let reading = reading::read_to_resume(&*keeper.medium, &record, Some(&disk), &mut *keeper.maps, &resume);
        keeper.before = match reading.how {
            How::Killed => Before::Killed(record.run),
            How::Clean | How::PowerCut { .. } | How::Unknown => Before::Other,
        };
        keeper.store = record.store;
        keeper.sequence = record.sequence;
        keeper.next_object = record.next_object.max(reading.number + 1);
        keeper.decided = record.decided;
        keeper.condition = Condition::Ready;
        tell(&store, &record, &reading);
        keeper.take_over(&mut draft, &reading);
        let generation = reading.generation + 1;
        let mended = keeper.mend_slot(&record, stale).map_err(|error| keeper.error(&error));
        // The table of this run begins cold, so what the run before left in caches has to be durable.
        let flushed = mended.and_then(|()| match reading.how == How::Clean || draft.kept_granularity().is_none() {
            true => Ok(()),
            false => keeper.flush_disk(),
        });
        match flushed.and_then(|()| keeper.begin_run_anyhow(&draft, generation)) {
            Ok(live) => Opened { keeper, draft, generation, live },
            Err(error) => {
                keeper.distrust(&mut draft, &error.to_string());
                Opened { keeper, draft, generation, live: None }
            }
        }
    }

    fn take_over(&mut self, draft: &mut Draft, reading: &Reading) {
        let mut know = |dirty: &Dirty| {
            if let (Some(bits), Some(object)) = (&dirty.bits, dirty.object) {
                let layer = Layer::Base(Arc::clone(bits));
                self.known.insert(layer.key(), (layer, object));
            }
        };
        for bitmap in &reading.bitmaps {
            match &bitmap.dirty {
                Ok(dirty) => {
                    know(dirty);
                    draft.restore(bitmap.name.clone(), bitmap.granularity, bitmap.recording, dirty.bits.clone());
                    if let (Some(id), Some(freeze)) = (bitmap.frozen, &bitmap.set) {
                        know(&freeze.dirty);
                        draft.restore_frozen(&bitmap.name, id, freeze);
                    }
                }
                Err(_) => draft.restore_inconsistent(bitmap.name.clone(), bitmap.granularity),
            }
        }
        for checkpoint in reading.checkpoints.iter().flatten() {
            know(&checkpoint.dirty);
            let (mark, size) = (checkpoint.mark.clone(), checkpoint.size);
            let bits = checkpoint.dirty.bits.clone();
            let layers = bits.map_or_else(|| Layers::empty(checkpoint.granularity, draft.size()), Layers::of);
            draft.checkpoints.0.push(Checkpoint { mark, size, layers });
        }
        draft.settle(false, None);
    }

    /// As [`Keeper::begin_run`]; where there is no room for it, in the room that was kept.
    fn begin_run_anyhow(&mut self, draft: &Draft, generation: u64) -> Result<Option<Arc<LiveMap>>, StoreError> {
        let begun = match self.begin_run(draft, generation) {
            Err(Failure::Before(error)) if self.take_reserve() => {
                tracing::warn!(%error, "bitmaps begin in the room that was kept for that");
                if let Some((number, _)) = self.heat.table() {
                    let _ = self.medium.remove(&table::file(number));
                }
                self.begin_run(draft, generation)
            }
            begun => begun,
        };
        begun.map_err(|(Failure::Before(error) | Failure::Torn(error))| error)
    }

    /// The first record of this process: from now on a clean end before it says nothing any more.
    fn begin_run(&mut self, draft: &Draft, generation: u64) -> Result<Option<Arc<LiveMap>>, Failure> {
        let live = self.prepare_run(draft, generation).map_err(Failure::Before)?;
        let state = State { draft, generation, live: live.as_ref(), prepared: None, decides: None, clean: None };
        self.record(&state).map(|()| live)
    }

    fn prepare_run(&mut self, draft: &Draft, generation: u64) -> Result<Option<Arc<LiveMap>>, StoreError> {
        self.make_room(&[draft]).map_err(|error| self.error(&error))?;
        self.begin_table(draft.size()).map_err(|error| self.error(&error))?;
        let granularity = draft.kept_granularity();
        granularity.map(|granularity| self.create_map(granularity, draft.size(), generation)).transpose()
    }

    /// Both slots have the record that was found before a new one is written over either of them.
    fn mend_slot(&self, record: &Record, stale: Option<&str>) -> io::Result<()> {
        let Some(slot) = stale else { return Ok(()) };
        let bytes = record.encode();
        // What was read may be in memory alone, if the process before was killed and the machine was not.
        for whole in SLOTS.iter().filter(|whole| **whole != slot) {
            self.medium.sync(whole)?;
        }
        self.medium.allocate(slot, bytes.len() as u64)?;
        self.medium.write(slot, 0, &bytes)?;
        self.medium.sync(slot)?;
        self.medium.sync_dir()
    }

    pub(super) fn begin_table(&mut self, size: u64) -> io::Result<()> {
        let number = self.next_object;
        self.next_object += 1;
        self.heat.begin(&self.medium, self.run, number, size).inspect_err(|_| {
            // What there is of it takes room. If it stays, the next record takes it away.
            let _ = self.medium.remove(&table::file(number));
        })?;
        self.medium.sync_dir()
    }
}

fn tell(store: &str, record: &Record, reading: &Reading) {
    for bitmap in &reading.bitmaps {
        if let Err(reason) = &bitmap.dirty {
            tracing::warn!(store, bitmap = bitmap.name, reason, "the bitmap is inconsistent");
        }
        if let Some(freeze) = bitmap.frozen.filter(|_| bitmap.set.is_none()) {
            tracing::warn!(store, bitmap = bitmap.name, %freeze, "a freeze ended with the process: reclaimed");
        }
    }
    if let Err(reason) = &reading.checkpoints
        && !record.contents.checkpoints.is_empty()
    {
        tracing::warn!(store, reason, "the checkpoints are lost");
    }
    let (sequence, bitmaps, how) = (record.sequence, reading.bitmaps.len(), &reading.how);
    if *how == How::Clean {
        tracing::info!(store, sequence, bitmaps, "bitmaps are as they were left");
    } else {
        tracing::warn!(store, sequence, bitmaps, ?how, "the process before has not ended cleanly");
    }
}
