//! A file on its way to becoming a new image, which disappears again unless it is kept.
//!
//! Both formats create through it. The invariant: until `make` has succeeded nothing that existed is changed, and
//! dropping a draft removes what it made.

use super::bytes::{Bytes, Kind};
use super::place::Place;
use super::{Policy, TargetError};
use crate::file_lock::{self, LockMode};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A file may vanish or appear between the two looks at it; that often in a row it is no accident.
const RACES: u32 = 16;

/// An empty file (or a block device), locked, not yet an image.
pub(super) struct Draft {
    pub bytes: Arc<Bytes>,
    place: Place,
    /// The file was not there before.
    created: bool,
    /// Remove it on drop.
    doomed: bool,
}

impl Draft {
    /// Creates the file; or, if `overwrite` and it exists, empties a regular one that nobody else uses.
    pub fn make(path: &Path, overwrite: bool, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Create { path: path.to_owned(), source };
        let place = Place::find(path, policy).map_err(failed)?;
        let (file, created) = open_or_create(&place, overwrite).map_err(failed)?;
        let bytes = Arc::new(Bytes::new(file).map_err(failed)?);
        let mut draft = Self { bytes, place, created, doomed: created };
        claim(&draft.bytes, policy).inspect_err(|e| {
            // Whoever locked a file that was made just now has taken it over: it is theirs, and stays.
            draft.doomed &= !matches!(e, TargetError::Locked(e) if e.is_conflict());
        })?;
        if !created && draft.bytes.kind() == Kind::Regular {
            draft.bytes.file().set_len(0).map_err(failed)?;
        }
        Ok(draft)
    }

    /// Opens and locks what exists; it is not a draft but shares its further life.
    pub fn existing(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open { path: path.to_owned(), source };
        let place = Place::find(path, policy).map_err(failed)?;
        let file = place.open().map_err(failed)?;
        let bytes = Arc::new(Bytes::new(file).map_err(failed)?);
        claim(&bytes, policy)?;
        Ok(Self { bytes, place, created: false, doomed: false })
    }

    /// It became an image: it stays.
    pub fn keep(&mut self) {
        self.doomed = false;
    }

    /// Makes the name of a file that was made here durable.
    pub fn sync_name(&self) -> io::Result<()> {
        if self.created { self.place.sync_dir() } else { Ok(()) }
    }

    /// Removes the file if it was made here and still bears its name.
    pub fn remove(&self) -> io::Result<()> {
        if self.created { self.place.remove(self.bytes.file()) } else { Ok(()) }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.doomed
            && let Err(e) = self.remove()
        {
            tracing::warn!("could not remove an unfinished image: {e}");
        }
    }
}

/// Makes sure that nobody else uses what is about to be written, and that it is no disk of ours.
fn claim(bytes: &Bytes, policy: &Policy) -> Result<(), TargetError> {
    if policy.forbidden.contains(&bytes.id()) {
        return Err(TargetError::Forbidden);
    }
    Ok(file_lock::lock(bytes.file(), LockMode::Writer)?)
}

fn open_or_create(place: &Place, overwrite: bool) -> io::Result<(File, bool)> {
    for _ in 0..RACES {
        match place.create() {
            Ok(file) => return Ok((file, true)),
            Err(e) if overwrite && e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        match place.open() {
            Ok(file) => return Ok((file, false)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Err(Errno::BUSY.into())
}
