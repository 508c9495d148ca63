//! Which clusters of the file are in use, by how many, and where there is room.
//!
//! Called by the writer, under its lock. Room is taken from what became free, then from the end of the file; compressed data
//! is packed byte by byte into a cluster that is open for it, and on into the next. The refcount blocks, and the table that
//! names them, take their place as the file grows and are filled with zeroes at once, so that a full disk is noticed by a
//! write that can be tried again and not at the end; their contents are written by [`Space::write_refcounts`].
//!
//! Invariants: what is handed out has no other user; a cluster's count is the number of its users; a failed call changes
//! nothing that matters, and may be made again.

use super::super::bytes::{Bytes, Kind};
use super::super::header::Header;
use super::counts::{Counts, Free};
use super::entry::{Geometry, Packed};
use std::io;

/// The file's length runs ahead of what is in it: writes into a hole need not wait for each other, writes at the end do.
const AHEAD: u64 = 32 << 20;
/// QEMU's limit for the refcount table.
const MAX_TABLE: u64 = 8 << 20;

/// The cluster that compressed data is packed into, and how much of it is taken.
#[derive(Clone, Copy)]
struct Open {
    cluster: u64,
    taken: u64,
}

/// Clusters of the file that follow one another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    /// Number of the first.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// The refcounts of an image that is written.
pub(super) struct Space {
    geometry: Geometry,
    refcount_order: u32,
    counts: Counts,
    free: Free,
    /// The first cluster that nobody ever had.
    frontier: u64,
    open: Option<Open>,
    /// Where each refcount block stands, in clusters; 0: nowhere.
    blocks: Vec<u64>,
    dirty: Vec<bool>,
    table: Run,
    table_dirty: bool,
    /// How long the file was made.
    len: u64,
}

impl Space {
    /// The header is all there is, and the table behind it.
    pub fn new(geometry: Geometry, refcount_order: u32) -> Self {
        let mut counts = Counts::default();
        counts.add(0);
        counts.add(1);
        Self {
            geometry,
            refcount_order,
            counts,
            free: Free::default(),
            frontier: 2,
            open: None,
            blocks: Vec::new(),
            dirty: Vec::new(),
            table: Run { first: 1, count: 1 },
            table_dirty: true,
            len: 0,
        }
    }

    /// An image that exists, was checked, and uses its clusters as `counts` says.
    pub fn existing(header: &Header, counts: Counts, blocks: &[u64], len: u64) -> Self {
        let bits = header.geometry.cluster_bits;
        let blocks: Vec<u64> = blocks.iter().map(|offset| offset >> bits).collect();
        let mut space = Self {
            geometry: header.geometry,
            refcount_order: header.refcount_order,
            frontier: counts.end(),
            free: Free::default(),
            open: None,
            dirty: vec![false; blocks.len()],
            table: Run { first: header.reftable_offset >> bits, count: header.reftable_clusters },
            table_dirty: false,
            counts,
            blocks,
            len,
        };
        let mut free = Free::default();
        for cluster in 0..space.frontier {
            // What no block counts would need one first.
            let counted = space.blocks.get((cluster / space.per_block()) as usize).is_some_and(|block| *block != 0);
            if counted && space.counts.get(cluster) == 0 {
                free.insert(cluster);
            }
        }
        space.free = free;
        space
    }

    /// No count in the file is to be believed: all are written at the end, in blocks that have their place from now on.
    pub fn count_anew(&mut self, bytes: &Bytes) -> io::Result<()> {
        self.dirty.fill(true);
        self.table_dirty = true;
        self.free = Free::default();
        // Not used: what it is for is that blocks count all before it.
        self.grow_from(bytes, 0, 1)?;
        for cluster in 0..self.frontier {
            if self.counts.get(cluster) == 0 {
                self.free.insert(cluster);
            }
        }
        Ok(())
    }

    fn per_block(&self) -> u64 {
        self.geometry.cluster() << 3 >> self.refcount_order
    }

    /// Most users that a cluster may have.
    fn most(&self) -> u16 {
        match self.refcount_order {
            order @ 0..4 => (1 << (1 << order)) - 1,
            _ => u16::MAX,
        }
    }

    /// Counts the users of everything that somebody has.
    fn add(&mut self, cluster: u64) {
        self.counts.add(cluster);
        let block = (cluster / self.per_block()) as usize;
        if let Some(dirty) = self.dirty.get_mut(block) {
            *dirty = true;
        }
    }

    /// One user less.
    pub fn release(&mut self, cluster: u64) {
        let left = self.counts.sub(cluster);
        let block = (cluster / self.per_block()) as usize;
        if let Some(dirty) = self.dirty.get_mut(block) {
            *dirty = true;
        }
        if left == 0 {
            // What was packed into it is gone, all of it.
            self.open = self.open.filter(|open| open.cluster != cluster);
            self.free.insert(cluster);
        }
    }

