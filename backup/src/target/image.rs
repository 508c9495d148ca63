//! The reading side: a raw image, or a qcow2 with everything it stands on, opened without QEMU.
//!
//! Used to open the backing chain of a target, to restore a chain ([`flatten`]), and wherever two images are compared:
//! an [`Image`] is a [`Source`]. The invariants: nothing is opened that the policy does not allow, under whatever name
//! an image header asks for it; formats are never guessed; every file of the chain is locked against writers meanwhile.

use super::bytes::{Bytes, check_range};
use super::header::{self, Access};
use super::place::open_for_reading;
use super::raw::RawTarget;
use super::storage::{ImageFile, keeping_errno};
use super::{CreateOptions, Format, Policy, Target, TargetError};
use crate::file_lock::{self, LockMode};
use crate::source::{BlockStatus, FileId, Source};
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, Mapping, ShallowMapping};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longer chains are an attack on the stack or a circle through names we cannot see.
const MAX_CHAIN: usize = 200;
/// What is read at a time, and what is tested for zeroes.
const CHUNK: usize = 1 << 20;
const ZERO_UNIT: usize = 64 << 10;

/// What the top layer of an image says of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// The layer holds bytes.
    Data,
    /// The layer says: zeroes, whatever lies beneath.
    Zero,
    /// The layer says nothing: the backing image shows through, or zeroes where there is none.
    Backing,
}

/// An image opened for reading, with its chain.
#[derive(Debug)]
pub struct Image {
    access: FormatAccess<ImageFile>,
    ids: Vec<FileId>,
    size: u64,
}

impl Image {
    /// Opens `path` and what it stands on. A relative backing name counts from the directory of the image naming it.
    pub fn open(path: &Path, format: Format, policy: &Policy) -> Result<Self, TargetError> {
        let mut ids = Vec::new();
        let access = open_layer(path, format, policy, &mut ids)?;
        let size = access.size();
        Ok(Self { access, ids, size })
    }

    /// The files of the chain, top first.
    pub fn file_ids(&self) -> &[FileId] {
        &self.ids
    }

    /// What the top layer says at `offset`, and for how many bytes, at most `limit`, that holds.
    pub fn allocation(&self, offset: u64, limit: u64) -> io::Result<(Allocation, u64)> {
        let limit = self.clamp(offset, limit)?;
        let (mapping, len) = keeping_errno(|| self.access.get_shallow_mapping(offset, limit))?;
        let what = match mapping {
            ShallowMapping::Zero { explicit: true, .. } => Allocation::Zero,
            ShallowMapping::Zero { .. } | ShallowMapping::Indirect { .. } => Allocation::Backing,
            _ => Allocation::Data,
        };
        Ok((what, len))
    }

    fn clamp(&self, offset: u64, limit: u64) -> io::Result<u64> {
        let limit = limit.min(self.size.saturating_sub(offset));
        check_range(offset, limit.max(1), self.size)?;
        Ok(limit)
    }
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn alignment(&self) -> u32 {
        1
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        keeping_errno(|| self.access.read(buf, offset))
    }

    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        let limit = self.clamp(offset, limit)?;
        let (mapping, len) = keeping_errno(|| self.access.get_mapping(offset, limit))?;
        match mapping {
            Mapping::Zero { .. } => Ok((BlockStatus::Hole, len)),
            Mapping::Raw { storage, offset, .. } => extent(storage.bytes(), offset, len),
            _ => Ok((BlockStatus::Data, len)),
        }
    }

    fn file_id(&self) -> Option<FileId> {
        self.ids.first().copied()
    }
}

/// Data or hole in the file itself; what cannot be told is data.
fn extent(bytes: &Bytes, offset: u64, len: u64) -> io::Result<(BlockStatus, u64)> {
    let data = match seek(bytes.file(), SeekFrom::Data(offset)) {
        Ok(data) => data,
        // Nothing but a hole up to the end of the file.
        Err(Errno::NXIO) => return Ok((BlockStatus::Hole, len)),
        Err(_) => return Ok((BlockStatus::Data, len)),
    };
    if data > offset {
        return Ok((BlockStatus::Hole, len.min(data - offset)));
    }
    match seek(bytes.file(), SeekFrom::Hole(offset)) {
        Ok(hole) if hole > offset => Ok((BlockStatus::Data, len.min(hole - offset))),
        _ => Ok((BlockStatus::Data, len)),
    }
}

fn open_layer(
    path: &Path,
    format: Format,
    policy: &Policy,
    ids: &mut Vec<FileId>,
) -> Result<FormatAccess<ImageFile>, TargetError> {
    let failed = |source| TargetError::Open { path: path.to_owned(), source };
    let file = open_for_reading(path, policy).map_err(failed)?;
    let bytes = Arc::new(Bytes::new(file).map_err(failed)?);
    let id = bytes.id();
    if policy.forbidden.contains(&id) {
        return Err(TargetError::Forbidden);
    }
    if ids.contains(&id) || ids.len() >= MAX_CHAIN {
        return Err(TargetError::refused(path, "The backing chain has no end"));
    }
    ids.push(id);
    file_lock::lock(bytes.file(), LockMode::Reader)?;
    if format == Format::Qcow2 {
        header::examine(&bytes, Access::Read).map_err(failed)?.map_err(|reason| TargetError::refused(path, reason))?;
    }
    let storage = ImageFile::new(bytes, path.display().to_string());
    match format {
        Format::Raw => {
            let raw = keeping_errno(|| Raw::open_image(storage, false)).map_err(failed)?;
            Ok(FormatAccess::new(raw))
        }
        Format::Qcow2 => {
            let mut qcow2 = keeping_errno(|| Qcow2::<ImageFile>::open_image(storage, false)).map_err(failed)?;
            let below = match backing_of(&qcow2, path)? {
                Some((name, format)) => Some(open_layer(&name, format, policy, ids)?),
                None => None,
            };
            qcow2.set_data_file(None);
            qcow2.set_backing(below);
            Ok(FormatAccess::new(qcow2))
        }
    }
}

