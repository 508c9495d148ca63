//! What a sector holds, and how it is read back: a sector tells by itself which write it is from.
//!
//! Used by the guest, which fills its writes, and by whoever looks at images. Two versions of a sector have nothing in
//! common, so bytes of one among bytes of another are found out.

/// Bytes of a sector: what a disk writes whole or not at all.
pub const SECTOR: usize = 512;

/// What a sector holds: the number of the write it is from, or 0 for zeroes.
pub type Version = u64;

/// Content that no write has made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign;

/// Fills a sector as write `version` does.
pub fn fill(disk: u8, sector: u32, version: Version, out: &mut [u8]) {
    let place = u64::from(disk) << 32 | u64::from(sector);
    let mut state = (version ^ place.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for (at, word) in out.chunks_exact_mut(8).enumerate() {
        let value = match at {
            0 => version,
            1 => place,
            _ => {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state
            }
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// Which write a sector is from.
pub fn version(disk: u8, sector: u32, bytes: &[u8]) -> Result<Version, Foreign> {
    let mut first = [0; 8];
    first.copy_from_slice(&bytes[..8]);
    let version = u64::from_le_bytes(first);
    let mut expected = [0; SECTOR];
    if version != 0 {
        fill(disk, sector, version, &mut expected);
    }
    if bytes == expected { Ok(version) } else { Err(Foreign) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_is_known_again_and_no_mixture_is_taken_for_one() {
        let (mut old, mut new) = ([0; SECTOR], [0; SECTOR]);
        fill(1, 77, 5, &mut old);
        fill(1, 77, 6, &mut new);
        assert_eq!(version(1, 77, &old), Ok(5));
        assert_eq!(version(1, 77, &[0; SECTOR]), Ok(0));
        assert_eq!(version(1, 78, &old), Err(Foreign), "another sector's content");
        assert_eq!(version(0, 77, &old), Err(Foreign), "another disk's content");
        for cut in [8, 16, 256, 504] {
            let torn = [&new[..cut], &old[cut..]].concat();
            assert_eq!(version(1, 77, &torn), Err(Foreign));
            let half = [&new[..cut], &[0; SECTOR][cut..]].concat();
            assert_eq!(version(1, 77, &half), Err(Foreign));
        }
    }
}
