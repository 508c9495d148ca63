//! A second front end, written by others: the `blkio` crate drives virtio-blk over vhost-user without any code of
//! blkmark. It never notices by itself that a back end is gone, so every wait here has a limit.

use std::mem::MaybeUninit;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};

use crate::process::GIVE_UP;

/// Bytes of shared memory that one batch of requests may use.
const BUFFER: usize = 16 << 20;

/// A connected and started client.
pub struct BlkioClient {
    queues: Vec<Blkioq>,
    region: MemoryRegion,
    // After the queues, which use what it has mapped.
    blkio: Blkio,
}

/// One request.
#[derive(Debug, Clone)]
pub enum Op {
    /// Read `length` bytes at `offset`.
    Read {
        /// Byte on the disk.
        offset: u64,
        /// Bytes.
        length: usize,
    },
    /// Write bytes at `offset`.
    Write {
        /// Byte on the disk.
        offset: u64,
        /// What to write.
        data: Vec<u8>,
    },
    /// Make what was written durable.
    Flush,
    /// The range is of no more use.
    Discard {
        /// Byte on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The range shall read as zeroes.
    WriteZeroes {
        /// Byte on the disk.
        offset: u64,
        /// Bytes.
        length: u64,
        /// Whether the back end may free the space.
        unmap: bool,
    },
}

/// What became of a request: the data of a read (else empty), or a negative errno.
pub type Outcome = Result<Vec<u8>, i32>;

impl BlkioClient {
    /// Connects to a back end's socket with some queues.
    pub fn connect(socket: &Path, queues: u16) -> Result<BlkioClient> {
        Self::connect_within_limit(socket, queues, false)
    }

    /// Connects without the wish to write.
    pub fn connect_read_only(socket: &Path, queues: u16) -> Result<BlkioClient> {
        Self::connect_within_limit(socket, queues, true)
    }

