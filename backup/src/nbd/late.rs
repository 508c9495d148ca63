//! An export that a killed process was writing a backup into, and that this one goes on with: it connects when the first worker wants
//! to write, not before.
//!
//! Made at a start by `control::nodes`, when the guests wait for their disks: no server may keep them waiting, and one that went down
//! with us may take a moment to come back. The job's own threads wait for it, for a few seconds; then its policy for errors of
//! the target decides, and a job that stops or ignores them tries again whenever it writes. Once there is a connection, this is
//! [`NbdTarget`]: one that breaks stays broken.
//!
//! Invariant: nothing is written to an export of another size. That it is the same export otherwise nobody can tell.

use super::client::{ClientError, ClientSettings};
use super::{Address, NbdTarget};
use crate::source::FileId;
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

/// An export that is written once it is there.
#[derive(Debug)]
pub struct LateTarget {
    address: Address,
    export: String,
    settings: ClientSettings,
    policy: Policy,
    size: u64,
    cluster: u64,
    connected: OnceLock<NbdTarget>,
    /// Held by who connects: until when it may take.
    connecting: Mutex<Option<Instant>>,
    interrupted: AtomicBool,
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
        let connecting = Mutex::default();
        let (connected, interrupted) = (OnceLock::new(), AtomicBool::new(false));
        Self { address, export, settings, policy, size, cluster, connected, connecting, interrupted }
    }

    /// The connection; waits for it where that makes sense.
    fn target(&self) -> io::Result<&NbdTarget> {
        if let Some(target) = self.connected.get() {
            return Ok(target);
        }
        let mut connecting = self.connecting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = self.connected.get() {
            return Ok(target);
        }
        let give_up = *connecting.get_or_insert_with(|| Instant::now() + PATIENCE.max(self.settings.open));
        loop {
            if self.interrupted.load(Ordering::SeqCst) {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it was told to end"));
            }
            match self.connect() {
                Ok(target) => {
                    let target = self.connected.get_or_init(|| target);
                    // Either this sees that it was told to end, or whoever tells it sees the connection.
                    fence(Ordering::SeqCst);
                    if self.interrupted.load(Ordering::SeqCst) {
                        target.interrupt();
                    }
                    return Ok(target);
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

    fn connect(&self) -> Result<NbdTarget, ClientError> {
        let settings = ClientSettings {
            open: Duration::ZERO,
            handshake: HANDSHAKE.min(self.settings.handshake),
            request: self.settings.request,
        };
        let target = NbdTarget::open(&self.address, &self.export, settings, &self.policy)?;
        match target.size() == self.size {
            true => Ok(target),
            false => Err(ClientError::Refused(format!(
                "Export '{}' has {} bytes now, it had {}",
                self.export,
                target.size(),
                self.size
            ))),
        }
    }
}

impl Target for LateTarget {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        self.connected.get().map_or(self.cluster, Target::cluster_size)
    }

    fn alignment(&self) -> u32 {
        self.connected.get().map_or(1, Target::alignment)
    }

    fn reads_zero(&self) -> bool {
        false
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.target()?.write_at(buf, offset)
    }

    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.target()?.write_zeroes_at(offset, len)
    }

    fn note_down(&self) -> io::Result<()> {
        self.target()?.note_down()
    }

    fn flush(&self) -> io::Result<()> {
        self.target()?.flush()
    }

    fn conclude(&self) -> io::Result<()> {
        self.target()?.conclude()
    }

    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(target) = self.connected.get() {
            target.interrupt();
        }
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
        self.address.url(&self.export)
    }
}
