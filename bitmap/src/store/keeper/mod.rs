//! The keeper: writes what a disk's bitmaps are to its store, so that no answer is given for what a crash could undo.
//!
//! [`opening`] takes over what is there, [`slots`] writes records, [`writer`] the objects that they name, [`room`] takes room ahead.
//!
//! Under the control lock of the disk's tracker; no queue thread ever comes here. Order of a record: objects that it names are
//! made durable; then the first slot; then the second; only then anything that older records needed is taken away. See
//! `docs/store.md` for why a crash between any two of these steps loses nothing.
//!
//! What fails before a slot is touched, or while the first is written to and can be put back, leaves the old record in force and is
//! an error of the command. What else fails in a slot leaves it open which record is in force, so all bitmaps become
//! inconsistent, durably (`distrust`).

mod error;
mod opening;
mod room;
mod slots;
mod writer;

pub(crate) use error::Failure;
pub use error::StoreError;
pub(crate) use opening::Opened;

use super::heat::Heat;
use super::maps::{MapHead, Maps};
use super::medium::Medium;
use super::object::ObjectRef;
use super::stamp::Stamp;
use super::{Before, Flush, Place};
use crate::live::LiveMap;
use crate::named::Draft;
use crate::units::{ByteRange, Granularity};
use error::reason;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use uuid::Uuid;
use writer::Layer;

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
}
