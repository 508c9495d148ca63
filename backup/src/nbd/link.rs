//! A connection after its handshake: bytes in, bytes out, in clear or over TLS.
//!
//! Used by `transmission`. One thread at a time reads and one at a time writes, each under a lock of its own there. Invariant: a
//! client that does not read what it asked for keeps only writers waiting, never the reader: what is encrypted is
//! sent without the session's lock.

use super::address::Stream;
use rustls::ServerConnection;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard};

/// Plaintext that is encrypted at once.
const RECORDS: usize = 64 << 10;

/// The two directions of a connection.
pub(super) struct Link {
    stream: Arc<Stream>,
    tls: Option<Mutex<Box<ServerConnection>>>,
}

/// The reading end.
pub(super) struct Incoming {
    link: Arc<Link>,
    /// Encrypted bytes that the session has not taken yet.
    raw: Vec<u8>,
    taken: usize,
}

impl Link {
    /// A connection whose handshake is over, with the session of TLS if there is one.
    pub fn new(stream: Arc<Stream>, tls: Option<Box<ServerConnection>>) -> Arc<Self> {
        Arc::new(Self { stream, tls: tls.map(Mutex::new) })
    }

    /// The reading end. There is one.
    pub fn incoming(self: &Arc<Self>) -> Incoming {
        Incoming { link: Arc::clone(self), raw: Vec::new(), taken: 0 }
    }

    /// The socket.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Sends all of `head` and `payload`. One at a time.
    pub fn send(&self, head: &[u8], payload: &[u8]) -> io::Result<()> {
        let Some(tls) = &self.tls else { return self.stream.send(head, payload, || true) };
        let mut records = Vec::new();
        for plain in std::iter::once(head).chain(payload.chunks(RECORDS)) {
            {
                let mut session = session(tls);
                session.writer().write_all(plain)?;
                while session.wants_write() {
                    session.write_tls(&mut records)?;
                }
            }
            if records.len() >= RECORDS {
                self.stream.send(&records, &[], || true)?;
                records.clear();
            }
        }
        self.stream.send(&records, &[], || true)
    }

    /// Ends both directions.
    pub fn close(&self) {
        if let Some(tls) = &self.tls {
            let mut session = session(tls);
            session.send_close_notify();
            let mut records = Vec::new();
            while session.wants_write() && session.write_tls(&mut records).is_ok() {}
            drop(session);
            let polite = self.stream.set_timeouts(None, Some(std::time::Duration::from_millis(200)));
            let _ = polite.and_then(|()| self.stream.send(&records, &[], || false));
        }
        self.stream.shutdown();
    }
}

fn session(tls: &Mutex<Box<ServerConnection>>) -> MutexGuard<'_, Box<ServerConnection>> {
    tls.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Incoming {
    /// The socket.
    pub fn stream(&self) -> &Stream {
        self.link.stream()
    }
}

impl Read for Incoming {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &self.link.tls else { return { &*self.link.stream }.read(buf) };
        loop {
            {
                let mut session = session(tls);
                match session.reader().read(buf) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    outcome => return outcome,
                }
                let mut rest = &self.raw[self.taken..];
                if !rest.is_empty() {
                    let taken = session.read_tls(&mut rest)?;
                    self.taken += taken;
                    session.process_new_packets().map_err(io::Error::other)?;
                    if taken > 0 {
                        continue;
                    }
                }
            }
            self.raw.resize(RECORDS, 0);
            self.taken = 0;
            let received = { &*self.link.stream }.read(&mut self.raw);
            let received = match received {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                outcome => match outcome? {
                    0 => return Ok(0),
                    received => received,
                },
            };
            self.raw.truncate(received);
        }
    }
}
