//! Locks on image files that QEMU's tools understand: who writes, and who forbids it to others.
//!
//! Called for every disk that is served and every target that is written (`LockMode::Writer`), and for images that are
//! only read (`LockMode::Reader`). The invariant: while a lock is held, no other process that keeps the same protocol
//! (QEMU 2.10 and later, blkmark) uses the file in a way that the holder forbids.
//!
//! The protocol, as QEMU documents and uses it: open file description (OFD) locks on single bytes far from anything
//! that matters. Byte `100 + p` is read-locked by each process that *uses* permission `p`, byte `200 + p` by each that
//! *forbids* `p` to others. Read locks never exclude each other; after taking its own, a process tests with
//! `F_OFD_GETLK` whether anybody else uses what it forbids, or forbids what it uses, and gives up if so. Taking before
//! testing makes a race safe: of two that start at once both may fail, never both succeed.
//!
//! Seen with QEMU 10: a plain `qemu-img convert` of a locked disk fails and `-U` helps, for every format; `compare` and
//! `info` of a locked *raw* file succeed even without `-U`, since QEMU lets readers of raw files share it with writers.
//!
//! OFD locks belong to the open file description: they stay until the last descriptor made from it is closed, so lock
//! the descriptor that does the I/O. io_uring requests of a killed process keep their file, and with it the lock, until
//! they are done; [`lock_within`] waits for that.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

const USES_BASE: i64 = 100;
const FORBIDS_BASE: i64 = 200;

/// How often [`lock_within`] looks again. Nothing announces the end of another process's lock of this kind.
const RETRY: Duration = Duration::from_millis(10);

/// What can be done to an image; the number is the byte's distance from the base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    Resize = 3,
}

impl Permission {
    const fn name(self) -> &'static str {
        match self {
            Permission::ConsistentRead => "consistent read",
            Permission::Write => "write",
            Permission::Resize => "resize",
        }
    }
}

/// What the holder does, and with it what it forbids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Reads and writes; nobody else may write or resize.
    Writer,
    /// Reads; nobody may write or resize meanwhile. Readers do not disturb each other.
    Reader,
}

impl LockMode {
    const fn uses(self) -> &'static [Permission] {
        match self {
            LockMode::Writer => &[Permission::ConsistentRead, Permission::Write, Permission::Resize],
            LockMode::Reader => &[Permission::ConsistentRead],
        }
    }

    const fn forbids(self) -> &'static [Permission] {
        &[Permission::Write, Permission::Resize]
    }
}

