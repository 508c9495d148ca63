//! One descriptor chain in, one request or one answer out.
//!
//! The write path calls [`parse`] once a chain. What it needs of the guest's bytes (header, discard
//! segment) is copied to private memory before it is looked at, so a guest that changes them
//! meanwhile changes nothing. Any layout is taken (virtio 1.x, 2.7.4): the header may be spread over
//! descriptors, and the status byte may end a descriptor that begins with data.
//!
//! Invariants: total (no input panics), bounded ([`MAX_DESCRIPTORS`], [`MAX_IOVECS`],
//! [`MAX_DATA`]), and every byte of every iovec pushed lies inside the memory given.

use std::ops::Range;

use libc::iovec;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, GuestAddress};

use super::chain::Descriptor;
use crate::memory::view::Spans;

/// The unit of offsets and lengths in the protocol, whatever the block size is.
pub const SECTOR: u64 = 512;
/// A chain longer than this is broken; a driver that heeds `seg_max` stays far below.
pub const MAX_DESCRIPTORS: usize = 1024;
/// Pieces of host memory a request may have: what one readv or writev takes.
pub const MAX_IOVECS: usize = 1024;
/// Data bytes a request may have. `seg_max` x `size_max` of the configuration space is below.
pub const MAX_DATA: u64 = 128 << 20;
/// Sectors a discard or write-zeroes may have: 16 MiB, so that one never holds the gate for long.
pub const MAX_DISCARD_SECTORS: u32 = (16 << 20) / SECTOR as u32;
/// Bytes of the answer to a GET_ID.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Status byte: done.
pub const OK: u8 = VIRTIO_BLK_S_OK as u8;
/// Status byte: failed.
pub const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
/// Status byte: not known or not offered.
pub const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

const HEADER: usize = 16;
const SEGMENT: usize = 16;

/// What a request is checked against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Size of the disk in bytes, a multiple of [`SECTOR`].
    pub capacity: u64,
    /// Refuse whatever would change the disk.
    pub read_only: bool,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From the disk into the iovecs.
    Read,
    /// From the iovecs to the disk.
    Write,
    /// Make completed writes durable.
    Flush,
    /// The range's content is of no more use.
    Discard,
    /// The range reads as zeroes; with `unmap` it may lose its blocks.
    WriteZeroes {
        /// Whether blocks may be given back.
        unmap: bool,
    },
    /// The serial number into the iovecs, see [`put_id`].
    GetId,
}

/// Where a request's status byte goes.
///
/// It points into the memory that [`parse`] was given and is of use only as long as the view of it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusPlace {
    /// In guest memory.
    pub guest: GuestAddress,
    host: *mut u8,
}

impl StatusPlace {
    /// Writes the status byte.
    ///
    /// # Safety
    /// The view of guest memory that the request was parsed with is still alive.
    pub unsafe fn write(self, code: u8) {
        // SAFETY: `parse` found this byte inside the view, which the caller has kept. The guest
        // may write it at the same time: hence volatile, and no reference.
        unsafe { self.host.write_volatile(code) }
    }
}

/// A well-formed request: `len` is above zero for all but [`Kind::Flush`], and inside the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is to be done.
    pub kind: Kind,
    /// Where on the disk, in bytes; a multiple of [`SECTOR`].
    pub offset: u64,
    /// Bytes; a multiple of [`SECTOR`] except for [`Kind::GetId`], where it is at most
    /// [`ID_BYTES`].
    pub len: u64,
    /// The data, in the vector given to [`parse`]: `len` bytes for reads and writes, at least `len`
    /// for [`Kind::GetId`], nothing otherwise.
    pub iovecs: Range<usize>,
    /// Where the status goes.
    pub status: StatusPlace,
    /// What the used ring is told on success.
    pub used_len: u32,
}

/// What became of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// To be carried out.
    Request(Request),
    /// Nothing to do but to answer: a malformed or refused request, or one of no length.
    Answer {
        /// Where the status goes.
        status: StatusPlace,
        /// [`OK`], [`IOERR`] or [`UNSUPP`].
        code: u8,
        /// What the used ring is told.
        used_len: u32,
    },
    /// Not even a place for a status: the chain goes back with length 0.
    Broken,
}

