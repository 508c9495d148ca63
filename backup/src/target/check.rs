//! Whether an existing qcow2 may be written at all: a check of its metadata, without repair.
//!
//! Called once when a target is opened. Every reference in the image is followed, and the image is refused unless each cluster
//! in use is counted, lies in the file, has one owner (compressed clusters may share one) and may be written in place. What
//! was found out about who uses what is what the writer begins with: it believes no count. Clusters that are counted but
//! not used are harmless. The work is proportional to the metadata, as for `qemu-img check`.

use super::bytes::Bytes;
use super::header::Header;
use super::qcow2::{COMPRESSED, COPIED, Counts, Entry, OFFSET, read_table};
use std::io;

/// 16 TiB in clusters of 64 KiB, and half a gigabyte to remember them (if all are touched).
const MAX_CLUSTERS: u64 = 1 << 28;

/// Bits that have to be clear: of an entry of the L1 table, and of one of an L2 table that is not compressed.
const RESERVED_L1: u64 = 0x7f00_0000_0000_01ff;
const RESERVED_L2: u64 = 0x3f00_0000_0000_01fe;

/// In the table of uses: the cluster belongs to one owner alone. The other bits count compressed users.
const EXCLUSIVE: u16 = 0x8000;
const MOST: u16 = 0x7fff;

enum Fault {
    Io(io::Error),
    Damaged(String),
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Self {
        Fault::Io(e)
    }
}

fn damaged<T>(what: String) -> Result<T, Fault> {
    Err(Fault::Damaged(format!("{what}; see 'qemu-img check'")))
}

struct Check<'a> {
    bytes: &'a Bytes,
    header: &'a Header,
    uses: Vec<u16>,
}

/// Who uses what in an image that is sound.
pub(super) struct Usage {
    /// Users of each cluster.
    pub counts: Counts,
    /// Entries of the refcount table.
    pub blocks: Vec<u64>,
}

/// The inner error is the reason for a refusal. `counted`: all that is in use must be counted.
pub(super) fn check(bytes: &Bytes, header: &Header, counted: bool) -> io::Result<Result<Usage, String>> {
    match check_all(bytes, header, counted) {
        Ok(usage) => Ok(Ok(usage)),
        Err(Fault::Io(e)) => Err(e),
        Err(Fault::Damaged(reason)) => Ok(Err(reason)),
    }
}

fn check_all(bytes: &Bytes, header: &Header, counted: bool) -> Result<Usage, Fault> {
    let geometry = header.geometry;
    let cluster_size = geometry.cluster();
    if header.snapshots > 0 {
        return Err(Fault::Damaged("Images with internal snapshots are not supported".into()));
    }
    let clusters = bytes.len()?.div_ceil(cluster_size);
    if clusters > MAX_CLUSTERS {
        return Err(Fault::Damaged("Image file is too long to be checked".into()));
    }
    let mut check = Check { bytes, header, uses: vec![0; clusters as usize] };
    check.own(0, 1, "header")?;
    let l1_clusters = (header.l1_entries * 8).div_ceil(cluster_size);
    check.own(header.l1_offset, l1_clusters, "L1 table")?;
    check.own(header.reftable_offset, header.reftable_clusters, "refcount table")?;
    let mut blocks = read_table(bytes, header.reftable_offset, header.reftable_clusters * cluster_size / 8)?;
    for entry in blocks.iter().filter(|entry| **entry != 0) {
        check.own(*entry, 1, "refcount block")?;
    }
    for entry in read_table(bytes, header.l1_offset, header.l1_entries)? {
        if entry & RESERVED_L1 != 0 {
            return damaged(format!("An entry of the L1 table has bits that are reserved: {entry:#x}"));
        }
        if entry & OFFSET != 0 {
            check.in_place(entry, "L2 table")?;
            for entry in read_table(bytes, entry & OFFSET, cluster_size / 8)? {
                check.data(entry)?;
            }
        }
    }
    if counted {
        check.counted(&blocks)?;
    }
    let mut counts = Counts::default();
    for (cluster, uses) in check.uses.iter().enumerate() {
        for _ in 0..users(*uses) {
            counts.add(cluster as u64);
        }
    }
    let last = blocks.iter().rposition(|block| *block != 0).map_or(0, |last| last + 1);
    blocks.truncate(last);
    Ok(Usage { counts, blocks })
}

fn users(uses: u16) -> u16 {
    if uses == EXCLUSIVE { 1 } else { uses }
}

