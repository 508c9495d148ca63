//! An export that a job of a killed process was using, and that this one goes on with: it connects when the first worker wants to write
//! to it or read it, not before.
//!
//! Made at a start by `control::nodes`, when the guests wait for their disks: no server may keep them waiting, and one that went down
//! with us may take a moment to come back. The job's own threads wait for it, for a few seconds; then its policy for errors of
//! the target decides, and a job that stops or ignores them tries again whenever it comes back. Once there is a connection, this is
//! [`NbdTarget`] or [`NbdReader`]: one that breaks stays broken.
//!
//! Invariant: nothing is written to an export of another size, or read from it. That it is the same export otherwise nobody can tell.

use super::client::{ClientError, ClientSettings};
use super::target::FLUSHED_EVERY;
use super::{Address, NbdReader, NbdTarget};
use crate::source::{BlockStatus, FileId, Source};
use crate::target::{Policy, Target, os_text};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// How long a server may take to come back, where the client that added the node said nothing longer (`open-timeout`).
const PATIENCE: Duration = Duration::from_secs(10);

/// How long one server that accepts and does not answer is listened to; somebody may want the job to end meanwhile.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long is waited before a server that was not there is tried again.
const PAUSE: Duration = Duration::from_millis(100);

/// What a connection is for.
trait Connection: Sized {
    fn open(address: &Address, export: &str, settings: ClientSettings, policy: &Policy) -> Result<Self, ClientError>;
    fn size(&self) -> u64;
    fn interrupt(&self);
}

impl Connection for NbdTarget {
    fn open(address: &Address, export: &str, settings: ClientSettings, policy: &Policy) -> Result<Self, ClientError> {
        NbdTarget::open(address, export, settings, policy)
    }

    fn size(&self) -> u64 {
        Target::size(self)
    }

    fn interrupt(&self) {
        Target::interrupt(self);
    }
}

impl Connection for NbdReader {
    fn open(address: &Address, export: &str, settings: ClientSettings, policy: &Policy) -> Result<Self, ClientError> {
        NbdReader::open(address, export, settings, policy)
    }

    fn size(&self) -> u64 {
        Source::size(self)
    }

    fn interrupt(&self) {
        Source::interrupt(self);
    }
}

/// A connection to come.
#[derive(Debug)]
struct Late<T> {
    address: Address,
    export: String,
    settings: ClientSettings,
    policy: Policy,
    size: u64,
    connected: OnceLock<T>,
    /// Held by who connects: until when it may take.
    connecting: Mutex<Option<Instant>>,
    interrupted: AtomicBool,
}

impl<T: Connection> Late<T> {
    fn new(address: Address, export: String, settings: ClientSettings, policy: Policy, size: u64) -> Self {
        let connecting = Mutex::default();
        let (connected, interrupted) = (OnceLock::new(), AtomicBool::new(false));
        Self { address, export, settings, policy, size, connected, connecting, interrupted }
    }

    /// It; waits for it where that makes sense.
    fn there(&self) -> io::Result<&T> {
        if let Some(there) = self.connected.get() {
            return Ok(there);
        }
        let mut connecting = self.connecting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = self.connected.get() {
            return Ok(there);
        }
        let give_up = *connecting.get_or_insert_with(|| Instant::now() + PATIENCE.max(self.settings.open));
        loop {
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it was told to end"));
            }
            match self.connect() {
                Ok(there) => {
                    let there = self.connected.get_or_init(|| there);
                    // Either this sees that it was told to end, or whoever tells it sees the connection.
                    fence(Ordering::SeqCst);
                    if self.interrupted.load(Ordering::SeqCst) {
                        there.interrupt();
                    }
                    return Ok(there);
                }
                Err(ClientError::Connect { .. } | ClientError::Lost(_)) if Instant::now() < give_up => {
                    std::thread::sleep(PAUSE);
                }
                Err(ClientError::Connect { address, source }) => {
                    let text = format!("Failed to connect to '{address}': {}", os_text(&source));
                    return Err(io::Error::new(source.kind(), text));
                }
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
    }

    fn connect(&self) -> Result<T, ClientError> {
        let settings = ClientSettings {
            open: Duration::ZERO,
            handshake: HANDSHAKE.min(self.settings.handshake),
            request: self.settings.request,
        };
        let there = T::open(&self.address, &self.export, settings, &self.policy)?;
        match there.size() == self.size {
            true => Ok(there),
            false => Err(ClientError::Refused(format!(
                "Export '{}' has {} bytes now, it had {}",
                self.export,
                there.size(),
                self.size
            ))),
        }
    }

    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(there) = self.connected.get() {
            there.interrupt();
        }
    }
}

/// An export that is written once it is there.
#[derive(Debug)]
pub struct LateTarget {
    late: Late<NbdTarget>,
    cluster: u64,
}

impl LateTarget {
    /// The export, which had this size and this natural unit of writing.
    pub fn new(
        address: Address,
        export: String,
        settings: ClientSettings,
        policy: Policy,
        size: u64,
        cluster: u64,
    ) -> Self {
        Self { late: Late::new(address, export, settings, policy, size), cluster }
    }
}

/// An export that is read once it is there.
#[derive(Debug)]
pub struct LateReader(Late<NbdReader>);

impl LateReader {
    /// The export, which had this size.
    pub fn new(address: Address, export: String, settings: ClientSettings, policy: Policy, size: u64) -> Self {
        Self(Late::new(address, export, settings, policy, size))
    }
}

impl Source for LateReader {
    fn size(&self) -> u64 {
        self.0.size
    }

    /// The most that a source may ask for, until it is known.
    fn alignment(&self) -> u32 {
        self.0.connected.get().map_or(4096, Source::alignment)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.there()?.read_at(buf, offset)
    }

    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        self.0.there()?.block_status(offset, limit)
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }

    fn interrupt(&self) {
        self.0.interrupt();
    }
}

impl Target for LateTarget {
    fn size(&self) -> u64 {
        self.late.size
    }

    fn cluster_size(&self) -> u64 {
        self.late.connected.get().map_or(self.cluster, Target::cluster_size)
    }

    fn alignment(&self) -> u32 {
        self.late.connected.get().map_or(1, Target::alignment)
    }

    fn reads_zero(&self) -> bool {
        false
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.late.there()?.write_at(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.late.there()?.write_zeroes_at(offset, len)
    }

    fn note_down(&self) -> io::Result<()> {
        self.late.there()?.note_down()
    }

    fn noted_every(&self) -> Duration {
        FLUSHED_EVERY
    }

    fn flush(&self) -> io::Result<()> {
        self.late.there()?.flush()
    }

    fn conclude(&self) -> io::Result<()> {
        self.late.there()?.conclude()
    }

    fn interrupt(&self) {
        self.late.interrupt();
    }

    fn abandon(&self) -> io::Result<()> {
        Ok(())
    }

    fn file_ids(&self) -> &[FileId] {
        &[]
    }

    fn format_name(&self) -> &'static str {
        "nbd"
    }

    fn name(&self) -> String {
        self.late.address.url(&self.late.export)
    }
}
