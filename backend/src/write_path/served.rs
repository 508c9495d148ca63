//! A served disk: the device that a vhost-user session drives, and the node that backups run over.

use super::inbox::{Inbox, Message};
use super::queue::QueueThread;
use crate::device::config::{ConfigSpace, Geometry, serial_bytes};
use crate::device::request::{Bounds, ID_BYTES, Kind};
use crate::disk::DiskFile;
use crate::session::{Device, Notices, RingParts, RunningRing};
use blkmark_backup::node::Front;
use blkmark_backup::source::Source;
use blkmark_backup::turns::come_soon;
use blkmark_bitmap::Tracker;
use blkmark_bitmap::store::Place;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// I/O errors are logged up to this one, and then at every power of two: a dying disk must not fill the log.
const LOGGED_ERRORS: u64 = 16;

/// How the operator wants a disk's queue threads.
#[derive(Debug, Clone, Default)]
pub struct ThreadOptions {
    /// Processors that they are tied to, one each, in turn; none: wherever the system puts them.
    pub cpus: Vec<usize>,
    /// How long one looks around before it sleeps, where that pays.
    pub spin: Duration,
}

/// What all queue threads of a disk share.
pub(super) struct Shared {
    pub(super) id: String,
    pub(super) disk: Arc<DiskFile>,
    pub(super) tracker: Arc<Tracker>,
    /// What requests are judged by, and what the guest is shown.
    capacity: AtomicU64,
    pub(super) serial: [u8; ID_BYTES],
    pub(super) threads: ThreadOptions,
    errors: AtomicU64,
}

impl Shared {
    /// What a request may ask for at this moment.
    pub(super) fn bounds(&self) -> Bounds {
        Bounds { capacity: self.capacity.load(Ordering::Acquire), read_only: self.disk.read_only() }
    }

    #[cold]
    pub(super) fn log_error(&self, kind: Kind, offset: u64, len: u64, error: &io::Error) {
        let count = self.errors.fetch_add(1, Ordering::Relaxed) + 1;
        if count <= LOGGED_ERRORS || count.is_power_of_two() {
            tracing::error!(disk = self.id, ?kind, offset, len, %error, count, "I/O error, reported to the guest");
        }
    }
}

/// One disk with its queues.
pub struct ServedDisk {
    shared: Arc<Shared>,
    config: ConfigSpace,
    queues: u16,
    queue_size: u16,
    notices: Notices,
}

impl ServedDisk {
    /// Serves `disk` under the name `id` with `queues` queues of up to `queue_size` entries each. Its bitmaps are those of the
    /// store at `place`, or end with the process.
    pub fn new(
        id: &str,
        disk: Arc<DiskFile>,
        serial: &str,
        queues: u16,
        queue_size: u16,
        threads: ThreadOptions,
        place: Option<Place>,
    ) -> Self {
        let capacity = disk.size();
        let (lanes, slots) = (usize::from(queues), usize::from(queue_size));
        let tracker = match place {
            Some(place) => Tracker::open(place, lanes, slots),
            None => Tracker::new(capacity, lanes, slots),
        };
        let config = ConfigSpace::new(&Geometry {
            capacity,
            logical_block: disk.block(),
            physical_block: disk.physical(),
            discard_granularity: disk.physical(),
            queues,
            read_only: disk.read_only(),
        });
        let shared = Shared {
            id: id.to_owned(),
            tracker,
            capacity: AtomicU64::new(capacity),
            disk,
            serial: serial_bytes(serial),
            threads,
            errors: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared), config, queues, queue_size, notices: Notices::default() }
    }

    /// What clients call it.
    pub fn id(&self) -> &str {
        &self.shared.id
    }

    /// Where its changes are marked.
    pub fn tracker(&self) -> &Arc<Tracker> {
        &self.shared.tracker
    }

    /// Its file.
    pub fn disk(&self) -> &Arc<DiskFile> {
        &self.shared.disk
    }
}

impl Front for ServedDisk {
    fn set_capacity(&self, bytes: u64) {
        self.shared.capacity.store(bytes, Ordering::Release);
        self.notices.config_changed();
    }
}

impl Device for ServedDisk {
    fn queues(&self) -> u16 {
        self.queues
    }

    fn queue_size_max(&self) -> u16 {
        self.queue_size
    }

    fn notices(&self) -> Option<&Notices> {
        Some(&self.notices)
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.with_capacity(self.shared.bounds().capacity).read(offset, size)
    }

    fn start(&self, parts: RingParts) -> io::Result<Box<dyn RunningRing>> {
        require_eventfd(&parts.kick)?;
        let index = usize::from(parts.index);
        let lane = self.shared.tracker.lane(index);
        let lane = lane.ok_or_else(|| io::Error::other(format!("queue {index} is still being served")))?;
        let inbox = Arc::new(Inbox::new()?);
        let (shared, inbox_there) = (Arc::clone(&self.shared), Arc::clone(&inbox));
        let (started, answer) = std::sync::mpsc::sync_channel(1);
        let next_avail = parts.ring.next_avail;
        let thread = std::thread::Builder::new().name(format!("{}-{index}", self.shared.id)).spawn(move || {
            tie_to_processor(&shared, index);
            come_soon();
            // The ring onto the disk is made by the thread that uses it: the kernel asks for that.
            match QueueThread::new(shared, inbox_there, lane, parts) {
                Ok(queue) => {
                    let _ = started.send(Ok(()));
                    queue.run()
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                    next_avail
                }
            }
        })?;
        answer.recv().map_err(|_| io::Error::other("the queue thread died at its start"))??;
        Ok(Box::new(Running { inbox, thread, next_avail }))
    }
}

/// Ties the calling thread to its processor, if the operator named any.
fn tie_to_processor(shared: &Shared, queue: usize) {
    let cpus = &shared.threads.cpus;
    let Some(&cpu) = cpus.get(queue % cpus.len().max(1)) else { return };
    let mut set = rustix::thread::CpuSet::new();
    // The configuration refuses numbers that the set has no room for.
    set.set(cpu);
    if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
        tracing::warn!(disk = shared.id, queue, cpu, %error, "cannot tie the queue thread to its processor");
    }
}

/// Watching something that is always ready would make the thread spin; only an eventfd is known not to be.
fn require_eventfd(kick: &OwnedFd) -> io::Result<()> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", kick.as_raw_fd()))?;
    if link.as_os_str() == "anon_inode:[eventfd]" {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("the kick descriptor is no eventfd but '{}'", link.display()),
    ))
}

struct Running {
    inbox: Arc<Inbox>,
    thread: JoinHandle<u16>,
    /// As it was at the start, in case the thread cannot tell any more.
    next_avail: u16,
}

impl RunningRing for Running {
    fn set_call(&self, call: Option<OwnedFd>) {
        self.inbox.send(Message::Call(call));
    }

    fn set_enabled(&self, on: bool) {
        self.inbox.send(Message::Enabled(on));
    }

    fn stop(self: Box<Self>) -> u16 {
        self.inbox.send(Message::Stop);
        self.thread.join().unwrap_or(self.next_avail)
    }
}
