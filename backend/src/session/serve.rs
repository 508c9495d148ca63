//! The thread of a disk's session: accept, serve until the front end goes, stop its rings, accept
//! again.
//!
//! The daemon starts one [`Session`] a disk and ends it through its [`Stopper`].
//!
//! Invariants: one connection is served at a time; its rings are stopped before it is closed; a
//! [`Stopper`] ends accept and serve, whatever the front end does or does not send.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::api::{Device, Hangup};
use super::handler::Handler;
use super::listen::{Endpoint, Listener};
use super::notices::next_channel;

/// How long to leave `accept` alone after an error that is not the front end's, such as a full
/// descriptor table.
const ACCEPT_RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// A running session. Dropping it stops it and waits.
#[derive(Debug)]
pub struct Session {
    stopper: Stopper,
    thread: Option<JoinHandle<()>>,
}

impl Session {
    /// Starts serving front ends that come to `endpoint`. `name` is for the log and the thread.
    ///
    /// # Errors
    /// If the kernel gives no thread or no descriptor.
    pub fn spawn(name: &str, endpoint: Endpoint, device: Arc<dyn Device>) -> io::Result<Self> {
        let stopper = Stopper::new()?;
        let serving = stopper.clone();
        let span = tracing::info_span!("session", disk = name);
        let thread = thread::Builder::new()
            .name(format!("vu-{name}"))
            .spawn(move || span.in_scope(|| run(endpoint, &device, &serving)))?;
        Ok(Self { stopper, thread: Some(thread) })
    }

    /// A handle to stop the session with, from any thread.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Whether the session is over: stopped, or its one handed-over connection has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end: a stop, or the end of a handed-over connection. Every request that was
    /// accepted is then finished.
    pub fn join(mut self) {
        self.wait();
    }

    /// Stops and waits.
    pub fn stop(self) {
        self.stopper.stop();
        self.join();
    }

    fn wait(&mut self) {
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the session thread panicked");
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.stopper.stop();
            self.wait();
        }
    }
}

/// Ends a session.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<StopState>);

#[derive(Debug)]
struct StopState {
    event: OwnedFd,
    raised: AtomicBool,
    connection: Mutex<Option<Arc<UnixStream>>>,
}

impl Stopper {
    fn new() -> io::Result<Self> {
        let event = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(StopState { event, raised: AtomicBool::new(false), connection: Mutex::new(None) })))
    }

    /// Asks the session to end: it takes no further message or connection, finishes what its rings
    /// have in flight and closes. Does not wait. Callable any number of times.
    pub fn stop(&self) {
        self.0.raised.store(true, Ordering::SeqCst);
        // A full counter is readable already.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
        if let Some(stream) = &*self.connection() {
            // Only our reading side: the front end shall not see the end before the rings have
            // stopped, since it reads the used index then. If it leaves answers unread, the session
            // may be blocked in writing one: then there is no other way.
            let unread = unread_bytes(stream) > 0;
            let how = if unread { Shutdown::Both } else { Shutdown::Read };
            let _ = stream.shutdown(how);
        }
    }

    /// Whether a stop was asked for.
    pub fn is_raised(&self) -> bool {
        self.0.raised.load(Ordering::SeqCst)
    }

    fn connection(&self) -> MutexGuard<'_, Option<Arc<UnixStream>>> {
        self.0.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `fd` is readable; `false` if a stop came instead.
    fn wait_for(&self, fd: Option<&Listener>, limit: Option<&Timespec>) -> bool {
        let mut fds = vec![PollFd::new(&self.0.event, PollFlags::IN)];
        fds.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)));
        while !self.is_raised() {
            match rustix::event::poll(&mut fds, limit) {
                Err(Errno::INTR) => {}
                Ok(_) => break,
                Err(e) => {
                    tracing::error!("poll failed: {e}");
                    break;
                }
            }
        }
        !self.is_raised()
    }
}

/// Bytes sent that the peer has not read yet.
fn unread_bytes(stream: &UnixStream) -> libc::c_int {
    let mut bytes = 0;
    // SAFETY: the descriptor is open for the call, and SIOCOUTQ (here by its other name) stores one
    // int, for which there is room.
    let ret = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if ret == 0 { bytes } else { 0 }
}

fn run(endpoint: Endpoint, device: &Arc<dyn Device>, stopper: &Stopper) {
    match endpoint {
        Endpoint::Connected(stream) => serve(stream, device, stopper),
        Endpoint::Listening(listener) => {
            while let Some(stream) = accept(&listener, stopper) {
                serve(stream, device, stopper);
            }
        }
    }
}

/// The next front end; `None` if the session is to end.
fn accept(listener: &Listener, stopper: &Stopper) -> Option<UnixStream> {
    while stopper.wait_for(Some(listener), None) {
        match listener.accept() {
            Ok(Some(stream)) => return Some(stream),
            Ok(None) => {}
            Err(e) => {
                tracing::warn!("cannot accept a connection: {e}");
                stopper.wait_for(None, Some(&ACCEPT_RETRY));
            }
        }
    }
    None
}

/// One front end, from its first message to its last.
fn serve(stream: UnixStream, device: &Arc<dyn Device>, stopper: &Stopper) {
    let connection = match stream.try_clone() {
        Ok(clone) => Arc::new(clone),
        Err(e) => {
            tracing::warn!("cannot serve a connection: {e}");
            return;
        }
    };
    *stopper.connection() = Some(connection.clone());
    tracing::info!("front end connected");
    let handler = Handler::new(device.clone(), Hangup::new(&connection));
    let handler = Arc::new(Mutex::new(handler));
    let mut protocol = BackendReqHandler::from_stream(stream, handler.clone());
    // A stop between the registration above and here is seen by the flag, a later one ends the
    // wait for a message.
    while !stopper.is_raised() {
        if let (Some(notices), Some(channel)) = (device.notices(), next_channel(&*connection)) {
            notices.set(Some(channel));
        }
        match protocol.handle_request() {
            Ok(()) => {}
            Err(Error::Disconnected) => break,
            Err(_) if stopper.is_raised() => break,
            Err(e) => {
                tracing::warn!("dropping the connection: {e}");
                break;
            }
        }
    }
    handler.lock().unwrap_or_else(PoisonError::into_inner).stop_rings();
    if let Some(notices) = device.notices() {
        notices.set(None);
    }
    *stopper.connection() = None;
    // Whoever else still holds a copy of the descriptor: now it is closed.
    let _ = connection.shutdown(Shutdown::Both);
    tracing::info!("front end gone");
}
