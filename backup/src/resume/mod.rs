//! What outlives a process that is killed, so that the next one goes on with its points in time and their jobs.
//!
//! A point in time of a served disk has three files beside its scratch, all of which a killed process leaves as they were, since
//! the kernel keeps what was written: a *ledger* (`ledger`: where each saved unit is, which units the target holds) and a *note*
//! (`note`: what the point is for) on tmpfs, and a *notice* where scratch is, durable, which says no more than that there was one,
//! for the case that the machine goes (`announce`). A copy of a point with a name has a ledger, a note and a notice of its own, beside
//! the same scratch. A job without a point leaves a *slip* (`slip`) and a notice: a populate notes what to search anew (`search`).
//! Nothing of it is synced while a guest waits.
//!
//! Called by `point` and `cbw`, which keep the ledger; by `job`, which keeps the note; by the daemon at a start ([`Haven::find`]),
//! before the store is opened, and by `control::resume`, which makes jobs of what was found.
//!
//! **Invariant.** A unit of a point that its ledger does not name as saved or copied is on the disk as it was at the instant: the
//! order is data, ledger, guest's write; and target, ledger, guest's write. What cannot be read whole is not gone on with.

mod announce;
mod ledger;
mod note;
mod search;
mod slip;

pub(crate) use ledger::{Ledger, Loaded, Phase, Place, Plan};
pub use note::Notice;
pub(crate) use note::{Member, Note, Role};
pub(crate) use search::{Search, Sought};
pub(crate) use slip::{Slip, Written};

use crate::source::FileId;
use blkmark_bitmap::store::is_memory;
use rustix::fs::{Mode, OFlags};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use uuid::Uuid;

/// Why nobody can tell what became of a job.
pub(crate) const UNKNOWN_END: &str = "its end was being stored, so look whether it succeeded";

/// No note is longer.
const MOST: u64 = 1 << 20;

/// Where the points of one disk leave what outlives the process.
#[derive(Clone, Debug)]
pub struct Haven {
    /// On tmpfs.
    memory: PathBuf,
    /// Where scratch is.
    directory: PathBuf,
    /// Tells the disks apart that share these directories.
    key: String,
    /// The disk.
    disk: FileId,
    boot: Uuid,
    /// The scratches of this process whose files have names.
    scratches: Arc<Mutex<BTreeSet<Uuid>>>,
}

/// One of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Ledger,
    Note,
    /// The part of scratch that is memory.
    Memory,
    /// The part of scratch that is a file.
    File,
    Notice,
    /// Of a job without a ledger.
    Slip,
}

impl Kind {
    const ALL: [Kind; 6] = [Kind::Ledger, Kind::Note, Kind::Memory, Kind::File, Kind::Notice, Kind::Slip];

    const fn name(self) -> &'static str {
        match self {
            Kind::Ledger => "ledger",
            Kind::Note => "note",
            Kind::Memory => "memory",
            Kind::File => "scratch",
            Kind::Notice => "notice",
            Kind::Slip => "slip",
        }
    }
}

/// What somebody may go on with.
#[derive(Debug)]
pub(crate) enum Left {
    /// A point in time, and where it stood.
    Point(Box<(Note, Loaded)>),
    /// A populate.
    Search(Box<(Notice, Search)>),
}

/// What a point in time, or a job, that was left looks like.
#[derive(Debug)]
pub struct Found {
    pub(crate) id: Uuid,
    /// What is left; or why nobody can go on with it.
    pub(crate) state: Result<Left, String>,
    /// The durable word that there was one.
    pub(crate) notice: Option<Notice>,
}

impl Found {
    /// The freeze that it needs.
    pub fn freeze(&self) -> Option<Uuid> {
        match self.state.as_ref().ok()? {
            Left::Point(point) => point.0.freeze(),
            Left::Search(search) => Some(search.1.freeze),
        }
    }
}

