//! Where a backup goes: image files and block devices that the copy engine writes point-in-time clusters into.
//!
//! Jobs make targets with [`create`] (`drive-backup`) or [`open`] (`mode: existing`, `blockdev-add`), the copy engine
//! writes them, and the job concludes them. Nothing here knows of bitmaps, points in time or QMP. Rooms: `place` (paths
//! to descriptors, links refused), `draft` (files that vanish unless kept), `bytes` (whole reads, writes and zeroing of a
//! descriptor), `pour` (large writes, with `huge` pages for what is memory), `raw` (with `share`, for taking blocks of another file), `qcow2` (with `header`, `check`, `mark` and `deflate` beneath it), `image`
//! (reading chains through `imago`, with `storage` beneath it; flattening them).
//!
//! Invariants: a refused creation leaves nothing behind and an existing file as it was; a target is never a file that
//! the caller forbids, under whatever name; an error that the kernel gave keeps its `raw_os_error`; a failed fsync is
//! never retried and trusted; a qcow2 that was not concluded is refused by everyone.

mod bytes;
mod check;
mod deflate;
mod draft;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod header;
mod huge;
pub mod image;
mod mark;
mod place;
mod pour;
mod qcow2;
mod raw;
mod share;
mod storage;

use crate::file_lock::LockError;
use crate::source::FileId;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

/// Something that a backup is written into.
///
/// Life: created or opened, written by several workers in any order, flushed at will, then concluded once all is
/// written, or abandoned. A write after [`Target::conclude`] begins anew and needs another. Dropping without concluding
/// leaves a qcow2 that every tool refuses to open.
pub trait Target: Send + Sync {
    /// Virtual size in bytes. Fixed.
    fn size(&self) -> u64;

    /// Natural unit of writing, a power of two: aligned writes of this size cause no copying inside the target.
    fn cluster_size(&self) -> u64;

    /// Alignment that offsets, lengths and buffers need (the end of the disk excepted).
    fn alignment(&self) -> u32 {
        1
    }

    /// Writes of which size, a power of two, beginning at its multiples, it likes best. 0: it has no wishes.
    fn stride(&self) -> u64 {
        0
    }

    /// Freshly made and without backing: what was not written yet reads as zeroes, so zeroes need not be written.
    fn reads_zero(&self) -> bool;

    /// Whether it can hold data compressed.
    fn compresses(&self) -> bool {
        false
    }

    /// Whether what is written from now on is to be compressed. Only asked of a target that can.
    fn set_compression(&self, _on: bool) {}

    /// It is wanted: where it was made to replace another file, it takes that one's name. To be called before the first write;
    /// until then the other file is as it was.
    fn accept(&self) -> io::Result<()> {
        Ok(())
    }

    /// Writes all of `buf`. Called from several workers at once, on disjoint ranges. A range past the end is refused
    /// with `InvalidInput` and nothing is written.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Whether the writes of several workers take turns, so that one who has many should hand them over together.
    fn writes_in_turns(&self) -> bool {
        false
    }

    /// Writes all of several pieces, each with its offset, in one turn. An error comes with how many were written before it.
    fn write_all_at(&self, pieces: &[(u64, &[u8])]) -> Result<(), (usize, io::Error)> {
        for (done, (offset, buf)) in pieces.iter().enumerate() {
            self.write_at(buf, *offset).map_err(|error| (done, error))?;
        }
        Ok(())
    }

    /// Makes the range read as zeroes, also over a backing file, taking as little space as possible.
    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Takes the range from the same place of `file` by sharing its blocks. `false`: it could not, what the range holds now is not
    /// known, and it is to be written. Called as writes are.
    fn take_from(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
        let _ = (file, offset, len);
        false
    }

    /// Everything written so far is found again by whoever opens the file after this process was killed. Not called for each write,
    /// since it may take something.
    fn note_down(&self) -> io::Result<()> {
        Ok(())
    }

    /// How often to have it note down, at most.
    fn noted_every(&self) -> Duration {
        Duration::from_millis(100)
    }

    /// Returns when everything written so far is durable. An error is final: later calls fail too.
    fn flush(&self) -> io::Result<()>;

    /// [`Target::flush`], then declares the contents complete: clears the mark of an unfinished qcow2, and makes the
    /// name of a created file durable. May be called again after more writes.
    fn conclude(&self) -> io::Result<()>;

    /// Makes what waits in here fail at once, and everything later. For a target that no longer answers, when nobody wants
    /// to wait for its time limits. May be called from any thread; files have nothing to wait for.
    fn interrupt(&self) {}

    /// Removes the file if this target created it and its name still leads to it; otherwise does nothing.
    fn abandon(&self) -> io::Result<()>;

    /// The files and devices behind it: first the one that is written, then its backing chain. Empty if there is none.
    fn file_ids(&self) -> &[FileId];

    /// The file or device that is written.
    fn file_id(&self) -> Option<FileId> {
        self.file_ids().first().copied()
    }

    /// `raw`, `qcow2`, ...
    fn format_name(&self) -> &'static str;

    /// What the user called it, for queries and logs.
    fn name(&self) -> String;
}

