//! Takes a range of another file by sharing its blocks, where the file system can (XFS, btrfs): nothing is read and nothing
//! written.
//!
//! Called by the raw target, from several workers at once. What fails is never an error here: whoever asked then reads and writes,
//! which tells what is wrong and on which side. Invariant: `true` means that the whole range holds what the other file held at
//! some moment of the call, and that what is written there later does not show here.
//!
//! Copies within the kernel (`copy_file_range` where blocks cannot be shared) are not made: on ext4 they go through the page
//! cache on both sides, and on tmpfs they save a tenth of the processor time but keep a second processor from helping.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// What is known of a pair of files.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    impossible: AtomicBool,
}

impl Sharing {
    /// Makes `len` bytes at `offset` of `to` what they are in `from`, or answers `false`.
    pub fn take(&self, from: BorrowedFd<'_>, to: &File, offset: u64, len: u64) -> bool {
        if self.impossible.load(Ordering::Relaxed) {
            return false;
        }
        match clone_range(from, to, offset, len) {
            Ok(()) => true,
            Err(error) => {
                // Else it is this range: one that ends within a block, for instance, or there is no space.
                if is_for_good(&error) {
                    self.impossible.store(true, Ordering::Relaxed);
                }
                false
            }
        }
    }
}

/// Whether a file system that answers this will answer the same for every range.
fn is_for_good(error: &io::Error) -> bool {
    let for_good = [libc::EOPNOTSUPP, libc::EXDEV, libc::ENOTTY, libc::ENOSYS, libc::EPERM, libc::EBADF];
    error.raw_os_error().is_some_and(|errno| for_good.contains(&errno))
}

fn clone_range(from: BorrowedFd<'_>, to: &File, offset: u64, len: u64) -> io::Result<()> {
    /// `struct file_clone_range` of linux/fs.h.
    #[repr(C)]
    struct CloneRange {
        from: i64,
        from_offset: u64,
        len: u64,
        to_offset: u64,
    }
    /// `FICLONERANGE`: `_IOW(0x94, 13, struct file_clone_range)`.
    const CLONE_RANGE: libc::Ioctl = 0x4020_940d;
    let range = CloneRange { from: i64::from(from.as_raw_fd()), from_offset: offset, len, to_offset: offset };
    loop {
        // SAFETY: two open descriptors and a structure that the call only reads.
        if unsafe { libc::ioctl(to.as_raw_fd(), CLONE_RANGE, &raw const range) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
