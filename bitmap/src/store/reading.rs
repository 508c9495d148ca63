//! Reading a store: what a record, the objects, the intent table and the maps that were left amount to. Writes nothing.
//!
//! Whatever the files hold, a bitmap that comes out of here as good contains all that changed while it recorded, and one
//! that did not record is exactly what it was. What cannot be vouched for comes out as inconsistent, with the reason.

use super::codec::Damage;
use super::maps::{FoundMaps, Maps};
use super::medium::Medium;
use super::object::{self, ObjectRef};
use super::record::{Contents, LayersRecord, MOST, Record, SLOTS};
use super::stamp::Stamp;
use super::table;
use crate::bits::Bits;
use crate::checkpoints::CheckpointMark;
use crate::units::{ByteRange, Granularity};
use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use uuid::Uuid;

/// No object is larger: a gigabyte of bits, with the blocks' numbers.
const MOST_OBJECT: u64 = (1 << 30) + (1 << 25);

/// What the slots of a store say.
#[derive(Debug)]
pub enum Slots {
    /// Nothing was ever recorded.
    Fresh,
    /// This. The other slot, if one is named, holds something else or nothing.
    Found(Box<Record>, Option<&'static str>),
    /// A version of blkmark that is not this one wrote it.
    Newer(u32),
    /// Neither slot can be read.
    Damaged(String),
}

fn read_slot(medium: &dyn Medium, slot: &str) -> Result<Option<Record>, Damage> {
    match medium.read(slot, MOST as u64) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Damage::Missing),
        Err(error) => Err(Damage::Unreadable(error.to_string())),
        // Allocated, and never written to.
        Ok(bytes) if bytes.iter().all(|byte| *byte == 0) => Ok(None),
        Ok(bytes) => Record::decode(&bytes).map(Some),
    }
}

/// The record that is in force. See [`record`](super::record) for why one whole slot is enough.
pub fn slots(medium: &dyn Medium) -> Slots {
    let read = SLOTS.map(|slot| read_slot(medium, slot));
    if let Some(Err(Damage::Version(version))) =
        read.iter().find(|slot| matches!(slot, Err(Damage::Version(version)) if *version > super::record::VERSION))
    {
        return Slots::Newer(*version);
    }
    match read {
        [Ok(Some(first)), Ok(Some(second))] => {
            if first.store != second.store {
                return Slots::Damaged("its two slots are of different stores".to_owned());
            }
            match first.sequence.cmp(&second.sequence) {
                Ordering::Less => Slots::Found(Box::new(second), Some(SLOTS[0])),
                Ordering::Equal => Slots::Found(Box::new(first), None),
                Ordering::Greater => Slots::Found(Box::new(first), Some(SLOTS[1])),
            }
        }
        [Ok(Some(record)), _] => Slots::Found(Box::new(record), Some(SLOTS[1])),
        [_, Ok(Some(record))] => Slots::Found(Box::new(record), Some(SLOTS[0])),
        // Nobody was told of a record that only one slot was to have so far.
        [Ok(None), _] | [_, Ok(None)] | [Err(Damage::Missing), Err(Damage::Missing)] => {
            let names = medium.list().unwrap_or_default();
            match names.iter().any(|name| object::parse_file(name).is_some()) {
                true => Slots::Damaged("it has objects and no record".to_owned()),
                false => Slots::Fresh,
            }
        }
        [Err(first), Err(second)] => Slots::Damaged(format!("{}: {first}; {}: {second}", SLOTS[0], SLOTS[1])),
    }
}

/// How the process before has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// As it should: everything is as it was.
    Clean,
    /// It was killed; its live maps were found.
    Killed,
    /// With the machine: bits that were synced, and all of the extents that were hot.
    PowerCut {
        /// Extents that count as changed.
        hot: u64,
        /// Sectors of the intent table that are damaged, the extents of which are among them.
        damaged: u64,
    },
    /// Not told by anything that was found.
    Unknown,
}

