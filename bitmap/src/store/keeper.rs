//! The keeper: writes what a disk's bitmaps are to its store, so that no answer is given for what a crash could undo.
//!
//! Under the control lock of the disk's tracker; no queue thread ever comes here. Order of a record: objects that it names are
//! made durable; then the first slot; then the second; only then anything that older records needed is taken away. See
//! `docs/store.md` for why a crash between any two of these steps loses nothing.
//!
//! What fails before a slot is touched, or while the first is written to and can be put back, leaves the old record in force and is
//! an error of the command. What else fails in a slot leaves it open which record is in force, so all bitmaps become
//! inconsistent, durably (`distrust`).

use super::heat::Heat;
use super::maps::{MapHead, Maps};
use super::medium::Medium;
use super::object::{self, ObjectRef};
use super::reading::{Dirty, How, Reading, Slots};
use super::record::{
    BitmapRecord, CheckpointRecord, Contents, FrozenRecord, LayersRecord, LiveRecord, MOST, Prepared, Record, SLOTS,
};
use super::stamp::Stamp;
use super::{Before, Flush, Place, reading, table};
use crate::bits::Bits;
use crate::blocks::words_for;
use crate::checkpoints::{Checkpoint, CheckpointMark};
use crate::layers::Layers;
use crate::live::LiveMap;
use crate::named::{Draft, Owner};
use crate::units::{ByteRange, Granularity};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use thiserror::Error;
use uuid::Uuid;

/// Slots are given room in these steps.
const ROOM: u64 = 16 << 10;

/// Room that is kept for the next start, so that a file system that is full by then costs nothing; for objects twice this at the most.
const RESERVE: &str = "reserve";
const MOST_RESERVED: u64 = 8 << 20;

/// File systems give room in such pieces.
const BLOCK: u64 = 4096;

/// What is written at once.
const PIECE: usize = 1 << 20;

/// Why bitmaps could not be stored.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StoreError {
    /// The disk has no store in this run.
    #[error("{0}")]
    Off(String),
    /// The store failed; its bitmaps are inconsistent.
    #[error("The bitmap store '{store}' failed ({reason}): persistent bitmaps need a restart of the daemon")]
    Failed {
        /// Where it is.
        store: String,
        /// What happened.
        reason: String,
    },
    /// A file could not be made or written.
    #[error("Could not store bitmaps in '{store}': {reason}")]
    Write {
        /// Where it is.
        store: String,
        /// What the system said.
        reason: String,
    },
    /// The disk could not be flushed.
    #[error("Could not flush the disk, which its persistent bitmaps rely on: {0}")]
    Flush(String),
    /// The disk grew far beyond what it was at the start.
    #[error(
        "The bitmap store '{0}' has no room for a disk of this size: restart the daemon with the smaller disk first"
    )]
    TooLarge(String),
}

/// A layer that has an object. Kept, so that its address stands for it.
enum Layer {
    Base(Arc<Bits>),
    Closed(Arc<LiveMap>),
}

impl Layer {
    fn key(&self) -> usize {
        match self {
            Layer::Base(bits) => Arc::as_ptr(bits).addr(),
            Layer::Closed(map) => Arc::as_ptr(map).addr(),
        }
    }
}

enum Condition {
    /// Nothing is there yet.
    Absent,
    /// As it should be.
    Ready,
    /// There will be none in this run.
    Off(String),
    /// Nothing is written any more but that nothing is to be trusted.
    Failed(String),
}

/// What came into force, to be written down.
pub(crate) struct State<'a> {
    pub(crate) draft: &'a Draft,
    pub(crate) generation: u64,
    pub(crate) live: Option<&'a Arc<LiveMap>>,
    /// It counts only if the store that is named decides so; if not, this does.
    pub(crate) prepared: Option<(Uuid, String, &'a Draft)>,
    /// The commit that is decided by this record.
    pub(crate) decides: Option<Uuid>,
    /// The disk as a clean end left it.
    pub(crate) clean: Option<Stamp>,
}

/// How far a record got.
pub(crate) enum Failure {
    /// The old one is in force.
    Before(StoreError),
    /// Nobody knows.
    Torn(StoreError),
}

/// Writes one store.
pub(crate) struct Keeper {
    medium: Arc<dyn Medium>,
    maps: Box<dyn Maps>,
    pub(crate) heat: Arc<Heat>,
    store: Uuid,
    run: Uuid,
    disk: Stamp,
    flush: Flush,
    sequence: u64,
    next_object: u64,
    room: u64,
    reserved: u64,
    /// The layers that the record in force names.
    known: HashMap<usize, (Layer, ObjectRef)>,
    /// What of the live generation is durable, and which generation that is.
    synced: Option<(u64, ObjectRef)>,
    decided: Option<Uuid>,
    condition: Condition,
    /// What the process before left.
    pub(crate) before: Before,
}

