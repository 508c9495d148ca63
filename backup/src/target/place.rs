//! From a path that a client named to an open descriptor, without being led astray.
//!
//! Used by every target and by the reader of chains. The directory is opened once and everything else happens relative
//! to it, so that what was checked is what is used: no link is followed in the last component, nothing outside the
//! allowed roots is reached, and removing or syncing a name concerns the directory that it was made in.

use super::Policy;
use super::bytes::{file_id, kind_of};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Backups hold what the disk holds: for their owner alone.
const NEW_FILE_MODE: Mode = Mode::from_raw_mode(0o600);

/// openat2 may ask to try again while other names beneath the root are being renamed.
const OPENAT2_TRIES: u32 = 100;

/// How often a name is looked for that nobody has.
const BESIDE_TRIES: u32 = 16;

/// Tells the files apart that this process makes beside others.
static BESIDE: AtomicU64 = AtomicU64::new(0);

/// A name in an opened directory.
#[derive(Debug)]
pub(super) struct Place {
    dir: OwnedFd,
    name: OsString,
}

impl Place {
    /// Finds the directory of `path`, beneath the policy's roots where there are any. The last component is not
    /// followed, except for a link to a block device in a directory that only root can write (`/dev/vg/volume`).
    pub fn find(path: &Path, policy: &Policy) -> io::Result<Self> {
        let place = Self::find_exactly(path, policy)?;
        match place.trusted_device_link() {
            Some(device) => Self::find_exactly(&device, policy),
            None => Ok(place),
        }
    }

    fn find_exactly(path: &Path, policy: &Policy) -> io::Result<Self> {
        let name = path.file_name().ok_or(Errno::ISDIR)?.to_owned();
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let dir = open_beneath(parent, OFlags::PATH | OFlags::DIRECTORY, policy)?;
        Ok(Self { dir, name })
    }

    /// Where the name leads, if it is a link to a block device that nobody but root can have planted.
    fn trusted_device_link(&self) -> Option<PathBuf> {
        let dir = rustix::fs::fstat(&self.dir).ok()?;
        let entry = rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let is_link = FileType::from_raw_mode(entry.st_mode) == FileType::Symlink;
        if !is_link || dir.st_uid != 0 || dir.st_mode & 0o022 != 0 {
            return None;
        }
        let end = rustix::fs::statat(&self.dir, &self.name, AtFlags::empty()).ok()?;
        if FileType::from_raw_mode(end.st_mode) != FileType::BlockDevice {
            return None;
        }
        let link = PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd()));
        std::fs::canonicalize(link.join(&self.name)).ok()
    }

    /// Opens what is there for reading and writing. Only regular files and block devices are images.
    pub fn open(&self) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.dir, &self.name, flags, Mode::empty())?);
        kind_of(&file)?;
        Ok(file)
    }

    /// Makes a new, empty file; whatever bears the name already, a dangling link included, is an error.
    pub fn create(&self) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.dir, &self.name, flags, NEW_FILE_MODE)?))
    }

    /// Makes a new, empty file beside this one, of the same owner and mode as `like` as far as that can be, under a name that
    /// nobody has.
    pub fn create_beside(&self, like: &File) -> io::Result<(Self, File)> {
        let stat = rustix::fs::fstat(like)?;
        for _ in 0..BESIDE_TRIES {
            let number = BESIDE.fetch_add(1, Ordering::Relaxed);
            let name = format!(".blkmark-{}-{number}.new", std::process::id());
            let beside = Self { dir: self.dir.try_clone()?, name: name.into() };
            let file = match beside.create() {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                made => made?,
            };
            let owner = (rustix::fs::Uid::from_raw(stat.st_uid), rustix::fs::Gid::from_raw(stat.st_gid));
            // Whoever may not give files away keeps it.
            let _ = rustix::fs::fchown(&file, Some(owner.0), Some(owner.1));
            let _ = rustix::fs::fchmod(&file, Mode::from_raw_mode(stat.st_mode & 0o7777));
            return Ok((beside, file));
        }
        Err(Errno::EXIST.into())
    }

    /// Whether the name still leads to `file`.
    pub fn leads_to(&self, file: &File) -> io::Result<bool> {
        let here = match rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let id = file_id(file)?;
        Ok((here.st_dev, here.st_ino) == (id.device, id.inode))
    }

    /// What `beside` names has this name from now on, in one step.
    pub fn take_over(&self, beside: &Self) -> io::Result<()> {
        Ok(rustix::fs::renameat(&beside.dir, &beside.name, &self.dir, &self.name)?)
    }

    /// Removes the name, if it still leads to `file`.
    pub fn remove(&self, file: &File) -> io::Result<()> {
        if !self.leads_to(file)? {
            return Ok(());
        }
        Ok(rustix::fs::unlinkat(&self.dir, &self.name, AtFlags::empty())?)
    }

    /// Makes the name durable.
    pub fn sync_dir(&self) -> io::Result<()> {
        // The descriptor at hand is a mere reference (O_PATH), which cannot be synced.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(&self.dir, OsStr::new("."), flags, Mode::empty())?;
        Ok(rustix::fs::fsync(&dir)?)
    }
}

/// Opens an image for reading. Links are followed, but not out of the policy's roots.
pub(super) fn open_for_reading(path: &Path, policy: &Policy) -> io::Result<File> {
    let file = File::from(open_beneath(path, OFlags::RDONLY | OFlags::NONBLOCK, policy)?);
    kind_of(&file)?;
    Ok(file)
}

pub(super) fn open_beneath(path: &Path, flags: OFlags, policy: &Policy) -> io::Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC;
    if policy.roots.is_empty() {
        return Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
    }
    for root in &policy.roots {
        let Ok(below) = path.strip_prefix(root) else {
            continue;
        };
        let below = if below == Path::new("") { Path::new(".") } else { below };
        let root_flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, root, root_flags, Mode::empty())?;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..OPENAT2_TRIES {
            match rustix::fs::openat2(&root, below, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                Err(Errno::XDEV) => return Err(not_allowed()),
                outcome => return Ok(outcome?),
            }
        }
        return Err(Errno::AGAIN.into());
    }
    Err(not_allowed())
}

fn not_allowed() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "not below an allowed directory")
}
