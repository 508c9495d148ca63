//! One queue thread's io_uring: submits a batch with one system call, and with the same call waits for completions and
//! for wake-ups together.
//!
//! Knows nothing of requests: an operation has a token, a completion has the token and the kernel's result. The owner
//! keeps the memory that an operation points to alive and in place until its completion has come.

#[cfg(test)]
mod tests;

use super::enter::Entrance;
use super::file::{DiskFile, Medium};
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use thiserror::Error;

/// The disk is the only registered file.
const DISK: types::Fixed = types::Fixed(0);

/// So many operations are handed over by themselves if the kernel has none. Of more than two in one system call it keeps all back
/// until it has seen the last (`IO_PLUG_THRESHOLD`).
const FIRST: u32 = 2;

/// What the disk can be asked to do.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    /// From the disk into memory.
    Read {
        /// Where on the disk, in bytes.
        offset: u64,
        /// First of the pieces of memory.
        iovecs: *const libc::iovec,
        /// How many there are.
        count: u32,
    },
    /// From memory to the disk.
    Write {
        /// Where on the disk, in bytes.
        offset: u64,
        /// First of the pieces of memory.
        iovecs: *const libc::iovec,
        /// How many there are.
        count: u32,
        /// Whether it is durable when it is complete.
        durable: bool,
    },
    /// Makes completed writes durable.
    Sync,
    /// Makes a range read as zeroes and gives its space back.
    PunchHole {
        /// Where on the disk, in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Makes a range read as zeroes and keeps its space.
    ZeroRange {
        /// Where on the disk, in bytes.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// What came of an operation, or of a watched descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    /// As given.
    pub token: u64,
    /// Bytes, or a negative errno.
    pub result: i32,
    /// Whether more will come for this token without asking (watched descriptors).
    pub more: bool,
}

/// Why there is no ring.
#[derive(Debug, Error)]
pub enum EngineError {
    /// The kernel has none, or does not let us.
    #[error("io_uring is not available: {0}")]
    Setup(io::Error),
    /// The disk could not be registered with it.
    #[error("could not register the disk with io_uring: {0}")]
    Register(io::Error),
}

/// A ring onto one disk. Made and used by one thread.
pub struct Engine {
    // Before the ring, which has to be open when this is dropped.
    entrance: Entrance,
    ring: IoUring,
    disk: Arc<DiskFile>,
    /// Entries that the kernel has not been told of.
    queued: u32,
    /// Entries that it was told of and has not ended, watches among them.
    under_way: u32,
}

impl Engine {
    /// A ring for up to `depth` operations at once.
    pub fn new(disk: &Arc<DiskFile>, depth: u32) -> Result<Self, EngineError> {
        // Room for a wake-up and a kick beside a full queue.
        let entries = (depth + 8).next_power_of_two();
        // Completions are made when this thread asks for them, not by interrupting it, and a flag says that there are
        // some; older kernels go without.
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(entries * 2)
            .setup_clamp()
            .build(entries);
        let ring = modern.or_else(|_| IoUring::builder().setup_cqsize(entries * 2).setup_clamp().build(entries));
        let ring = ring.map_err(EngineError::Setup)?;
        ring.submitter().register_files(&[disk.as_fd().as_raw_fd()]).map_err(EngineError::Register)?;
        let entrance = Entrance::new(ring.as_raw_fd(), ring.params().is_feature_no_iowait());
        Ok(Self { entrance, ring, disk: Arc::clone(disk), queued: 0, under_way: 0 })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the entry's memory is kept by our caller until its completion, as `begin` and `watch` demand.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.queued += 1;
                return Ok(());
            }
            // The ring is full: hand it over and try again.
            self.enter(0, false)?;
        }
    }

    /// Carries an operation out at once where that is the cheapest way, and answers its result (bytes, or a negative errno);
    /// else queues it and answers `None`: [`Engine::wait`] hands it to the kernel, and a completion of `token` tells.
    ///
    /// Of many operations a disk without work gets the first [`FIRST`] at once, then each time as many as it has already: else it
    /// would stand still until the last of them is prepared.
    ///
    /// # Safety
    /// The iovecs, and the memory they point to, are mapped, and stay in place until the result has come.
    #[inline]
    pub unsafe fn begin(&mut self, operation: Operation, token: u64) -> io::Result<Option<i32>> {
        // SAFETY: our caller's promise.
        if let Some(result) = unsafe { at_once(&self.disk, &operation) } {
            return Ok(Some(result));
        }
        // SAFETY: our caller's promise.
        let entry = unsafe { entry(&operation) };
        self.push(&entry.user_data(token))?;
        if self.queued >= self.under_way.max(FIRST) {
            self.enter(0, false)?;
        }
        Ok(None)
    }

    /// Reports each time `eventfd` is signalled, without it being read, until a completion says that no more will come.
    /// The descriptor must stay open until then, or until the engine is gone.
    pub fn watch(&mut self, eventfd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        self.push(&entry.user_data(token))
    }

    /// Hands everything over and waits for at least `want` completions. Returns early, without error, on a signal. `idle`: no
    /// operation is under way, so that the wait is for somebody to want one.
    pub fn wait(&mut self, want: u32, idle: bool) -> io::Result<()> {
        self.enter(want, idle)
    }

    /// Hands over what was queued, and lets the kernel make the completions that are due. No system call if there is
    /// neither.
    #[inline]
    pub fn flush(&mut self) -> io::Result<()> {
        if self.queued > 0 || self.due() { self.enter(0, false) } else { Ok(()) }
    }

    /// Whether there are completions to take, or to be made by [`Engine::flush`]. Costs two loads.
    #[inline]
    pub fn stirs(&mut self) -> bool {
        !self.ring.completion().is_empty() || self.due()
    }

    #[inline]
    fn due(&mut self) -> bool {
        self.ring.submission().taskrun()
    }

    fn enter(&mut self, want: u32, idle: bool) -> io::Result<()> {
        let queue = self.ring.submission();
        let (submit, events) = (queue.len() as u32, queue.taskrun() || queue.cq_overflow());
        drop(queue);
        let entered = self.entrance.enter(submit, want, events, idle);
        // The kernel moves the head of the queue beyond what it has taken, whatever it answers.
        let left = self.ring.submission().len() as u32;
        self.under_way += submit.saturating_sub(left);
        self.queued = left;
        match entered {
            Ok(()) => Ok(()),
            // A signal; or more completions wait than the kernel likes, and the caller is about to take them.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves all completions that have come into `into`.
    #[inline]
    pub fn completions(&mut self, into: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            let more = cqueue::more(entry.flags());
            self.under_way = self.under_way.saturating_sub(u32::from(!more));
            into.push(Completion { token: entry.user_data(), result: entry.result(), more });
        }
    }
}

