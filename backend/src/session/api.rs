//! What a session needs of the device behind it.
//!
//! The session speaks vhost-user, owns the guest's memory map and knows when a ring may run; it
//! knows nothing of requests, disks or bitmaps. The write path implements [`Device`] and
//! [`RunningRing`]; the session calls them, from its own thread only.
//!
//! Invariant: between [`Device::start`] and [`RunningRing::stop`] of a queue index no second
//! `start` of that index happens, and every started ring is stopped before its session ends.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};

use super::inflight::InflightQueue;
use super::notices::Notices;
use crate::memory::GuestMemory;
use crate::vring::RingPlace;

/// Everything a ring needs to run, all of it checked.
#[derive(Debug)]
pub struct RingParts {
    /// Index of the queue, below [`Device::queues`].
    pub index: u16,
    /// The ring: well-formed and inside guest memory, `next_avail` as the front end gave it, `next_used` read from the
    /// ring itself, EVENT_IDX as negotiated.
    pub ring: RingPlace,
    /// Guest memory. It may be replaced while the ring runs: take one snapshot a batch, and let a
    /// request in flight keep the snapshot its pointers come from.
    pub memory: GuestMemory,
    /// Set when some of that memory turns out to be gone: the connection is to be ended.
    pub memory_lost: Arc<AtomicBool>,
    /// Readable when the guest made buffers available; non-blocking.
    pub kick: OwnedFd,
    /// Written to when buffers were used; non-blocking. `None`: the front end polls.
    pub call: Option<OwnedFd>,
    /// Whether the ring may take requests from the start.
    pub enabled: bool,
    /// The features that were negotiated.
    pub features: u64,
    /// Where to note which requests are on their way, if the front end keeps such notes. `ring` then goes on behind
    /// those of `resubmit`, whatever the front end said.
    pub inflight: Option<InflightQueue>,
    /// Heads of requests that an earlier process took and did not answer, in the order in which it took them. They are
    /// noted in `inflight` already, and come before all new ones, once the ring is enabled or stopped.
    pub resubmit: Vec<u16>,
    /// Ends this connection, for a ring that finds its front end beyond repair.
    pub hangup: Hangup,
}

/// The device behind a session. One object serves all connections that follow each other.
pub trait Device: Send + Sync {
    /// Number of queues offered, at least 1.
    fn queues(&self) -> u16;

    /// The largest ring a front end may set up, a power of two up to 32768. The vhost-user
    /// protocol cannot announce it: QEMU and Cloud Hypervisor take 128 entries, Firecracker 256,
    /// crosvm 32768 unless told otherwise.
    fn queue_size_max(&self) -> u16;

    /// The virtio feature bits offered (the session adds the vhost-user one).
    fn features(&self) -> u64;

    /// `size` bytes of the configuration space from `offset` on, zero beyond its end: exactly
    /// `size` bytes, always.
    fn config(&self, offset: u32, size: u32) -> Vec<u8>;

    /// Where the session leaves a way to tell the front end of changes, for as long as there is one.
    fn notices(&self) -> Option<&Notices> {
        None
    }

    /// Starts a ring. It looks at the ring at once, as though kicked: requests may be waiting
    /// from before a reconnect.
    ///
    /// # Errors
    /// Whatever keeps the ring from running; the session then drops the connection.
    fn start(&self, parts: RingParts) -> io::Result<Box<dyn RunningRing>>;
}

/// A ring that runs. Dropping it without [`stop`](Self::stop) does not happen in a session.
pub trait RunningRing: Send {
    /// Signal completions there from now on.
    fn set_call(&self, call: Option<OwnedFd>);

    /// Take requests (`true`) or leave them in the ring (`false`); turned on, it looks at the
    /// ring at once. Requests in flight finish either way.
    fn set_enabled(&self, on: bool);

    /// Takes no further request, waits for all in flight to finish and be put into the used ring,
    /// and answers `next_avail`.
    fn stop(self: Box<Self>) -> u16;
}

/// Ends the connection that a ring belongs to; the session then stops its rings and goes on to the
/// next connection.
#[derive(Clone)]
pub struct Hangup(Weak<UnixStream>);

impl Hangup {
    /// A handle on a connection, which it does not keep open.
    pub fn new(connection: &Arc<UnixStream>) -> Self {
        Self(Arc::downgrade(connection))
    }

    /// Drops the connection and logs why. Callable from any thread, and more than once.
    pub fn hang_up(&self, why: &dyn fmt::Display) {
        tracing::warn!(%why, "dropping the vhost-user connection");
        if let Some(connection) = self.0.upgrade() {
            // Our side only: the front end sees the end once the rings have stopped. Not connected
            // any more is what was asked for.
            let _ = connection.shutdown(Shutdown::Read);
        }
    }
}

impl fmt::Debug for Hangup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hangup")
    }
}