/// A store that was opened: who writes it, and what was in it.
pub(crate) struct Opened {
    pub(crate) keeper: Keeper,
    pub(crate) draft: Draft,
    pub(crate) generation: u64,
    pub(crate) live: Option<Arc<LiveMap>>,
}

impl Keeper {
    fn new(place: Place) -> Self {
        let Place { medium, maps, disk, flush, resume: _ } = place;
        Self {
            medium,
            maps,
            heat: Heat::new(disk.size),
            store: Uuid::new_v4(),
            run: Uuid::new_v4(),
            disk,
            flush,
            sequence: 0,
            next_object: 1,
            room: 0,
            reserved: 0,
            known: HashMap::new(),
            synced: None,
            decided: None,
            condition: Condition::Absent,
            before: Before::Nothing,
        }
    }

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
                    if let (Some(id), Some(set)) = (bitmap.frozen, &bitmap.set) {
                        know(set);
                        draft.restore_frozen(&bitmap.name, id, set.bits.clone());
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

    fn begin_table(&mut self, size: u64) -> io::Result<()> {
        let number = self.next_object;
        self.next_object += 1;
        self.heat.begin(&self.medium, self.run, number, size).inspect_err(|_| {
            // What there is of it takes room. If it stays, the next record takes it away.
            let _ = self.medium.remove(&table::file(number));
        })?;
        self.medium.sync_dir()
    }

    /// Gives up the room that was kept; `false`: there is none.
    pub(crate) fn take_reserve(&mut self) -> bool {
        self.reserved = 0;
        self.medium.remove(RESERVE).is_ok()
    }

    /// Keeps room for what an end and the next start write before they can take anything away: a table, and an object a bitmap.
    /// Twice the latter, less what `objects` have by now: so what is taken for new ones comes back from old ones, and the whole
    /// of it never grows.
    fn reserve(&mut self, draft: &Draft, objects: impl Iterator<Item = u64>) {
        let object = |granularity: Granularity| {
            let words = words_for(granularity, draft.size()) as u64;
            (80 + words * 8 + words.div_ceil(64) * 8).next_multiple_of(BLOCK)
        };
        let bitmaps = draft.kept().map(|bitmap| object(bitmap.layers().granularity()));
        let checkpoints = draft.checkpoints.0.iter().map(|checkpoint| object(checkpoint.layers.granularity()));
        let most = bitmaps.chain(checkpoints).sum::<u64>().min(MOST_RESERVED);
        let there = objects.map(|len| len.next_multiple_of(BLOCK)).sum::<u64>().min(most);
        let table = table::sectors_for(draft.size()) * table::SECTOR as u64;
        let needed = table.next_multiple_of(BLOCK) + 2 * most - there;
        if needed > self.reserved {
            match self.medium.allocate(RESERVE, needed) {
                Ok(()) => self.reserved = needed,
                Err(error) => tracing::debug!(%error, needed, "no room is kept for the next start"),
            }
        }
    }

    fn error(&self, error: &io::Error) -> StoreError {
        StoreError::Write { store: self.medium.name(), reason: reason(error) }
    }

    /// The process that writes it.
    pub(crate) fn run(&self) -> Uuid {
        self.run
    }

    /// Where it is.
    pub(crate) fn name(&self) -> String {
        self.medium.name()
    }

    /// Whether persistent bitmaps can be had.
    pub(crate) fn is_usable(&self) -> Result<(), StoreError> {
        match &self.condition {
            Condition::Absent | Condition::Ready => Ok(()),
            Condition::Off(reason) => Err(StoreError::Off(reason.clone())),
            Condition::Failed(reason) => Err(StoreError::Failed { store: self.medium.name(), reason: reason.clone() }),
        }
    }

    /// Before a flip: all that can be done ahead so that it will succeed. Changes nothing that is in force.
    pub(crate) fn prepare(&mut self, old: &Draft, new: &Draft) -> Result<(), StoreError> {
        if !new.needs_store() && !old.needs_store() {
            return Ok(());
        }
        if new.needs_store() {
            self.is_usable()?;
        }
        if !self.heat.has_room(new.size()) {
            return Err(StoreError::TooLarge(self.medium.name()));
        }
        let prepared = match self.condition {
            Condition::Absent => self.make(&[old, new]),
            Condition::Ready => self.make_room(&[old, new]),
            Condition::Off(_) | Condition::Failed(_) => Ok(()),
        };
        prepared.map_err(|error| self.error(&error))
    }

    fn make(&mut self, drafts: &[&Draft]) -> io::Result<()> {
        self.medium.make()?;
        self.make_room(drafts)?;
        let size = drafts.iter().map(|draft| draft.size()).max().unwrap_or(0);
        self.begin_table(size)?;
        self.condition = Condition::Ready;
        Ok(())
    }

    /// Lets the slots grow to what a record of `drafts` may take, so that only a broken disk can refuse it.
    fn make_room(&mut self, drafts: &[&Draft]) -> io::Result<()> {
        let needed: u64 = 4096 + drafts.iter().map(|draft| bound(draft)).sum::<u64>();
        self.let_slots_hold(needed)
    }

    fn let_slots_hold(&mut self, needed: u64) -> io::Result<()> {
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

    /// A map for generation `generation`, all of its memory taken.
    pub(crate) fn create_map(
        &mut self,
        granularity: Granularity,
        size: u64,
        generation: u64,
    ) -> Result<Arc<LiveMap>, StoreError> {
        let (store, run, sequence) = (self.store, self.run, self.sequence);
        let head = MapHead { store, run, generation, sequence, granularity, size };
        self.maps.create(&head).map_err(|error| {
            let reason = format!("no memory for the live map: {}", reason(&error));
            StoreError::Write { store: self.medium.name(), reason }
        })
    }

    /// Makes durable all writes to the disk that have ended, before anything relies on extents that are cold: a power cut that
    /// takes a write back changes the disk, too.
    pub(crate) fn flush_disk(&self) -> Result<(), StoreError> {
        (self.flush)().map_err(|error| StoreError::Flush(reason(&error)))
    }

    /// How to do that without this.
    pub(crate) fn flush(&self) -> Flush {
        Arc::clone(&self.flush)
    }

    /// Makes the extents of writes in flight hot, now.
    pub(crate) fn warm(&mut self, ranges: impl Iterator<Item = ByteRange>) -> Result<(), StoreError> {
        self.heat.ensure(ranges).map_err(|error| self.error(&error))
    }

    /// Whether what is in force has to be written down.
    pub(crate) fn concerns(&self, old: &Draft, new: &Draft) -> bool {
        let any = |draft: &Draft| draft.kept().next().is_some() || !draft.checkpoints.0.is_empty();
        !matches!(self.condition, Condition::Absent | Condition::Off(_)) && (any(old) || any(new))
    }

    /// Whether it is there, and is written to.
    pub(crate) fn is_open(&self) -> bool {
        matches!(self.condition, Condition::Ready)
    }

    /// Whether it failed: then a record is only written for the sake of what is shown after a restart.
    pub(crate) fn has_failed(&self) -> bool {
        matches!(self.condition, Condition::Failed(_))
    }

    /// Makes `state` durable, whole. On success nothing that it does not name is left.
    pub(crate) fn record(&mut self, state: &State<'_>) -> Result<(), Failure> {
        if self.has_failed() {
            self.record_distrust(state.draft);
            return Ok(());
        }
        let mut writer =
            Writer { keeper: self, objects: Vec::new(), places: HashMap::new(), layers: Vec::new(), new: Vec::new() };
        let written = writer.contents(state);
        let Writer { objects, layers, new, .. } = writer;
        let (contents, otherwise) = match written {
            Ok(written) => written,
            Err(error) => {
                let error = self.error(&error);
                self.take_away(&new);
                return Err(Failure::Before(error));
            }
        };
        if !new.is_empty()
            && let Err(error) = self.medium.sync_dir()
        {
            let error = self.error(&error);
            self.take_away(&new);
            return Err(Failure::Before(error));
        }
        let synced = self.synced.filter(|(generation, _)| *generation == state.generation);
        let prepared = state.prepared.as_ref().zip(otherwise);
        let prepared = prepared.map(|((commit, decided_in, _), otherwise)| Prepared {
            commit: *commit,
            decided_in: decided_in.clone(),
            otherwise,
        });
        let decided = state.decides.or(self.decided);
        let record = Record {
            store: self.store,
            sequence: self.sequence + 1,
            run: self.run,
            disk: Stamp { size: state.draft.size(), ..self.disk },
            clean: state.clean,
            size: state.draft.size(),
            generation: state.generation,
            live: state
                .live
                .map(|live| LiveRecord { granularity: live.granularity(), synced: synced.map(|(_, object)| object) }),
            next_object: self.next_object,
            table: self.heat.table(),
            objects: objects.clone(),
            contents,
            prepared,
            decided,
        };
        self.write_slots(&record).inspect_err(|failure| {
            if let Failure::Before(_) = failure {
                self.take_away(&new);
            }
        })?;
        self.decided = decided;
        self.known = layers.into_iter().map(|(layer, object)| (layer.key(), (layer, object))).collect();
        let kept = objects.iter().chain(synced.as_ref().map(|(_, object)| object));
        self.clean_up(kept.clone().map(ObjectRef::file).collect(), record.table.map(|(number, _)| number));
        self.maps.keep(self.store, self.run, state.generation);
        self.reserve(state.draft, kept.map(|object| object.len));
        Ok(())
    }

    fn write_slots(&mut self, record: &Record) -> Result<(), Failure> {
        let bytes = record.encode();
        // Not every record was prepared: what cooling or the end of a job writes may be larger than what was asked for.
        self.let_slots_hold(bytes.len() as u64).map_err(|error| Failure::Before(self.error(&error)))?;
        let [first, second] = SLOTS;
        if let Err(error) = self.medium.write(first, 0, &bytes) {
            let error = self.error(&error);
            // No sync has failed, so what is written now can be relied on: the second slot has what is in force.
            return Err(match self.copy_slot(second, first) {
                Ok(()) => Failure::Before(error),
                Err(_) => Failure::Torn(error),
            });
        }
        // Used up even if it fails: nobody knows what the slots hold then.
        self.sequence = record.sequence;
        let written = self.medium.sync(first).and_then(|()| self.medium.write(second, 0, &bytes));
        written.and_then(|()| self.medium.sync(second)).map_err(|error| Failure::Torn(self.error(&error)))
    }

    fn copy_slot(&self, from: &str, to: &str) -> io::Result<()> {
        let bytes = self.medium.read(from, MOST as u64)?;
        self.medium.write(to, 0, &bytes)?;
        self.medium.sync(to)
    }

    fn take_away(&self, objects: &[ObjectRef]) {
        for object in objects {
            // Nobody names it; the next start takes it away.
            let _ = self.medium.remove(&object.file());
        }
    }

    /// Takes away what no record names any more.
    fn clean_up(&self, kept: Vec<String>, number: Option<u64>) {
        for name in self.medium.list().unwrap_or_default() {
            let object = object::parse_file(&name).is_some() && !kept.contains(&name);
            let table = table::parse_file(&name).is_some_and(|there| Some(there) != number);
            if object || table {
                let _ = self.medium.remove(&name);
            }
        }
    }

    /// Nobody knows any more what was written: says so in `draft`, and durably, if there is any way to. Only then may a
    /// write go that was not written down.
    pub(crate) fn distrust(&mut self, draft: &mut Draft, reason: &str) {
        draft.distrust();
        if self.has_failed() {
            return;
        }
        tracing::error!(
            store = self.medium.name(),
            reason,
            "the bitmap store failed; its bitmaps are inconsistent, the disk is served on"
        );
        self.condition = Condition::Failed(reason.to_owned());
        // For the case that this process ends before the record is written.
        self.maps.distrust(self.store);
        self.record_distrust(draft);
    }

    /// A record in which nothing is to be trusted, or none at all.
    fn record_distrust(&mut self, draft: &Draft) {
        let record = Record {
            store: self.store,
            sequence: self.sequence + 1,
            run: self.run,
            disk: Stamp { size: draft.size(), ..self.disk },
            clean: None,
            size: draft.size(),
            generation: 0,
            live: None,
            next_object: self.next_object,
            table: None,
            objects: Vec::new(),
            contents: Contents {
                bitmaps: draft
                    .kept()
                    .map(|bitmap| BitmapRecord {
                        name: bitmap.name().to_owned(),
                        granularity: bitmap.layers().granularity(),
                        recording: false,
                        inconsistent: true,
                        layers: LayersRecord::default(),
                        frozen: None,
                    })
                    .collect(),
                checkpoints: Vec::new(),
            },
            prepared: None,
            decided: None,
        };
        let Err(Failure::Before(error) | Failure::Torn(error)) = self.write_slots(&record) else { return };
        let removed = SLOTS.map(|slot| self.medium.remove(slot));
        match removed.into_iter().collect::<io::Result<Vec<()>>>().and_then(|_| self.medium.sync_dir()) {
            Ok(()) => {
                tracing::error!(store = self.medium.name(), %error, "its record could not be written, and was removed")
            }
            Err(gone) => tracing::error!(
                store = self.medium.name(), %error, %gone,
                "the store can be neither written nor emptied: REMOVE IT BY HAND before the machine is started again, or its bitmaps will lie"
            ),
        }
    }

    /// Makes the bits of the live generation durable as they stand, for the record that follows.
    pub(crate) fn sync_live(&mut self, generation: u64, live: &LiveMap) -> Result<(), StoreError> {
        let bits = live.to_bits();
        let mut writer =
            Writer { keeper: self, objects: Vec::new(), places: HashMap::new(), layers: Vec::new(), new: Vec::new() };
        let written = writer.write(&bits);
        let new = std::mem::take(&mut writer.new);
        let done = written.and_then(|object| self.medium.sync_dir().map(|()| object));
        match done {
            Ok(object) => {
                self.synced = Some((generation, object));
                Ok(())
            }
            Err(error) => {
                let error = self.error(&error);
                self.take_away(&new);
                Err(error)
            }
        }
    }
}

fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => {
            let text = io::Error::from_raw_os_error(errno).to_string();
            text.split(" (os error").next().unwrap_or(&text).to_owned()
        }
        None => error.to_string(),
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

/// Collects what a record names, and writes the objects that are not there yet.
struct Writer<'a> {
    keeper: &'a mut Keeper,
    objects: Vec<ObjectRef>,
    places: HashMap<usize, u32>,
    layers: Vec<(Layer, ObjectRef)>,
    /// Written now.
    new: Vec<ObjectRef>,
}

impl Writer<'_> {
    fn contents(&mut self, state: &State<'_>) -> io::Result<(Contents, Option<Contents>)> {
        let contents = self.draft(state.draft)?;
        let otherwise = match &state.prepared {
            Some((_, _, otherwise)) => Some(self.draft(otherwise)?),
            None => None,
        };
        Ok((contents, otherwise))
    }