    pub fn release_run(&mut self, run: Run) {
        (run.first..run.first + run.count).for_each(|cluster| self.release(cluster));
    }

    pub fn release_packed(&mut self, packed: Packed) {
        packed.clusters(self.geometry).for_each(|cluster| self.release(cluster));
    }

    /// Takes `want` clusters in a row, or fewer.
    pub fn take(&mut self, bytes: &Bytes, want: u64) -> io::Result<Run> {
        let run = match self.free.take(want) {
            Some((first, count)) => Run { first, count },
            None => Run { first: self.grow(bytes, want)?, count: want },
        };
        (run.first..run.first + run.count).for_each(|cluster| self.add(cluster));
        Ok(run)
    }

    /// Takes the clusters behind the refcount table of a new image.
    pub fn take_first(&mut self, bytes: &Bytes, want: u64) -> io::Result<Run> {
        let run = Run { first: self.frontier, count: want };
        self.frontier += want;
        // The blocks that count them come behind them.
        (run.first..run.first + run.count).for_each(|cluster| self.add(cluster));
        let next = self.grow_from(bytes, 0, 1)?;
        self.free.insert(next);
        Ok(run)
    }

    /// Takes `len` bytes, fewer than a cluster.
    pub fn pack(&mut self, bytes: &Bytes, len: u64) -> io::Result<Packed> {
        let (cluster_size, bits) = (self.geometry.cluster(), self.geometry.cluster_bits);
        if let Some(open) = self.open.filter(|open| self.counts.get(open.cluster) < self.most()) {
            let packed = Packed { offset: (open.cluster << bits) + open.taken, len };
            let end = open.taken + len;
            if end <= cluster_size {
                self.open = Some(Open { taken: end, ..open });
                self.add(open.cluster);
                return Ok(packed);
            }
            // It goes on into the next cluster if that is nobody's.
            if open.taken < cluster_size
                && let Some(next) = self.next_to(bytes, open.cluster)?
            {
                self.open = Some(Open { cluster: next, taken: end - cluster_size });
                self.add(open.cluster);
                self.add(next);
                return Ok(packed);
            }
        }
        let run = self.take(bytes, 1)?;
        self.open = Some(Open { cluster: run.first, taken: len });
        Ok(Packed { offset: run.first << bits, len })
    }

    /// The cluster behind this one, out of the free, if it is nobody's.
    fn next_to(&mut self, bytes: &Bytes, cluster: u64) -> io::Result<Option<u64>> {
        let wanted = cluster + 1;
        if self.free.take_this(wanted) {
            return Ok(Some(wanted));
        }
        if wanted != self.frontier {
            return Ok(None);
        }
        let next = self.grow(bytes, 1)?;
        if next != wanted {
            // A refcount block got in between.
            self.free.insert(next);
            return Ok(None);
        }
        Ok(Some(next))
    }

    /// The first of `want` clusters that nobody ever had, all of them counted by blocks that have their place.
    fn grow(&mut self, bytes: &Bytes, want: u64) -> io::Result<u64> {
        self.grow_from(bytes, self.frontier, want)
    }