/// Parses one chain against a disk. Pushes a request's data to `iovecs` (which it allocates in only
/// while that vector grows) and leaves it as it was for anything but a request.
///
/// `chain` yields the descriptors in order, indirect tables resolved, and ends early where they are
/// invalid; that is how [`super::chain::Chain`] does it.
pub fn parse(chain: impl Iterator<Item = Descriptor>, mem: &Spans, bounds: &Bounds, iovecs: &mut Vec<iovec>) -> Parsed {
    let start = iovecs.len();
    let mut scan = Scan::new(mem, iovecs);
    let mut more = false;
    for (n, desc) in chain.enumerate() {
        more = desc.has_next();
        if n == MAX_DESCRIPTORS || scan.take(&desc).is_none() {
            more = true;
            break;
        }
    }
    // A chain whose last descriptor names a next one was cut short by an error in it.
    let status = if more { None } else { scan.status() };
    let Some(status) = status else {
        iovecs.truncate(start);
        return Parsed::Broken;
    };
    let verdict = scan.judge(bounds);
    let (writable, data_at) = (scan.writable, scan.data_at());
    match verdict {
        Ok((kind, offset, len)) if len > 0 || kind == Kind::Flush => {
            let iovecs = match kind {
                Kind::Read | Kind::Write | Kind::GetId => {
                    scan.drop_status_byte();
                    data_at..iovecs.len()
                }
                Kind::Flush | Kind::Discard | Kind::WriteZeroes { .. } => {
                    iovecs.truncate(start);
                    start..start
                }
            };
            Parsed::Request(Request {
                kind,
                offset,
                len,
                iovecs,
                status,
                // `judge` bounds it by MAX_DATA.
                used_len: u32::try_from(writable).unwrap_or(u32::MAX),
            })
        }
        other => {
            iovecs.truncate(start);
            Parsed::Answer { status, code: other.map_or_else(|code| code, |_| OK), used_len: 1 }
        }
    }
}

/// Copies a serial number to where a GET_ID wants it; answers how many bytes found room.
///
/// # Safety
/// The iovecs are those of a [`Kind::GetId`] request, and the view it was parsed with is alive.
pub unsafe fn put_id(iovecs: &[iovec], id: &[u8; ID_BYTES]) -> usize {
    let mut rest = &id[..];
    for iov in iovecs {
        let (now, later) = rest.split_at(rest.len().min(iov.iov_len));
        for (i, byte) in now.iter().enumerate() {
            // SAFETY: `i` is below `iov_len`, and `parse` found that many bytes inside the view,
            // which the caller has kept. Volatile, since the guest may look on.
            unsafe { iov.iov_base.cast::<u8>().add(i).write_volatile(*byte) }
        }
        rest = later;
    }
    ID_BYTES - rest.len()
}

/// The state of a walk along one chain.
struct Scan<'a> {
    mem: &'a Spans,
    iovecs: &'a mut Vec<iovec>,
    /// First iovec of this chain, and first that is device-writable.
    start: usize,
    first_writable: Option<usize>,
    /// Its bytes, the first one lowest; what has not come yet is zero.
    header: u128,
    header_len: usize,
    /// Device-readable bytes after the header; device-writable bytes, the status included.
    readable: u64,
    writable: u64,
    /// The last device-writable byte so far: the status byte, if nothing follows.
    last: Option<GuestAddress>,
    /// Something was outside guest memory or too much. The walk goes on for the status byte.
    fault: bool,
}

impl<'a> Scan<'a> {
    fn new(mem: &'a Spans, iovecs: &'a mut Vec<iovec>) -> Self {
        Self {
            mem,
            start: iovecs.len(),
            iovecs,
            first_writable: None,
            header: 0,
            header_len: 0,
            readable: 0,
            writable: 0,
            last: None,
            fault: false,
        }
    }