/// Why a lock was not taken. Nothing is held then.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody forbids what we want to do (QEMU's text).
    #[error("Failed to get \"{0}\" lock")]
    Forbidden(&'static str),
    /// Somebody does what we want to forbid (QEMU's text).
    #[error("Failed to get shared \"{0}\" lock")]
    InUse(&'static str),
    /// The file system has no such locks, or the kernel failed.
    #[error("Failed to lock the image: {0}")]
    Unavailable(#[source] io::Error),
}

impl LockError {
    /// Whether another holder is the reason, so that waiting may help.
    pub fn is_conflict(&self) -> bool {
        !matches!(self, LockError::Unavailable(_))
    }
}

/// Locks the open file description behind `file`, until its last descriptor is closed or [`unlock`] is called.
/// The descriptor must be readable and hold no such lock yet.
pub fn lock(file: impl AsFd, mode: LockMode) -> Result<(), LockError> {
    let file = file.as_fd();
    let mut bytes = mode
        .uses()
        .iter()
        .map(|p| USES_BASE + *p as i64)
        .chain(mode.forbids().iter().map(|p| FORBIDS_BASE + *p as i64));
    let outcome = bytes
        .try_for_each(|byte| set(file, byte, libc::F_RDLCK as i16))
        .map_err(LockError::Unavailable)
        .and_then(|()| test_others(file, mode));
    if outcome.is_err() {
        // Closing the file frees them anyway; a failure to free them early is no second error.
        let _ = unlock(file);
    }
    outcome
}

/// [`lock`], but waits up to `patience` for another holder to go, as after a kill -9 with requests still in the kernel.
pub fn lock_within(file: impl AsFd, mode: LockMode, patience: Duration) -> Result<(), LockError> {
    let end = Instant::now() + patience;
    loop {
        match lock(&file, mode) {
            Err(e) if e.is_conflict() && Instant::now() < end => std::thread::sleep(RETRY),
            outcome => return outcome,
        }
    }
}

/// Frees what [`lock`] took, at once, also where another process still has a copy of the descriptor: a child between
/// fork and exec keeps the locks of every file that its parent has closed meanwhile.
pub fn unlock(file: impl AsFd) -> io::Result<()> {
    let file = file.as_fd();
    for base in [USES_BASE, FORBIDS_BASE] {
        for p in [Permission::ConsistentRead, Permission::Write, Permission::Resize] {
            set(file, base + p as i64, libc::F_UNLCK as i16)?;
        }
    }
    Ok(())
}

fn test_others(file: impl AsFd, mode: LockMode) -> Result<(), LockError> {
    let file = file.as_fd();
    for p in mode.uses() {
        if held_by_another(file, FORBIDS_BASE + *p as i64).map_err(LockError::Unavailable)? {
            return Err(LockError::Forbidden(p.name()));
        }
    }
    for p in mode.forbids() {
        if held_by_another(file, USES_BASE + *p as i64).map_err(LockError::Unavailable)? {
            return Err(LockError::InUse(p.name()));
        }
    }
    Ok(())
}

fn one_byte(byte: i64, kind: i16) -> libc::flock {
    // SAFETY: `flock` is plain integers, for which zero is a valid value; OFD commands want `l_pid` to be 0.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind;
    lock.l_whence = libc::SEEK_SET as i16;
    lock.l_start = byte;
    lock.l_len = 1;
    lock
}

fn set(file: impl AsFd, byte: i64, kind: i16) -> io::Result<()> {
    let lock = one_byte(byte, kind);
    loop {
        // SAFETY: the descriptor is borrowed for the call, and the kernel only reads the struct it is given.
        let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &lock) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Asks whether an exclusive lock could be had, which our own locks do not hinder.
fn held_by_another(file: impl AsFd, byte: i64) -> io::Result<bool> {
    let mut lock = one_byte(byte, libc::F_WRLCK as i16);
    // SAFETY: the descriptor is borrowed for the call, and the kernel writes only into the struct it is given.
    let result = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type != libc::F_UNLCK as i16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::path::Path;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn two_writers_never_both_hold() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(file.path()), open(file.path()));
        lock(&a, LockMode::Writer).unwrap();
        let error = lock(&b, LockMode::Writer).unwrap_err();
        assert_eq!(error.to_string(), "Failed to get \"write\" lock");
        drop(a);
        lock(&b, LockMode::Writer).unwrap();
    }

    #[test]
    fn a_refused_lock_leaves_nothing_held() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (open(file.path()), open(file.path()), open(file.path()));
        lock(&a, LockMode::Writer).unwrap();
        lock(&b, LockMode::Reader).unwrap_err();
        drop(a);
        // If b still held its half, c could not write.
        lock(&c, LockMode::Writer).unwrap();
    }

    #[test]
    fn readers_share_and_keep_writers_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b, c) = (open(file.path()), open(file.path()), open(file.path()));
        lock(&a, LockMode::Reader).unwrap();
        lock(&b, LockMode::Reader).unwrap();
        assert!(lock(&c, LockMode::Writer).unwrap_err().is_conflict());
        unlock(&a).unwrap();
        unlock(&b).unwrap();
        lock(&c, LockMode::Writer).unwrap();
    }

    #[test]
    fn waiting_ends_when_the_holder_goes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (a, b) = (open(file.path()), open(file.path()));
        lock(&a, LockMode::Writer).unwrap();
        assert!(lock_within(&b, LockMode::Writer, Duration::ZERO).is_err());
        let closer = std::thread::spawn(move || drop(a));
        lock_within(&b, LockMode::Writer, Duration::from_secs(60)).unwrap();
        closer.join().unwrap();
    }

    #[test]
    fn of_many_at_once_at_most_one_wins() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for _ in 0..50 {
            let start = std::sync::Barrier::new(4);
            let winners = std::sync::Mutex::new(Vec::new());
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        let mine = open(file.path());
                        start.wait();
                        if lock(&mine, LockMode::Writer).is_ok() {
                            winners.lock().unwrap().push(mine);
                        }
                    });
                }
            });
            assert!(winners.lock().unwrap().len() <= 1);
        }
    }
}
