//! An NBD server: the socket, who is connected, and which exports there are.
//!
//! Used by `control` (or a daemon). A thread accepts; each connection has one of its own for the handshake, which becomes the
//! first of those that serve it. Invariants: there are never more connections than the settings allow (the next
//! one waits in the kernel's queue); a handshake that does not end is ended; an export that was removed is not used by anybody
//! when [`NbdServer::remove`] returns; [`NbdServer::stop`] ends with nobody connected.

use super::address::{Address, Stream, Timed};
use super::export::Export;
use super::link::Link;
use super::negotiate::{Catalogue, Entry, negotiate};
use super::protocol::STRING_MAX;
use super::tls::TlsCredentials;
use super::transmission::Transmission;
use crate::qmp::BindError;
use crate::qmp::socket::ControlSocket;
use crate::target::os_text;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long is waited before a kernel that has no descriptor or thread left is asked again.
const BREATHER: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What the operator decides.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// Connections at a time, at least one. Each takes up to eight threads with 256 KiB each.
    pub max_connections: usize,
    /// All of a handshake.
    pub handshake: Duration,
    /// With them, clients must use TLS.
    pub tls: Option<TlsCredentials>,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self { max_connections: 100, handshake: Duration::from_secs(10), tls: None }
    }
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// On a Unix socket.
    #[error(transparent)]
    Unix(#[from] BindError),
    /// On TCP, or for want of a thread.
    #[error("Failed to listen on '{address}': {}", os_text(source))]
    Listen {
        /// Where.
        address: Address,
        /// The reason.
        source: io::Error,
    },
}

/// Why an export was not added or removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    /// Another has the name.
    #[error("NBD server already has export with this name")]
    Exists,
    /// There is none.
    #[error("Export is not found")]
    NotFound,
    /// Clients use it.
    #[error("export still in use")]
    InUse,
    /// No client could ask for it.
    #[error("export name or description too long")]
    TooLong,
}

/// How an export is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// Only if no client uses it.
    Safe,
    /// Clients are hung up on.
    Hard,
}

enum Listener {
    Unix(ControlSocket),
    Tcp(TcpListener),
}

struct Listed {
    entry: Entry,
    /// A name may be used again; a number is not.
    number: u64,
}

struct Connection {
    stream: Arc<Stream>,
    /// The number of its export, once it has chosen.
    export: Option<u64>,
}

#[derive(Default)]
struct State {
    exports: BTreeMap<String, Listed>,
    connections: HashMap<u64, Connection>,
    /// Last number given.
    last: u64,
    stopping: bool,
}

struct Shared {
    state: Mutex<State>,
    /// A connection ended.
    left: Condvar,
    /// Wakes the thread that accepts.
    wake: OwnedFd,
    settings: ServerSettings,
}

/// A server that listens. Dropping it stops it.
pub struct NbdServer {
    shared: Arc<Shared>,
    address: Address,
    bound: Option<SocketAddr>,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

/// A connection's place; given up when it is over.
struct Seat {
    shared: Arc<Shared>,
    number: u64,
}

impl NbdServer {
    /// Listens. A Unix socket is for this user alone; a stale one is replaced and a live one refused.
    pub fn bind(address: &Address, settings: ServerSettings) -> Result<Self, ServerError> {
        let fail = |source: io::Error| ServerError::Listen { address: address.clone(), source };
        let (listener, bound) = match address {
            Address::Unix(path) => (Listener::Unix(ControlSocket::bind(path)?), None),
            Address::Tcp { host, port } => {
                let wrong = || fail(io::Error::new(io::ErrorKind::InvalidInput, "the port is no number"));
                let port: u16 = port.parse().map_err(|_| wrong())?;
                let addresses: Vec<_> = (host.as_str(), port).to_socket_addrs().map_err(fail)?.collect();
                let listener = TcpListener::bind(&addresses[..]).map_err(fail)?;
                listener.set_nonblocking(true).map_err(fail)?;
                let bound = listener.local_addr().map_err(fail)?;
                (Listener::Tcp(listener), Some(bound))
            }
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| fail(errno.into()))?;
        let shared = Arc::new(Shared { state: Mutex::default(), left: Condvar::new(), wake, settings });
        let accepts = Arc::clone(&shared);
        let acceptor = std::thread::Builder::new()
            .name("nbd-accept".to_owned())
            .spawn(move || accepts.accept(&listener))
            .map_err(fail)?;
        Ok(Self { shared, address: address.clone(), bound, acceptor: Mutex::new(Some(acceptor)) })
    }

    /// Where it was told to listen.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Where it listens, for TCP.
    pub fn bound(&self) -> Option<SocketAddr> {
        self.bound
    }

    /// Exports something from now on.
    pub fn add(&self, name: &str, export: Arc<dyn Export>, description: &str) -> Result<(), ExportError> {
        if name.len() > STRING_MAX || description.len() > STRING_MAX {
            return Err(ExportError::TooLong);
        }
        let mut state = self.shared.state();
        if state.exports.contains_key(name) {
            return Err(ExportError::Exists);
        }
        state.last += 1;
        let entry = Entry { export, description: description.to_owned() };
        let listed = Listed { entry, number: state.last };
        state.exports.insert(name.to_owned(), listed);
        Ok(())
    }

