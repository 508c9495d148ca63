//! Raw targets: a file or block device that holds the bytes of the disk one to one.
//!
//! Made by `target::create` and `target::open`. Workers write at once without a lock: the kernel keeps disjoint ranges
//! apart. The invariant: nothing is ever written outside `0..size`, so neither file nor size changes under a job.

use super::bytes::{Kind, check_range};
use super::draft::Draft;
use super::pour::Pour;
use super::share::Sharing;
use super::{CreateOptions, Policy, Target, TargetError};
use crate::source::FileId;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

/// A page: what is written in whole pages needs nothing read.
const CLUSTER: u64 = 4096;

/// A raw image that is written.
pub(super) struct RawTarget {
    draft: Draft,
    size: u64,
    reads_zero: bool,
    path: PathBuf,
    ids: [FileId; 1],
    pour: Pour,
    sharing: Sharing,
}

impl RawTarget {
    /// Opens what exists.
    pub fn open(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open { path: path.to_owned(), source };
        let draft = Draft::existing(path, policy)?;
        let size = draft.bytes.len().map_err(failed)?;
        Ok(Self::new(draft, size, false, path))
    }

    /// Opens what a killed process was writing.
    pub fn reopen(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let mut target = Self::open(path, policy)?;
        target.draft.renew_name();
        Ok(target)
    }

    /// Makes a sparse file of the wanted size, or takes a block device as it is.
    pub fn create(path: &Path, options: &CreateOptions, policy: &Policy) -> Result<Self, TargetError> {
        if options.backing.is_some() {
            let reason = "Backing file not supported for file format 'raw'";
            return Err(TargetError::options(path, reason));
        }
        let failed = |source| TargetError::Create { path: path.to_owned(), source };
        let draft = Draft::make(path, options.overwrite, policy)?;
        let is_file = draft.bytes.kind() == Kind::Regular;
        if is_file {
            draft.bytes.file().set_len(options.size).map_err(failed)?;
        }
        let size = draft.bytes.len().map_err(failed)?;
        Ok(Self::new(draft, size, is_file, path))
    }

    fn new(mut draft: Draft, size: u64, reads_zero: bool, path: &Path) -> Self {
        draft.keep();
        let ids = [draft.bytes.id()];
        let pour = Pour::new(&draft.bytes);
        Self { draft, size, reads_zero, path: path.to_owned(), ids, pour, sharing: Sharing::default() }
    }
}

impl Target for RawTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        CLUSTER
    }

    fn stride(&self) -> u64 {
        self.pour.stride()
    }

    fn reads_zero(&self) -> bool {
        self.reads_zero
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        self.pour.write_at(&self.draft.bytes, buf, offset)
    }

    fn writes_in_turns(&self) -> bool {
        true
    }

    fn write_all_at(&self, pieces: &[(u64, &[u8])]) -> Result<(), (usize, io::Error)> {
        let mut turn = None;
        for (done, (offset, buf)) in pieces.iter().enumerate() {
            check_range(*offset, buf.len() as u64, self.size)
                .and_then(|()| self.pour.write_in_turn(&self.draft.bytes, buf, *offset, &mut turn))
                .map_err(|error| (done, error))?;
        }
        Ok(())
    }

    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        self.draft.bytes.zero_at(offset, len)
    }

    fn take_from(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
        check_range(offset, len, self.size).is_ok() && self.sharing.take(file, self.draft.bytes.file(), offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.draft.bytes.sync()
    }

    fn accept(&self) -> io::Result<()> {
        self.draft.accept()
    }

    fn conclude(&self) -> io::Result<()> {
        self.accept()?;
        self.flush()?;
        self.draft.sync_name()
    }

    fn abandon(&self) -> io::Result<()> {
        self.draft.remove()
    }

    fn file_ids(&self) -> &[FileId] {
        &self.ids
    }

    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}