    /// Takes the next descriptor; `None` if the chain is broken by it.
    #[inline]
    fn take(&mut self, desc: &Descriptor) -> Option<()> {
        let (mut addr, mut len) = (desc.addr(), u64::from(desc.len()));
        if desc.is_write_only() {
            self.first_writable.get_or_insert(self.iovecs.len());
            if len == 0 {
                return Some(());
            }
            self.writable += len;
            // An end past the last address leaves no byte to write; a later one may follow.
            self.last = addr.checked_add(len - 1);
            self.fault |= self.last.is_none();
        } else {
            // Readable after writable is not a chain (virtio 1.x, 2.7.4.2).
            if self.first_writable.is_some() {
                return None;
            }
            if self.header_len < HEADER {
                (addr, len) = self.take_header(addr, len);
            }
            self.readable += len;
        }
        self.fault |= self.readable.max(self.writable) > MAX_DATA;
        if !self.fault && len > 0 {
            self.fault = self.push(addr, len).is_none();
        }
        Some(())
    }

    /// Takes what is missing of the header; answers what follows it in the descriptor.
    #[inline]
    fn take_header(&mut self, addr: GuestAddress, len: u64) -> (GuestAddress, u64) {
        let wanted = len.min((HEADER - self.header_len) as u64);
        if wanted == HEADER as u64 {
            // In one piece, as every driver has it.
            match self.mem.read_pair(addr.0) {
                Some((low, high)) => self.header = u128::from(low) | u128::from(high) << 64,
                None => self.fault = true,
            }
        } else {
            let mut part = [0; HEADER];
            self.fault |= self.mem.read(addr.0, &mut part[..wanted as usize]).is_none();
            self.header |= u128::from_le_bytes(part) << (8 * self.header_len);
        }
        self.header_len += wanted as usize;
        let next = addr.checked_add(wanted);
        self.fault |= next.is_none();
        (next.unwrap_or(addr), len - wanted)
    }

    /// Pushes guest memory as iovecs, one a region; neighbours in host memory become one.
    #[inline]
    fn push(&mut self, mut addr: GuestAddress, mut len: u64) -> Option<()> {
        while len > 0 {
            let (host, follow) = self.mem.at(addr.0)?;
            let piece = len.min(follow);
            let iov_len = usize::try_from(piece).ok()?;
            let side = self.first_writable.unwrap_or(self.start);
            let count = self.iovecs.len() - self.start;
            match self.iovecs[side..].last_mut() {
                Some(last) if last.iov_base as usize + last.iov_len == host as usize => {
                    last.iov_len += iov_len;
                }
                _ if count == MAX_IOVECS => return None,
                _ => self.iovecs.push(iovec { iov_base: host.cast(), iov_len }),
            }
            len -= piece;
            if len > 0 {
                addr = addr.checked_add(piece)?;
            }
        }
        Some(())
    }

    /// The place of the status byte, if there is one inside guest memory.
    fn status(&self) -> Option<StatusPlace> {
        let guest = self.last?;
        let (host, _) = self.mem.at(guest.0)?;
        Some(StatusPlace { guest, host })
    }

    /// First iovec of the data: the writable ones, or the readable ones if none is writable data.
    fn data_at(&self) -> usize {
        match self.first_writable {
            Some(at) if self.writable > 1 => at,
            _ => self.start,
        }
    }

    /// Takes the status byte, the last of all, out of the iovecs.
    fn drop_status_byte(&mut self) {
        if let Some(last) = self.iovecs.last_mut() {
            last.iov_len -= 1;
            if last.iov_len == 0 {
                self.iovecs.pop();
            }
        }
    }