impl Haven {
    /// For the disk at `path`, which is `disk`. `memory`: where to look for tmpfs, in this order; `None` if there is none: then
    /// points in time end with the process. `directory` is where scratch is.
    pub fn new(memory: &[&Path], directory: &Path, path: &Path, disk: FileId, boot: Uuid) -> Option<Self> {
        let in_memory = |path: &Path| rustix::fs::statfs(path).is_ok_and(|stat| is_memory(&stat));
        let memory = memory.iter().find(|path| in_memory(path))?.to_path_buf();
        let path = std::fs::canonicalize(path).ok()?;
        let bytes = path.as_os_str().as_bytes();
        let mut reversed = bytes.to_vec();
        reversed.reverse();
        let key = format!("{:08x}{:08x}", crc32fast::hash(bytes), crc32fast::hash(&reversed));
        Some(Self { memory, directory: directory.to_owned(), key, disk, boot, scratches: Arc::default() })
    }

    /// The disk.
    pub(crate) fn disk(&self) -> FileId {
        self.disk
    }

    /// The boot of the machine.
    pub(crate) fn boot(&self) -> Uuid {
        self.boot
    }

    fn prefix(&self) -> String {
        format!(".blkmark-point-{}.", self.key)
    }

    fn directory_of(&self, kind: Kind) -> &Path {
        match kind {
            Kind::Ledger | Kind::Note | Kind::Memory | Kind::Slip => &self.memory,
            Kind::File | Kind::Notice => &self.directory,
        }
    }

    fn path(&self, id: Uuid, kind: Kind) -> PathBuf {
        self.directory_of(kind).join(format!("{}{}.{}", self.prefix(), id.simple(), kind.name()))
    }

