//! A file on its way to becoming a new image, which disappears again unless it is kept.
//!
//! Both formats create through it. An existing file that is to be replaced is locked and left alone: the new one grows beside it under
//! a name of its own, and takes over the name in [`Draft::accept`]. The invariant: until then nothing that existed is changed,
//! and dropping a draft removes what it made.

use super::bytes::{Bytes, Kind};
use super::place::Place;
use super::{Policy, TargetError};
use crate::file_lock::{self, LockMode};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A file may vanish or appear between the two looks at it; that often in a row it is no accident.
const RACES: u32 = 16;

/// A file that was there before, locked, and where the new one stands until it takes its place.
struct Replaced {
    old: Arc<Bytes>,
    beside: Place,
}

/// An empty file (or a block device), locked, not yet an image.
pub(super) struct Draft {
    pub bytes: Arc<Bytes>,
    place: Place,
    /// The file was not there before.
    created: bool,
    /// Remove it on drop.
    doomed: bool,
    /// There until `accept`.
    replaces: Mutex<Option<Replaced>>,
    /// It has taken the place of another file.
    replaced: AtomicBool,
}

impl Draft {
    /// Creates the file; or, if `overwrite` and it exists, one beside it that will replace it, if it is a regular one that nobody
    /// else uses. In a directory that cannot be written it is emptied instead.
    pub fn make(path: &Path, overwrite: bool, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Create { path: path.to_owned(), source };
        let place = Place::find(path, policy).map_err(failed)?;
        let (file, created) = open_or_create(&place, overwrite).map_err(failed)?;
        let bytes = Arc::new(Bytes::new(file).map_err(failed)?);
        let mut draft = Self::of(bytes, place, created);
        claim(&draft.bytes, policy).inspect_err(|e| {
            // Whoever locked a file that was made just now has taken it over: it is theirs, and stays.
            draft.doomed &= !matches!(e, TargetError::Locked(e) if e.is_conflict());
        })?;
        if created || draft.bytes.kind() != Kind::Regular {
            return Ok(draft);
        }
        if !draft.place.leads_to(draft.bytes.file()).map_err(failed)? {
            // Replaced by somebody else between opening and locking it.
            return Err(failed(Errno::BUSY.into()));
        }
        match draft.place.create_beside(draft.bytes.file()) {
            Ok((beside, file)) => {
                let new = Bytes::new(file).map_err(failed)?;
                let old = std::mem::replace(&mut draft.bytes, Arc::new(new));
                *draft.replaces() = Some(Replaced { old, beside });
                claim(&draft.bytes, policy)?;
                Ok(draft)
            }
            Err(e) if matches!(e.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
                draft.bytes.file().set_len(0).map_err(failed)?;
                Ok(draft)
            }
            Err(e) => Err(failed(e)),
        }
    }

    /// Opens and locks what exists; it is not a draft but shares its further life.
    pub fn existing(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open { path: path.to_owned(), source };
        let place = Place::find(path, policy).map_err(failed)?;
        let file = place.open().map_err(failed)?;
        let bytes = Arc::new(Bytes::new(file).map_err(failed)?);
        claim(&bytes, policy)?;
        Ok(Self::of(bytes, place, false))
    }

    fn of(bytes: Arc<Bytes>, place: Place, created: bool) -> Self {
        Self { bytes, place, created, doomed: created, replaces: Mutex::default(), replaced: AtomicBool::new(false) }
    }

    fn replaces(&self) -> MutexGuard<'_, Option<Replaced>> {
        self.replaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is wanted: takes the place of the file that it replaces, if there is one that still bears its name.
    pub fn accept(&self) -> io::Result<()> {
        let mut replaces = self.replaces();
        let Some(Replaced { old, beside }) = &*replaces else { return Ok(()) };
        if !self.place.leads_to(old.file())? {
            return Err(Errno::BUSY.into());
        }
        self.place.take_over(beside)?;
        self.replaced.store(true, Ordering::Release);
        *replaces = None;
        Ok(())
    }

    /// Its name may not be durable yet: it was made by a process that was killed.
    pub fn renew_name(&mut self) {
        *self.replaced.get_mut() = true;
    }

    /// It became an image: it stays.
    pub fn keep(&mut self) {
        self.doomed = false;
    }

    /// Makes the name of a file that was made here durable.
    pub fn sync_name(&self) -> io::Result<()> {
        if self.created || self.replaced.load(Ordering::Acquire) { self.place.sync_dir() } else { Ok(()) }
    }

    /// Removes the file if it was made here and still bears its name.
    pub fn remove(&self) -> io::Result<()> {
        if let Some(Replaced { beside, .. }) = self.replaces().take() {
            return beside.remove(self.bytes.file());
        }
        if self.created { self.place.remove(self.bytes.file()) } else { Ok(()) }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        let waits = self.replaces().is_some();
        if (self.doomed || waits)
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
