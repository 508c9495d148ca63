//! A blocking disk over one queue, for whoever wants bytes and not rings. Large transfers are cut into requests that
//! travel together.

use std::time::Instant;

use super::config::DeviceConfig;
use super::error::FrontendError;
use super::guest::Guest;
use super::queue::{Queue, Wait};
use super::request::{Buffer, Completion, ID_LEN, Request};

const SECTOR: u64 = 512;

/// A disk with blocking calls. Made by [`Guest::into_disk`] or from a queue.
pub struct Disk {
    // Before the guest: the queue goes first.
    queue: Queue,
    guest: Option<Guest>,
    done: Vec<Completion>,
}

/// The caller's bytes and which way they go.
enum Direction<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Direction<'_> {
    fn name(&self) -> &'static str {
        match self {
            Direction::Read(_) => "read",
            Direction::Write(_) => "write",
        }
    }

    fn len(&self) -> usize {
        match self {
            Direction::Read(bytes) => bytes.len(),
            Direction::Write(bytes) => bytes.len(),
        }
    }
}

/// One piece of a transfer, in the caller's bytes.
#[derive(Clone, Copy)]
struct Piece {
    start: usize,
    len: usize,
}

impl Disk {
    /// A disk over `queue`; `guest` is kept alive with it, if given.
    pub fn new(queue: Queue, guest: Option<Guest>) -> Self {
        Disk { queue, guest, done: Vec::new() }
    }

    /// The config space, as read at connect.
    pub fn config(&self) -> &DeviceConfig {
        self.queue.config()
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.config().size()
    }

    /// The guest, if it lives here.
    pub fn guest_mut(&mut self) -> Option<&mut Guest> {
        self.guest.as_mut()
    }

    /// Queue and guest back.
    pub fn into_parts(self) -> (Queue, Option<Guest>) {
        (self.queue, self.guest)
    }

    /// Fills `bytes` from `offset`; both in whole sectors.
    pub fn read_at(&mut self, bytes: &mut [u8], offset: u64) -> Result<(), FrontendError> {
        self.transfer(Direction::Read(bytes), offset)
    }

    /// Writes `bytes` at `offset`; both in whole sectors.
    pub fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<(), FrontendError> {
        self.transfer(Direction::Write(bytes), offset)
    }

    /// Makes completed writes durable.
    pub fn flush(&mut self) -> Result<(), FrontendError> {
        self.settle()?;
        self.queue.submit(Request::Flush, 0)?;
        self.finish("flush", 0)
    }

    /// Discards a range in whole sectors, in as many requests as the device's limits need.
    pub fn discard(&mut self, offset: u64, len: u64) -> Result<(), FrontendError> {
        let limit = self.config().max_discard_sectors;
        self.range("discard", offset, len, limit, |sector, sectors| Request::Discard { sector, sectors })
    }

    /// Zeroes a range in whole sectors, in as many requests as the device's limits need.
    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<(), FrontendError> {
        let limit = self.config().max_write_zeroes_sectors;
        self.range("write zeroes", offset, len, limit, |sector, sectors| Request::WriteZeroes {
            sector,
            sectors,
            unmap,
        })
    }

    /// The disk's serial.
    pub fn id(&mut self) -> Result<String, FrontendError> {
        self.settle()?;
        let buffer = Buffer { offset: 0, len: ID_LEN };
        self.queue.write_data(0, &[0; ID_LEN])?;
        self.queue.submit(Request::GetId { buffer }, 0)?;
        self.finish("get id", 0)?;
        let mut id = [0; ID_LEN];
        self.queue.read_data(0, &mut id)?;
        let end = id.iter().position(|&b| b == 0).unwrap_or(ID_LEN);
        Ok(String::from_utf8_lossy(&id[..end]).into_owned())
    }

    /// Length and number of the pieces that the data area is cut into.
    fn slots(&self) -> Result<(usize, usize), FrontendError> {
        let area = self.queue.data_size();
        let len = self.queue.max_request().min(area) / 512 * 512;
        if len == 0 {
            return Err(FrontendError::BadOptions("no room for a sector in the data area".into()));
        }
        Ok((len, area / len))
    }

