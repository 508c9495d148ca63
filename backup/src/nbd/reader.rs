//! An NBD export that is read: an older image that a disk is compared with.
//!
//! Many threads read at once over one connection. Where the server offers `base:allocation`, it is asked where the zeroes are, for a
//! long stretch at once. Invariant: what a read gives came from the server whole, or the read fails; what reads as zeroes is
//! what the server says reads as zeroes, not what merely takes no space there.

use super::Address;
use super::client::{Client, ClientError, ClientSettings};
use super::protocol::allocation;
use crate::source::{BlockStatus, FileId, Source};
use crate::target::Policy;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Bytes that a server is asked about at once.
const STRETCH: u64 = 1 << 30;

/// Part of an export, all data or all zeroes.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    start: u64,
    end: u64,
    status: BlockStatus,
}

/// An export that is read.
#[derive(Debug)]
pub struct NbdReader {
    client: Client,
    /// What the server said last, in order.
    known: Mutex<Vec<Stretch>>,
}

impl NbdReader {
    /// Connects to an export.
    pub fn open(
        address: &Address,
        export: &str,
        settings: ClientSettings,
        policy: &Policy,
    ) -> Result<Self, ClientError> {
        let client = Client::connect_to_read(address, export, settings, policy)?;
        Ok(Self { client, known: Mutex::default() })
    }

    /// QEMU's way to write where this leads.
    pub fn name(&self) -> &str {
        self.client.name()
    }

    /// What was said last of `offset`, if anything.
    fn recall(&self, offset: u64) -> Option<Stretch> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let at = known.partition_point(|stretch| stretch.end <= offset);
        known.get(at).filter(|stretch| stretch.start <= offset).copied()
    }
}

impl Source for NbdReader {
    fn size(&self) -> u64 {
        self.client.export().size
    }

    fn alignment(&self) -> u32 {
        // Blocks may be larger than what a source may ask for; whoever reads larger pieces meets those too.
        self.client.export().min_block.min(4096)
    }

    fn read_at(&self, buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        self.client.check(offset, buf.len() as u64)?;
        for piece in buf.chunks_mut(self.client.export().max_payload as usize) {
            let bytes = self.client.read(offset, vec![0; piece.len()])?;
            piece.copy_from_slice(&bytes);
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        let until = |stretch: Stretch| (stretch.status, (stretch.end - offset).min(limit));
        if let Some(stretch) = self.recall(offset) {
            return Ok(until(stretch));
        }
        let block = u64::from(self.client.export().min_block);
        let len = STRETCH.min(self.size().saturating_sub(offset)) / block * block;
        self.client.check(offset, len)?;
        let Some(extents) = self.client.allocation(offset, len as u32)? else { return Ok((BlockStatus::Data, limit)) };
        let mut said: Vec<Stretch> = Vec::new();
        let mut start = offset;
        for (len, flags) in extents {
            let status = if flags & allocation::ZERO != 0 { BlockStatus::Hole } else { BlockStatus::Data };
            // The last one may go on beyond what was asked about.
            let end = (start + u64::from(len)).min(self.size());
            match said.last_mut() {
                Some(last) if last.status == status => last.end = end,
                _ if start < end => said.push(Stretch { start, end, status }),
                _ => {}
            }
            start = end;
        }
        let Some(first) = said.first().copied() else { return Ok((BlockStatus::Data, limit)) };
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = said;
        Ok(until(first))
    }

    fn file_id(&self) -> Option<FileId> {
        None
    }

    fn interrupt(&self) {
        self.client.shutdown();
    }
}
