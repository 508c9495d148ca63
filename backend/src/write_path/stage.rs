//! How far one request is: which operation comes next, and what a result means. Pure but for copying through a bounce
//! buffer; talks to no ring and no disk.
//!
//! A result that is short leads to another operation for what remains, never to a request that counts as done. What a
//! file system cannot do (EOPNOTSUPP) has a slower way with the same outcome.

use crate::device::request::Kind;
use crate::disk::Operation;
use blkmark_backup::buffer::AlignedBuffer;
use blkmark_bitmap::ByteRange;
use libc::iovec;
use std::sync::OnceLock;

/// Bytes that go through a bounce buffer at once; it bounds what a guest with odd buffers can make us allocate.
const BOUNCE: usize = 256 << 10;

/// Bytes of the shared block of zeroes.
const ZEROES: usize = 1 << 20;

/// Which way the request takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Read,
    Write,
    Sync,
    /// A discard: a hint, so a file system without holes has nothing to do.
    Discard,
    ZeroRange,
    PunchZeroes,
    WriteZeroes,
}

/// What holds for all requests of a queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// What the disk wants of memory, in bytes.
    pub(super) memory_alignment: u32,
    /// The guest has no way to flush (it did not take VIRTIO_BLK_F_FLUSH), so an answer means durable (virtio 1.2,
    /// 5.2.6.2).
    pub(super) write_through: bool,
}

/// What follows a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Ask [`Stage::operation`] for what comes next.
    Again,
    /// All done.
    Done,
    /// Failed for good, with this errno.
    Failed(i32),
}

/// The progress of one request. Kept in its table place, so that its memory stays where the kernel was told.
pub(super) struct Stage {
    way: Way,
    offset: u64,
    len: u64,
    done: u64,
    /// Whether a change has to be durable before it is answered.
    durable: bool,
    /// Pieces of memory of the operation under way, where they are not the request's own.
    pieces: Vec<iovec>,
    bounce: Option<AlignedBuffer>,
}

fn zeroes() -> &'static AlignedBuffer {
    static SHARED: OnceLock<AlignedBuffer> = OnceLock::new();
    SHARED.get_or_init(|| AlignedBuffer::new(ZEROES))
}

impl Stage {
    pub(super) fn idle() -> Self {
        Self { way: Way::Sync, offset: 0, len: 0, done: 0, durable: false, pieces: Vec::new(), bounce: None }
    }

    /// Begins a request.
    pub(super) fn begin(&mut self, kind: Kind, range: ByteRange, iovecs: &[iovec], rules: Rules) {
        self.way = match kind {
            Kind::Read => Way::Read,
            Kind::Write => Way::Write,
            Kind::Discard => Way::Discard,
            Kind::WriteZeroes { unmap: true } => Way::PunchZeroes,
            Kind::WriteZeroes { unmap: false } => Way::ZeroRange,
            Kind::Flush | Kind::GetId => Way::Sync,
        };
        (self.offset, self.len, self.done) = (range.start(), range.len(), 0);
        self.durable = rules.write_through;
        self.pieces.clear();
        let aligned =
            |piece: &iovec| (piece.iov_base.addr() | piece.iov_len) & (rules.memory_alignment as usize - 1) == 0;
        self.bounce = None;
        if matches!(self.way, Way::Read | Way::Write) && !iovecs.iter().all(aligned) {
            self.bounce = Some(AlignedBuffer::new((range.len() as usize).min(BOUNCE)));
        }
    }

    /// The request is over: lets go of what it needed.
    pub(super) fn end(&mut self) {
        self.bounce = None;
    }

