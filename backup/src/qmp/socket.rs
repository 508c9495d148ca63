//! The control socket in the file system: who may reach it, and what is done about one that is already there.
//!
//! Called by [`super::server`], and for NBD's socket by [`crate::nbd::server`]. Whoever can connect owns the daemon's disks, so the socket is mode 0600 from its first
//! moment, and its directory must not let others swap it. A socket that a dead daemon left is replaced, a live one
//! never: both are decided under a lock on the directory, so that two daemons that start at once do not both win.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};

/// Why a control socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is longer than the kernel takes (107 bytes), or has a NUL in it.
    #[error("'{}' cannot be the path of a socket: {error}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the kernel's rules say.
        error: io::Error,
    },
    /// The directory is missing or cannot be used.
    #[error("cannot use the directory '{}' for the socket: {error}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Anyone could replace the socket.
    #[error("the directory '{}' is writable by everybody and not sticky: anyone could replace the socket",
        path.display())]
    UnsafeDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// Somebody answers on it.
    #[error("'{}' is in use by a running process", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// There is a file of another kind.
    #[error("'{}' exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// Anything else.
    #[error("cannot listen on '{}': {error}", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// A listening socket, and the name by which it is reached.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl ControlSocket {
    /// Binds and listens.
    pub(crate) fn bind(path: &Path) -> Result<ControlSocket, BindError> {
        let fail = |error: io::Error| BindError::Listen { path: path.to_owned(), error };
        let address = SocketAddrUnix::new(path)
            .map_err(|error| BindError::Path { path: path.to_owned(), error: error.into() })?;
        let _lock = lock_directory(path)?;
        remove_stale(path)?;

        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| fail(error.into()))?;
        // The file gets the mode of the descriptor at bind: there is no moment in which others may connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|error| fail(error.into()))?;
        bind(&socket, &address).map_err(|error| fail(error.into()))?;
        let identity = identity(&fs::symlink_metadata(path).map_err(fail)?);
        let bound = ControlSocket { listener: UnixListener::from(socket), path: path.to_owned(), identity };
        listen(&bound.listener, 128).map_err(|error| fail(error.into()))?;
        bound.listener.set_nonblocking(true).map_err(fail)?;
        Ok(bound)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // Another daemon may have replaced it meanwhile, after an operator removed it: not ours to remove.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| identity(&found) == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Checks the directory and locks it, for as long as the returned file is open.
fn lock_directory(path: &Path) -> Result<File, BindError> {
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let fail = |error: io::Error| BindError::Directory { path: parent.to_owned(), error };
    let directory = File::open(parent).map_err(fail)?;
    let metadata = directory.metadata().map_err(fail)?;
    if !metadata.is_dir() {
        return Err(fail(io::ErrorKind::NotADirectory.into()));
    }
    if metadata.mode() & 0o1002 == 0o0002 {
        return Err(BindError::UnsafeDirectory { path: parent.to_owned() });
    }
    let give_up = Instant::now() + Duration::from_secs(5);
    loop {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(directory),
            Err(Errno::WOULDBLOCK) if Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(fail(io::Error::other("another process has locked it for over 5 seconds")));
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(fail(error.into())),
        }
    }
}

/// Removes what a dead daemon left; refuses everything else.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let fail = |error: io::Error| BindError::Listen { path: path.to_owned(), error };
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    if !found.file_type().is_socket() {
        return Err(BindError::NotASocket { path: path.to_owned() });
    }
    match connect_now(path) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(fail),
        Err(Errno::NOENT) => Ok(()),
        // Connected, or its queue is so full that one would have to wait: somebody listens.
        Ok(()) | Err(Errno::AGAIN) => Err(BindError::InUse { path: path.to_owned() }),
        Err(error) => Err(fail(error.into())),
    }
}

/// Connects without ever waiting, since whoever listens there may hang.
fn connect_now(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_socket_is_for_its_owner_alone_and_goes_when_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let bound = ControlSocket::bind(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let live = UnixListener::bind(&path).unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(BindError::InUse { .. })));
        drop(live);
        ControlSocket::bind(&path).unwrap();
    }

    #[test]
    fn of_many_that_start_at_once_one_gets_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let bound: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| ControlSocket::bind(&path).ok())).collect();
            starts.into_iter().filter_map(|start| start.join().unwrap()).collect()
        });
        assert_eq!(bound.len(), 1);
        assert!(connect_now(&path).is_ok());
    }

    #[test]
    fn what_is_in_the_way_is_left_alone_and_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "precious").unwrap();
        let error = ControlSocket::bind(&file).unwrap_err();
        assert!(matches!(error, BindError::NotASocket { .. }), "{error}");
        assert_eq!(fs::read(&file).unwrap(), b"precious");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(matches!(ControlSocket::bind(&link), Err(BindError::NotASocket { .. })));
        assert!(matches!(ControlSocket::bind(&file.join("s")), Err(BindError::Directory { .. })));
        let missing = directory.path().join("missing/s");
        assert!(matches!(ControlSocket::bind(&missing), Err(BindError::Directory { .. })));
        let long = directory.path().join("x".repeat(120));
        assert!(matches!(ControlSocket::bind(&long), Err(BindError::Path { .. })));
    }

    #[test]
    fn a_directory_in_which_anyone_can_swap_the_socket_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(BindError::UnsafeDirectory { .. })));
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        ControlSocket::bind(&path).unwrap();
    }
}
