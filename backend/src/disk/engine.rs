//! One queue thread's io_uring: submits a batch with one system call, and with the same call waits for completions and
//! for wake-ups together.
//!
//! Knows nothing of requests: an operation has a token, a completion has the token and the kernel's result. The owner
//! keeps the memory that an operation points to alive and in place until its completion has come.

use super::file::DiskFile;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use thiserror::Error;

/// The disk is the only registered file.
const DISK: types::Fixed = types::Fixed(0);

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
    ring: IoUring,
}

impl Engine {
    /// A ring for up to `depth` operations at once.
    pub fn new(disk: &DiskFile, depth: u32) -> Result<Self, EngineError> {
        // Room for a wake-up and a kick beside a full queue.
        let entries = (depth + 8).next_power_of_two();
        // Completions are made when this thread asks for them, not by interrupting it; older kernels go without.
        let modern = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_cqsize(entries * 2)
            .setup_clamp()
            .build(entries);
        let ring = modern.or_else(|_| IoUring::builder().setup_cqsize(entries * 2).setup_clamp().build(entries));
        let ring = ring.map_err(EngineError::Setup)?;
        ring.submitter().register_files(&[disk.as_fd().as_raw_fd()]).map_err(EngineError::Register)?;
        Ok(Self { ring })
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        loop {
            // SAFETY: the entry's memory is kept by our caller until its completion, as `submit` and `watch` demand.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return Ok(());
            }
            // The ring is full: hand it over and try again.
            self.enter(0)?;
        }
    }

    /// Queues an operation; [`Engine::wait`] hands it to the kernel.
    ///
    /// # Safety
    /// The iovecs, and the memory they point to, stay in place until the completion of `token` has been seen.
    pub unsafe fn submit(&mut self, operation: Operation, token: u64) -> io::Result<()> {
        const KEEP_SIZE: i32 = libc::FALLOC_FL_KEEP_SIZE;
        let entry = match operation {
            Operation::Read { offset, iovecs, count } => opcode::Readv::new(DISK, iovecs, count).offset(offset).build(),
            Operation::Write { offset, iovecs, count, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(DISK, iovecs, count).offset(offset).rw_flags(flags).build()
            }
            Operation::Sync => opcode::Fsync::new(DISK).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::PunchHole { offset, len } => {
                opcode::Fallocate::new(DISK, len).offset(offset).mode(libc::FALLOC_FL_PUNCH_HOLE | KEEP_SIZE).build()
            }
            Operation::ZeroRange { offset, len } => {
                opcode::Fallocate::new(DISK, len).offset(offset).mode(libc::FALLOC_FL_ZERO_RANGE | KEEP_SIZE).build()
            }
        };
        self.push(&entry.user_data(token))
    }

    /// Reports each time `eventfd` is signalled, without it being read, until a completion says that no more will come.
    /// The descriptor must stay open until then, or until the engine is gone.
    pub fn watch(&mut self, eventfd: &impl AsRawFd, token: u64) -> io::Result<()> {
        let entry = opcode::PollAdd::new(types::Fd(eventfd.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        self.push(&entry.user_data(token))
    }

    /// Hands everything over and waits for at least `want` completions. Returns early, without error, on a signal.
    pub fn wait(&mut self, want: usize) -> io::Result<()> {
        self.enter(want)
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        match self.ring.submit_and_wait(want) {
            Ok(_) => Ok(()),
            // A signal; or more completions wait than the kernel likes, and the caller is about to take them.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves all completions that have come into `into`.
    pub fn completions(&mut self, into: &mut Vec<Completion>) {
        into.extend(self.ring.completion().map(|entry| Completion {
            token: entry.user_data(),
            result: entry.result(),
            more: cqueue::more(entry.flags()),
        }));
    }
}
