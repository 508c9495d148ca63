//! The file beneath a qcow2 image, as `imago` wants it.
//!
//! Used by `qcow2` (writing) and `image` (reading). It exists, in place of imago's own file driver, for three reasons:
//! the descriptor was opened, checked and locked by us; imago wraps errors in text and so loses the errno, which is
//! kept aside here ([`keeping_errno`]); and the mark of an unfinished image has to be in the file from its very first
//! header on, while imago refuses to open a marked one. So the mark is *veiled*: header bytes that imago writes get it
//! on their way to the file, and lose it on their way back.
//!
//! The invariant: while the veil is on, the feature bits in the file contain the mark.

use super::bytes::{Bytes, Kind};
use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where a version 3 header keeps its incompatible features, a big-endian u64.
pub(super) const FEATURES_AT: u64 = 72;

/// The mark: bit 1 ("corrupt"), which keeps writers and repairs away, and bit 63, which nobody knows, so that readers
/// refuse too: QEMU opens a merely corrupt image for reading and converts it without a word.
pub(super) const MARK: u64 = 1 << 1 | 1 << 63;

/// See [`MARK`].
pub(super) const UNFINISHED_BIT: u32 = 63;

thread_local! {
    static ERRNO: Cell<Option<i32>> = const { Cell::new(None) };
}

/// Runs an imago call and gives its error the errno back that a file of ours failed with during it. In imago's
/// synchronous mode everything happens on the calling thread.
pub(super) fn keeping_errno<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    ERRNO.set(None);
    call().map_err(|e| match (e.raw_os_error(), ERRNO.take()) {
        (None, Some(errno)) => io::Error::from_raw_os_error(errno),
        _ => e,
    })
}

fn noted<T>(result: io::Result<T>) -> io::Result<T> {
    if let Err(e) = &result {
        ERRNO.set(e.raw_os_error());
    }
    result
}

/// What target and storage share of an image's file.
#[derive(Debug)]
pub(super) struct ImageBytes {
    pub bytes: Arc<Bytes>,
    veil: AtomicBool,
}

impl ImageBytes {
    /// `veiled`: the image is being made, and marked from its first byte.
    pub fn new(bytes: Arc<Bytes>, veiled: bool) -> Arc<Self> {
        Arc::new(Self { bytes, veil: AtomicBool::new(veiled) })
    }

    /// Puts the mark into the file, durably, before the first change.
    pub fn mark(&self) -> io::Result<()> {
        self.veil.store(true, Ordering::Release);
        let features = self.features()?;
        self.write_features(features | MARK)?;
        self.bytes.sync()
    }

    /// Takes the mark away, once everything else is durable.
    pub fn unmark(&self) -> io::Result<()> {
        self.bytes.sync()?;
        let features = self.features()?;
        self.write_features(features & !MARK)?;
        self.bytes.sync()?;
        self.veil.store(false, Ordering::Release);
        Ok(())
    }

    fn features(&self) -> io::Result<u64> {
        let mut field = [0; 8];
        self.bytes.read_at(&mut field, FEATURES_AT)?;
        Ok(u64::from_be_bytes(field))
    }

    fn write_features(&self, features: u64) -> io::Result<()> {
        self.bytes.write_at(&features.to_be_bytes(), FEATURES_AT)
    }

    /// The part of a transfer at `offset` that is the feature field, and where in the field it begins.
    fn veiled_part(&self, offset: u64, len: usize) -> Option<(std::ops::Range<usize>, usize)> {
        let end = offset.checked_add(len as u64)?;
        let from = offset.max(FEATURES_AT);
        let to = end.min(FEATURES_AT + 8);
        if from >= to || !self.veil.load(Ordering::Acquire) {
            return None;
        }
        let range = (from - offset) as usize..(to - offset) as usize;
        Some((range, (from - FEATURES_AT) as usize))
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_at(buf, offset)?;
        if let Some((range, first)) = self.veiled_part(offset, buf.len()) {
            let mark = &MARK.to_be_bytes()[first..];
            buf[range].iter_mut().zip(mark).for_each(|(byte, mark)| *byte &= !mark);
        }
        Ok(())
    }

    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let Some((range, first)) = self.veiled_part(offset, buf.len()) else {
            return self.bytes.write_at(buf, offset);
        };
        let mark = &MARK.to_be_bytes()[first..];
        let mut marked = buf.to_vec();
        marked[range].iter_mut().zip(mark).for_each(|(byte, mark)| *byte |= mark);
        self.bytes.write_at(&marked, offset)
    }

    fn grow_to(&self, end: u64) -> io::Result<()> {
        if self.bytes.kind() == Kind::Regular && end > self.bytes.len()? {
            self.bytes.file().set_len(end)?;
        }
        Ok(())
    }
}

