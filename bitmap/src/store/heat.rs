//! Heat: before a write goes into an extent of the disk for the first time, it is written down durably that the extent may
//! have changed (I4, the half that survives a power cut).
//!
//! The write path tests one bit (`admits`). If the extent is cold, the write is held like one that a gate holds; the log's
//! own thread writes the intent table, one sync for all that wait, and lets them ask again. So queue threads never touch
//! the store.
//!
//! **Invariant.** A set bit in memory means that the extent is hot in the durable table. It is set under the table's lock after
//! the sync; the table is made cold under the same lock, only where the bit in memory is clear, after the bytes of the extent are
//! durable and its bits are in a durable object that a durable record names (`Tracker::cool`). Bits in memory are cleared while all queues are held out,
//! so a write that saw one is marked before the snapshot for that object is taken. After a change of the table that failed, no bit is set
//! in memory any more: what asks waits until the bitmaps are durably known not to be trusted (`Heat::give_up`).

use super::medium::Medium;
use super::table::{self, EXTENT, Extents, PER_SECTOR, SECTOR};
use crate::gate::{Gate, Resume, Verdict};
use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, lock};
use crate::units::ByteRange;
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The most extents that one miss makes hot.
const MOST_NEIGHBOURS: u64 = 8;

/// Misses that follow each other faster than this are a load that goes over the disk.
const FOLLOWS: Duration = Duration::from_secs(1);

/// What stands in the file.
struct Table {
    medium: Arc<dyn Medium>,
    file: String,
    run: Uuid,
    number: u64,
    written: u64,
    sectors: Vec<Extents>,
    neighbours: u64,
    missed: Option<Instant>,
    /// A change of it failed: nobody knows what the file says, so nothing is hot for certain any more.
    failed: bool,
}

#[derive(Default)]
struct Waiting {
    writes: Vec<(ByteRange, Resume)>,
    closed: bool,
    /// Nothing is written down any more; every write goes.
    given_up: bool,
}

/// Which extents are hot.
pub(crate) struct Heat {
    hot: Box<[AtomicU64]>,
    waiting: Mutex<Waiting>,
    work: Condvar,
    table: Mutex<Option<Table>>,
}

/// What [`Heat::serve`] came to.
pub(crate) enum Served {
    /// All that waited goes.
    Done,
    /// The table cannot be written. What waits goes once the bitmaps are known not to be trusted ([`Heat::give_up`]).
    #[cfg_attr(any(loom, shuttle), allow(dead_code, reason = "models have no threads that tell it"))]
    Failed(io::Error),
    /// No more.
    Closed,
}

fn extents(range: ByteRange) -> Option<RangeInclusive<u64>> {
    (!range.is_empty()).then(|| range.start() / EXTENT..=(range.end() - 1) / EXTENT)
}

impl Heat {
    /// All cold, for a disk of `size` bytes that may grow as far as its table has room.
    pub(crate) fn new(size: u64) -> Arc<Self> {
        let words = (table::sectors_for(size) * PER_SECTOR).div_ceil(64);
        Arc::new(Self {
            hot: (0..words).map(|_| AtomicU64::new(0)).collect(),
            waiting: Mutex::default(),
            work: Condvar::new(),
            table: Mutex::new(None),
        })
    }

    /// Whether a disk of `size` bytes has its extents in here.
    pub(crate) fn has_room(&self, size: u64) -> bool {
        size.div_ceil(EXTENT) <= self.hot.len() as u64 * 64
    }

    /// Makes a table for `run`, durably, and goes on with it: everything is cold. The caller syncs the directory.
    pub(crate) fn begin(&self, medium: &Arc<dyn Medium>, run: Uuid, number: u64, size: u64) -> io::Result<()> {
        let mut table = lock(&self.table);
        let file = table::file(number);
        let sectors = table::sectors_for(size).min((self.hot.len() as u64 * 64).div_ceil(PER_SECTOR)) as usize;
        let none: Extents = [0; _];
        let all: Vec<u8> = (0..sectors as u64).flat_map(|place| table::encode(run, number, 0, place, &none)).collect();
        medium.allocate(&file, all.len() as u64)?;
        medium.write(&file, 0, &all)?;
        medium.sync(&file)?;
        let sectors = vec![none; sectors];
        let medium = Arc::clone(medium);
        *table =
            Some(Table { medium, file, run, number, written: 0, sectors, neighbours: 1, missed: None, failed: false });
        Ok(())
    }

    /// Number of the table, and how many sectors of it have been written.
    pub(crate) fn table(&self) -> Option<(u64, u64)> {
        lock(&self.table).as_ref().map(|table| (table.number, table.written))
    }