    /// The same, where clusters from `from` on may not be counted by a block yet.
    fn grow_from(&mut self, bytes: &Bytes, from: u64, want: u64) -> io::Result<u64> {
        loop {
            let end = self.frontier + want;
            self.lengthen(bytes, end)?;
            let per_block = self.per_block();
            let missing = (from / per_block..=(end - 1) / per_block)
                .find(|block| self.blocks.get(*block as usize).is_none_or(|block| *block == 0));
            let Some(missing) = missing else {
                self.frontier = end;
                return Ok(end - want);
            };
            let fit = self.table.count * self.geometry.cluster() / 8;
            let clusters = if missing < fit { 1 } else { self.table.count * 2 };
            if clusters * self.geometry.cluster() > MAX_TABLE.max(self.geometry.cluster()) {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let place = Run { first: self.frontier, count: clusters };
            self.lengthen(bytes, place.first + place.count)?;
            for cluster in place.first..place.first + place.count {
                bytes.fill_zero(cluster << self.geometry.cluster_bits, self.geometry.cluster())?;
            }
            self.frontier += place.count;
            if missing < fit {
                let index = missing as usize;
                if index >= self.blocks.len() {
                    self.blocks.resize(index + 1, 0);
                    self.dirty.resize(index + 1, true);
                }
                self.blocks[index] = place.first;
                self.dirty[index] = true;
                self.table_dirty = true;
            } else {
                let old = std::mem::replace(&mut self.table, place);
                self.table_dirty = true;
                self.release_run(old);
            }
            (place.first..place.first + place.count).for_each(|cluster| self.add(cluster));
        }
    }

    fn lengthen(&mut self, bytes: &Bytes, clusters: u64) -> io::Result<()> {
        let end = clusters << self.geometry.cluster_bits;
        if end > 1 << 55 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if end > self.len && bytes.kind() == Kind::Regular {
            // Where files may not be as long, the write will say so.
            if bytes.file().set_len(end + AHEAD).is_ok() {
                self.len = end + AHEAD;
            }
        }
        Ok(())
    }

    /// Writes what changed, and makes the file as long as what is in it. The header has to be told where the table stands.
    pub fn write_refcounts(&mut self, bytes: &Bytes) -> io::Result<Run> {
        let bits = self.geometry.cluster_bits;
        let mut raw = vec![0; self.geometry.cluster() as usize];
        for (index, block) in self.blocks.iter().enumerate() {
            if *block == 0 || !self.dirty[index] {
                continue;
            }
            raw.fill(0);
            let first = index as u64 * self.per_block();
            for i in 0..self.per_block() {
                put(&mut raw, i as usize, self.refcount_order, self.counts.get(first + i));
            }
            bytes.write_at(&raw, block << bits)?;
        }
        if self.table_dirty {
            let mut raw = vec![0; (self.table.count << bits) as usize];
            for (entry, block) in raw.as_chunks_mut::<8>().0.iter_mut().zip(&self.blocks) {
                *entry = (block << bits).to_be_bytes();
            }
            bytes.write_at(&raw, self.table.first << bits)?;
        }
        let end = self.counts.end() << bits;
        if bytes.kind() == Kind::Regular {
            bytes.file().set_len(end)?;
            self.len = end;
        }
        self.dirty.fill(false);
        self.table_dirty = false;
        Ok(self.table)
    }
}

/// Refcounts are big-endian, and those of less than a byte fill it from its low bits. The block is zero.
fn put(block: &mut [u8], index: usize, order: u32, count: u16) {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per_byte = 8 / bits;
            block[index / per_byte] |= (count as u8) << (index % per_byte * bits);
        }
        3 => block[index] = count as u8,
        _ => {
            let width = 1 << (order - 3);
            let end = (index + 1) * width;
            block[end - 2..end].copy_from_slice(&count.to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::check::refcount;
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_written_as_they_are_read() {
        for order in 0..=6 {
            let mut block = vec![0; 512];
            let most = if order < 4 { (1u16 << (1 << order)) - 1 } else { 0x1234 };
            let count = |i: usize| [1, 0, most, 1, most][i % 5];
            let entries = (512 << 3) >> order;
            (0..entries).for_each(|i| put(&mut block, i, order, count(i)));
            assert!((0..entries).all(|i| refcount(&block, i, order) == u64::from(count(i))), "order {order}");
        }
    }

    #[test]
    fn nobody_gets_what_somebody_has() {
        let geometry = Geometry { size: 1 << 30, cluster_bits: 9 };
        let mut moved = false;
        for order in [0, 2, 4, 6] {
            let bytes = Bytes::new(tempfile::tempfile().unwrap()).unwrap();
            let mut space = Space::new(geometry, order);
            let mut random = 0x9e37_79b9_7f4a_7c15u64;
            let mut next = |limit: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % limit
            };
            let (mut runs, mut packs): (Vec<Run>, Vec<Packed>) = (Vec::new(), Vec::new());
            for _ in 0..20_000 {
                match next(5) {
                    0 => runs.push(space.take(&bytes, 1 + next(40)).unwrap()),
                    1 | 2 => packs.push(space.pack(&bytes, 1 + next(511)).unwrap()),
                    3 if !runs.is_empty() && next(2) == 0 => {
                        space.release_run(runs.swap_remove(next(runs.len() as u64) as usize))
                    }
                    _ if !packs.is_empty() => {
                        space.release_packed(packs.swap_remove(next(packs.len() as u64) as usize));
                    }
                    _ => {}
                }
            }
            space.write_refcounts(&bytes).unwrap();
            let mut users = vec![0u16; space.frontier as usize];
            let mut bytes_used = std::collections::BTreeMap::new();
            users[0] += 1;
            let metadata =
                space.blocks.iter().filter(|block| **block != 0).map(|block| Run { first: *block, count: 1 });
            for run in runs.iter().copied().chain(metadata).chain([space.table]) {
                (run.first..run.first + run.count).for_each(|cluster| users[cluster as usize] += 1);
                assert!(bytes_used.insert(run.first << 9, (run.first + run.count) << 9).is_none());
            }
            for packed in &packs {
                packed.clusters(geometry).for_each(|cluster| users[cluster as usize] += 1);
                assert!(bytes_used.insert(packed.offset, packed.offset + packed.len).is_none());
            }
            let mut last = 0;
            for (start, end) in bytes_used {
                assert!(start >= last, "two have byte {start}");
                last = end;
            }
            for (cluster, users) in users.iter().enumerate() {
                assert_eq!(space.counts.get(cluster as u64), *users, "cluster {cluster}");
                assert!(*users <= space.most());
            }
            moved |= space.table.count > 1;
        }
        assert!(moved, "the table never had to move");
    }
}
