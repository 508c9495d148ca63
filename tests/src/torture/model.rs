//! What a disk must hold: every sector's last acknowledged version, and what it may hold instead.
//!
//! Fed with the journal, record by record. A write that was not answered has either outcome, sector by sector, until it
//! is answered, or a read says which it was: from then on that is what the sector holds, and nothing else will do.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::content::Version;
use super::journal::{Record, Word};

/// A change that a guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Its number, which no other change of any disk has.
    pub number: u64,
    /// The first sector.
    pub sector: u32,
    /// How many.
    pub count: u32,
    /// What they hold afterwards.
    pub version: Version,
    /// A discard: or what they held before.
    pub discard: bool,
    /// The place in the journal at which it began.
    pub begun: u64,
}

impl Change {
    /// The change that a record begins, if it begins one.
    pub fn begun_by(at: u64, record: &Record) -> Option<Change> {
        let version = match record.word {
            Word::Write => record.number,
            Word::Zero | Word::Discard => 0,
            _ => return None,
        };
        Some(Change {
            number: record.number,
            sector: record.sector,
            count: record.count.into(),
            version,
            discard: record.word == Word::Discard,
            begun: at,
        })
    }

    /// Its sectors.
    pub fn sectors(&self) -> std::ops::Range<u32> {
        self.sector..self.sector + self.count
    }
}

/// What the journal tells that cannot be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wrong(pub String);

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What became certain by a record: the bitmaps have to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Certain {
    /// A change was answered.
    Done(Change),
    /// Sectors turned out to hold what a dead guest was about to write.
    Landed {
        /// The sectors.
        sectors: Vec<u32>,
        /// The place in the journal at which that began, the earliest that it can be.
        begun: u64,
    },
}

/// A disk's model.
#[derive(Clone, Debug)]
pub struct Model {
    known: Vec<Version>,
    /// What a sector may hold besides, and where that began.
    open: BTreeMap<u32, Vec<(Version, u64)>>,
    pending: HashMap<u64, Change>,
}

impl Model {
    /// A disk of zeroes.
    pub fn new(sectors: u32) -> Model {
        Model { known: vec![0; sectors as usize], open: BTreeMap::new(), pending: HashMap::new() }
    }

    /// How many sectors there are.
    pub fn sectors(&self) -> u32 {
        self.known.len() as u32
    }

    /// What each sector holds if nothing else is said of it.
    pub fn known(&self) -> &[Version] {
        &self.known
    }

    /// Requests that were begun and not answered.
    pub fn pending(&self) -> impl Iterator<Item = &Change> {
        self.pending.values()
    }

    /// What sectors may hold besides what is known, unanswered requests of a living guest left out.
    pub fn open(&self) -> BTreeMap<u32, Vec<Version>> {
        self.open.iter().map(|(sector, more)| (*sector, more.iter().map(|(version, _)| *version).collect())).collect()
    }

    /// Whether the sector may hold this now.
    pub fn may_hold(&self, sector: u32, version: Version) -> bool {
        self.known.get(sector as usize) == Some(&version)
            || self.open.get(&sector).is_some_and(|more| more.iter().any(|(open, _)| *open == version))
    }

    /// Takes a record of this disk, the one at place `at`.
    pub fn apply(&mut self, at: u64, record: &Record) -> Result<Option<Certain>, Wrong> {
        if let Some(change) = Change::begun_by(at, record) {
            if change.sectors().end > self.sectors() {
                return Err(Wrong(format!("request {:#x} is beyond the disk", change.number)));
            }
            self.pending.insert(change.number, change);
            return Ok(None);
        }
        match record.word {
            Word::Done => {
                let Some(change) = self.pending.remove(&record.number) else {
                    return Err(Wrong(format!("request {:#x} was answered without being asked", record.number)));
                };
                for sector in change.sectors() {
                    if change.discard {
                        self.open.entry(sector).or_default().push((0, change.begun));
                    } else {
                        self.known[sector as usize] = change.version;
                        self.open.remove(&sector);
                    }
                }
                Ok(Some(Certain::Done(change)))
            }
            Word::Seen => self.seen(record),
            Word::Foreign => Err(Wrong(format!(
                "disk {} sector {} (byte {}): the guest read what nobody wrote there",
                record.disk,
                record.sector,
                u64::from(record.sector) * 512
            ))),
            _ => Err(Wrong(format!(
                "request {:#x} of disk {} failed: status {}",
                record.number, record.disk, record.count
            ))),
        }
    }

