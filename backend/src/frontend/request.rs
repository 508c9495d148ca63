//! Requests, completions and statuses as the front end's users see them (virtio 1.2, section 5.2.6).

use std::fmt;
use std::time::Duration;

use virtio_bindings::virtio_blk as vb;

/// Bytes of a request's header.
pub(super) const HEADER_LEN: usize = 16;
/// Bytes of a discard or write-zeroes segment.
pub(super) const SEGMENT_LEN: usize = 16;
/// Bytes of a GET_ID answer.
pub(super) const ID_LEN: usize = vb::VIRTIO_BLK_ID_BYTES as usize;

/// A range of the queue's data area. Who uses it for two requests in flight at once gets what a guest would get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Byte offset in the data area.
    pub offset: usize,
    /// Length in bytes.
    pub len: usize,
}

impl Buffer {
    /// The `index`th of equal slots of `len` bytes.
    pub fn slot(index: usize, len: usize) -> Self {
        Buffer { offset: index.saturating_mul(len), len }
    }
}

/// A request to the block device. Sectors have 512 bytes, whatever the disk's block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Reads `buffer.len` bytes at `sector` into the buffer.
    Read {
        /// First sector.
        sector: u64,
        /// Where the bytes go.
        buffer: Buffer,
    },
    /// Writes `buffer.len` bytes at `sector` from the buffer.
    Write {
        /// First sector.
        sector: u64,
        /// Where the bytes are.
        buffer: Buffer,
    },
    /// Makes completed writes durable.
    Flush,
    /// Says that nobody needs the range any more.
    Discard {
        /// First sector.
        sector: u64,
        /// How many sectors.
        sectors: u32,
    },
    /// Makes the range read as zeroes.
    WriteZeroes {
        /// First sector.
        sector: u64,
        /// How many sectors.
        sectors: u32,
        /// Whether the range may be deallocated.
        unmap: bool,
    },
    /// Reads the disk's serial, 20 bytes, into the buffer (which has at least that length).
    GetId {
        /// Where the serial goes.
        buffer: Buffer,
    },
}

impl Request {
    /// Its type, as the header says it.
    pub(super) fn kind(&self) -> u32 {
        match self {
            Request::Read { .. } => vb::VIRTIO_BLK_T_IN,
            Request::Write { .. } => vb::VIRTIO_BLK_T_OUT,
            Request::Flush => vb::VIRTIO_BLK_T_FLUSH,
            Request::Discard { .. } => vb::VIRTIO_BLK_T_DISCARD,
            Request::WriteZeroes { .. } => vb::VIRTIO_BLK_T_WRITE_ZEROES,
            Request::GetId { .. } => vb::VIRTIO_BLK_T_GET_ID,
        }
    }

    /// The header's bytes.
    pub(super) fn header(&self) -> [u8; HEADER_LEN] {
        let sector = match self {
            Request::Read { sector, .. } | Request::Write { sector, .. } => *sector,
            _ => 0,
        };
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&self.kind().to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    /// The discard or write-zeroes segment's bytes, if it is such a request.
    pub(super) fn segment(&self) -> Option<[u8; SEGMENT_LEN]> {
        let (sector, sectors, flags) = match *self {
            Request::Discard { sector, sectors } => (sector, sectors, 0),
            Request::WriteZeroes { sector, sectors, unmap } => {
                (sector, sectors, u32::from(unmap) * vb::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            }
            _ => return None,
        };
        let mut segment = [0; SEGMENT_LEN];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        Some(segment)
    }

    /// The data buffer, and whether the device writes to it.
    pub(super) fn data(&self) -> Option<(Buffer, bool)> {
        match *self {
            Request::Read { buffer, .. } => Some((buffer, true)),
            Request::Write { buffer, .. } => Some((buffer, false)),
            Request::GetId { buffer } => Some((Buffer { offset: buffer.offset, len: buffer.len.min(ID_LEN) }, true)),
            _ => None,
        }
    }
}

/// A request's status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed.
    IoError,
    /// The device does not know the request.
    Unsupported,
    /// The device has not written the status byte at all.
    Missing,
    /// A value without a meaning.
    Other(u8),
}

/// What the front end puts into the status byte before the request goes out.
pub(super) const STATUS_MISSING: u8 = 0xff;

impl Status {
    pub(super) fn from_byte(byte: u8) -> Self {
        match u32::from(byte) {
            vb::VIRTIO_BLK_S_OK => Status::Ok,
            vb::VIRTIO_BLK_S_IOERR => Status::IoError,
            vb::VIRTIO_BLK_S_UNSUPP => Status::Unsupported,
            _ if byte == STATUS_MISSING => Status::Missing,
            _ => Status::Other(byte),
        }
    }

    /// Whether the request was done.
    pub fn is_ok(self) -> bool {
        self == Status::Ok
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Ok => f.write_str("ok"),
            Status::IoError => f.write_str("I/O error"),
            Status::Unsupported => f.write_str("unsupported"),
            Status::Missing => f.write_str("no status written"),
            Status::Other(byte) => write!(f, "unknown status {byte}"),
        }
    }
}

/// A request that the device has finished.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// What `submit` was given.
    pub token: u64,
    /// The status byte.
    pub status: Status,
    /// Bytes that the device says it wrote, the status byte included.
    pub written: u32,
    /// From `submit` to the moment the completion was taken from the ring.
    pub latency: Duration,
}
