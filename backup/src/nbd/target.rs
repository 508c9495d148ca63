//! An NBD export that a backup is written into.
//!
//! Made by `blockdev-add` with driver `nbd`. Workers write at once. The server is asked for zeroes rather than sent them where it
//! offers that. Invariant: what a flush covers is durable at the server, or the flush failed and so does every later one;
//! an export that cannot promise that is refused.

use super::Address;
use super::client::{Client, ClientError, ClientSettings, Request};
use super::protocol::{command, command_flag, export_flag};
use crate::source::FileId;
use crate::target::{Policy, Target};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Longest range that a server is asked to zero at once, so that each answer comes in time.
const ZEROES_MAX: u64 = 128 << 20;

/// Bounds of the natural unit of writing, whatever the server prefers.
const CLUSTERS: std::ops::RangeInclusive<u32> = 64 << 10..=2 << 20;

/// How often a copy has the server flush, if that is quick. Little and often: where its file is on the guest's disk, all that was written
/// since is ahead of the guest's next request then.
pub(super) const FLUSHED_EVERY: Duration = Duration::from_millis(20);

/// An export that is written.
#[derive(Debug)]
pub struct NbdTarget {
    client: Client,
    /// Writes are durable when answered: the export cannot flush.
    fua: bool,
    /// The server zeroes ranges.
    zeroes: AtomicBool,
    flush_failed: AtomicBool,
}

impl NbdTarget {
    /// Connects to an export that can be written.
    pub fn open(
        address: &Address,
        export: &str,
        settings: ClientSettings,
        policy: &Policy,
    ) -> Result<Self, ClientError> {
        let client = Client::connect(address, export, settings, policy)?;
        let about = client.export();
        if about.can(export_flag::READ_ONLY) {
            return Err(ClientError::ReadOnly(export.to_owned()));
        }
        let fua = !about.can(export_flag::SEND_FLUSH);
        if fua && !about.can(export_flag::SEND_FUA) {
            return Err(ClientError::NotDurable(export.to_owned()));
        }
        let zeroes = AtomicBool::new(about.can(export_flag::SEND_WRITE_ZEROES));
        Ok(Self { client, fua, zeroes, flush_failed: AtomicBool::new(false) })
    }

    fn request(&self, kind: u16, offset: u64, len: u64, payload: &[u8]) -> io::Result<()> {
        let flags = if self.fua && kind != command::FLUSH { command_flag::FUA } else { 0 };
        // No piece is longer than fits.
        self.client.request(Request { kind, flags, offset, len: len as u32 }, payload)
    }

    fn write_pieces(&self, buf: &[u8], mut offset: u64) -> io::Result<()> {
        for piece in buf.chunks(self.client.export().max_payload as usize) {
            self.request(command::WRITE, offset, piece.len() as u64, piece)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Sends zeroes as data, for servers that cannot make them.
    fn send_zeroes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        // A multiple of every minimum block size.
        let buffer = vec![0; len.min(1 << 20) as usize];
        let end = offset + len;
        while offset < end {
            let piece = &buffer[..(end - offset).min(buffer.len() as u64) as usize];
            self.write_pieces(piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }
}

impl Target for NbdTarget {
    fn size(&self) -> u64 {
        self.client.export().size
    }

    fn cluster_size(&self) -> u64 {
        self.client.export().preferred_block.clamp(*CLUSTERS.start(), *CLUSTERS.end()).into()
    }

    fn alignment(&self) -> u32 {
        self.client.export().min_block
    }

    fn reads_zero(&self) -> bool {
        false
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.client.check(offset, buf.len() as u64)?;
        self.write_pieces(buf, offset)
    }

    fn write_zeroes_at(&self, mut offset: u64, len: u64) -> io::Result<()> {
        self.client.check(offset, len)?;
        let end = offset + len;
        while offset < end {
            let piece = (end - offset).min(ZEROES_MAX);
            if self.zeroes.load(Ordering::Relaxed) {
                match self.request(command::WRITE_ZEROES, offset, piece, &[]) {
                    // It says that it can, and cannot (or not so many): nothing is lost but time.
                    Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EOVERFLOW)) => {
                        self.zeroes.store(false, Ordering::Relaxed);
                        continue;
                    }
                    outcome => outcome?,
                }
            } else {
                self.send_zeroes(offset, piece)?;
            }
            offset += piece;
        }
        Ok(())
    }

    /// The server may go with us: what it answered and has not flushed is nowhere.
    fn note_down(&self) -> io::Result<()> {
        self.flush()
    }

    fn noted_every(&self) -> Duration {
        FLUSHED_EVERY
    }

    fn flush(&self) -> io::Result<()> {
        if self.flush_failed.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let outcome = if self.fua { Ok(()) } else { self.request(command::FLUSH, 0, 0, &[]) };
        if outcome.is_err() {
            self.flush_failed.store(true, Ordering::SeqCst);
        }
        outcome
    }

    fn conclude(&self) -> io::Result<()> {
        self.flush()
    }

    fn interrupt(&self) {
        self.client.shutdown();
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
        self.client.name().to_owned()
    }
}