    /// Cuts a transfer into pieces that fit the data area's slots and keeps as many of them in flight as there is
    /// room for. After a failure no new piece goes out, and the first failure is told once all have come back.
    fn transfer(&mut self, mut bytes: Direction<'_>, offset: u64) -> Result<(), FrontendError> {
        self.settle()?;
        let what = bytes.name();
        let len = bytes.len();
        let first = sectors(what, offset, len as u64)?;
        let (slot_len, slots) = self.slots()?;
        let mut free: Vec<usize> = (0..slots).rev().collect();
        let mut pieces: Vec<Option<Piece>> = vec![None; slots];
        let mut next = 0;
        let mut failed = None;
        while self.queue.in_flight() > 0 || (next < len && failed.is_none()) {
            while next < len && failed.is_none() {
                let Some(slot) = free.pop() else { break };
                let piece = Piece { start: next, len: slot_len.min(len - next) };
                let buffer = Buffer { offset: slot * slot_len, len: piece.len };
                let sector = first + next as u64 / SECTOR;
                let request = match &bytes {
                    Direction::Read(_) => Request::Read { sector, buffer },
                    Direction::Write(bytes) => {
                        let bytes = &bytes[piece.start..piece.start + piece.len];
                        self.queue.write_data(buffer.offset, bytes)?;
                        Request::Write { sector, buffer }
                    }
                };
                match self.queue.submit(request, slot as u64) {
                    Ok(()) => {}
                    Err(FrontendError::QueueFull) if self.queue.in_flight() > 0 => {
                        free.push(slot);
                        break;
                    }
                    Err(e) => return Err(e),
                }
                pieces[slot] = Some(piece);
                next += piece.len;
            }
            self.wait_some()?;
            for completion in self.done.drain(..) {
                let slot = completion.token as usize;
                let Some(piece) = pieces.get_mut(slot).and_then(Option::take) else {
                    continue;
                };
                free.push(slot);
                if !completion.status.is_ok() {
                    failed.get_or_insert(FrontendError::Failed {
                        request: what,
                        offset: offset + piece.start as u64,
                        status: completion.status,
                    });
                } else if let Direction::Read(bytes) = &mut bytes {
                    let bytes = &mut bytes[piece.start..piece.start + piece.len];
                    self.queue.read_data(slot * slot_len, bytes)?;
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn range(
        &mut self,
        what: &'static str,
        offset: u64,
        len: u64,
        limit: u32,
        request: impl Fn(u64, u32) -> Request,
    ) -> Result<(), FrontendError> {
        self.settle()?;
        let mut sector = sectors(what, offset, len)?;
        let end = sector + len / SECTOR;
        let limit = if limit == 0 { u32::MAX } else { limit };
        while sector < end {
            let count = u32::try_from(end - sector).unwrap_or(u32::MAX).min(limit);
            self.queue.submit(request(sector, count), 0)?;
            self.finish(what, sector * SECTOR)?;
            sector += u64::from(count);
        }
        Ok(())
    }

    /// Kicks and waits for the one request in flight.
    fn finish(&mut self, request: &'static str, offset: u64) -> Result<(), FrontendError> {
        while self.queue.in_flight() > 0 {
            self.wait_some()?;
        }
        match std::mem::take(&mut self.done).last() {
            Some(c) if !c.status.is_ok() => Err(FrontendError::Failed { request, offset, status: c.status }),
            _ => Ok(()),
        }
    }

    /// Waits for what an earlier call that timed out or lost its back end has left in flight.
    fn settle(&mut self) -> Result<(), FrontendError> {
        while self.queue.in_flight() > 0 {
            self.wait_some()?;
        }
        self.done.clear();
        Ok(())
    }

    /// Kicks and takes at least one completion into `done`.
    fn wait_some(&mut self) -> Result<(), FrontendError> {
        self.queue.kick()?;
        let limit = self.queue.answer_within();
        let give_up = Instant::now() + limit;
        while self.queue.completions(&mut self.done)? == 0 {
            let left = give_up.saturating_duration_since(Instant::now());
            if self.queue.wait(Some(left))? == Wait::TimedOut {
                return Err(FrontendError::TimedOut(limit));
            }
        }
        Ok(())
    }
}

/// The first sector of a range that has to lie in whole sectors.
fn sectors(request: &'static str, offset: u64, len: u64) -> Result<u64, FrontendError> {
    if !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) || offset.checked_add(len).is_none() {
        return Err(FrontendError::NotInSectors { request, offset, len });
    }
    Ok(offset / SECTOR)
}
