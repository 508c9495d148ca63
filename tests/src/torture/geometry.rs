//! Where on a disk the guests work: a few windows, so that blocks are written again and again, and images stay small, with
//! the borders of the store's extents (32 MiB) and the end of the disk among them.

use crate::random::Random;

/// Sectors of a mebibyte.
pub const MIB_SECTORS: u32 = 2048;
/// Size of a disk, in sectors, unless it was resized; it never becomes smaller.
pub const SECTORS: u32 = 72 * MIB_SECTORS;
/// Most sectors of a request.
pub const LONGEST: u32 = 256;

/// The windows of a disk of this size.
pub fn windows(sectors: u32) -> Vec<(u32, u32)> {
    let mib = |from: u32, to: u32| (from * MIB_SECTORS, to * MIB_SECTORS);
    vec![mib(0, 3), mib(30, 34), mib(63, 65), (sectors - 3 * MIB_SECTORS, sectors)]
}

/// A range for a request: short ones more often than long ones.
pub fn any_range(random: &mut Random, windows: &[(u32, u32)]) -> (u32, u32) {
    let (from, to) = windows[random.below(windows.len() as u64) as usize];
    let shift = random.below(9);
    let count = 1 + random.below((u64::from(LONGEST) >> shift).max(1)) as u32;
    // The first and the last sector of a window are as likely as any other.
    (from + random.below(u64::from(to - from - count) + 1) as u32, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_within_the_disk_and_reach_its_end() {
        let mut random = Random(9);
        for sectors in [SECTORS, SECTORS + 24] {
            let windows = windows(sectors);
            let ranges: Vec<_> = (0..20_000).map(|_| any_range(&mut random, &windows)).collect();
            assert!(ranges.iter().all(|(first, count)| (1..=LONGEST).contains(count) && first + count <= sectors));
            assert!(ranges.iter().any(|(first, count)| first + count == sectors));
            assert!(ranges.iter().any(|(first, _)| *first == 0));
        }
    }
}