    fn seen(&mut self, record: &Record) -> Result<Option<Certain>, Wrong> {
        let (mut sectors, mut earliest) = (Vec::new(), u64::MAX);
        for sector in record.sector..record.sector + u32::from(record.count) {
            if !self.may_hold(sector, record.number) {
                return Err(Wrong(format!(
                    "disk {} sector {sector} (byte {}): the guest read version {:#x}, but {:#x} was written last{}",
                    record.disk,
                    u64::from(sector) * 512,
                    record.number,
                    self.known.get(sector as usize).copied().unwrap_or_default(),
                    match self.open.get(&sector) {
                        Some(open) => format!(" (or {open:x?})"),
                        None => String::new(),
                    }
                )));
            }
            let known = &mut self.known[sector as usize];
            if let Some(open) = self.open.remove(&sector)
                && *known != record.number
                && let Some((_, begun)) = open.iter().find(|(version, _)| *version == record.number)
            {
                sectors.push(sector);
                earliest = earliest.min(*begun);
            }
            *known = record.number;
        }
        Ok((!sectors.is_empty()).then_some(Certain::Landed { sectors, begun: earliest }))
    }

    /// The guest died: what it was not answered has either outcome. Ranges that the next guest has to look at, of at
    /// most `longest` sectors each.
    pub fn guest_died(&mut self, longest: u32) -> Vec<(u32, u32)> {
        let end = self.sectors();
        for change in self.pending.drain().map(|(_, change)| change) {
            // The disk may have become smaller since.
            for sector in change.sectors().filter(|sector| *sector < end) {
                self.open.entry(sector).or_default().push((change.version, change.begun));
            }
        }
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for sector in self.open.keys() {
            match ranges.last_mut() {
                Some((first, count)) if *first + *count == *sector && *count < longest => *count += 1,
                _ => ranges.push((*sector, 1)),
            }
        }
        ranges
    }

    /// The disk got another size while no guest wrote beyond the smaller one.
    pub fn resize(&mut self, sectors: u32) {
        self.known.resize(sectors as usize, 0);
        self.open.split_off(&sectors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(word: Word, sector: u32, count: u16, number: u64) -> Record {
        Record { word, disk: 0, count, sector, number }
    }

    #[test]
    fn an_unanswered_write_has_either_outcome_until_it_was_seen() {
        let mut model = Model::new(64);
        model.apply(0, &record(Word::Write, 8, 4, 5)).unwrap();
        model.apply(1, &record(Word::Done, 0, 0, 5)).unwrap();
        model.apply(2, &record(Word::Write, 10, 4, 6)).unwrap();
        assert!(!model.may_hold(10, 6), "a living guest does not read what it is writing");
        assert_eq!(model.guest_died(3), [(10, 3), (13, 1)]);
        assert!(model.may_hold(10, 5) && model.may_hold(10, 6) && model.may_hold(13, 0) && !model.may_hold(9, 6));
        let landed = model.apply(3, &record(Word::Seen, 10, 1, 6)).unwrap();
        assert_eq!(landed, Some(Certain::Landed { sectors: vec![10], begun: 2 }));
        assert_eq!(model.apply(4, &record(Word::Seen, 11, 1, 5)), Ok(None));
        // From now on it is what was seen, torn or not.
        assert!(model.apply(5, &record(Word::Seen, 10, 1, 5)).is_err());
        assert!(model.apply(6, &record(Word::Seen, 11, 1, 6)).is_err());
        assert!(model.apply(7, &record(Word::Seen, 10, 1, 6)).is_ok());
    }

    #[test]
    fn what_was_answered_is_all_that_a_sector_may_hold() {
        let mut model = Model::new(64);
        for (number, word) in [(5, Word::Write), (6, Word::Zero), (7, Word::Write)] {
            model.apply(0, &record(word, 0, 2, number)).unwrap();
            model.apply(1, &record(Word::Done, 0, 0, number)).unwrap();
        }
        assert!(model.apply(2, &record(Word::Seen, 0, 2, 5)).is_err());
        assert!(model.apply(2, &record(Word::Seen, 0, 2, 0)).is_err());
        assert!(model.apply(3, &record(Word::Done, 0, 0, 7)).is_err(), "answered twice");
        model.apply(4, &record(Word::Discard, 1, 1, 8)).unwrap();
        model.apply(5, &record(Word::Done, 0, 0, 8)).unwrap();
        assert!(model.may_hold(1, 7) && model.may_hold(1, 0) && !model.may_hold(0, 0));
        model.apply(6, &record(Word::Seen, 1, 1, 0)).unwrap();
        assert!(!model.may_hold(1, 7));
    }
}
