//! Deflating and inflating the clusters of qcow2 images, with `libdeflate`.
//!
//! Called by the qcow2 writer from many threads at once. Raw deflate streams (RFC 1951), which is compression type 0 of the
//! specification: every qcow2 reader has it, the one that chains are read with here included, which knows no other.

use libdeflater::{CompressionLvl, Compressor, Decompressor};
use rustix::io::Errno;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Beside a guest processor time counts for more than the last few percent of space.
const LEVEL: i32 = 1;

/// Compressors that nobody uses at the moment; each is a few hundred kilobytes of tables.
#[derive(Default)]
pub(super) struct Deflate(Mutex<Vec<Compressor>>);

impl Deflate {
    fn idle(&self) -> MutexGuard<'_, Vec<Compressor>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` with a compressor of its own.
    pub fn with<T>(&self, work: impl FnOnce(&mut Compressor) -> T) -> T {
        let idle = self.idle().pop();
        let mut compressor =
            idle.unwrap_or_else(|| Compressor::new(CompressionLvl::new(LEVEL).unwrap_or_else(|_| Default::default())));
        let done = work(&mut compressor);
        self.idle().push(compressor);
        done
    }
}

/// Appends `data` deflated to `out`, if that is at least one byte shorter. Answers how long it is.
pub(super) fn deflate(compressor: &mut Compressor, data: &[u8], out: &mut Vec<u8>) -> Option<usize> {
    let start = out.len();
    out.resize(start + data.len() - 1, 0);
    let len = compressor.deflate_compress(data, &mut out[start..]).ok();
    out.truncate(start + len.unwrap_or(0));
    len
}

/// Inflates what begins `data` into all of `out`.
pub(super) fn inflate(data: &[u8], out: &mut [u8]) -> io::Result<()> {
    match Decompressor::new().deflate_decompress(data, out) {
        Ok(len) if len == out.len() => Ok(()),
        _ => Err(Errno::IO.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_deflated_is_inflated_and_what_does_not_shrink_is_left() {
        let pool = Deflate::default();
        let text: Vec<u8> = (0..65536u32).map(|i| (i / 100) as u8).collect();
        let mut out = vec![1, 2, 3];
        let len = pool.with(|compressor| deflate(compressor, &text, &mut out)).unwrap();
        assert!(len < 10_000 && out.len() == 3 + len && out[..3] == [1, 2, 3]);
        // What lies behind is not its affair.
        out.extend([0xff; 700]);
        let mut back = vec![0; 65536];
        inflate(&out[3..], &mut back).unwrap();
        assert!(back == text);
        assert!(inflate(&out[4..], &mut back).is_err());
        assert!(inflate(&out[3..], &mut back[..65535]).is_err());

        let mut x = 1u64;
        let noise = std::iter::repeat_with(|| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 56) as u8
        });
        let noise: Vec<u8> = noise.take(65536).collect();
        let before = out.len();
        assert_eq!(pool.with(|compressor| deflate(compressor, &noise, &mut out)), None);
        assert_eq!(out.len(), before);
        assert_eq!(pool.idle().len(), 1);
    }
}
