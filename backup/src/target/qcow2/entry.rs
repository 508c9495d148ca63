//! What an entry of an L2 table says, and the arithmetic of clusters.
//!
//! Used by the writer (`mod`), its tables and its space. Source: the qcow2 specification, "Cluster mapping". Knows nothing of
//! files.

/// The entry's cluster has this one user, so that it may be written in place.
pub(in crate::target) const COPIED: u64 = 1 << 63;
pub(in crate::target) const COMPRESSED: u64 = 1 << 62;
/// Bits 9 to 55 of an entry of either table.
pub(in crate::target) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const ZERO: u64 = 1;
const SECTOR: u64 = 512;

/// How an image is divided.
#[derive(Clone, Copy, Debug)]
pub(in crate::target) struct Geometry {
    /// Virtual size in bytes.
    pub size: u64,
    /// Logarithm of the cluster size, 9 to 21.
    pub cluster_bits: u32,
}

impl Geometry {
    pub fn cluster(self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(self) -> u64 {
        self.cluster() / 8
    }

    /// Entries that the L1 table needs.
    pub fn l1_entries(self) -> u64 {
        self.size.div_ceil(self.cluster()).div_ceil(self.l2_entries())
    }

    /// The bytes of a guest cluster that the disk has: fewer than a cluster at its end.
    pub fn len_of(self, cluster: u64) -> u64 {
        (self.size - (cluster << self.cluster_bits)).min(self.cluster())
    }

    /// Where the size of compressed data begins in an entry.
    fn size_shift(self) -> u32 {
        62 - (self.cluster_bits - 8)
    }
}

/// What is known of a guest cluster in this layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::target) enum Entry {
    /// Nothing: the backing image shows through.
    Unmapped,
    /// It reads as zeroes; a host cluster may be set aside for it, at this offset.
    Zero(Option<u64>),
    /// It lies here.
    Plain(u64),
    /// Deflated, from this byte on.
    Compressed(Packed),
}

/// Where compressed data lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::target) struct Packed {
    /// First byte in the file.
    pub offset: u64,
    /// At least as many bytes as it has; what follows up to a sector's end may be another's.
    pub len: u64,
}

impl Packed {
    /// First and last host cluster that it touches.
    pub fn clusters(self, geometry: Geometry) -> std::ops::RangeInclusive<u64> {
        let last = self.offset + self.len - 1;
        self.offset >> geometry.cluster_bits..=last >> geometry.cluster_bits
    }

    /// Whether an entry can say where it lies.
    pub fn fits(self, geometry: Geometry) -> bool {
        self.offset + self.len < 1 << geometry.size_shift().min(56)
    }
}

impl Entry {
    pub fn decode(raw: u64, geometry: Geometry) -> Self {
        if raw & COMPRESSED != 0 {
            let shift = geometry.size_shift();
            let offset = raw & ((1 << shift) - 1);
            let sectors = ((raw & (COMPRESSED - 1)) >> shift) + 1;
            return Entry::Compressed(Packed { offset, len: sectors * SECTOR - offset % SECTOR });
        }
        match (raw & ZERO != 0, raw & OFFSET) {
            (true, 0) => Entry::Zero(None),
            (true, host) => Entry::Zero(Some(host)),
            (false, 0) => Entry::Unmapped,
            (false, host) => Entry::Plain(host),
        }
    }

    pub fn encode(self, geometry: Geometry) -> u64 {
        match self {
            Entry::Unmapped => 0,
            Entry::Zero(None) => ZERO,
            Entry::Zero(Some(host)) => ZERO | COPIED | host,
            Entry::Plain(host) => COPIED | host,
            Entry::Compressed(Packed { offset, len }) => {
                let more_sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
                COMPRESSED | more_sectors << geometry.size_shift() | offset
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        for cluster_bits in [9, 12, 16, 21] {
            let geometry = Geometry { size: 1 << 40, cluster_bits };
            let cluster = geometry.cluster();
            for entry in [
                Entry::Unmapped,
                Entry::Zero(None),
                Entry::Zero(Some(7 * cluster)),
                Entry::Plain(cluster),
                // Up to a sector's end in either case, so that nothing is rounded.
                Entry::Compressed(Packed { offset: 5 * cluster + 100, len: 412 }),
                Entry::Compressed(Packed { offset: 5 * cluster + 511, len: cluster + 1 - 512 }),
                Entry::Compressed(Packed { offset: (1 << 40) + cluster - 512, len: cluster }),
            ] {
                assert_eq!(Entry::decode(entry.encode(geometry), geometry), entry, "{cluster_bits}");
            }
        }
    }
}
