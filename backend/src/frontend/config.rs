//! The block device's config space (virtio 1.2, section 5.2.4), read field by field from its bytes.

/// Bytes of config space that this front end asks for: up to and with `write_zeroes_may_unmap` and its padding, as
/// QEMU and Cloud Hypervisor do.
pub(super) const CONFIG_SIZE: usize = 60;

/// What the device says of itself. A field means something only with its feature bit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// Size of the disk in sectors of 512 bytes.
    pub capacity: u64,
    /// Largest data segment in bytes (SIZE_MAX).
    pub size_max: u32,
    /// Most data segments in a request (SEG_MAX).
    pub seg_max: u32,
    /// Logical block size in bytes (BLK_SIZE).
    pub blk_size: u32,
    /// Logical blocks in a physical block, as a power of two (TOPOLOGY).
    pub physical_block_exp: u8,
    /// First aligned logical block (TOPOLOGY).
    pub alignment_offset: u8,
    /// Suggested smallest I/O in logical blocks (TOPOLOGY).
    pub min_io_size: u16,
    /// Suggested best I/O in logical blocks (TOPOLOGY).
    pub opt_io_size: u32,
    /// Writeback (1) or writethrough (0) cache (CONFIG_WCE).
    pub writeback: u8,
    /// Request queues (MQ).
    pub num_queues: u16,
    /// Most sectors in a discard segment (DISCARD).
    pub max_discard_sectors: u32,
    /// Most segments in a discard (DISCARD).
    pub max_discard_seg: u32,
    /// Alignment for splitting discards, in sectors (DISCARD).
    pub discard_sector_alignment: u32,
    /// Most sectors in a write-zeroes segment (WRITE_ZEROES).
    pub max_write_zeroes_sectors: u32,
    /// Most segments in a write-zeroes request (WRITE_ZEROES).
    pub max_write_zeroes_seg: u32,
    /// Whether write-zeroes may deallocate (WRITE_ZEROES).
    pub write_zeroes_may_unmap: bool,
}

impl DeviceConfig {
    /// Reads the fields from config space; bytes that are missing count as zero.
    pub fn parse(bytes: &[u8]) -> Self {
        let mut space = [0u8; CONFIG_SIZE];
        let len = bytes.len().min(CONFIG_SIZE);
        space[..len].copy_from_slice(&bytes[..len]);
        let u16_at = |at: usize| u16::from_le_bytes([space[at], space[at + 1]]);
        let u32_at = |at: usize| u32::from(u16_at(at)) | u32::from(u16_at(at + 2)) << 16;
        DeviceConfig {
            capacity: u64::from(u32_at(0)) | u64::from(u32_at(4)) << 32,
            size_max: u32_at(8),
            seg_max: u32_at(12),
            // 16: geometry, which nothing uses.
            blk_size: u32_at(20),
            physical_block_exp: space[24],
            alignment_offset: space[25],
            min_io_size: u16_at(26),
            opt_io_size: u32_at(28),
            writeback: space[32],
            num_queues: u16_at(34),
            max_discard_sectors: u32_at(36),
            max_discard_seg: u32_at(40),
            discard_sector_alignment: u32_at(44),
            max_write_zeroes_sectors: u32_at(48),
            max_write_zeroes_seg: u32_at(52),
            write_zeroes_may_unmap: space[56] != 0,
        }
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.capacity.saturating_mul(512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::virtio_blk::virtio_blk_config;

    #[test]
    fn fields_stand_where_virtio_puts_them() {
        let mut bytes = [0u8; CONFIG_SIZE];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(offset_of!(virtio_blk_config, capacity), &0x0102_0304_0506_0708u64.to_le_bytes());
        put(offset_of!(virtio_blk_config, size_max), &1u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, seg_max), &2u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, blk_size), &3u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, physical_block_exp), &[4]);
        put(offset_of!(virtio_blk_config, alignment_offset), &[5]);
        put(offset_of!(virtio_blk_config, min_io_size), &6u16.to_le_bytes());
        put(offset_of!(virtio_blk_config, opt_io_size), &7u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, wce), &[8]);
        put(offset_of!(virtio_blk_config, num_queues), &9u16.to_le_bytes());
        put(offset_of!(virtio_blk_config, max_discard_sectors), &10u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, max_discard_seg), &11u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, discard_sector_alignment), &12u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, max_write_zeroes_sectors), &13u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, max_write_zeroes_seg), &14u32.to_le_bytes());
        put(offset_of!(virtio_blk_config, write_zeroes_may_unmap), &[1]);
        assert_eq!(
            DeviceConfig::parse(&bytes),
            DeviceConfig {
                capacity: 0x0102_0304_0506_0708,
                size_max: 1,
                seg_max: 2,
                blk_size: 3,
                physical_block_exp: 4,
                alignment_offset: 5,
                min_io_size: 6,
                opt_io_size: 7,
                writeback: 8,
                num_queues: 9,
                max_discard_sectors: 10,
                max_discard_seg: 11,
                discard_sector_alignment: 12,
                max_write_zeroes_sectors: 13,
                max_write_zeroes_seg: 14,
                write_zeroes_may_unmap: true,
            }
        );
        assert_eq!(DeviceConfig::parse(&bytes[..12]).seg_max, 0);
    }
}
