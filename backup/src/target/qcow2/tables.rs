//! The two levels of tables that say where each guest cluster lies.
//!
//! Called by the writer, under its lock. The L1 table is in memory; of the L2 tables as many as were used last, and the others
//! are read again when they are wanted. A new L2 table takes its place in the file at once, filled with zeroes, so that a
//! full disk is noticed by a write that can be tried again. A failed call has changed nothing and may be made again.

use super::super::bytes::Bytes;
use super::entry::{COPIED, Entry, Geometry, OFFSET};
use super::space::Space;
use std::collections::HashMap;
use std::io;
use std::ops::Range;

/// Memory for L2 tables; a copy goes through a disk in order, so that few are in use at a time.
const MEMORY: u64 = 8 << 20;
const FEWEST: u64 = 16;

struct Table {
    entries: Vec<u64>,
    dirty: bool,
    used: u64,
}

pub(super) struct Tables {
    geometry: Geometry,
    l1: Vec<u64>,
    l1_offset: u64,
    /// Entries of the L1 table that are not in the file.
    l1_dirty: Range<usize>,
    tables: HashMap<usize, Table>,
    clock: u64,
}

impl Tables {
    /// Those of a new image, whose L1 table is not in the file yet.
    pub fn new(geometry: Geometry, l1_offset: u64) -> Self {
        let l1 = vec![0; geometry.l1_entries() as usize];
        let l1_dirty = 0..l1.len();
        Self { geometry, l1, l1_offset, l1_dirty, tables: HashMap::new(), clock: 0 }
    }

    /// Those of an image that exists.
    pub fn read(bytes: &Bytes, geometry: Geometry, l1_offset: u64, entries: u64) -> io::Result<Self> {
        let l1 = read_table(bytes, l1_offset, entries)?;
        Ok(Self { geometry, l1, l1_offset, l1_dirty: 0..0, tables: HashMap::new(), clock: 0 })
    }

    fn split(&self, cluster: u64) -> (usize, usize) {
        let entries = self.geometry.l2_entries();
        ((cluster / entries) as usize, (cluster % entries) as usize)
    }

    /// How many clusters from this one on are certainly unmapped, because there is no table for them.
    pub fn without_table(&self, cluster: u64) -> u64 {
        let (index, at) = self.split(cluster);
        if self.l1[index] & OFFSET == 0 { self.geometry.l2_entries() - at as u64 } else { 0 }
    }

    pub fn get(&mut self, bytes: &Bytes, cluster: u64) -> io::Result<Entry> {
        if self.without_table(cluster) > 0 {
            return Ok(Entry::Unmapped);
        }
        let (index, at) = self.split(cluster);
        let geometry = self.geometry;
        Ok(Entry::decode(self.table(bytes, index)?.entries[at], geometry))
    }

    /// Replaces an entry; gives back what it said before.
    pub fn set(&mut self, bytes: &Bytes, space: &mut Space, cluster: u64, entry: Entry) -> io::Result<Entry> {
        let (index, at) = self.split(cluster);
        if self.l1[index] & OFFSET == 0 {
            self.make_room(bytes)?;
            let run = space.take(bytes, 1)?;
            let offset = run.first << self.geometry.cluster_bits;
            if let Err(error) = bytes.fill_zero(offset, self.geometry.cluster()) {
                space.release_run(run);
                return Err(error);
            }
            let entries = vec![0; self.geometry.l2_entries() as usize];
            self.tables.insert(index, Table { entries, dirty: true, used: self.clock });
            self.l1[index] = offset | COPIED;
            self.l1_dirty = match self.l1_dirty.is_empty() {
                true => index..index + 1,
                false => self.l1_dirty.start.min(index)..self.l1_dirty.end.max(index + 1),
            };
        }
        let geometry = self.geometry;
        let table = self.table(bytes, index)?;
        table.dirty = true;
        let old = std::mem::replace(&mut table.entries[at], entry.encode(geometry));
        Ok(Entry::decode(old, geometry))
    }

    fn table(&mut self, bytes: &Bytes, index: usize) -> io::Result<&mut Table> {
        if !self.tables.contains_key(&index) {
            self.make_room(bytes)?;
            let entries = read_table(bytes, self.l1[index] & OFFSET, self.geometry.l2_entries())?;
            self.tables.insert(index, Table { entries, dirty: false, used: 0 });
        }
        self.clock += 1;
        let Some(table) = self.tables.get_mut(&index) else { unreachable!("it was put there") };
        table.used = self.clock;
        Ok(table)
    }

    /// Writes the table that was not used for longest and forgets it, if there are too many.
    fn make_room(&mut self, bytes: &Bytes) -> io::Result<()> {
        if (self.tables.len() as u64) < (MEMORY / self.geometry.cluster()).max(FEWEST) {
            return Ok(());
        }
        let oldest = self.tables.iter().min_by_key(|(_, table)| table.used).map(|(index, _)| *index);
        if let Some(index) = oldest {
            if self.tables[&index].dirty {
                write_table(bytes, self.l1[index] & OFFSET, &self.tables[&index].entries)?;
            }
            self.tables.remove(&index);
        }
        Ok(())
    }

    /// Writes what is not in the file.
    pub fn flush(&mut self, bytes: &Bytes) -> io::Result<()> {
        for (index, table) in self.tables.iter_mut().filter(|(_, table)| table.dirty) {
            write_table(bytes, self.l1[*index] & OFFSET, &table.entries)?;
            table.dirty = false;
        }
        let dirty = self.l1_dirty.clone();
        write_table(bytes, self.l1_offset + dirty.start as u64 * 8, &self.l1[dirty])?;
        self.l1_dirty = 0..0;
        Ok(())
    }
}

pub(in crate::target) fn read_table(bytes: &Bytes, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let mut raw = vec![0; (entries * 8) as usize];
    bytes.read_at(&mut raw, offset)?;
    Ok(raw.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

fn write_table(bytes: &Bytes, offset: u64, entries: &[u64]) -> io::Result<()> {
    let raw: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
    bytes.write_at(&raw, offset)
}
