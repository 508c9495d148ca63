//! Records: what is in force is written into both slots, one after the other, and what no record names any more is taken away.

use super::super::object::{self, ObjectRef};
use super::super::record::{BitmapRecord, Contents, LayersRecord, LiveRecord, MOST, Prepared, Record, SLOTS};
use super::super::stamp::Stamp;
use super::super::table;
use super::error::{Failure, StoreError};
use super::writer::Writer;
use super::{Condition, Keeper, State};
use crate::live::LiveMap;
use crate::named::Draft;
use std::io;

impl Keeper {
    /// Makes `state` durable, whole. On success nothing that it does not name is left.
    pub(crate) fn record(&mut self, state: &State<'_>) -> Result<(), Failure> {
        if self.has_failed() {
            self.record_distrust(state.draft);
            return Ok(());
        }
        let mut writer = Writer::new(self);
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

    pub(super) fn take_away(&self, objects: &[ObjectRef]) {
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

    /// Makes the bits of the live generation durable as they stand, for the record that follows.
    pub(crate) fn sync_live(&mut self, generation: u64, live: &LiveMap) -> Result<(), StoreError> {
        let bits = live.to_bits();
        let mut writer = Writer::new(self);
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
                        for_job: false,
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
}