    fn draft(&mut self, draft: &Draft) -> io::Result<Contents> {
        let mut contents = Contents::default();
        for bitmap in draft.kept() {
            let frozen = match bitmap.frozen().filter(|_| !bitmap.is_inconsistent()) {
                Some((frozen, layers)) => Some(FrozenRecord {
                    id: frozen.id(),
                    by_client: frozen.owner() == Owner::Client,
                    layers: self.layers(layers)?,
                }),
                None => None,
            };
            // What a disabled bitmap's successor records, a job alone wants: with the process, that job is over.
            let layers = match bitmap.is_inconsistent() || bitmap.for_job {
                true => LayersRecord::default(),
                false => self.layers(bitmap.layers())?,
            };
            contents.bitmaps.push(BitmapRecord {
                name: bitmap.name().to_owned(),
                granularity: bitmap.layers().granularity(),
                recording: bitmap.is_recording(),
                inconsistent: bitmap.is_inconsistent() || bitmap.unfilled,
                layers,
                frozen,
            });
        }
        for checkpoint in &draft.checkpoints.0 {
            contents.checkpoints.push(CheckpointRecord {
                mark: checkpoint.mark.clone(),
                size: checkpoint.size,
                granularity: checkpoint.layers.granularity(),
                layers: self.layers(&checkpoint.layers)?,
            });
        }
        Ok(contents)
    }