/// An image format. Never guessed: a guest that may write a raw disk could make it look like anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk, one to one.
    Raw,
    /// QEMU's qcow2, version 3 for writing, 2 and 3 for reading.
    Qcow2,
}

impl Format {
    /// QEMU's name of it.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = TargetError;

    fn from_str(name: &str) -> Result<Self, TargetError> {
        match name {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(TargetError::UnknownFormat(name.to_owned())),
        }
    }
}

/// Which files may be touched.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// Directories that every path (also of a backing file) must lie beneath, links resolved. Empty: anywhere.
    pub roots: Vec<PathBuf>,
    /// Files and devices that may be neither target nor a part of its chain: the source, and every disk served.
    pub forbidden: Vec<FileId>,
}

/// The image that a new qcow2 stands on.
#[derive(Clone, Debug)]
pub struct Backing {
    /// Written into the new image as it is; a relative path counts from the new image's directory.
    pub path: PathBuf,
    /// Its format, written too.
    pub format: Format,
}

/// What to create.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// qcow2 only; 64 KiB when not given.
    pub cluster_size: Option<u64>,
    /// qcow2 only.
    pub backing: Option<Backing>,
    /// QEMU's `absolute-paths`: an existing regular file is replaced, in [`Target::accept`]. Otherwise it is refused.
    pub overwrite: bool,
}

impl CreateOptions {
    /// A new image of `size` bytes, on nothing, over nothing.
    pub fn new(size: u64) -> Self {
        Self { size, cluster_size: None, backing: None, overwrite: false }
    }
}

/// Why a target could not be made or opened. The text is QEMU's where QEMU has the case.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// No such image format.
    #[error("Unknown file format '{0}'")]
    UnknownFormat(String),
    /// The file could not be made.
    #[error("Could not create '{}': {}", path.display(), os_text(source))]
    Create {
        /// The path as given.
        path: PathBuf,
        /// The reason, with the kernel's errno where it has one.
        source: io::Error,
    },
    /// The file could not be opened.
    #[error("Could not open '{}': {}", path.display(), os_text(source))]
    Open {
        /// The path as given.
        path: PathBuf,
        /// The reason, with the kernel's errno where it has one.
        source: io::Error,
    },
    /// An image could not be read.
    #[error("Could not read '{}': {}", path.display(), os_text(source))]
    Read {
        /// The top of the chain.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// An image could not be written.
    #[error("Could not write '{}': {}", path.display(), os_text(source))]
    Write {
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The file is there, but its contents are not acceptable.
    #[error("Could not open '{}': {reason}", path.display())]
    Refused {
        /// The path as given, or of a file in its chain.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The options make no sense; nothing was touched.
    #[error("Could not create '{}': {reason}", path.display())]
    Options {
        /// The path as given.
        path: PathBuf,
        /// What is wrong with them.
        reason: String,
    },
    /// The file, or one in its chain, is forbidden: the source itself or another served disk.
    #[error("Source and target cannot be the same")]
    Forbidden,
    /// Another process uses the file.
    #[error(transparent)]
    Locked(#[from] LockError),
}

impl TargetError {
    fn refused(path: &Path, reason: impl Into<String>) -> Self {
        TargetError::Refused { path: path.to_owned(), reason: reason.into() }
    }

    fn options(path: &Path, reason: impl Into<String>) -> Self {
        TargetError::Options { path: path.to_owned(), reason: reason.into() }
    }
}

/// `strerror` alone, as QEMU prints it: without Rust's "(os error 2)".
pub fn os_text(error: &io::Error) -> String {
    let text = error.to_string();
    match (error.raw_os_error(), text.rfind(" (os error ")) {
        (Some(_), Some(end)) => text[..end].to_owned(),
        _ => text,
    }
}

/// A reference to what `path` names (a socket, say), found as images are: beneath the roots, no link in the last place.
pub(crate) fn locate(path: &Path, policy: &Policy) -> io::Result<OwnedFd> {
    place::open_beneath(path, rustix::fs::OFlags::PATH | rustix::fs::OFlags::NOFOLLOW, policy)
}

/// Makes a new image and opens it for writing.
pub fn create(
    path: &Path,
    format: Format,
    options: &CreateOptions,
    policy: &Policy,
) -> Result<Box<dyn Target>, TargetError> {
    if !options.size.is_multiple_of(512) {
        return Err(TargetError::options(path, "Image size must be a multiple of 512 bytes"));
    }
    match format {
        Format::Raw => Ok(Box::new(raw::RawTarget::create(path, options, policy)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2Target::create(path, options, policy)?)),
    }
}

/// Opens the image that a killed process was writing, to go on with it: what it had noted down is in it.
pub(crate) fn reopen(path: &Path, format: Format, policy: &Policy) -> Result<Box<dyn Target>, TargetError> {
    match format {
        Format::Raw => Ok(Box::new(raw::RawTarget::reopen(path, policy)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2Target::reopen(path, policy)?)),
    }
}

/// Opens an existing image or block device for writing.
pub fn open(path: &Path, format: Format, policy: &Policy) -> Result<Box<dyn Target>, TargetError> {
    match format {
        Format::Raw => Ok(Box::new(raw::RawTarget::open(path, policy)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2Target::open(path, policy)?)),
    }
}