    fn connect_within_limit(socket: &Path, queues: u16, read_only: bool) -> Result<BlkioClient> {
        let socket = socket.to_owned();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            // If nobody waits any more, there is nobody to tell.
            let _ = sender.send(connect_unlimited(&socket, queues, read_only));
        });
        match receiver.recv_timeout(GIVE_UP) {
            Ok(client) => client.context("blkio"),
            Err(error) => bail!("blkio could not connect: {error}"),
        }
    }

    /// Size of the disk in bytes.
    pub fn capacity(&self) -> Result<u64> {
        self.blkio.get_u64("capacity").map_err(of_blkio)
    }

    /// Whether the disk is read-only.
    pub fn read_only(&self) -> Result<bool> {
        self.blkio.get_bool("read-only").map_err(of_blkio)
    }

    /// Puts all requests on one queue at once and waits for every one of them; outcomes stand in the order of `ops`.
    pub fn batch(&mut self, queue: usize, ops: &[Op]) -> Result<Vec<Outcome>> {
        let base = self.region.addr as *mut u8;
        let queue = self.queues.get_mut(queue).context("no such queue")?;
        let mut buffers = Vec::with_capacity(ops.len());
        let mut used = 0usize;
        for op in ops {
            let length = match op {
                Op::Read { length, .. } => *length,
                Op::Write { data, .. } => data.len(),
                _ => 0,
            };
            let end = used + length.next_multiple_of(4096);
            if end > BUFFER {
                bail!("a batch uses more than {BUFFER} bytes of buffers");
            }
            // SAFETY: `used + length <= BUFFER`, the length of the region, which stays mapped while `self` lives.
            buffers.push((unsafe { base.add(used) }, length));
            used = end;
        }
        let none = ReqFlags::empty();
        for (index, (op, &(buffer, length))) in ops.iter().zip(&buffers).enumerate() {
            match op {
                Op::Read { offset, .. } => queue.read(*offset, buffer, length, index, none),
                Op::Write { offset, data } => {
                    // SAFETY: the buffer holds `data.len()` bytes of the region, and no request uses it yet.
                    unsafe { buffer.copy_from_nonoverlapping(data.as_ptr(), length) };
                    queue.write(*offset, buffer, length, index, none);
                }
                Op::Flush => queue.flush(index, none),
                Op::Discard { offset, length } => queue.discard(*offset, *length, index, none),
                Op::WriteZeroes { offset, length, unmap } => {
                    let flags = if *unmap { none } else { ReqFlags::NO_UNMAP };
                    queue.write_zeroes(*offset, *length, index, flags);
                }
            }
        }
        let mut outcomes: Vec<Option<Outcome>> = vec![None; ops.len()];
        for completion in completions(queue, ops.len())? {
            let slot = outcomes.get_mut(completion.user_data).context("a completion for no request")?;
            if slot.is_some() {
                bail!("request {} was completed twice", completion.user_data);
            }
            let (buffer, length) = buffers[completion.user_data];
            *slot = Some(match (&ops[completion.user_data], completion.ret) {
                (Op::Read { .. }, 0) => {
                    // SAFETY: the read has completed, so the back end is done with these bytes of the region.
                    Ok(unsafe { std::slice::from_raw_parts(buffer, length) }.to_vec())
                }
                (_, 0) => Ok(Vec::new()),
                (_, error) => Err(error),
            });
        }
        outcomes.into_iter().map(|outcome| outcome.context("a request without a completion")).collect()
    }

    /// One request that has to succeed.
    pub fn one(&mut self, queue: usize, op: Op) -> Result<Vec<u8>> {
        match self.attempt(queue, op.clone())? {
            Ok(data) => Ok(data),
            Err(error) => bail!("{op:.60?} failed with {error}"),
        }
    }

    /// One request, whatever its outcome.
    pub fn attempt(&mut self, queue: usize, op: Op) -> Result<Outcome> {
        self.batch(queue, &[op])?.pop().context("no outcome")
    }

    /// A read on the first queue.
    pub fn read(&mut self, offset: u64, length: usize) -> Result<Vec<u8>> {
        self.one(0, Op::Read { offset, length })
    }

    /// A write on the first queue.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<()> {
        let data = data.to_vec();
        self.one(0, Op::Write { offset, data }).map(drop)
    }
}

fn connect_unlimited(socket: &Path, queues: u16, read_only: bool) -> Result<BlkioClient> {
    let path = socket.to_str().context("a socket path that is no UTF-8")?;
    let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(of_blkio)?;
    blkio.set_str("path", path).map_err(of_blkio)?;
    blkio.set_bool("read-only", read_only).map_err(of_blkio)?;
    blkio.connect().map_err(of_blkio)?;
    blkio.set_i32("num-queues", i32::from(queues)).map_err(of_blkio)?;
    let started = blkio.start().map_err(of_blkio)?;
    let region = blkio.alloc_mem_region(BUFFER).map_err(of_blkio)?;
    blkio.map_mem_region(&region).map_err(of_blkio)?;
    Ok(BlkioClient { queues: started.queues, region, blkio })
}

fn completions(queue: &mut Blkioq, wanted: usize) -> Result<Vec<Completion>> {
    let mut done = Vec::with_capacity(wanted);
    let mut limit: Duration = GIVE_UP;
    while done.len() < wanted {
        let mut slots: Vec<MaybeUninit<Completion>> = Vec::with_capacity(wanted);
        slots.resize_with(wanted - done.len(), MaybeUninit::uninit);
        let count = queue
            .do_io(&mut slots, 1, Some(&mut limit), None)
            .map_err(of_blkio)
            .with_context(|| format!("{} of {wanted} requests completed", done.len()))?;
        for slot in slots.into_iter().take(count) {
            // SAFETY: `do_io` has filled the first `count` slots.
            done.push(unsafe { slot.assume_init() });
        }
    }
    Ok(done)
}

fn of_blkio(error: blkio::Error) -> anyhow::Error {
    anyhow!("{} ({})", error.message(), error.errno())
}