    fn layers(&mut self, layers: &Layers) -> io::Result<LayersRecord> {
        let (base, closed) = layers.parts();
        let mut record = LayersRecord::default();
        if let Some(base) = base {
            record.objects.push((self.layer(Layer::Base(Arc::clone(base)))?, base.granularity()));
        }
        for (generation, granularity) in closed {
            record.objects.push((self.layer(Layer::Closed(Arc::clone(generation)))?, *granularity));
        }
        Ok(record)
    }

    fn layer(&mut self, layer: Layer) -> io::Result<u32> {
        let key = layer.key();
        if let Some(place) = self.places.get(&key) {
            return Ok(*place);
        }
        let object = match (self.keeper.known.get(&key), &layer) {
            (Some((_, object)), _) => *object,
            (None, Layer::Base(bits)) => self.write(bits)?,
            (None, Layer::Closed(map)) => self.write(&map.to_bits())?,
        };
        let place = self.objects.len() as u32;
        self.objects.push(object);
        self.places.insert(key, place);
        self.layers.push((layer, object));
        Ok(place)
    }

    fn write(&mut self, bits: &Bits) -> io::Result<ObjectRef> {
        let number = self.keeper.next_object;
        self.keeper.next_object += 1;
        let (bytes, object) = object::encode(self.keeper.store, number, self.keeper.sequence + 1, bits);
        let (medium, file) = (&self.keeper.medium, object.file());
        self.new.push(object);
        medium.allocate(&file, object.len)?;
        for (at, piece) in (0u64..).step_by(PIECE).zip(bytes.chunks(PIECE)) {
            medium.write(&file, at, piece)?;
        }
        medium.sync(&file)?;
        Ok(object)
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