/// A bitmap or a segment, with its bits.
#[derive(Clone, Debug)]
pub struct Dirty {
    /// The bits; `None`: none is set.
    pub bits: Option<Arc<Bits>>,
    /// The object that holds exactly them.
    pub object: Option<ObjectRef>,
}

/// A bitmap.
#[derive(Clone, Debug)]
pub struct FoundBitmap {
    /// Its name.
    pub name: String,
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// Whether it records.
    pub recording: bool,
    /// The freeze that ended with the process; what was frozen is among the bits again, unless it is in `set`.
    pub frozen: Option<Uuid>,
    /// What is frozen still, since its freeze may be gone on with.
    pub set: Option<Freeze>,
    /// Its bits, or why it is inconsistent.
    pub dirty: Result<Dirty, String>,
}

/// A freeze of a job that may be gone on with.
#[derive(Clone, Debug)]
pub struct Freeze {
    /// What is frozen.
    pub dirty: Dirty,
    /// What took over records for that job although the bitmap does not.
    pub for_job: bool,
    /// The bitmap was made for what that job is to find, and is of no worth without it.
    pub unfilled: bool,
}

/// A checkpoint.
#[derive(Clone, Debug)]
pub struct FoundCheckpoint {
    /// What it is called.
    pub mark: CheckpointMark,
    /// Bytes that the disk had.
    pub size: u64,
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// Its segment.
    pub dirty: Dirty,
}

/// What there is.
#[derive(Debug)]
pub struct Reading {
    /// How it came about.
    pub how: How,
    /// The bitmaps in their order.
    pub bitmaps: Vec<FoundBitmap>,
    /// The checkpoints, oldest first; or why they are lost.
    pub checkpoints: Result<Vec<FoundCheckpoint>, String>,
    /// The highest generation that was seen.
    pub generation: u64,
    /// The highest number of a file that was seen.
    pub number: u64,
}

struct Reader<'a> {
    medium: &'a dyn Medium,
    record: &'a Record,
    /// Freezes that do not end here.
    resume: &'a [Uuid],
    /// By all that a record says of one: what it says may be nonsense, as two checksums for one file.
    objects: HashMap<ObjectRef, Result<Arc<Bits>, String>>,
}

/// Reads all that `record` names. `disk`: the disk as it is now, if it is known; `maps`: what was left on tmpfs.
pub fn read(medium: &dyn Medium, record: &Record, disk: Option<&Stamp>, maps: &mut dyn Maps) -> Reading {
    read_to_resume(medium, record, disk, maps, &[])
}

/// The same; freezes of jobs that are among `resume` go on if the process was killed and nothing is lost.
pub fn read_to_resume(
    medium: &dyn Medium,
    record: &Record,
    disk: Option<&Stamp>,
    maps: &mut dyn Maps,
    resume: &[Uuid],
) -> Reading {
    let names = medium.list().unwrap_or_default();
    let files: Vec<(u64, u64)> = names.iter().filter_map(|name| object::parse_file(name)).collect();
    let tables = names.iter().filter_map(|name| table::parse_file(name));
    let number = files.iter().map(|(number, _)| *number).chain(tables).max().unwrap_or(0);
    let (maps, no_maps) = match maps.find(record.store) {
        Ok(found) => (found, None),
        Err(error) => (FoundMaps::default(), Some(error)),
    };
    if let Some(error) = no_maps {
        tracing::warn!(store = medium.name(), %error, "could not look for live maps");
    }
    let generation = maps.maps.iter().map(|map| map.head.generation).chain([record.generation]).max().unwrap_or(0);
    let mut reader = Reader { medium, record, resume, objects: HashMap::new() };
    let contents = reader.contents();
    let older = files.iter().any(|(_, sequence)| *sequence > record.sequence + 1);
    let distrust = match disk {
        _ if maps.distrusted => Some("what it recorded could not be written down"),
        _ if older => Some("its record is older than its objects"),
        Some(disk) => match &record.clean {
            Some(clean) => clean.changed_until(disk),
            None => record.disk.differs(disk),
        }
        .or((record.size != disk.size).then_some("its size changed")),
        None => None,
    };
    if let Some(reason) = distrust {
        let reason = match disk {
            Some(_) if !maps.distrusted && !older => format!("the disk is not as it was left: {reason}"),
            _ => reason.to_owned(),
        };
        let lost = Err(reason);
        return Reading {
            how: How::Unknown,
            bitmaps: contents.bitmaps.iter().map(|bitmap| reader.inconsistent(bitmap, lost.clone())).collect(),
            checkpoints: lost.map(|_: Dirty| Vec::new()),
            generation,
            number,
        };
    }
    let (how, live) = reader.live(maps);
    if how != How::Killed {
        reader.resume = &[];
    }
    let bitmaps = contents.bitmaps.iter().map(|bitmap| reader.bitmap(bitmap, &live)).collect();
    let checkpoints = reader.checkpoints(contents, &live);
    Reading { how, bitmaps, checkpoints, generation, number }
}

