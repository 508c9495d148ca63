//! Where a server is, and the socket to it: Unix or TCP, with time limits.
//!
//! Used by the client and by the server. Invariant: no call on a `Timed` stream outlasts its deadline, whatever the other side
//! does; a connection is shut down from any thread, and everybody who waits on it wakes.

use crate::target::Policy;
use rustix::net::sockopt::{
    Timeout, set_socket_keepalive, set_socket_timeout, set_tcp_keepcnt, set_tcp_keepidle, set_tcp_keepintvl,
};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// After this much silence a peer over TCP is asked whether it is there, and after as much again without a word it is gone.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host's name or number, and a port's.
    Tcp {
        /// Name or number.
        host: String,
        /// Name or number.
        port: String,
    },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => path.display().fmt(f),
            Address::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

impl Address {
    /// QEMU's way to write an export of this server.
    pub fn url(&self, export: &str) -> String {
        match self {
            Address::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Address::Tcp { .. } => format!("nbd://{self}/{export}"),
        }
    }

    /// Connects, until `deadline`. A Unix socket must lie beneath the policy's roots, and is not found through a link.
    pub(super) fn connect(&self, policy: &Policy, deadline: Instant) -> io::Result<Stream> {
        match self {
            Address::Unix(path) => {
                let place = crate::target::locate(path, policy)?;
                let flags = SocketFlags::CLOEXEC;
                let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                // A queue of connections that is full makes connect wait, for as long as this says.
                set_socket_timeout(&socket, Timeout::Send, Some(left(deadline)?))?;
                // By way of the descriptor: what was checked is what is connected to.
                let found = SocketAddrUnix::new(format!("/proc/self/fd/{}", place.as_raw_fd()))?;
                match connect(&socket, &found) {
                    Err(rustix::io::Errno::AGAIN) => Err(io::ErrorKind::TimedOut.into()),
                    Err(errno) => Err(errno.into()),
                    Ok(()) => Ok(Stream::Unix(socket.into())),
                }
            }
            Address::Tcp { host, port } => {
                let port: u16 =
                    port.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the port is no number"))?;
                let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
                for address in (host.as_str(), port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, left(deadline)?) {
                        Ok(stream) => return Stream::tcp(stream),
                        Err(error) => failure = error,
                    }
                }
                Err(failure)
            }
        }
    }
}

/// What is left until `deadline`, or the error that nothing is.
fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        left => Ok(left),
    }
}

/// A connection. Reading and writing work through a shared reference, from two threads at once.
#[derive(Debug)]
pub(super) enum Stream {
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TCP.
    Tcp(TcpStream),
}

impl Stream {
    /// Requests and replies go out at once, and a peer whose machine is gone is noticed.
    pub fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        set_socket_keepalive(&stream, true)?;
        set_tcp_keepidle(&stream, KEEPALIVE)?;
        set_tcp_keepintvl(&stream, KEEPALIVE / 6)?;
        set_tcp_keepcnt(&stream, 6)?;
        Ok(Stream::Tcp(stream))
    }

    /// Ends the connection for both sides, and wakes who waits on it.
    pub fn shutdown(&self) {
        // Fails only if the other side was quicker.
        let _ = match self {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Both),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    /// How long one system call may wait; `None`: for ever.
    pub fn set_timeouts(&self, receive: Option<Duration>, send: Option<Duration>) -> io::Result<()> {
        set_socket_timeout(self, Timeout::Recv, receive)?;
        Ok(set_socket_timeout(self, Timeout::Send, send)?)
    }

    /// Writes all of `head` and `payload`. A system call that times out is tried again while `go_on` says so.
    pub fn send(&self, head: &[u8], payload: &[u8], go_on: impl Fn() -> bool) -> io::Result<()> {
        let mut parts = [IoSlice::new(head), IoSlice::new(payload)];
        let mut parts = &mut parts[..];
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            match { self }.write_vectored(parts) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut parts, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && go_on() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => { stream }.read(buf),
            Stream::Tcp(stream) => { stream }.read(buf),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => { stream }.write(buf),
            Stream::Tcp(stream) => { stream }.write(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => { stream }.write_vectored(bufs),
            Stream::Tcp(stream) => { stream }.write_vectored(bufs),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A connection during its handshake, all of which has to be over at one deadline.
#[derive(Clone, Copy)]
pub(super) struct Timed<'a> {
    stream: &'a Stream,
    deadline: Instant,
}

impl<'a> Timed<'a> {
    /// `stream`, until `deadline`.
    pub fn new(stream: &'a Stream, deadline: Instant) -> Self {
        Self { stream, deadline }
    }
}

/// The kernel's word for a timeout on a socket is "try again".
fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

impl Read for Timed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        set_socket_timeout(self.stream, Timeout::Recv, Some(left(self.deadline)?))?;
        self.stream.read(buf).map_err(timed_out)
    }
}

impl Write for Timed<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        set_socket_timeout(self.stream, Timeout::Send, Some(left(self.deadline)?))?;
        self.stream.write(buf).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