/// The storage object that imago owns.
#[derive(Debug)]
pub(super) struct ImageFile {
    image: Arc<ImageBytes>,
    name: String,
    helper: CommonStorageHelper,
}

impl ImageFile {
    /// `name` is for messages.
    pub fn new(image: Arc<ImageBytes>, name: String) -> Self {
        Self { image, name, helper: CommonStorageHelper::default() }
    }

    /// The descriptor, to ask for holes.
    pub fn bytes(&self) -> &Bytes {
        &self.image.bytes
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        noted(self.image.bytes.len())
    }

    // SAFETY: called with any range, aligned to 1 as all ranges are; the buffers are plain slices.
    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut part in bufv.into_inner() {
            noted(self.image.read(&mut part, offset))?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    // SAFETY: as for reading; a target serialises the calls.
    unsafe fn pure_writev(&self, bufv: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        for part in bufv.into_inner() {
            noted(self.image.write(&part, offset))?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    // SAFETY: as for writing.
    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        noted(self.image.bytes.zero_at(offset, length))?;
        noted(self.image.grow_to(offset + length))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        noted(self.image.bytes.sync())
    }

    // SAFETY: there is nothing to drop.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, _mode: PreallocateMode) -> io::Result<()> {
        match self.image.bytes.kind() {
            Kind::Regular => noted(self.image.bytes.file().set_len(new_size)),
            Kind::BlockDevice => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(veiled: bool) -> Arc<ImageBytes> {
        ImageBytes::new(Arc::new(Bytes::new(tempfile::tempfile().unwrap()).unwrap()), veiled)
    }

    fn in_file(image: &ImageBytes) -> u64 {
        image.features().unwrap()
    }

    #[test]
    fn the_mark_is_in_the_file_from_the_first_write_and_never_seen() {
        // Whatever pieces the header is written in.
        for (offset, len) in [(0, 4096), (72, 8), (79, 1), (72, 1), (60, 13), (79, 100)] {
            let image = image(true);
            image.write(&vec![0; len], offset).unwrap();
            let touched = image.veiled_part(offset, len).unwrap().1;
            let expected = u64::from_be_bytes(std::array::from_fn(|i| {
                let inside = i >= touched && (FEATURES_AT + i as u64) < offset + len as u64;
                if inside { MARK.to_be_bytes()[i] } else { 0 }
            }));
            assert_eq!(in_file(&image), expected, "{offset}+{len}");
            let mut seen = vec![0xff; len];
            image.read(&mut seen, offset).unwrap();
            assert!(seen.iter().all(|b| *b == 0));
        }
        let image = image(true);
        image.write(&[1; 72], 0).unwrap();
        image.write(&[1; 72], 80).unwrap();
        assert_eq!(in_file(&image), 0);
    }

    #[test]
    fn marking_and_unmarking_leaves_other_features_alone() {
        let image = image(false);
        image.write(&4u64.to_be_bytes(), FEATURES_AT).unwrap();
        assert_eq!(in_file(&image), 4);
        image.mark().unwrap();
        assert_eq!(in_file(&image), 4 | MARK);
        image.unmark().unwrap();
        assert_eq!(in_file(&image), 4);
    }

    #[test]
    fn an_errno_survives_being_wrapped_in_text() {
        let wrapped = || {
            let e = noted::<()>(Err(io::Error::from_raw_os_error(libc::ENOSPC))).unwrap_err();
            Err::<(), _>(io::Error::other(format!("Backing file: {e}")))
        };
        assert_eq!(keeping_errno(wrapped).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        // An older one is not blamed for an error without any.
        let plain = || Err::<(), _>(io::Error::other("no"));
        assert_eq!(keeping_errno(plain).unwrap_err().raw_os_error(), None);
    }
}