impl<'a> Reader<'a> {
    /// What is in force: a commit that was prepared here counts if the store that decides says so.
    fn contents(&self) -> &'a Contents {
        let Some(prepared) = &self.record.prepared else { return &self.record.contents };
        let there = SLOTS.map(|slot| {
            let bytes = self.medium.read_elsewhere(&prepared.decided_in, slot, MOST as u64).ok()?;
            Record::decode(&bytes).ok()
        });
        let newest = there.into_iter().flatten().max_by_key(|record| record.sequence);
        let decided = newest.is_some_and(|record| record.decided == Some(prepared.commit));
        if decided { &self.record.contents } else { &prepared.otherwise }
    }

    fn inconsistent(&self, bitmap: &super::record::BitmapRecord, dirty: Result<Dirty, String>) -> FoundBitmap {
        FoundBitmap {
            name: bitmap.name.clone(),
            granularity: bitmap.granularity,
            recording: false,
            frozen: bitmap.frozen.as_ref().map(|frozen| frozen.id),
            set: None,
            dirty,
        }
    }

    fn bitmap(&mut self, bitmap: &super::record::BitmapRecord, live: &Result<Vec<Bits>, String>) -> FoundBitmap {
        let mut found = self.inconsistent(bitmap, Err("it was found inconsistent before".to_owned()));
        let goes_on = bitmap.frozen.as_ref().filter(|frozen| !frozen.by_client && self.resume.contains(&frozen.id));
        // If the set cannot be read, the freeze ends, and the bitmap is inconsistent for the same reason.
        let set = goes_on.and_then(|frozen| self.dirty(bitmap.granularity, &[&frozen.layers], None).ok());
        let (for_job, unfilled) = (bitmap.for_job, bitmap.inconsistent);
        found.set = set.map(|dirty| Freeze { dirty, for_job, unfilled });
        if unfilled && found.set.is_none() {
            return found;
        }
        let frozen = bitmap.frozen.as_ref().filter(|_| found.set.is_none()).map(|frozen| &frozen.layers);
        // What was recorded for a job alone goes with it.
        let own = Some(&bitmap.layers).filter(|_| !for_job || found.set.is_some());
        let layers: Vec<&LayersRecord> = own.into_iter().chain(frozen).collect();
        let records = bitmap.recording || for_job && found.set.is_some();
        found.dirty = self.dirty(bitmap.granularity, &layers, records.then_some(live));
        found.recording = bitmap.recording && found.dirty.is_ok();
        found
    }

    fn checkpoints(
        &mut self,
        contents: &Contents,
        live: &Result<Vec<Bits>, String>,
    ) -> Result<Vec<FoundCheckpoint>, String> {
        let last = contents.checkpoints.len().saturating_sub(1);
        let found = contents.checkpoints.iter().enumerate().map(|(at, checkpoint)| {
            let live = (at == last).then_some(live);
            Ok(FoundCheckpoint {
                mark: checkpoint.mark.clone(),
                size: checkpoint.size,
                granularity: checkpoint.granularity,
                dirty: self.dirty(checkpoint.granularity, &[&checkpoint.layers], live)?,
            })
        });
        found.collect()
    }

    /// A union of objects, and of the live generation if it counts.
    fn dirty(
        &mut self,
        granularity: Granularity,
        layers: &[&LayersRecord],
        live: Option<&Result<Vec<Bits>, String>>,
    ) -> Result<Dirty, String> {
        let live: &[Bits] = match live {
            Some(live) => live.as_ref().map_err(Clone::clone)?,
            None => &[],
        };
        let mut objects: Vec<(u32, Granularity)> = layers.iter().flat_map(|layers| layers.objects.clone()).collect();
        objects.dedup();
        if let ([(object, _)], true) = (&objects[..], live.iter().all(Bits::is_empty)) {
            let named = self.record.objects[*object as usize];
            let bits = self.object(&named)?;
            if (bits.granularity(), bits.size()) == (granularity, self.record.size) {
                return Ok(Dirty { bits: Some(bits), object: Some(named) });
            }
        }
        if objects.is_empty() && live.iter().all(Bits::is_empty) {
            return Ok(Dirty { bits: None, object: None });
        }
        let mut all = Bits::new(granularity, self.record.size);
        for (object, at) in objects {
            let bits = self.object(&self.record.objects[object as usize])?;
            if at > granularity && at > bits.granularity() {
                all.union(&bits.at(at));
            } else {
                all.union(&bits);
            }
        }
        live.iter().for_each(|live| all.union(live));
        Ok(Dirty { bits: Some(Arc::new(all)), object: None })
    }

    fn object(&mut self, named: &ObjectRef) -> Result<Arc<Bits>, String> {
        let (medium, store) = (self.medium, self.record.store);
        let read = || {
            let bytes = medium.read(&named.file(), MOST_OBJECT).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => Damage::Missing,
                _ => Damage::Unreadable(error.to_string()),
            });
            let bits = bytes.and_then(|bytes| object::decode(store, named, &bytes));
            bits.map(Arc::new).map_err(|damage| format!("'{}' is damaged: {damage}", named.file()))
        };
        self.objects.entry(*named).or_insert_with(read).clone()
    }

    /// What was marked in the generation that was being written, and in every later one.
    fn live(&mut self, found: FoundMaps) -> (How, Result<Vec<Bits>, String>) {
        let record = self.record;
        let Some(live) = record.live.as_ref().filter(|_| record.clean.is_none()) else {
            let how = if record.clean.is_some() { How::Clean } else { How::Killed };
            return (how, Ok(Vec::new()));
        };
        let maps: Vec<_> = found
            .maps
            .into_iter()
            .filter(|map| map.head.run == record.run && map.head.generation >= record.generation)
            .collect();
        let is_there = |generation: u64| maps.iter().any(|map| map.head.generation == generation);
        let whole = is_there(record.generation) && maps.iter().all(|map| map.next == 0 || is_there(map.next));
        let mut all: Vec<Bits> = maps.into_iter().map(|map| map.bits).collect();
        if whole {
            return (How::Killed, Ok(all));
        }
        if let Some(synced) = &live.synced {
            match self.object(synced) {
                Ok(bits) => all.push((*bits).clone()),
                Err(damage) => return (How::Unknown, Err(damage)),
            }
        }
        let Some((number, written)) = record.table else {
            return (How::Unknown, Err("there is no intent table".to_owned()));
        };
        let file = table::file(number);
        let bytes = match self.medium.read(&file, MOST_OBJECT) {
            Ok(bytes) => bytes,
            Err(error) => return (How::Unknown, Err(format!("'{file}' cannot be read: {error}"))),
        };
        match table::read(record.run, number, written, record.size, &bytes) {
            Ok(found) => {
                let extent = Granularity::new(table::EXTENT).unwrap_or(Granularity::MAX);
                let mut hot = Bits::new(extent, record.size);
                found.hot.iter().for_each(|at| hot.set(ByteRange::new(at * table::EXTENT, table::EXTENT)));
                all.push(hot);
                (How::PowerCut { hot: found.hot.len() as u64, damaged: found.damaged }, Ok(all))
            }
            Err(damage) => (How::Unknown, Err(format!("'{file}' is damaged: {damage}"))),
        }
    }
}