/// Reads and writes of files that lie in memory (tmpfs) are copies. io_uring would hand each to a kernel thread, since such
/// file systems do not tell it whether they would wait; to copy here costs less than to hand over. A benchmark's null disk
/// has nothing to copy.
///
/// # Safety
/// The operation's iovecs, and the memory they point to, are mapped.
#[inline]
unsafe fn at_once(disk: &DiskFile, operation: &Operation) -> Option<i32> {
    match (disk.medium(), *operation) {
        (Medium::Device, _) => None,
        (Medium::Null, Operation::Read { iovecs, count, .. } | Operation::Write { iovecs, count, .. }) => {
            // SAFETY: our caller's promise.
            let iovecs = unsafe { std::slice::from_raw_parts(iovecs, count as usize) };
            let bytes: usize = iovecs.iter().map(|piece| piece.iov_len).sum();
            Some(i32::try_from(bytes).unwrap_or(i32::MAX))
        }
        (Medium::Memory, Operation::Read { offset, iovecs, count }) => {
            let fd = disk.as_fd().as_raw_fd();
            // SAFETY: our caller's promise; what the kernel writes there is the guest's, to which nobody has references.
            result(unsafe { libc::preadv(fd, iovecs, count as i32, offset as i64) })
        }
        (Medium::Memory, Operation::Write { offset, iovecs, count, durable: false }) => {
            let fd = disk.as_fd().as_raw_fd();
            // SAFETY: our caller's promise.
            result(unsafe { libc::pwritev(fd, iovecs, count as i32, offset as i64) })
        }
        _ => None,
    }
}

/// What a system call answered; `None` if it would rather wait, which is for the ring.
#[inline]
fn result(returned: isize) -> Option<i32> {
    if returned >= 0 {
        // A read or write moves less than 2^31 bytes.
        return i32::try_from(returned).ok();
    }
    let errno = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
    (errno != libc::EAGAIN).then_some(-errno)
}

/// # Safety
/// The operation's iovecs are mapped.
#[inline]
unsafe fn entry(operation: &Operation) -> squeue::Entry {
    const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
    match *operation {
        // One piece, as most requests have, spares the kernel the walk along a vector.
        Operation::Read { offset, iovecs, count: 1 } => {
            // SAFETY: our caller's promise.
            let piece = unsafe { *iovecs };
            opcode::Read::new(DISK, piece.iov_base.cast(), piece.iov_len as u32).offset(offset).build()
        }
        Operation::Read { offset, iovecs, count } => opcode::Readv::new(DISK, iovecs, count).offset(offset).build(),
        Operation::Write { offset, iovecs, count, durable } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            if count == 1 {
                // SAFETY: our caller's promise.
                let piece = unsafe { *iovecs };
                let (base, len) = (piece.iov_base.cast::<u8>().cast_const(), piece.iov_len as u32);
                return opcode::Write::new(DISK, base, len).offset(offset).rw_flags(flags).build();
            }
            opcode::Writev::new(DISK, iovecs, count).offset(offset).rw_flags(flags).build()
        }
        Operation::Sync => opcode::Fsync::new(DISK).flags(types::FsyncFlags::DATASYNC).build(),
        Operation::PunchHole { offset, len } => {
            opcode::Fallocate::new(DISK, len).offset(offset).mode(libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE).build()
        }
        Operation::ZeroRange { offset, len } => {
            opcode::Fallocate::new(DISK, len).offset(offset).mode(libc::FALLOC_FL_ZERO_RANGE | KEEP_SIZE).build()
        }
    }
}