    /// Kind, offset and length of the request in bytes, or the status to refuse it with.
    fn judge(&self, bounds: &Bounds) -> Result<(Kind, u64, u64), u8> {
        if self.fault || self.header_len < HEADER {
            return Err(IOERR);
        }
        let sector = (self.header >> 64) as u64;
        let kind = match self.header as u32 {
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_GET_ID => Kind::GetId,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes { unmap: false },
            _ => return Err(UNSUPP),
        };
        // `status` has seen at least one writable byte.
        let into_guest = self.writable.saturating_sub(1);
        let (from_guest_wanted, into_guest_wanted) = match kind {
            Kind::Read | Kind::GetId => (0, into_guest),
            Kind::Write | Kind::Discard | Kind::WriteZeroes { .. } => (self.readable, 0),
            Kind::Flush => (0, 0),
        };
        if (self.readable, into_guest) != (from_guest_wanted, into_guest_wanted) {
            return Err(IOERR);
        }
        match kind {
            Kind::Read => range(sector, into_guest, bounds).map(|(o, l)| (kind, o, l)),
            Kind::Flush => Ok((kind, 0, 0)),
            Kind::GetId if into_guest == 0 => Err(IOERR),
            Kind::GetId => Ok((kind, 0, into_guest.min(ID_BYTES as u64))),
            _ if bounds.read_only => Err(IOERR),
            Kind::Write => range(sector, self.readable, bounds).map(|(o, l)| (kind, o, l)),
            Kind::Discard | Kind::WriteZeroes { .. } => self.judge_segment(kind, bounds),
        }
    }

    /// The same for the one segment that a discard or a write-zeroes may have.
    fn judge_segment(&self, kind: Kind, bounds: &Bounds) -> Result<(Kind, u64, u64), u8> {
        if self.readable == 0 || !self.readable.is_multiple_of(SEGMENT as u64) {
            return Err(IOERR);
        }
        // The configuration space offers one segment a request.
        if self.readable > SEGMENT as u64 {
            return Err(UNSUPP);
        }
        let end = self.first_writable.unwrap_or(self.iovecs.len());
        let segment = private_copy(&self.iovecs[self.start..end]);
        let [s0, s1, s2, s3, s4, s5, s6, s7, rest @ ..] = segment;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let [n0, n1, n2, n3, flags @ ..] = rest;
        let sectors = u32::from_le_bytes([n0, n1, n2, n3]);
        // Unknown flags, and unmap on a discard, are to be refused (virtio 1.x, 5.2.6.2).
        let kind = match (kind, u32::from_le_bytes(flags)) {
            (Kind::Discard, 0) => Kind::Discard,
            (Kind::WriteZeroes { .. }, 0) => Kind::WriteZeroes { unmap: false },
            (Kind::WriteZeroes { .. }, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP) => Kind::WriteZeroes { unmap: true },
            _ => return Err(UNSUPP),
        };
        if sectors > MAX_DISCARD_SECTORS {
            return Err(IOERR);
        }
        range(sector, u64::from(sectors) * SECTOR, bounds).map(|(o, l)| (kind, o, l))
    }
}

/// The byte range of a request, if it is whole sectors inside the disk.
fn range(sector: u64, len: u64, bounds: &Bounds) -> Result<(u64, u64), u8> {
    let offset = sector.checked_mul(SECTOR).ok_or(IOERR)?;
    let end = offset.checked_add(len).ok_or(IOERR)?;
    if !len.is_multiple_of(SECTOR) || end > bounds.capacity {
        return Err(IOERR);
    }
    Ok((offset, len))
}

/// Copies the first bytes that `iovecs` describe; what they lack stays zero.
fn private_copy(iovecs: &[iovec]) -> [u8; SEGMENT] {
    let mut copy = [0; SEGMENT];
    let mut at = 0;
    for iov in iovecs {
        let n = iov.iov_len.min(SEGMENT - at);
        for (i, byte) in copy[at..at + n].iter_mut().enumerate() {
            // SAFETY: called by `Scan` only, on iovecs it has just pushed: `iov_len` bytes from
            // `iov_base` on lie in the memory it borrows, and `i` is below that. Volatile, since the
            // guest may write there at the same time.
            *byte = unsafe { iov.iov_base.cast::<u8>().add(i).read_volatile() };
        }
        at += n;
    }
    copy
}

#[cfg(test)]
mod tests;