    /// Exports something no longer. When this returns, nobody uses it any more.
    pub fn remove(&self, name: &str, mode: Removal) -> Result<(), ExportError> {
        let mut state = self.shared.state();
        let number = state.exports.get(name).ok_or(ExportError::NotFound)?.number;
        let uses = |connection: &Connection| connection.export == Some(number);
        if mode == Removal::Safe && state.connections.values().any(uses) {
            return Err(ExportError::InUse);
        }
        state.exports.remove(name);
        for connection in state.connections.values().filter(|connection| uses(connection)) {
            connection.stream.shutdown();
        }
        while state.connections.values().any(uses) {
            state = self.shared.left.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        Ok(())
    }

    /// Clients of an export at the moment; `None` if there is no such export.
    pub fn clients(&self, name: &str) -> Option<usize> {
        let state = self.shared.state();
        let number = state.exports.get(name)?.number;
        Some(state.connections.values().filter(|connection| connection.export == Some(number)).count())
    }

    /// Listens no more, hangs up on everybody, and returns when nobody is left. Idempotent.
    pub fn stop(&self) {
        self.shared.state().stopping = true;
        self.shared.wake();
        if let Some(acceptor) = self.acceptor.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take() {
            let _ = acceptor.join();
        }
        let mut state = self.shared.state();
        for connection in state.connections.values() {
            connection.stream.shutdown();
        }
        while !state.connections.is_empty() {
            state = self.shared.left.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.exports.clear();
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for NbdServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NbdServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Listener {
    fn accept(&self) -> io::Result<Stream> {
        match self {
            Listener::Unix(socket) => {
                let (stream, _) = socket.listener.accept()?;
                stream.set_nonblocking(false)?;
                Ok(Stream::Unix(stream))
            }
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(false)?;
                Stream::tcp(stream)
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Listener::Unix(socket) => socket.listener.as_fd(),
            Listener::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wake(&self) {
        // A counter that is full wakes as well.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// The thread that accepts.
    fn accept(self: &Arc<Self>, listener: &Listener) {
        let mut tired = false;
        loop {
            let room = {
                let state = self.state();
                if state.stopping {
                    return;
                }
                state.connections.len() < self.settings.max_connections.max(1)
            };
            let mut watched = [PollFd::new(&self.wake, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            // Without room, or while the kernel has none, newcomers stay in the queue.
            let watched = if room && !tired { &mut watched[..] } else { &mut watched[..1] };
            match poll(watched, tired.then_some(&BREATHER)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the NBD server cannot wait for clients");
                    return;
                }
            }
            let _ = rustix::io::read(&self.wake, &mut [0; 8]);
            tired = false;
            if room {
                match listener.accept() {
                    Ok(stream) => tired = self.welcome(stream).is_err(),
                    Err(error) => {
                        let usual =
                            [io::ErrorKind::WouldBlock, io::ErrorKind::ConnectionAborted, io::ErrorKind::Interrupted];
                        tired = !usual.contains(&error.kind());
                    }
                }
            }
        }
    }

    fn welcome(self: &Arc<Self>, stream: Stream) -> io::Result<()> {
        let stream = Arc::new(stream);
        let seat = {
            let mut state = self.state();
            state.last += 1;
            let number = state.last;
            state.connections.insert(number, Connection { stream: Arc::clone(&stream), export: None });
            Seat { shared: Arc::clone(self), number }
        };
        let thread = std::thread::Builder::new().name("nbd-serve".to_owned());
        thread.spawn(move || seat.serve(stream)).map(drop)
    }
}

impl Seat {
    /// The thread of a connection.
    fn serve(self, stream: Arc<Stream>) {
        let deadline = Instant::now() + self.shared.settings.handshake;
        let agreed = negotiate(Timed::new(&stream, deadline), &self, self.shared.settings.tls.as_ref());
        match agreed.and_then(|agreed| stream.set_timeouts(None, None).map(|()| agreed)) {
            Ok(Some(mut agreed)) => {
                let link = Link::new(stream, agreed.tls.take());
                Transmission::run(link, agreed, self);
            }
            Ok(None) => stream.shutdown(),
            Err(error) => {
                tracing::debug!(%error, "an NBD handshake failed");
                stream.shutdown();
            }
        }
    }
}

impl Catalogue for Seat {
    fn list(&self) -> Vec<(String, String)> {
        let state = self.shared.state();
        state.exports.iter().map(|(name, listed)| (name.clone(), listed.entry.description.clone())).collect()
    }

    fn look(&self, name: &str) -> Option<Entry> {
        Some(self.shared.state().exports.get(name)?.entry.clone())
    }

    fn enter(&self, name: &str) -> Option<Entry> {
        let mut state = self.shared.state();
        let Listed { entry, number } = state.exports.get(name)?;
        let (entry, number) = (entry.clone(), *number);
        state.connections.get_mut(&self.number)?.export = Some(number);
        Some(entry)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.state().connections.remove(&self.number);
        self.shared.left.notify_all();
        self.shared.wake();
    }
}
