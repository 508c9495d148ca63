//! The configuration space and the feature bits of the block device (virtio 1.x, 5.2.3, 5.2.4).
//!
//! The write path keeps one [`ConfigSpace`] a disk and answers the session's questions from it.
//! Invariant: what is offered here is what [`super::request`] takes.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::request::{ID_BYTES, MAX_DISCARD_SECTORS, SECTOR};

/// Data segments a request may have: with header and status, 128 descriptors, QEMU's usual ring.
pub const SEG_MAX: u32 = 126;
/// Bytes a segment may have. It bounds what one write can make copy-before-write save at once.
pub const SIZE_MAX: u32 = 1 << 20;

/// Bytes of the part that is filled in; the rest of the space reads as zero.
const USED: usize = 60;

/// What a disk tells its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of the disk in bytes; a rest below a sector is not shown.
    pub capacity: u64,
    /// Logical block size in bytes: the unit guests are asked to use. A power of two from 512 on.
    pub logical_block: u32,
    /// Physical block size in bytes, a power of two, at least `logical_block`.
    pub physical_block: u32,
    /// Unit and alignment of discards that free something, in bytes.
    pub discard_granularity: u32,
    /// Number of queues.
    pub queues: u16,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// The configuration space of one disk, ready to be read.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; USED],
    features: u64,
}

impl ConfigSpace {
    /// The space for a disk.
    pub fn new(geometry: &Geometry) -> Self {
        let g = geometry;
        let logical = g.logical_block.max(SECTOR as u32);
        let physical_exponent = (g.physical_block / logical).checked_ilog2().unwrap_or(0);
        let physical_in_blocks = 1u32 << physical_exponent.min(15);
        let discard_sectors = (g.discard_granularity.max(logical)) / SECTOR as u32;

        let mut bytes = [0; USED];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(g.capacity / SECTOR).to_le_bytes());
        put(8, &SIZE_MAX.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        // 16: CHS geometry, not offered.
        put(20, &logical.to_le_bytes());
        // Topology: exponent, alignment offset (none), smallest I/O in logical blocks.
        put(24, &[physical_exponent.min(15) as u8, 0]);
        put(26, &(physical_in_blocks as u16).to_le_bytes());
        // 28: best I/O size: none in particular.
        // 32: writeback, read only with CONFIG_WCE: not offered.
        put(34, &g.queues.max(1).to_le_bytes());
        if !g.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &discard_sectors.to_le_bytes());
            put(48, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        Self { bytes, features: features(g.queues, g.read_only) }
    }

    /// The same disk with another size.
    pub fn with_capacity(&self, bytes: u64) -> Self {
        let mut space = self.clone();
        space.bytes[..8].copy_from_slice(&(bytes / SECTOR).to_le_bytes());
        space
    }

    /// `size` bytes from `offset` on, zero where there is nothing: exactly `size` bytes.
    pub fn read(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut out = vec![0; size as usize];
        let from = self.bytes.get(offset as usize..).unwrap_or(&[]);
        let n = from.len().min(out.len());
        out[..n].copy_from_slice(&from[..n]);
        out
    }

    /// The virtio feature bits to offer.
    pub fn features(&self) -> u64 {
        self.features
    }
}

/// The virtio feature bits of a disk. The vhost-user bit is the session's.
fn features(queues: u16, read_only: bool) -> u64 {
    let mut bits = vec![
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
    ];
    if queues > 1 {
        bits.push(VIRTIO_BLK_F_MQ);
    }
    if read_only {
        bits.push(VIRTIO_BLK_F_RO);
    } else {
        bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
    }
    bits.into_iter().fold(0, |all, bit| all | 1 << bit)
}

/// A serial number as GET_ID answers it: zero-padded, cut after 20 bytes.
pub fn serial_bytes(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let n = serial.len().min(ID_BYTES);
    id[..n].copy_from_slice(&serial.as_bytes()[..n]);
    id
}

#[cfg(test)]
mod tests;