/// What the header names as its backing image.
pub(super) fn backing_of(qcow2: &Qcow2<ImageFile>, path: &Path) -> Result<Option<(PathBuf, Format)>, TargetError> {
    let Some(name) = qcow2.implicit_backing_file().filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    let name = plain_name(name).map_err(|reason| TargetError::refused(path, reason))?;
    let format = match qcow2.implicit_backing_format().map(String::as_str) {
        Some("file") => Format::Raw,
        Some(format) => format.parse()?,
        None => {
            let reason = "The image does not say which format its backing file has";
            return Err(TargetError::refused(path, reason));
        }
    };
    Ok(Some((beside(path, Path::new(name)), format)))
}

/// `name` as seen from the image at `path`.
pub(super) fn beside(path: &Path, name: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) => dir.join(name),
        None => name.to_owned(),
    }
}

/// Refuses what QEMU would take for anything but a file name: `json:{...}`, `nbd://...`, `driver:...`.
pub(super) fn plain_name(name: &str) -> Result<&str, String> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    match name.split_once(':') {
        Some((protocol, _)) if !protocol.contains('/') => {
            Err(format!("Backing file name '{name}' is not a plain file name"))
        }
        _ => Ok(name),
    }
}

/// What [`flatten`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattened {
    /// Virtual size in bytes.
    pub size: u64,
    /// Bytes that were not zero and so were written.
    pub written: u64,
    /// Files in the chain.
    pub layers: usize,
}

/// Restores what a chain holds into a new sparse raw file. `progress` hears bytes done and bytes in all. A failure
/// leaves no file behind.
pub fn flatten(
    top: &Path,
    format: Format,
    out: &Path,
    policy: &Policy,
    mut progress: impl FnMut(u64, u64),
) -> Result<Flattened, TargetError> {
    let image = Image::open(top, format, policy)?;
    let target = RawTarget::create(out, &CreateOptions::new(image.size), policy)?;
    let written = match pour(&image, top, &target, out, &mut progress) {
        Ok(written) => written,
        Err(e) => {
            if let Err(e) = target.abandon() {
                tracing::warn!("could not remove '{}': {e}", out.display());
            }
            return Err(e);
        }
    };
    Ok(Flattened { size: image.size, written, layers: image.ids.len() })
}

fn pour(
    image: &Image,
    top: &Path,
    target: &RawTarget,
    out: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<u64, TargetError> {
    let unreadable = |source| TargetError::Read { path: top.to_owned(), source };
    let unwritable = |source| TargetError::Write { path: out.to_owned(), source };
    let mut buf = vec![0; CHUNK];
    let (mut at, mut written) = (0, 0);
    progress(0, image.size);
    while at < image.size {
        let (status, len) = image.block_status(at, image.size - at).map_err(unreadable)?;
        let end = at + len;
        if status == BlockStatus::Hole {
            at = end;
            progress(at, image.size);
        }
        // The whole extent, before the next question: asking for holes costs a walk through the file's extents.
        while at < end {
            let buf = &mut buf[..(end - at).min(CHUNK as u64) as usize];
            image.read_at(buf, at).map_err(unreadable)?;
            for (offset, data) in data_runs(buf) {
                target.write_at(data, at + offset as u64).map_err(unwritable)?;
                written += data.len() as u64;
            }
            at += buf.len() as u64;
            progress(at, image.size);
        }
    }
    target.conclude().map_err(unwritable)?;
    Ok(written)
}

/// The parts that are not zero, in units of [`ZERO_UNIT`], neighbours together.
fn data_runs(buf: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let is_data = |at: usize| {
        let unit = &buf[at..buf.len().min(at + ZERO_UNIT)];
        unit.iter().any(|byte| *byte != 0)
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < buf.len() && !is_data(at) {
            at += ZERO_UNIT;
        }
        let start = at;
        while at < buf.len() && is_data(at) {
            at += ZERO_UNIT;
        }
        (start < buf.len()).then(|| (start, &buf[start..at.min(buf.len())]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_all_that_is_not_zero() {
        let runs = |buf: &[u8]| data_runs(buf).map(|(at, data)| (at, data.len())).collect::<Vec<_>>();
        let mut buf = vec![0; 5 * ZERO_UNIT + 100];
        assert_eq!(runs(&[]), []);
        assert_eq!(runs(&buf), []);
        buf[ZERO_UNIT] = 1;
        buf[3 * ZERO_UNIT - 1] = 1;
        assert_eq!(runs(&buf), [(ZERO_UNIT, 2 * ZERO_UNIT)]);
        buf[5 * ZERO_UNIT + 99] = 1;
        assert_eq!(runs(&buf), [(ZERO_UNIT, 2 * ZERO_UNIT), (5 * ZERO_UNIT, 100)]);
        buf.fill(1);
        assert_eq!(runs(&buf), [(0, buf.len())]);
    }

    #[test]
    fn only_plain_file_names_are_backing_names() {
        for good in ["a", "/a/b", "./a:b", "/a:b", "file:a", "../x"] {
            assert!(plain_name(good).is_ok(), "{good}");
        }
        for bad in ["json:{}", "nbd://h/x", "a:b", "fat:rw:/x", "file:json:{}"] {
            assert!(plain_name(bad).is_err(), "{bad}");
        }
    }
}