    /// Makes all extents of `ranges` hot, now. For the few writes that are in flight at a flip.
    pub(crate) fn ensure(&self, ranges: impl Iterator<Item = ByteRange>) -> io::Result<()> {
        let wanted: Vec<u64> = ranges.filter_map(extents).flatten().collect();
        if wanted.is_empty() || lock(&self.waiting).given_up {
            return Ok(());
        }
        match &mut *lock(&self.table) {
            Some(table) => self.warm(table, wanted),
            None => Err(no_table()),
        }
    }

    /// Makes durable that `wanted` are hot, then says so in memory.
    fn warm(&self, table: &mut Table, wanted: Vec<u64>) -> io::Result<()> {
        if table.failed {
            return Err(io::Error::other("the intent table failed before"));
        }
        let cold: Vec<u64> = wanted.iter().copied().filter(|extent| !table.is_hot(*extent)).collect();
        if !cold.is_empty() {
            table.change(&cold, true)?;
        }
        for extent in wanted {
            if let Some(word) = self.hot.get((extent / 64) as usize) {
                word.fetch_or(1 << (extent % 64), Ordering::Release);
            }
        }
        Ok(())
    }

    /// The log's thread: makes hot what writes wait for. With `wait`, blocks until there is something.
    pub(crate) fn serve(&self, wait: bool) -> Served {
        let writes = {
            let mut waiting = lock(&self.waiting);
            while wait && waiting.writes.is_empty() && !waiting.closed {
                waiting = self.work.wait(waiting).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            if waiting.writes.is_empty() && waiting.closed {
                return Served::Closed;
            }
            std::mem::take(&mut waiting.writes)
        };
        if writes.is_empty() {
            return Served::Done;
        }
        let result = match &mut *lock(&self.table) {
            Some(table) => {
                let wanted = table.neighbourhood(writes.iter().filter_map(|(range, _)| extents(*range)).flatten());
                self.warm(table, wanted)
            }
            None => Err(no_table()),
        };
        match result {
            Ok(()) => {
                writes.into_iter().for_each(|(_, resume)| resume(Verdict::Again));
                Served::Done
            }
            Err(error) => {
                lock(&self.waiting).writes.extend(writes);
                Served::Failed(error)
            }
        }
    }

    /// From now on every write goes. Only when no bitmap relies on the table any more, durably.
    pub(crate) fn give_up(&self) {
        let writes = {
            let mut waiting = lock(&self.waiting);
            waiting.given_up = true;
            self.hot.iter().for_each(|word| word.store(u64::MAX, Ordering::Release));
            std::mem::take(&mut waiting.writes)
        };
        writes.into_iter().for_each(|(_, resume)| resume(Verdict::Again));
    }

    /// Whether it was given up.
    pub(crate) fn is_given_up(&self) -> bool {
        lock(&self.waiting).given_up
    }

    /// Forgets in memory which extents are hot, so that the next write to each has to ask; not those of writes that are in flight,
    /// whose bytes a flush does not cover yet. Only while all queues are held out.
    pub(crate) fn forget(&self, in_flight: &mut Vec<ByteRange>) {
        if self.is_given_up() {
            return;
        }
        in_flight.retain(|range| self.admits(*range));
        self.hot.iter().for_each(|word| {
            if word.load(Ordering::Relaxed) != 0 {
                word.store(0, Ordering::Relaxed);
            }
        });
        for extent in in_flight.iter().copied().filter_map(extents).flatten() {
            if let Some(word) = self.hot.get((extent / 64) as usize) {
                word.fetch_or(1 << (extent % 64), Ordering::Release);
            }
        }
    }

    /// The extents that are hot in the table and that nobody wrote to since [`Heat::forget`].
    pub(crate) fn idle(&self) -> Vec<u64> {
        let table = lock(&self.table);
        let sectors = table.iter().flat_map(|table| &table.sectors);
        let hot = (0..).zip(sectors).flat_map(|(place, extents): (u64, &Extents)| {
            let bits = (0..PER_SECTOR).filter(|bit| extents[(bit / 8) as usize] >> (bit % 8) & 1 != 0);
            bits.map(move |bit| place * PER_SECTOR + bit)
        });
        hot.filter(|extent| !self.remembers(*extent)).collect()
    }

    fn remembers(&self, extent: u64) -> bool {
        let word = self.hot.get((extent / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (extent % 64) & 1 != 0)
    }

    /// Makes those of `extents` cold in the table that nobody asked for meanwhile. Their bits are durable.
    pub(crate) fn cool(&self, extents: &[u64]) -> io::Result<()> {
        let mut table = lock(&self.table);
        let Some(table) = &mut *table else { return Ok(()) };
        // Nobody sets a bit in memory without this lock.
        let idle: Vec<u64> = extents.iter().copied().filter(|extent| !self.remembers(*extent)).collect();
        if idle.is_empty() { Ok(()) } else { table.change(&idle, false) }
    }

    /// Ends [`Heat::serve`].
    pub(crate) fn close(&self) {
        lock(&self.waiting).closed = true;
        self.work.notify_all();
    }

    /// Waits for `time`, or until it is closed; `false`: it is.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn rest(&self, time: Duration) -> bool {
        let end = Instant::now() + time;
        let mut waiting = lock(&self.waiting);
        while !waiting.closed {
            let now = Instant::now();
            if now >= end {
                return true;
            }
            waiting = self.work.wait_timeout(waiting, end - now).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
        false
    }
}

impl Gate for Heat {
    #[inline]
    fn admits(&self, range: ByteRange) -> bool {
        if range.is_empty() {
            return true;
        }
        let (first, last) = (range.start() / EXTENT, (range.end() - 1) / EXTENT);
        // Past the end there is nothing: a disk does not grow beyond its table.
        let hot = |extent: u64| {
            let word = self.hot.get((extent / 64) as usize);
            word.is_none_or(|word| word.load(Ordering::Relaxed) >> (extent % 64) & 1 != 0)
        };
        // Extents are large: few writes touch two.
        hot(first) && (first == last || (first + 1..=last).all(hot))
    }

    fn hold(&self, range: ByteRange, _: Instant, resume: Resume) {
        let mut waiting = lock(&self.waiting);
        if waiting.given_up {
            drop(waiting);
            return resume(Verdict::Again);
        }
        waiting.writes.push((range, resume));
        drop(waiting);
        self.work.notify_all();
    }
}

impl Table {
    fn is_hot(&self, extent: u64) -> bool {
        let bit = (extent % PER_SECTOR) as usize;
        let sector = self.sectors.get((extent / PER_SECTOR) as usize);
        sector.is_some_and(|extents| extents[bit / 8] >> (bit % 8) & 1 != 0)
    }

    /// Writes the sectors of `extents` anew, all of them before one sync.
    fn change(&mut self, extents: &[u64], hot: bool) -> io::Result<()> {
        self.rewrite(extents, hot).inspect_err(|_| self.failed = true)
    }

    fn rewrite(&mut self, extents: &[u64], hot: bool) -> io::Result<()> {
        let mut places: Vec<u64> = extents.iter().map(|extent| extent / PER_SECTOR).collect();
        places.sort_unstable();
        places.dedup();
        let mut new = Vec::with_capacity(places.len());
        for place in places {
            let Some(sector) = self.sectors.get(place as usize) else { return Err(no_table()) };
            let mut sector = *sector;
            for extent in extents.iter().filter(|extent| *extent / PER_SECTOR == place) {
                let bit = (extent % PER_SECTOR) as usize;
                if hot {
                    sector[bit / 8] |= 1 << (bit % 8);
                } else {
                    sector[bit / 8] &= !(1 << (bit % 8));
                }
            }
            new.push((place, sector));
        }
        for (place, sector) in &new {
            self.written += 1;
            let bytes = table::encode(self.run, self.number, self.written, *place, sector);
            self.medium.write(&self.file, place * SECTOR as u64, &bytes)?;
        }
        self.medium.sync(&self.file)?;
        for (place, sector) in new {
            self.sectors[place as usize] = sector;
        }
        Ok(())
    }

    /// What is wanted, and more of it if misses follow each other.
    fn neighbourhood(&mut self, wanted: impl Iterator<Item = u64>) -> Vec<u64> {
        let now = Instant::now();
        let wanted: Vec<u64> = wanted.collect();
        if wanted.iter().any(|extent| !self.is_hot(*extent)) {
            let follows = self.missed.is_some_and(|missed| now.duration_since(missed) < FOLLOWS);
            self.neighbours = if follows { (self.neighbours * 2).min(MOST_NEIGHBOURS) } else { 1 };
            self.missed = Some(now);
        }
        let (count, room) = (self.neighbours, self.sectors.len() as u64 * PER_SECTOR);
        let mut all = wanted.clone();
        for extent in wanted {
            if !self.is_hot(extent) {
                let first = extent - extent % count;
                all.extend(first..(first + count).min(room));
            }
        }
        all.sort_unstable();
        all.dedup();
        all
    }
}

fn no_table() -> io::Error {
    io::Error::other("there is no intent table for this part of the disk")
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
