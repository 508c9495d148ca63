//! The socket a front end comes to: bound by path, or handed over as a descriptor.
//!
//! Invariant: a path is taken over only from a socket nobody answers on; a live socket, or a file
//! that is no socket, is left alone. The socket file is ours from its first moment: mode 0600, in a directory in which not
//! everybody may replace it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use thiserror::Error;

/// Connections that may wait while one is served.
const BACKLOG: i32 = 16;

/// Why a socket could not be had.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum ListenError {
    #[error("socket {} is in use by a live process", .0.display())]
    InUse(PathBuf),
    #[error("{} exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    #[error("the directory of socket {} is writable by everybody and not sticky: anyone could replace the socket", .0.display())]
    UnsafeDirectory(PathBuf),
    #[error("socket path {} is too long", .0.display())]
    TooLong(PathBuf),
    #[error("cannot listen on socket {}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("descriptor is not a Unix stream socket")]
    NotAUnixSocket,
    #[error("cannot use the descriptor as a socket: {0}")]
    Descriptor(io::Error),
}

/// Where front ends come from.
#[derive(Debug)]
pub enum Endpoint {
    /// A listening socket: one front end after the other.
    Listening(Listener),
    /// A connected socket that was handed over: one front end, once.
    Connected(UnixStream),
}

impl Endpoint {
    /// Binds `path`, taking it over from a socket file that a dead process left.
    ///
    /// # Errors
    /// [`ListenError`]; whatever is at `path` is then as it was.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let io = |source: io::Error| ListenError::Io { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|_| ListenError::TooLong(path.to_owned()))?;
        let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        // What is not there is told by the bind.
        if fs::metadata(parent).is_ok_and(|found| found.mode() & 0o1002 == 0o0002) {
            return Err(ListenError::UnsafeDirectory(path.to_owned()));
        }
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|e| io(e.into()))?;
        // On Linux the file inherits the mode of the unbound socket: no moment in which it is open
        // to others, and no umask of the whole process to change.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| io(e.into()))?;
        if let Err(e) = rustix::net::bind(&socket, &address) {
            if e != Errno::ADDRINUSE {
                return Err(io(e.into()));
            }
            remove_stale(path)?;
            rustix::net::bind(&socket, &address).map_err(|e| io(e.into()))?;
        }
        let bound = Bound::new(path).map_err(io)?;
        rustix::net::listen(&socket, BACKLOG).map_err(|e| io(e.into()))?;
        Ok(Self::Listening(Listener { socket: socket.into(), _bound: Some(bound) }))
    }

    /// Takes over a descriptor: a listening socket, or one that is already connected (back ends
    /// started by hand get the one, those started by a management layer often the other).
    ///
    /// # Errors
    /// [`ListenError::NotAUnixSocket`] or [`ListenError::Descriptor`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, ListenError> {
        let failed = |e: Errno| match e {
            Errno::NOTSOCK => ListenError::NotAUnixSocket,
            other => ListenError::Descriptor(other.into()),
        };
        if sockopt::socket_domain(&fd).map_err(failed)? != AddressFamily::UNIX
            || sockopt::socket_type(&fd).map_err(failed)? != SocketType::STREAM
        {
            return Err(ListenError::NotAUnixSocket);
        }
        let flags = rustix::io::fcntl_getfd(&fd).map_err(failed)?;
        rustix::io::fcntl_setfd(&fd, flags | rustix::io::FdFlags::CLOEXEC).map_err(failed)?;
        if sockopt::socket_acceptconn(&fd).map_err(failed)? {
            let socket = UnixListener::from(fd);
            socket.set_nonblocking(true).map_err(ListenError::Descriptor)?;
            Ok(Self::Listening(Listener { socket, _bound: None }))
        } else {
            let stream = UnixStream::from(fd);
            stream.peer_addr().map_err(ListenError::Descriptor)?;
            stream.set_nonblocking(false).map_err(ListenError::Descriptor)?;
            Ok(Self::Connected(stream))
        }
    }
}

/// A listening socket; its file goes away with it.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    _bound: Option<Bound>,
}

impl Listener {
    /// The next connection, or `None` if none is waiting.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(e),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The file of a socket we bound, to be removed if it is still ours.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    inode: (u64, u64),
}

impl Bound {
    fn new(path: &Path) -> io::Result<Self> {
        let meta = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), inode: (meta.dev(), meta.ino()) })
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours {
            // At worst a stale file stays, which the next start takes over.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes what is in the way at `path` if it is a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), ListenError> {
    let io = |source: io::Error| ListenError::Io { path: path.to_owned(), source };
    let meta = match fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io(e)),
    };
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.to_owned()));
    }
    match probe(path) {
        // Nobody has it open any more.
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(io),
        Err(Errno::NOENT) => Ok(()),
        // AGAIN: its backlog is full. PROTOTYPE: somebody serves another kind of socket there.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(ListenError::InUse(path.to_owned())),
        Err(e) => Err(io(e.into())),
    }
}

/// Tries to connect, without waiting.
fn probe(path: &Path) -> Result<(), Errno> {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests;