    /// What to ask of the disk next. The pointers in it stay good until [`Stage::completed`].
    ///
    /// # Safety
    /// `iovecs` are the request's, and the memory they point to is mapped.
    pub(super) unsafe fn operation(&mut self, iovecs: &[iovec]) -> Operation {
        let (offset, len) = (self.offset + self.done, self.len - self.done);
        match self.way {
            Way::Sync => return Operation::Sync,
            Way::Discard | Way::PunchZeroes => return Operation::PunchHole { offset, len },
            Way::ZeroRange => return Operation::ZeroRange { offset, len },
            Way::WriteZeroes => {
                let base = zeroes().as_ptr().cast_mut().cast();
                self.pieces.clear();
                let mut left = len as usize;
                while left > 0 {
                    let iov_len = left.min(ZEROES);
                    self.pieces.push(iovec { iov_base: base, iov_len });
                    left -= iov_len;
                }
            }
            Way::Read | Way::Write => {
                if let Some(bounce) = &mut self.bounce {
                    let piece = bounce.len().min(len as usize);
                    if self.way == Way::Write {
                        // SAFETY: our caller's promise about `iovecs`.
                        unsafe { copy(iovecs, self.done, Some(&mut bounce[..piece]), None) };
                    }
                    self.pieces.clear();
                    self.pieces.push(iovec { iov_base: bounce.as_mut_ptr().cast(), iov_len: piece });
                } else if self.done > 0 {
                    self.pieces.clear();
                    let mut skip = self.done as usize;
                    for piece in iovecs {
                        let gone = skip.min(piece.iov_len);
                        skip -= gone;
                        if gone < piece.iov_len {
                            // In bounds: `gone` is below the piece's length.
                            let iov_base = piece.iov_base.wrapping_byte_add(gone);
                            self.pieces.push(iovec { iov_base, iov_len: piece.iov_len - gone });
                        }
                    }
                }
            }
        }
        let pieces = if self.pieces.is_empty() { iovecs } else { &self.pieces };
        let (iovecs, count) = (pieces.as_ptr(), pieces.len() as u32);
        match self.way {
            Way::Read => Operation::Read { offset, iovecs, count },
            _ => Operation::Write { offset, iovecs, count, durable: self.durable },
        }
    }

    /// Takes a result: bytes, or a negative errno.
    ///
    /// # Safety
    /// As for [`Stage::operation`].
    pub(super) unsafe fn completed(&mut self, result: i32, iovecs: &[iovec]) -> Outcome {
        if result < 0 {
            return match (-result, self.way) {
                (libc::EINTR | libc::EAGAIN, _) => Outcome::Again,
                (libc::EOPNOTSUPP, Way::Discard) => Outcome::Done,
                (libc::EOPNOTSUPP, Way::ZeroRange | Way::PunchZeroes) => {
                    self.way = if self.way == Way::ZeroRange { Way::PunchZeroes } else { Way::WriteZeroes };
                    Outcome::Again
                }
                (errno, _) => Outcome::Failed(errno),
            };
        }
        match self.way {
            Way::Discard | Way::ZeroRange | Way::PunchZeroes if self.durable => {
                self.way = Way::Sync;
                Outcome::Again
            }
            Way::Sync | Way::Discard | Way::ZeroRange | Way::PunchZeroes => Outcome::Done,
            // The end of the file where the disk should go on: somebody cut it off.
            Way::Read | Way::Write | Way::WriteZeroes if result == 0 => Outcome::Failed(libc::EIO),
            Way::Read | Way::Write | Way::WriteZeroes => {
                let moved = u64::from(result.unsigned_abs()).min(self.len - self.done);
                if let (Way::Read, Some(bounce)) = (self.way, &self.bounce) {
                    // SAFETY: our caller's promise about `iovecs`.
                    unsafe { copy(iovecs, self.done, None, Some(&bounce[..moved as usize])) };
                }
                self.done += moved;
                if self.done == self.len { Outcome::Done } else { Outcome::Again }
            }
        }
    }
}

/// Copies between a buffer and the bytes of `iovecs` from `skip` on: out of them into `out`, or `from` into them.
///
/// # Safety
/// The iovecs point to mapped memory. It may be shared with a guest that changes it meanwhile: what such a guest gets
/// is its own affair, no reference is made to that memory.
unsafe fn copy(iovecs: &[iovec], skip: u64, mut out: Option<&mut [u8]>, from: Option<&[u8]>) {
    let total = out.as_deref().or(from).map_or(0, <[u8]>::len);
    let (mut skip, mut at) = (skip as usize, 0);
    for piece in iovecs {
        let gone = skip.min(piece.iov_len);
        skip -= gone;
        let n = (piece.iov_len - gone).min(total - at);
        let guest = piece.iov_base.wrapping_byte_add(gone).cast::<u8>();
        if let Some(out) = &mut out {
            // SAFETY: `n` bytes lie in this piece and in the rest of `out`; private and guest memory never overlap.
            unsafe { std::ptr::copy_nonoverlapping(guest, out[at..at + n].as_mut_ptr(), n) };
        } else if let Some(from) = from {
            // SAFETY: likewise, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(from[at..at + n].as_ptr(), guest, n) };
        }
        at += n;
    }
}
