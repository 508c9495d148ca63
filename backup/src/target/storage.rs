//! The file beneath an image, as `imago` wants it: for reading only.
//!
//! Used by `image`, and by the qcow2 writer for a look at what an image stands on. It exists, in place of imago's own file
//! driver, because the descriptor was opened, checked and locked by us, and because imago wraps errors in text and so loses
//! the errno, which is kept aside here ([`keeping_errno`]).

use super::bytes::Bytes;
use super::mark::{FEATURES_AT, MARK};
use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use rustix::io::Errno;
use std::cell::Cell;
use std::fmt;
use std::io;
use std::sync::Arc;

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

/// The storage object that imago owns.
#[derive(Debug)]
pub(super) struct ImageFile {
    bytes: Arc<Bytes>,
    name: String,
    /// Whether the mark of an unfinished image is left out of what is read.
    without_mark: bool,
    helper: CommonStorageHelper,
}

impl ImageFile {
    /// `name` is for messages.
    pub fn new(bytes: Arc<Bytes>, name: String) -> Self {
        Self { bytes, name, without_mark: false, helper: CommonStorageHelper::default() }
    }

    /// The same file, as it would be without the mark of an unfinished image: for who goes on writing it.
    pub fn without_mark(self) -> Self {
        Self { without_mark: true, ..self }
    }

    /// The descriptor, to ask for holes.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn not_for_writing() -> io::Error {
    Errno::BADF.into()
}

impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        noted(self.bytes.len())
    }

    // SAFETY: called with any range, aligned to 1 as all ranges are; the buffers are plain slices.
    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut part in bufv.into_inner() {
            noted(self.bytes.read_at(&mut part, offset))?;
            if self.without_mark {
                for (at, bits) in (FEATURES_AT..).zip(MARK.to_be_bytes()) {
                    let byte = at.checked_sub(offset).and_then(|at| part.get_mut(usize::try_from(at).ok()?));
                    if let Some(byte) = byte {
                        *byte &= !bits;
                    }
                }
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    // SAFETY: it does nothing.
    unsafe fn pure_writev(&self, _: IoVector<'_>, _: u64) -> io::Result<()> {
        Err(not_for_writing())
    }

    // SAFETY: it does nothing.
    unsafe fn pure_write_zeroes(&self, _: u64, _: u64) -> io::Result<()> {
        Err(not_for_writing())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    // SAFETY: there is nothing to drop.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, _: u64, _: PreallocateMode) -> io::Result<()> {
        Err(not_for_writing())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_survives_being_wrapped_in_text() {
        let wrapped = || {
            let e = noted::<()>(Err(io::Error::from_raw_os_error(libc::EIO))).unwrap_err();
            Err::<(), _>(io::Error::other(format!("Backing file: {e}")))
        };
        assert_eq!(keeping_errno(wrapped).unwrap_err().raw_os_error(), Some(libc::EIO));
        // An older one is not blamed for an error without any.
        let plain = || Err::<(), _>(io::Error::other("no"));
        assert_eq!(keeping_errno(plain).unwrap_err().raw_os_error(), None);
    }
}