impl Check<'_> {
    /// Notes an exclusive use.
    fn own(&mut self, offset: u64, clusters: u64, what: &str) -> Result<(), Fault> {
        if !offset.is_multiple_of(self.header.geometry.cluster()) {
            return damaged(format!("A {what} is not aligned: {offset:#x}"));
        }
        let first = offset / self.header.geometry.cluster();
        for cluster in first..first + clusters {
            match self.uses.get_mut(cluster as usize) {
                Some(uses) if *uses == 0 => *uses = EXCLUSIVE,
                Some(_) => return damaged(format!("A {what} overlaps something: {offset:#x}")),
                None => return damaged(format!("A {what} lies outside of the file: {offset:#x}")),
            }
        }
        Ok(())
    }

    /// Notes an exclusive use that a table entry says is one: the cluster may be written in place.
    fn in_place(&mut self, entry: u64, what: &str) -> Result<(), Fault> {
        if entry & COPIED == 0 {
            return damaged(format!("A {what} is said to be shared: {:#x}", entry & OFFSET));
        }
        self.own(entry & OFFSET, 1, what)
    }

    fn data(&mut self, entry: u64) -> Result<(), Fault> {
        if entry & COMPRESSED == 0 && entry & RESERVED_L2 != 0 {
            return damaged(format!("An entry of an L2 table has bits that are reserved: {entry:#x}"));
        }
        let packed = match Entry::decode(entry, self.header.geometry) {
            Entry::Unmapped | Entry::Zero(None) => return Ok(()),
            Entry::Zero(Some(_)) | Entry::Plain(_) => return self.in_place(entry, "data cluster"),
            Entry::Compressed(packed) => packed,
        };
        let offset = packed.offset;
        // The last sectors of the last cluster need not be there.
        for cluster in packed.clusters(self.header.geometry) {
            match self.uses.get_mut(cluster as usize) {
                Some(uses) if *uses & EXCLUSIVE == 0 => *uses = (*uses + 1).min(MOST),
                Some(_) => {
                    return damaged(format!("A compressed cluster overlaps something: {offset:#x}"));
                }
                None => {
                    let what = "A compressed cluster lies outside of the file";
                    return damaged(format!("{what}: {offset:#x}"));
                }
            }
        }
        Ok(())
    }

    /// Every cluster in use has a refcount that covers its uses.
    fn counted(&self, blocks: &[u64]) -> Result<(), Fault> {
        let per_block = (self.header.geometry.cluster() << 3 >> self.header.refcount_order) as usize;
        let mut raw = vec![0; self.header.geometry.cluster() as usize];
        for (index, uses) in self.uses.chunks(per_block).enumerate() {
            if uses.iter().all(|uses| *uses == 0) {
                continue;
            }
            match blocks.get(index) {
                Some(offset) if *offset != 0 => self.bytes.read_at(&mut raw, *offset)?,
                _ => raw.fill(0),
            }
            for (i, uses) in uses.iter().enumerate() {
                let needed = u64::from(users(*uses));
                if refcount(&raw, i, self.header.refcount_order) < needed {
                    let cluster = index * per_block + i;
                    return damaged(format!("The refcount of cluster {cluster} is too low"));
                }
            }
        }
        Ok(())
    }
}

/// Refcounts are big-endian, and those of less than a byte fill it from its low bits.
pub(super) fn refcount(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bits = 1 << order;
            let per_byte = 8 / bits;
            let byte = block[index / per_byte] >> (index % per_byte * bits);
            u64::from(byte) & ((1 << bits) - 1)
        }
        _ => {
            let width = 1 << (order - 3);
            let bytes = &block[index * width..][..width];
            bytes.iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refcounts_of_every_width_are_read() {
        assert_eq!([0, 1, 2, 7].map(|i| refcount(&[0b1000_0101], i, 0)), [1, 0, 1, 1]);
        assert_eq!([0, 1, 2, 3].map(|i| refcount(&[0b1101_1000], i, 1)), [0, 2, 1, 3]);
        assert_eq!([0, 1].map(|i| refcount(&[0x5a], i, 2)), [0xa, 5]);
        assert_eq!([0, 1].map(|i| refcount(&[7, 9], i, 3)), [7, 9]);
        assert_eq!([0, 1].map(|i| refcount(&[1, 2, 3, 4], i, 4)), [0x102, 0x304]);
        assert_eq!(refcount(&[0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 6], 1, 6), 0x1_0000_0006);
    }
}