    /// A new file of this user alone.
    pub(crate) fn create(&self, id: Uuid, kind: Kind) -> io::Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::open(self.path(id, kind), flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// What is there, if it is this user's: anybody may put files into `/dev/shm`.
    pub(crate) fn open(&self, id: Uuid, kind: Kind) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(self.path(id, kind), flags, Mode::empty())?);
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(file)
    }

    fn read(&self, id: Uuid, kind: Kind) -> io::Result<Vec<u8>> {
        let file = self.open(id, kind)?;
        let mut bytes = Vec::new();
        file.take(MOST).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Replaces a file in one step, so that a killed process leaves the old one or the new one.
    pub(crate) fn replace(&self, id: Uuid, kind: Kind, bytes: &[u8], durable: bool) -> io::Result<()> {
        let path = self.path(id, kind);
        let mut new = path.clone().into_os_string();
        new.push(".new");
        let new = PathBuf::from(new);
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(&new, flags, Mode::RUSR | Mode::WUSR)?);
        let written = file.write_all(bytes).and_then(|()| if durable { file.sync_all() } else { Ok(()) });
        let replaced = written.and_then(|()| std::fs::rename(&new, &path));
        if replaced.is_err() {
            // Nobody reads it under that name; the next start takes it away.
            let _ = std::fs::remove_file(&new);
        }
        replaced?;
        if durable { File::open(self.directory_of(kind))?.sync_all() } else { Ok(()) }
    }

    /// Takes a file away; one that is not there is no error.
    pub(crate) fn remove(&self, id: Uuid, kind: Kind) -> io::Result<()> {
        match std::fs::remove_file(self.path(id, kind)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The same where nothing can be done about a failure.
    fn take_away(&self, id: Uuid, kind: Kind) {
        if let Err(error) = self.remove(id, kind) {
            tracing::warn!(point = %id, %error, "could not take away what a point in time had noted");
        }
    }

    /// The names of what is there in both directories, with the point that each belongs to.
    fn names(&self) -> Vec<(PathBuf, Uuid, Option<Kind>)> {
        let prefix = self.prefix();
        let mut names = Vec::new();
        let directories =
            if self.memory == self.directory { vec![&self.memory] } else { vec![&self.memory, &self.directory] };
        for directory in directories {
            let entries = match std::fs::read_dir(directory) {
                Ok(entries) => entries,
                Err(error) => {
                    tracing::warn!(directory = %directory.display(), %error, "could not look for points in time");
                    continue;
                }
            };
            for entry in entries.flatten() {
                let name = entry.file_name();
                let Some((id, kind)) = name.to_str().and_then(|name| name.strip_prefix(&prefix)?.split_once('.'))
                else {
                    continue;
                };
                if let Ok(id) = Uuid::try_parse(id) {
                    let kind = Kind::ALL.into_iter().find(|known| known.name() == kind);
                    names.push((entry.path(), id, kind));
                }
            }
        }
        names
    }

    /// All points in time that processes before this one left of the disk. Changes nothing.
    pub fn find(&self) -> Vec<Found> {
        let mut ids: BTreeMap<Uuid, ()> = BTreeMap::new();
        for (_, id, kind) in self.names() {
            // Scratch alone says nothing.
            if matches!(kind, Some(Kind::Ledger | Kind::Note | Kind::Notice | Kind::Slip)) {
                ids.insert(id, ());
            }
        }
        ids.into_keys().map(|id| self.find_one(id)).collect()
    }

    fn find_one(&self, id: Uuid) -> Found {
        let notice = self.read(id, Kind::Notice).ok().and_then(|bytes| Notice::decode(&bytes));
        if let Ok(bytes) = self.read(id, Kind::Slip) {
            let Some(Written { notice: slip, search }) = Written::decode(&bytes) else {
                return Found { id, state: Err("its note is damaged".to_owned()), notice };
            };
            let state = match search {
                _ if slip.boot() != self.boot => Err("the machine was started anew"),
                Some(search) if search.disk != self.disk => Err("the disk is another one"),
                Some(search) => Ok(Left::Search(Box::new((slip.clone(), search)))),
                None if slip.commits => Err(UNKNOWN_END),
                None => Err("nothing could be noted that it would go on with"),
            };
            return Found { id, state: state.map_err(str::to_owned), notice: Some(slip) };
        }
        let load = || {
            let note = match self.read(id, Kind::Note) {
                Ok(bytes) => Note::decode(&bytes).ok_or("its note is damaged")?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(match &notice {
                        Some(notice) if notice.boot() != self.boot => "the machine was started anew".to_owned(),
                        _ => "what it had noted is gone".to_owned(),
                    });
                }
                Err(error) => return Err(format!("its note cannot be read: {error}")),
            };
            if note.boot() != self.boot {
                return Err("the machine was started anew".to_owned());
            }
            if note.disk() != self.disk {
                return Err("the disk is another one".to_owned());
            }
            let loaded = self
                .open(id, Kind::Ledger)
                .and_then(|file| Loaded::read(file, id, self.disk))
                .map_err(|error| format!("its ledger cannot be read: {error}"))?;
            Ok(Left::Point(Box::new((note, loaded))))
        };
        Found { id, state: load(), notice }
    }

    fn scratches(&self) -> MutexGuard<'_, BTreeSet<Uuid>> {
        self.scratches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A scratch has files here from now on.
    pub(crate) fn take_in(&self, scratch: Uuid) {
        self.scratches().insert(scratch);
    }

    /// Takes the files of a scratch away. Whoever uses it goes on with what is open.
    pub(crate) fn let_go(&self, scratch: Uuid) {
        for kind in [Kind::Memory, Kind::File] {
            if let Err(error) = self.remove(scratch, kind) {
                tracing::warn!(%scratch, %error, "could not take scratch away; the next start does it");
            }
        }
        self.scratches().remove(&scratch);
    }

    /// The same for all scratches of this process. Others may serve the same disk, if it is read-only.
    pub(crate) fn let_all_go(&self) {
        let all = self.scratches().clone();
        all.into_iter().for_each(|scratch| self.let_go(scratch));
    }

    /// Takes away what belongs to none of `kept`: points, and scratches.
    pub(crate) fn clean_up(&self, kept: &[Uuid]) {
        for (path, id, _) in self.names() {
            if !kept.contains(&id)
                && let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), %error, "could not take away what a point in time left");
            }
        }
    }
}
