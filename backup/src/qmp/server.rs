//! The control socket's threads: one that accepts, and two a client, a reader that executes and a writer that sends.
//!
//! The daemon binds early ([`Server::bind`], so that a wrong path fails the start), starts once its commands are
//! ready, and stops last. Invariants: replies go out in the order of their requests; nothing a client does or fails to do
//! holds up another client or an emitter of events; [`Server::stop`] ends with every thread joined.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::error::QmpError;
use super::event::{Event, Events};
use super::outbox::Link;
use super::parser::{Limits, Parser};
use super::session::Session;
use super::socket::{BindError, ControlSocket};
use super::{Commands, lock, wire};

/// Clients at a time. Each costs two threads; the next is told so and hung up on.
pub const MAX_CLIENTS: usize = 64;

/// How long [`Server::stop`] waits for clients that do not read their last replies.
const FLUSH_LIMIT: Duration = Duration::from_secs(2);

/// A socket that exists and that nobody answers on yet. Dropping it removes the socket.
pub struct BoundServer {
    socket: ControlSocket,
}

/// A served control socket. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    wake: UnixStream,
    acceptor: Mutex<Option<JoinHandle<ControlSocket>>>,
}

struct Shared {
    commands: Arc<dyn Commands>,
    events: Events,
    stopping: AtomicBool,
    clients: Mutex<Vec<Client>>,
    left: Condvar,
}

