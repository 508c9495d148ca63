//! A node: one served disk as everything that runs over it sees it.

use crate::cbw::{CopyBeforeWrite, Load};
use crate::resume::{Found, Haven, Place};
use crate::scratch::{Blocks, Scratch, ScratchFiles, ScratchSettings};
use crate::source::Source;
use blkmark_bitmap::{Granularity, Tracker};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use uuid::Uuid;

/// What shows a disk to its guest.
pub trait Front: Send + Sync {
    /// Requests that come from now on are judged by this size; the guest is told of it where the front end allows.
    fn set_capacity(&self, bytes: u64);
}

/// One served disk. Its id is its node name and its device name.
pub struct Node {
    /// What clients call it.
    pub id: String,
    /// The file or device, as the operator named it.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// Where its dirty blocks are marked.
    pub tracker: Arc<Tracker>,
    /// Where its bytes are read from.
    pub source: Arc<dyn Source>,
    /// Who shows it to a guest, if anybody does.
    pub(crate) front: Option<Arc<dyn Front>>,
    /// One resize at a time.
    pub(crate) resizing: Mutex<()>,
    scratch: ScratchSettings,
    /// Where its points in time outlive the process, and what others left there.
    haven: Option<Haven>,
    left: Mutex<Vec<Found>>,
    /// There while a point in time is.
    cbw: Mutex<Weak<CopyBeforeWrite>>,
}

impl Node {
    /// A disk called `id` that stands at `path`; `scratch` is where points in time keep what the guest overwrites.
    pub fn new(
        id: impl Into<String>,
        path: impl Into<PathBuf>,
        read_only: bool,
        tracker: Arc<Tracker>,
        source: Arc<dyn Source>,
        scratch: ScratchSettings,
    ) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            read_only,
            tracker,
            source,
            scratch,
            haven: None,
            left: Mutex::default(),
            front: None,
            resizing: Mutex::new(()),
            cbw: Mutex::new(Weak::new()),
        }
    }

    /// The same disk, shown to a guest by `front`.
    pub fn shown_by(self, front: Arc<dyn Front>) -> Self {
        Self { front: Some(front), ..self }
    }

    /// The same disk, whose points in time outlive the process in `haven`, where processes before this one left those in `left`.
    pub fn with_haven(self, haven: Haven, left: Vec<Found>) -> Self {
        Self { haven: Some(haven), left: Mutex::new(left), ..self }
    }

    /// Where its points in time outlive the process.
    pub(crate) fn haven(&self) -> Option<&Haven> {
        self.haven.as_ref()
    }

    /// What processes before this one left; once.
    pub(crate) fn take_left(&self) -> Vec<Found> {
        std::mem::take(&mut self.left.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// The copy-before-write over the scratch `id` that a killed process left, for one point to begin with, and the blocks of it
    /// that are named in `places`, each with its length.
    pub(crate) fn restore_copy_before_write(
        &self,
        id: Uuid,
        unit: Granularity,
        places: &[(Place, u64)],
    ) -> io::Result<(Arc<CopyBeforeWrite>, Blocks)> {
        let haven = self.haven.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let scratch = Scratch::new(ScratchFiles::reopen(haven, id)?, &self.scratch, unit.bytes());
        let blocks = scratch.adopt(places)?;
        let (source, size) = (Arc::clone(&self.source), self.tracker.size());
        let cbw = CopyBeforeWrite::with(&self.id, source, size, scratch, unit)?;
        *self.cbw() = Arc::downgrade(&cbw);
        Ok((cbw, blocks))
    }

    fn cbw(&self) -> MutexGuard<'_, Weak<CopyBeforeWrite>> {
        self.cbw.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes the files that points in time of this disk keep old data in. May take as long as the file system likes.
    pub fn open_scratch(&self) -> io::Result<ScratchFiles> {
        ScratchFiles::open(&self.scratch, self.haven.as_ref())
    }

    /// The copy-before-write that all points of this disk share, for one more point. `cluster` is what that point's
    /// readers take; `scratch` is taken if there is none yet, which touches no file system.
    pub(crate) fn copy_before_write(
        &self,
        scratch: &mut Option<ScratchFiles>,
        cluster: Granularity,
    ) -> io::Result<Arc<CopyBeforeWrite>> {
        let mut shared = self.cbw();
        if let Some(cbw) = shared.upgrade()
            && cbw.unit() <= cluster
            && cbw.size() == self.tracker.size()
            && cbw.join()
        {
            return Ok(cbw);
        }
        let Some(files) = scratch.take() else {
            return Err(io::Error::other("no scratch was made for it"));
        };
        let (source, size) = (Arc::clone(&self.source), self.tracker.size());
        let cbw =
            CopyBeforeWrite::create(&self.id, source, size, |unit| Scratch::new(files, &self.scratch, unit), cluster)?;
        *shared = Arc::downgrade(&cbw);
        Ok(cbw)
    }

    /// What its points in time take, and what waits for them.
    pub fn load(&self) -> Load {
        self.cbw().upgrade().map_or_else(Load::default, |cbw| cbw.load())
    }
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.id).field("path", &self.path).finish_non_exhaustive()
    }
}
