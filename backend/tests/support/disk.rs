//! A disk in memory: the smallest honest [`Device`]. One thread a ring, requests parsed by the real
//! parser and carried out on a `Vec`.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use blkmark::device::chain::Descriptor;
use blkmark::device::config::{ConfigSpace, Geometry};
use blkmark::device::request::{self, Bounds, Kind, OK, Parsed};
use blkmark::memory::view::View;
use blkmark::session::{Device, RingParts, RunningRing};
use blkmark::vring::RingPlace;
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::GuestAddressSpace;

use super::GIVE_UP_MS;

pub const CAPACITY: usize = 1 << 20;

/// What the session asked of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Start { index: u16, next_avail: u16, next_used: u16, enabled: bool },
    Stop { index: u16, next_avail: u16 },
}

pub struct MemoryDisk {
    config: ConfigSpace,
    queues: u16,
    bytes: Arc<Mutex<Vec<u8>>>,
    events: Arc<Mutex<Vec<Event>>>,
    running: Arc<Running>,
    /// While shut, rings that are told to stop do not: as if requests were in flight.
    gate: Arc<(Mutex<bool>, Condvar)>,
    /// Told whenever a ring waits at the gate.
    waiting: Sender<()>,
    /// Refuse to start any ring.
    pub broken: AtomicBool,
}

impl MemoryDisk {
    pub fn new(queues: u16) -> Self {
        let geometry = Geometry {
            capacity: CAPACITY as u64,
            logical_block: 512,
            physical_block: 4096,
            discard_granularity: 4096,
            queues,
            read_only: false,
        };
        Self {
            config: ConfigSpace::new(&geometry),
            queues,
            bytes: Arc::new(Mutex::new(vec![0; CAPACITY])),
            events: Arc::default(),
            running: Arc::default(),
            gate: Arc::new((Mutex::new(true), Condvar::new())),
            waiting: mpsc::channel().0,
            broken: AtomicBool::new(false),
        }
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    pub fn running(&self) -> u32 {
        *self.running.0.lock().unwrap()
    }

    /// Waits until so many rings run.
    pub fn wait_running(&self, rings: u32) {
        let limit = Duration::from_millis(GIVE_UP_MS as u64);
        let running = self.running.0.lock().unwrap();
        let (_running, timeout) = self.running.1.wait_timeout_while(running, limit, |now| *now != rings).unwrap();
        assert!(!timeout.timed_out(), "gave up waiting for {rings} running rings");
    }

    pub fn set_gate(&self, open: bool) {
        *self.gate.0.lock().unwrap() = open;
        self.gate.1.notify_all();
    }

    /// Tells `to` whenever a ring waits at the gate.
    pub fn report_waiting(&mut self, to: Sender<()>) {
        self.waiting = to;
    }
}

/// How many rings run.
#[derive(Default)]
struct Running(Mutex<u32>, Condvar);

impl Running {
    fn change(&self, by: i32) {
        let mut now = self.0.lock().unwrap();
        *now = now.checked_add_signed(by).unwrap();
        self.1.notify_all();
    }
}

impl Device for MemoryDisk {
    fn queues(&self) -> u16 {
        self.queues
    }

    fn queue_size_max(&self) -> u16 {
        1024
    }

    fn features(&self) -> u64 {
        self.config.features()
    }

    fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config.read(offset, size)
    }

    fn start(&self, parts: RingParts) -> io::Result<Box<dyn RunningRing>> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::other("out of order"));
        }
        self.events.lock().unwrap().push(Event::Start {
            index: parts.index,
            next_avail: parts.ring.next_avail,
            next_used: parts.ring.next_used,
            enabled: parts.enabled,
        });
        self.running.change(1);
        let wake = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let shared = Arc::new(Shared {
            wake,
            stop: AtomicBool::new(false),
            enabled: AtomicBool::new(parts.enabled),
            call: Mutex::new(parts.call.as_ref().map(|c| c.try_clone()).transpose()?),
        });
        let index = parts.index;
        let (theirs, bytes) = (shared.clone(), self.bytes.clone());
        let thread = std::thread::spawn(move || run(parts, &theirs, &bytes));
        Ok(Box::new(MemoryRing {
            index,
            shared,
            thread,
            events: self.events.clone(),
            running: self.running.clone(),
            gate: self.gate.clone(),
            waiting: self.waiting.clone(),
        }))
    }
}

struct Shared {
    wake: OwnedFd,
    stop: AtomicBool,
    enabled: AtomicBool,
    call: Mutex<Option<OwnedFd>>,
}

struct MemoryRing {
    index: u16,
    shared: Arc<Shared>,
    thread: JoinHandle<u16>,
    events: Arc<Mutex<Vec<Event>>>,
    running: Arc<Running>,
    gate: Arc<(Mutex<bool>, Condvar)>,
    waiting: Sender<()>,
}

impl RunningRing for MemoryRing {
    fn set_call(&self, call: Option<OwnedFd>) {
        *self.shared.call.lock().unwrap() = call;
    }

