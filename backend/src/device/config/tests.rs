//! What the configuration space tells, byte by byte as the specification lays it out.

use proptest::prelude::*;

use super::*;

const GEOMETRY: Geometry = Geometry {
    capacity: (3 << 30) + 511,
    logical_block: 512,
    physical_block: 4096,
    discard_granularity: 65536,
    queues: 4,
    read_only: false,
};

fn le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
}

fn field(space: &ConfigSpace, at: u32, len: u32) -> u64 {
    le(&space.read(at, len))
}

#[test]
fn fields_stand_where_the_specification_has_them() {
    let space = ConfigSpace::new(&GEOMETRY);
    assert_eq!(field(&space, 0, 8), 3 << 21, "capacity in whole sectors");
    assert_eq!(field(&space, 8, 4), 1 << 20, "size_max");
    assert_eq!(field(&space, 12, 4), 126, "seg_max");
    assert_eq!(field(&space, 20, 4), 512, "blk_size");
    assert_eq!(field(&space, 24, 1), 3, "physical_block_exp");
    assert_eq!(field(&space, 25, 1), 0, "alignment_offset");
    assert_eq!(field(&space, 26, 2), 8, "min_io_size");
    assert_eq!(field(&space, 34, 2), 4, "num_queues");
    assert_eq!(field(&space, 36, 4), 32768, "max_discard_sectors");
    assert_eq!(field(&space, 40, 4), 1, "max_discard_seg");
    assert_eq!(field(&space, 44, 4), 128, "discard_sector_alignment");
    assert_eq!(field(&space, 48, 4), 32768, "max_write_zeroes_sectors");
    assert_eq!(field(&space, 52, 4), 1, "max_write_zeroes_seg");
    assert_eq!(field(&space, 56, 1), 1, "write_zeroes_may_unmap");
}

#[test]
fn a_read_only_disk_says_so_and_offers_no_way_to_change_it() {
    let space = ConfigSpace::new(&Geometry { read_only: true, ..GEOMETRY });
    let has = |bit: u32| space.features() & 1 << bit != 0;
    assert!(has(VIRTIO_BLK_F_RO));
    assert!(!has(VIRTIO_BLK_F_DISCARD) && !has(VIRTIO_BLK_F_WRITE_ZEROES));
    assert_eq!(field(&space, 36, 8) + field(&space, 44, 8) + field(&space, 52, 5), 0);
}

#[test]
fn several_queues_are_offered_only_where_there_are_several() {
    let one = Geometry { queues: 1, ..GEOMETRY };
    let has = |g: &Geometry| ConfigSpace::new(g).features() & 1 << VIRTIO_BLK_F_MQ != 0;
    assert!(has(&GEOMETRY) && !has(&one));
}

#[test]
fn a_serial_is_padded_and_cut_to_twenty_bytes() {
    assert_eq!(&serial_bytes("abc")[..4], b"abc\0");
    assert_eq!(&serial_bytes("0123456789012345678901234"), b"01234567890123456789");
}

proptest! {
    #[test]
    fn any_read_has_its_size_and_agrees_with_the_whole(offset: u32, size in 0u32..5000) {
        let space = ConfigSpace::new(&GEOMETRY);
        let whole = space.read(0, 6000);
        let part = space.read(offset, size);
        prop_assert_eq!(part.len(), size as usize);
        for (i, byte) in part.iter().enumerate() {
            let at = offset as usize + i;
            prop_assert_eq!(*byte, whole.get(at).copied().unwrap_or(0));
        }
    }

    #[test]
    fn no_geometry_panics(
        capacity: u64, logical_block: u32, physical_block: u32, discard_granularity: u32,
        queues: u16, read_only: bool,
    ) {
        ConfigSpace::new(&Geometry {
            capacity, logical_block, physical_block, discard_granularity, queues, read_only,
        });
    }
}
