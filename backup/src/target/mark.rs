//! The mark of an unfinished qcow2: what keeps everybody away from an image while its tables are in nobody's order.
//!
//! Put on by the writer before its first change, taken away when all is durable. Bit 1 ("corrupt") keeps writers and repairs
//! away; bit 63, which nobody knows, keeps readers away too: QEMU opens a merely corrupt image for reading and converts
//! it without a word. An entry in the table of feature names, where there is one, tells what it means.

use super::bytes::Bytes;
use super::header;
use std::io;

/// Where a version 3 header keeps its incompatible features, a big-endian u64.
pub(super) const FEATURES_AT: u64 = 72;
/// And the features that whoever does not know them has to clear when writing.
const AUTOCLEAR_AT: u64 = 88;

/// The two bits.
pub(super) const MARK: u64 = 1 << 1 | 1 << 63;
/// The one that says whose it is.
pub(super) const UNFINISHED_BIT: u32 = 63;

/// Whether the image bears it, and what it displaced.
#[derive(Debug, Default)]
pub(super) struct Mark {
    set: bool,
    /// A feature name that made room for that of the mark.
    displaced: Option<(u64, [u8; 48])>,
}

impl Mark {
    /// That of an image which was made with it.
    pub fn of_new() -> Self {
        Self { set: true, displaced: None }
    }

    /// Whether the image bears it.
    pub fn is_set(&self) -> bool {
        self.set
    }

    /// Puts it on, durably, before the first change.
    pub fn set(&mut self, bytes: &Bytes) -> io::Result<()> {
        if self.set {
            return Ok(());
        }
        bytes.write_at(&(features(bytes)? | MARK).to_be_bytes(), FEATURES_AT)?;
        // Bitmaps of others are not kept up: QEMU takes them for inconsistent from now on.
        let mut autoclear = [0; 8];
        bytes.read_at(&mut autoclear, AUTOCLEAR_AT)?;
        if autoclear != [0; 8] {
            bytes.write_at(&[0; 8], AUTOCLEAR_AT)?;
        }
        if self.displaced.is_none()
            && let Some(at) = header::last_feature_name(bytes)?
        {
            let mut entry = [0; 48];
            bytes.read_at(&mut entry, at)?;
            bytes.write_at(&header::unfinished_name(), at)?;
            self.displaced = Some((at, entry));
        }
        bytes.sync()?;
        self.set = true;
        Ok(())
    }

    /// Takes it away, once everything else is durable.
    pub fn clear(&mut self, bytes: &Bytes) -> io::Result<()> {
        if let Some((at, entry)) = self.displaced {
            bytes.write_at(&entry, at)?;
        }
        bytes.sync()?;
        self.displaced = None;
        bytes.write_at(&(features(bytes)? & !MARK).to_be_bytes(), FEATURES_AT)?;
        // Whatever comes of the sync, the next write has to set it again.
        self.set = false;
        bytes.sync()
    }
}

fn features(bytes: &Bytes) -> io::Result<u64> {
    let mut field = [0; 8];
    bytes.read_at(&mut field, FEATURES_AT)?;
    Ok(u64::from_be_bytes(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marking_and_unmarking_leaves_other_features_alone() {
        let bytes = Bytes::new(tempfile::tempfile().unwrap()).unwrap();
        bytes.write_at(&4u64.to_be_bytes(), FEATURES_AT).unwrap();
        let mut mark = Mark::default();
        for _ in 0..2 {
            mark.set(&bytes).unwrap();
            assert!(mark.is_set());
            assert_eq!(features(&bytes).unwrap(), 4 | MARK);
            mark.clear(&bytes).unwrap();
            assert!(!mark.is_set());
            assert_eq!(features(&bytes).unwrap(), 4);
        }
    }
}
