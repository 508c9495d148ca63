//! The real medium: a directory beside the disk, of mode 0700, with a lock.

use super::medium::Medium;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The file that is locked; nothing is in it.
pub const LOCK: &str = "lock";

/// How long the lock of a process that is ending is waited for.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Default)]
struct Open {
    directory: Option<Arc<File>>,
    /// Held for its lock.
    lock: Option<File>,
    /// Files that are written to, so that an error of writing them back is reported to who wrote.
    files: HashMap<String, Arc<File>>,
}

/// A directory, there or not.
pub struct Directory {
    path: PathBuf,
    /// Why it can neither be looked into nor made.
    refused: Option<String>,
    open: Mutex<Open>,
}

impl Directory {
    /// At `path`; locked if it is there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let this = Self { path: path.to_owned(), refused: None, open: Mutex::default() };
        match std::fs::symlink_metadata(path) {
            Ok(_) => this.take()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(this)
    }

    /// One that cannot be had, for `reason`: whoever wants something stored is told so.
    pub fn refused(path: &Path, reason: String) -> Self {
        Self { path: path.to_owned(), refused: Some(reason), open: Mutex::default() }
    }

    /// The one at `path`, which is there, to look at: it is not locked, and nothing in it is changed.
    pub fn inspect(path: &Path) -> io::Result<Self> {
        let this = Self { path: path.to_owned(), refused: None, open: Mutex::default() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        this.state().directory = Some(Arc::new(directory));
        Ok(this)
    }

    fn state(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = File::from(rustix::fs::open(&self.path, flags, Mode::empty())?);
        let owner = directory.metadata()?.uid();
        let me = rustix::process::geteuid().as_raw();
        if owner != me && me != 0 {
            let text = format!("'{}' belongs to another user", self.path.display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = match rustix::fs::openat(&directory, LOCK, flags, Mode::RUSR | Mode::WUSR) {
            // What cannot be written to can be locked all the same, if the file is there.
            Err(rustix::io::Errno::ROFS | rustix::io::Errno::NOSPC) => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::openat(&directory, LOCK, flags, Mode::empty()) {
                    Err(rustix::io::Errno::NOENT) => None,
                    opened => Some(opened?),
                }
            }
            opened => Some(opened?),
        };
        let end = Instant::now() + PATIENCE;
        while let Some(lock) = &lock
            && let Err(error) = rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive)
        {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(error.into());
            }
            if Instant::now() > end {
                let text = format!("'{}' is in use by another process or disk", self.path.display());
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut state = self.state();
        state.directory = Some(Arc::new(directory));
        state.lock = lock.map(File::from);
        Ok(())
    }

    fn directory(&self) -> io::Result<Arc<File>> {
        self.state().directory.clone().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn file(&self, name: &str, create: bool) -> io::Result<Arc<File>> {
        if let Some(file) = self.state().files.get(name) {
            return Ok(Arc::clone(file));
        }
        let directory = self.directory()?;
        let mut flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if create {
            flags |= OFlags::CREATE;
        }
        let file = Arc::new(File::from(rustix::fs::openat(&directory, name, flags, Mode::RUSR | Mode::WUSR)?));
        self.state().files.insert(name.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    fn sync_parent(&self) -> io::Result<()> {
        let parent = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        File::open(parent)?.sync_all()
    }
}

/// Reads a regular file, and no more of it than `limit`.
fn read(file: File, limit: u64) -> io::Result<Vec<u8>> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

const READ: OFlags = OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

impl Medium for Directory {
    fn name(&self) -> String {
        // As another store's record names it, whatever the working directory is by then.
        let path = std::path::absolute(&self.path);
        path.as_deref().unwrap_or(&self.path).display().to_string()
    }

    fn is_there(&self) -> bool {
        self.state().directory.is_some()
    }

    fn make(&self) -> io::Result<()> {
        if let Some(reason) = &self.refused {
            return Err(io::Error::other(reason.clone()));
        }
        if self.is_there() {
            return Ok(());
        }
        match std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        self.sync_parent()?;
        self.take()
    }

    fn list(&self) -> io::Result<Vec<String>> {
        self.directory()?;
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn read(&self, file: &str, limit: u64) -> io::Result<Vec<u8>> {
        let fd = rustix::fs::openat(self.directory()?, file, READ, Mode::empty())?;
        read(File::from(fd), limit)
    }

    fn allocate(&self, file: &str, len: u64) -> io::Result<()> {
        let file = self.file(file, true)?;
        let there = file.metadata()?.len();
        if there >= len {
            return Ok(());
        }
        match rustix::fs::fallocate(&*file, FallocateFlags::empty(), 0, len) {
            Err(rustix::io::Errno::OPNOTSUPP) => {
                let zeroes = vec![0; 64 << 10];
                let mut at = there;
                while at < len {
                    let count = (len - at).min(zeroes.len() as u64);
                    file.write_all_at(&zeroes[..count as usize], at)?;
                    at += count;
                }
                Ok(())
            }
            done => Ok(done?),
        }
    }

    fn write(&self, file: &str, at: u64, data: &[u8]) -> io::Result<()> {
        self.file(file, false)?.write_all_at(data, at)
    }

    fn sync(&self, file: &str) -> io::Result<()> {
        let synced = self.file(file, false)?.sync_data();
        // Written once, so nothing more will be reported of it.
        if super::object::parse_file(file).is_some() {
            self.state().files.remove(file);
        }
        synced
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.directory()?.sync_all()
    }

    fn remove(&self, file: &str) -> io::Result<()> {
        self.state().files.remove(file);
        Ok(rustix::fs::unlinkat(self.directory()?, file, rustix::fs::AtFlags::empty())?)
    }

    fn put_aside(&self) -> io::Result<String> {
        for number in 1..1000 {
            let mut name = self.path.clone().into_os_string();
            name.push(format!(".damaged-{number}"));
            let (from, to) = (&self.path, PathBuf::from(name));
            match rustix::fs::renameat_with(
                rustix::fs::CWD,
                from,
                rustix::fs::CWD,
                &to,
                rustix::fs::RenameFlags::NOREPLACE,
            ) {
                Err(rustix::io::Errno::EXIST) => {}
                renamed => {
                    renamed?;
                    *self.state() = Open::default();
                    self.sync_parent()?;
                    return Ok(to.display().to_string());
                }
            }
        }
        Err(io::Error::other("there are a thousand damaged ones already"))
    }

    fn read_elsewhere(&self, directory: &str, file: &str, limit: u64) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(directory, flags, Mode::empty())?;
        let fd = rustix::fs::openat(&directory, file, READ, Mode::empty())?;
        read(File::from(fd), limit)
    }
}