struct Client {
    link: Arc<Link>,
    gone: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Server {
    /// Creates the socket. Its directory has to exist and must not be writable by everybody unless it is sticky; a
    /// stale socket is replaced, a live one refused.
    pub fn bind(path: impl AsRef<Path>) -> Result<BoundServer, BindError> {
        ControlSocket::bind(path.as_ref()).map(|socket| BoundServer { socket })
    }

    /// Stops: takes no more clients and no more commands, lets running commands end, sends what is queued (to
    /// clients that read it within two seconds), removes the socket and joins all threads. Idempotent.
    ///
    /// Not to be called from within a command, whose thread it would wait for.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // A full or closed pipe means that the acceptor is awake or gone.
        let _ = (&self.wake).write(&[0]);
        let Some(acceptor) = lock(&self.acceptor).take() else { return };
        drop(acceptor.join());
        let clients = self.shared.hang_up();
        for client in clients {
            let _ = client.thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

impl BoundServer {
    /// Answers clients with `commands` and passes `events` on to them.
    pub fn start(self, commands: Arc<dyn Commands>, events: Events) -> io::Result<Server> {
        let shared = Arc::new(Shared {
            commands,
            events,
            stopping: AtomicBool::new(false),
            clients: Mutex::new(Vec::new()),
            left: Condvar::new(),
        });
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let acceptor = {
            let shared = Arc::clone(&shared);
            let accept = move || {
                accept(&shared, &self.socket.listener, &woken);
                self.socket
            };
            thread::Builder::new().name("qmp-accept".into()).spawn(accept)?
        };
        Ok(Server { shared, wake, acceptor: Mutex::new(Some(acceptor)) })
    }
}

fn accept(shared: &Arc<Shared>, listener: &UnixListener, woken: &UnixStream) {
    while !shared.stopping.load(Ordering::SeqCst) {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Err(error) = shared.admit(stream) {
                    tracing::warn!(%error, "a control client could not be served");
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(&[PollFd::new(listener, PollFlags::IN), PollFd::new(woken, PollFlags::IN)], None);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted) => {}
            Err(error) => {
                // Out of descriptors or memory: the connection stays queued, so asking again at once would spin.
                tracing::warn!(%error, "cannot accept a control client");
                wait(&[PollFd::new(woken, PollFlags::IN)], Some(Duration::from_millis(200)));
            }
        }
    }
}

/// Waits until one of the descriptors is readable. Waking too early is harmless: the caller looks again.
fn wait(descriptors: &[PollFd<'_>], limit: Option<Duration>) {
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    let mut descriptors = descriptors.to_vec();
    let _ = poll(&mut descriptors, limit.as_ref());
}

impl Shared {
    fn admit(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        let mut clients = lock(&self.clients);
        let (gone, stayed) =
            std::mem::take(&mut *clients).into_iter().partition(|client: &Client| client.gone.load(Ordering::SeqCst));
        *clients = stayed;
        for client in gone as Vec<Client> {
            // Its thread is past its last statement that could wait for anything.
            let _ = client.thread.join();
        }
        if clients.len() >= MAX_CLIENTS {
            let desc = format!("Too many clients: at most {MAX_CLIENTS} are served at a time");
            let line = wire::line(&wire::reply(None, Err(QmpError::generic(desc))));
            // It fits the buffer of a fresh socket; if it does not, hanging up says enough.
            let _ = send(&stream, &line, SendFlags::NOSIGNAL | SendFlags::DONTWAIT);
            return Ok(());
        }
        // What `accept` returns does not inherit the listener's non-blocking mode on Linux; other systems differ.
        stream.set_nonblocking(false)?;
        let link = Arc::new(Link::new(stream));
        let gone = Arc::new(AtomicBool::new(false));
        let thread = {
            let (shared, link, gone) = (Arc::clone(self), Arc::clone(&link), Arc::clone(&gone));
            thread::Builder::new().name("qmp-client".into()).spawn(move || {
                let _leaving = Leaving { shared: &shared, gone: &gone };
                shared.serve(&link);
            })?
        };
        clients.push(Client { link, gone, thread });
        Ok(())
    }

    fn serve(&self, link: &Arc<Link>) {
        link.outbox.push_reply(wire::line(&wire::greeting()).into(), false);
        self.events.add_client(link);
        thread::scope(|scope| {
            let writer = thread::Builder::new().name("qmp-writer".into()).spawn_scoped(scope, || write(link));
            match writer {
                Ok(_) => self.read(link),
                Err(error) => tracing::warn!(%error, "a control client could not be served"),
            }
            link.outbox.close();
        });
        link.hang_up();
    }

    fn read(&self, link: &Link) {
        let mut parser = Parser::new(Limits::COMMAND);
        let mut session = Session::default();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let mut bytes = match recv(&link.stream, &mut buffer[..], RecvFlags::empty()) {
                Ok((0, _)) => return,
                Ok((length, _)) => &buffer[..length],
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            };
            while !bytes.is_empty() {
                let (used, message) = parser.feed(bytes);
                bytes = &bytes[used..];
                let Some(message) = message else { continue };
                if self.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let knew = session.is_negotiated();
                let reply = wire::line(&session.answer(message, &*self.commands)).into();
                let told = || self.commands.told_before().into_iter().map(told_line).collect();
                let queued = match session.is_negotiated() {
                    true if !knew => link.outbox.push_reply_and(reply, true, told),
                    negotiated => link.outbox.push_reply(reply, negotiated),
                };
                if !queued {
                    return;
                }
            }
        }
    }

    /// Ends all conversations. What is queued is sent first, unless a client does not take it in time.
    fn hang_up(&self) -> Vec<Client> {
        let mut clients = lock(&self.clients);
        for client in clients.iter() {
            let _ = client.link.stream.shutdown(Shutdown::Read);
        }
        let give_up = Instant::now() + FLUSH_LIMIT;
        while clients.iter().any(|client| !client.gone.load(Ordering::SeqCst)) {
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            clients = self.left.wait_timeout(clients, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        for client in clients.iter() {
            client.link.hang_up();
        }
        std::mem::take(&mut *clients)
    }
}

/// An event from before, as a client gets it.
fn told_line((time, event): (SystemTime, Event)) -> Arc<[u8]> {
    wire::line(&wire::event_at(time, &event.name, event.data)).into()
}

/// Tells that a client's threads are done, however they ended.
struct Leaving<'a> {
    shared: &'a Shared,
    gone: &'a AtomicBool,
}

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        // Under the lock: a stop that has just looked is waiting by now, and whoever sees the mark can join this
        // thread while holding the lock itself.
        let _clients = lock(&self.shared.clients);
        self.gone.store(true, Ordering::SeqCst);
        self.shared.left.notify_all();
    }
}

/// Sends what is queued until the outbox has ended or the client is gone.
fn write(link: &Link) {
    while let Ok(line) = link.outbox.pop() {
        let mut rest = &line[..];
        while !rest.is_empty() {
            match send(&link.stream, rest, SendFlags::NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return link.hang_up(),
            }
        }
    }
}