    fn set_enabled(&self, on: bool) {
        self.shared.enabled.store(on, Ordering::SeqCst);
        signal(&self.shared.wake);
    }

    fn stop(self: Box<Self>) -> u16 {
        let mut open = self.gate.0.lock().unwrap();
        while !*open {
            let _ = self.waiting.send(());
            open = self.gate.1.wait(open).unwrap();
        }
        drop(open);
        self.shared.stop.store(true, Ordering::SeqCst);
        signal(&self.shared.wake);
        let next_avail = self.thread.join().unwrap();
        let index = self.index;
        self.events.lock().unwrap().push(Event::Stop { index, next_avail });
        self.running.change(-1);
        next_avail
    }
}

fn signal(fd: &OwnedFd) {
    let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
}

/// The ring as rust-vmm's device side sees it.
fn queue(ring: &RingPlace) -> Queue {
    let mut queue = Queue::try_from(QueueState {
        max_size: ring.size,
        next_avail: ring.next_avail,
        next_used: ring.next_used,
        event_idx_enabled: ring.event_idx,
        size: ring.size,
        ready: true,
        desc_table: ring.desc.0,
        avail_ring: ring.avail.0,
        used_ring: ring.used.0,
    })
    .unwrap();
    queue.set_next_used(ring.next_used);
    queue
}

fn run(parts: RingParts, shared: &Shared, bytes: &Mutex<Vec<u8>>) -> u16 {
    let mut queue = queue(&parts.ring);
    while !shared.stop.load(Ordering::SeqCst) {
        if shared.enabled.load(Ordering::SeqCst) && !drain(&parts, &mut queue, shared, bytes) {
            parts.hangup.hang_up(&"the ring is beyond repair");
            break;
        }
        let mut fds = [
            PollFd::from_borrowed_fd(parts.kick.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(shared.wake.as_fd(), PollFlags::IN),
        ];
        rustix::event::poll(&mut fds, None).unwrap();
        let mut counter = [0; 8];
        let _ = rustix::io::read(&parts.kick, &mut counter);
        let _ = rustix::io::read(&shared.wake, &mut counter);
    }
    queue.next_avail()
}

/// Carries out what is in the ring; `false` if the ring cannot be read.
fn drain(parts: &RingParts, queue: &mut Queue, shared: &Shared, bytes: &Mutex<Vec<u8>>) -> bool {
    let bounds = Bounds { capacity: CAPACITY as u64, read_only: false };
    loop {
        let mem = parts.memory.memory();
        let chains: Vec<_> = match queue.iter(&*mem) {
            Ok(chains) => chains.collect(),
            Err(_) => return false,
        };
        for chain in chains {
            let head = chain.head_index();
            let mut iovecs = Vec::new();
            let view = View::over(&mem);
            let chain = chain.map(|d| Descriptor::new(d.addr().0, d.len(), d.flags(), d.next()));
            let used = match request::parse(chain, view.spans(), &bounds, &mut iovecs) {
                Parsed::Broken => 0,
                Parsed::Answer { status, code, used_len } => {
                    // SAFETY: `mem` is alive.
                    unsafe { status.write(code) };
                    used_len
                }
                Parsed::Request(r) => {
                    let mut disk = bytes.lock().unwrap();
                    let at = &mut disk[r.offset as usize..][..r.len as usize];
                    carry_out(r.kind, at, &iovecs[r.iovecs.clone()]);
                    // SAFETY: `mem` is alive.
                    unsafe { r.status.write(OK) };
                    r.used_len
                }
            };
            if queue.add_used(&*mem, head, used).is_err() {
                return false;
            }
            if queue.needs_notification(&*mem).unwrap_or(true)
                && let Some(call) = &*shared.call.lock().unwrap()
            {
                signal(call);
            }
        }
        match queue.enable_notification(&*mem) {
            Ok(true) => {}
            Ok(false) => return true,
            Err(_) => return false,
        }
    }
}

fn carry_out(kind: Kind, mut at: &mut [u8], iovecs: &[libc::iovec]) {
    match kind {
        Kind::Read | Kind::Write => {
            for iov in iovecs {
                let (now, later) = at.split_at_mut(iov.iov_len);
                let (disk, guest) = (now.as_mut_ptr(), iov.iov_base.cast::<u8>());
                let (from, to) = match kind {
                    Kind::Read => (disk, guest),
                    _ => (guest, disk),
                };
                // SAFETY: both have `iov_len` bytes, the one on the heap, the other in guest memory
                // that the caller keeps; the test's guest leaves it alone meanwhile.
                unsafe { from.copy_to_nonoverlapping(to, iov.iov_len) };
                at = later;
            }
        }
        Kind::GetId => {
            // SAFETY: the iovecs of a GetId; the caller keeps the memory.
            unsafe { request::put_id(iovecs, b"memory-disk\0\0\0\0\0\0\0\0\0") };
        }
        Kind::Discard | Kind::WriteZeroes { .. } => at.fill(0),
        Kind::Flush => {}
    }
}
