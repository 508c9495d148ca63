//! The one thing that a guest and its queues share about the connection: is the back end still there?
//!
//! Queues poll the socket for a hang-up beside their call event; the guest replaces the socket when it reconnects.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Debug)]
pub(super) struct Link {
    socket: Mutex<Arc<UnixStream>>,
    generation: AtomicU64,
}

impl Link {
    pub fn new(socket: UnixStream) -> Self {
        Link { socket: Mutex::new(Arc::new(socket)), generation: AtomicU64::new(1) }
    }

    /// Counts the connections, from 1.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The socket of the current connection.
    pub fn socket(&self) -> Arc<UnixStream> {
        Arc::clone(&self.socket.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A new connection took the old one's place.
    pub fn replace(&self, socket: UnixStream) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(socket);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Ends the connection for both sides, whoever else holds a duplicate of the descriptor.
    pub fn cut(&self) {
        // Fails only when it is cut already.
        let _ = self.socket().shutdown(Shutdown::Both);
    }
}
