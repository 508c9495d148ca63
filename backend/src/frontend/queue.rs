//! One virtqueue of the guest, with its buffers: submit, kick, wait, take completions. Owned by one thread.
//!
//! Invariant: a descriptor is free, or it belongs to exactly one request in flight; a used entry frees only what is in
//! flight. What frees descriptors is the private copy of the chain, never the shared one.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::event::epoll::{EventData, EventFlags};
use rustix::fd::OwnedFd;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vmm_sys_util::eventfd::EventFd;

use super::config::DeviceConfig;
use super::error::{FrontendError, OutOfRange};
use super::layout::{DESCRIPTOR_LEN, Layout};
use super::link::Link;
use super::memory::GuestMemory;
use super::raw::{Descriptor, RawQueue};
use super::request::{Buffer, Completion, HEADER_LEN, Request, SEGMENT_LEN, STATUS_MISSING, Status};
use super::ring::DriverRing;

/// Why [`Queue::wait`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// There are completions to take.
    Ready,
    /// The time is over and there are none.
    TimedOut,
}

/// A request in flight, by its head.
#[derive(Clone, Copy, Debug)]
struct InFlight {
    token: u64,
    started: Instant,
}

/// What a queue is made of; gathered by the guest.
pub(super) struct Parts {
    pub index: usize,
    pub memory: Arc<GuestMemory>,
    pub layout: Layout,
    pub event_idx: bool,
    pub indirect: bool,
    /// Most bytes in a data descriptor.
    pub segment: usize,
    pub max_request: usize,
    pub call: Arc<EventFd>,
    pub kick: Arc<EventFd>,
    pub link: Arc<Link>,
    pub config: Arc<DeviceConfig>,
    pub spin: Duration,
    pub answer_within: Duration,
}

/// A virtqueue and its data area. `Send`: give each to its own thread.
pub struct Queue {
    ring: DriverRing,
    parts: Parts,
    free: Vec<u16>,
    /// The private copy of the descriptors' `next`, for chains in flight; `None` ends a chain.
    next: Vec<Option<u16>>,
    in_flight: Vec<Option<InFlight>>,
    in_flight_count: usize,
    /// Descriptors of the request being submitted; kept to allocate once.
    chain: Vec<Descriptor>,
    epoll: OwnedFd,
    watched: Arc<UnixStream>,
    generation: u64,
}

/// Epoll tag of the call event.
const CALL: u64 = 0;
/// Epoll tag of the vhost-user socket.
const SOCKET: u64 = 1;

impl Queue {
    pub(super) fn new(parts: Parts) -> Result<Self, FrontendError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(FrontendError::system("epoll_create"))?;
        // Edge-triggered: the event needs no reading, one system call a wake-up.
        epoll::add(
            &epoll,
            // The crate's EventFd has no AsFd; the borrow lives shorter than `parts.call`.
            borrow(&parts.call),
            EventData::new_u64(CALL),
            EventFlags::IN | EventFlags::ET,
        )
        .map_err(FrontendError::system("watching the call event"))?;
        let size = parts.layout.size;
        let generation = parts.link.generation();
        let watched = parts.link.socket();
        watch(&epoll, &watched)?;
        Ok(Queue {
            ring: DriverRing::new(Arc::clone(&parts.memory), parts.layout, parts.event_idx),
            free: (0..size).rev().collect(),
            next: vec![None; usize::from(size)],
            in_flight: vec![None; usize::from(size)],
            in_flight_count: 0,
            chain: Vec::with_capacity(parts.layout.table_len.max(3)),
            epoll,
            watched,
            generation,
            parts,
        })
    }

    /// The queue's number.
    pub fn index(&self) -> usize {
        self.parts.index
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        self.parts.layout.size
    }

    /// Requests submitted and not yet taken back with [`Queue::completions`].
    pub fn in_flight(&self) -> usize {
        self.in_flight_count
    }

    /// Bytes of the data area.
    pub fn data_size(&self) -> usize {
        self.parts.layout.data_len
    }

    /// Largest read or write in bytes.
    pub fn max_request(&self) -> usize {
        self.parts.max_request
    }

    /// The config space as it was at connect.
    pub fn config(&self) -> &DeviceConfig {
        &self.parts.config
    }

    /// Guest memory, this queue's and the others'.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.parts.memory
    }

    /// How long a blocking caller gives the back end.
    pub(super) fn answer_within(&self) -> Duration {
        self.parts.answer_within
    }

    /// Copies `bytes` into the data area at `offset`.
    pub fn write_data(&self, offset: usize, bytes: &[u8]) -> Result<(), FrontendError> {
        let at = self.data_offset(Buffer { offset, len: bytes.len() })?;
        Ok(self.parts.memory.write_at(at, bytes)?)
    }

    /// Copies from the data area at `offset` into `bytes`.
    pub fn read_data(&self, offset: usize, bytes: &mut [u8]) -> Result<(), FrontendError> {
        let at = self.data_offset(Buffer { offset, len: bytes.len() })?;
        Ok(self.parts.memory.read_at(at, bytes)?)
    }

    fn data_offset(&self, buffer: Buffer) -> Result<usize, FrontendError> {
        let size = self.data_size();
        match buffer.offset.checked_add(buffer.len) {
            Some(end) if end <= size => Ok(self.parts.layout.data + buffer.offset),
            _ => Err(FrontendError::BadBuffer {
                offset: buffer.offset,
                len: buffer.len,
                limit: format!("the data area has {size} bytes"),
            }),
        }
    }

    /// Puts a request into the ring; the device sees it at the next [`Queue::kick`]. `token` comes back with the
    /// completion. [`FrontendError::QueueFull`] when there is no room: take completions and try again.
    pub fn submit(&mut self, request: Request, token: u64) -> Result<(), FrontendError> {
        let data = match request.data() {
            None => None,
            Some((buffer, _)) if buffer.len > self.parts.max_request => {
                return Err(FrontendError::BadBuffer {
                    offset: buffer.offset,
                    len: buffer.len,
                    limit: format!("the largest request is {} bytes", self.parts.max_request),
                });
            }
            Some((buffer, writable)) => Some((self.data_offset(buffer)?, buffer.len, writable)),
        };
        let data_descriptors = match data {
            Some((_, len, _)) => len.div_ceil(self.parts.segment),
            None => usize::from(request.segment().is_some()),
        };
        let needed = if self.parts.indirect { 1 } else { data_descriptors + 2 };
        if needed > self.free.len() {
            if needed > self.size().into() {
                return Err(FrontendError::BadOptions(format!(
                    "a request of {needed} descriptors never fits into a ring of {}",
                    self.size()
                )));
            }
            return Err(FrontendError::QueueFull);
        }
        let Some(&head) = self.free.last() else {
            return Err(FrontendError::QueueFull);
        };
        self.describe(head, &request, data)?;
        if self.parts.indirect {
            self.write_table(head)?;
            self.free.pop();
            self.next[usize::from(head)] = None;
        } else {
            self.write_chain()?;
        }
        self.ring.push(head)?;
        self.in_flight[usize::from(head)] = Some(InFlight { token, started: Instant::now() });
        self.in_flight_count += 1;
        Ok(())
    }

    /// Writes the request's record and gathers its descriptors, without flags NEXT and without `next`.
    fn describe(&mut self, head: u16, request: &Request, data: Option<(usize, usize, bool)>) -> Result<(), OutOfRange> {
        let memory = &self.parts.memory;
        let layout = &self.parts.layout;
        let descriptor = |offset: usize, len: usize, writable: bool| Descriptor {
            address: memory.guest_address(offset),
            // Lengths are at most `max_request`, which fits.
            len: len as u32,
            flags: if writable { VRING_DESC_F_WRITE as u16 } else { 0 },
            next: 0,
        };
        self.chain.clear();
        memory.write_at(layout.header(head), &request.header())?;
        self.chain.push(descriptor(layout.header(head), HEADER_LEN, false));
        if let Some(segment) = request.segment() {
            memory.write_at(layout.segment(head), &segment)?;
            self.chain.push(descriptor(layout.segment(head), SEGMENT_LEN, false));
        }
        if let Some((mut offset, mut len, writable)) = data {
            while len > 0 {
                let piece = len.min(self.parts.segment);
                self.chain.push(descriptor(offset, piece, writable));
                offset += piece;
                len -= piece;
            }
        }
        memory.write_at(layout.status(head), &[STATUS_MISSING])?;
        self.chain.push(descriptor(layout.status(head), 1, true));
        Ok(())
    }

    /// The chain as an indirect table, and the one ring descriptor that points to it.
    fn write_table(&mut self, head: u16) -> Result<(), OutOfRange> {
        let memory = &self.parts.memory;
        let table = self.parts.layout.table(head);
        let last = self.chain.len() - 1;
        for (i, descriptor) in self.chain.iter_mut().enumerate() {
            if i < last {
                descriptor.flags |= VRING_DESC_F_NEXT as u16;
                descriptor.next = i as u16 + 1;
            }
            memory.write_at(table + i * DESCRIPTOR_LEN, &descriptor.to_bytes())?;
        }
        let pointer = Descriptor {
            address: memory.guest_address(table),
            len: (self.chain.len() * DESCRIPTOR_LEN) as u32,
            flags: VRING_DESC_F_INDIRECT as u16,
            next: 0,
        };
        memory.write_at(self.parts.layout.descriptor(head), &pointer.to_bytes())
    }

    /// The chain in the ring's own descriptors, which `submit` has counted.
    fn write_chain(&mut self) -> Result<(), OutOfRange> {
        let mut following = None;
        // Free descriptors are taken from the end of the list, so the chain's head is the one that `submit` saw.
        let first_free = self.free.len() - self.chain.len();
        for (i, &at) in self.free[first_free..].iter().enumerate() {
            let descriptor = &mut self.chain[self.free.len() - first_free - 1 - i];
            if let Some(next) = following {
                descriptor.flags |= VRING_DESC_F_NEXT as u16;
                descriptor.next = next;
            }
            self.next[usize::from(at)] = following;
            following = Some(at);
            let to = self.parts.layout.descriptor(at);
            self.parts.memory.write_at(to, &descriptor.to_bytes())?;
        }
        self.free.truncate(first_free);
        Ok(())
    }

    /// Shows the device everything submitted, and notifies it if it asked for that. Returns whether it was notified.
    pub fn kick(&mut self) -> Result<bool, FrontendError> {
        let wanted = self.ring.publish()?;
        if wanted {
            self.notify()?;
        }
        Ok(wanted)
    }

    /// Notifies the device, asked or not.
    pub(super) fn notify(&self) -> Result<(), FrontendError> {
        match self.parts.kick.write(1) {
            Ok(()) => Ok(()),
            // The counter is full: the device has not read it yet and is notified as it is.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
            Err(source) => Err(FrontendError::System { what: "kicking the queue", source }),
        }
    }

    /// Appends all finished requests to `out` and returns how many there were. Never waits.
    pub fn completions(&mut self, out: &mut Vec<Completion>) -> Result<usize, FrontendError> {
        let mut taken = 0;
        loop {
            let pending = self.ring.pending()?;
            if pending == 0 {
                return Ok(taken);
            }
            if usize::from(pending) > self.in_flight_count {
                return Err(FrontendError::UsedIndexJump {
                    from: self.ring.last_used(),
                    to: self.ring.last_used().wrapping_add(pending),
                    in_flight: self.in_flight_count,
                });
            }
            let now = Instant::now();
            for _ in 0..pending {
                out.push(self.complete(now)?);
            }
            taken += usize::from(pending);
        }
    }

    fn complete(&mut self, now: Instant) -> Result<Completion, FrontendError> {
        let used = self.ring.take()?;
        let unexpected = FrontendError::UnexpectedCompletion { head: used.id };
        let Ok(head) = u16::try_from(used.id) else {
            return Err(unexpected);
        };
        let Some(request) = self.in_flight.get_mut(usize::from(head)).and_then(Option::take) else {
            return Err(unexpected);
        };
        let mut status = [0];
        let at = self.parts.layout.status(head);
        self.parts.memory.read_at(at, &mut status)?;
        let mut freed = Some(head);
        while let Some(at) = freed {
            self.free.push(at);
            freed = self.next[usize::from(at)].take();
        }
        self.in_flight_count -= 1;
        Ok(Completion {
            token: request.token,
            status: Status::from_byte(status[0]),
            written: used.len,
            latency: now.saturating_duration_since(request.started),
        })
    }

    /// Sleeps until there are completions, at most `timeout` (`None`: for ever). [`FrontendError::BackendGone`] when
    /// the back end is gone and everything that it completed has been taken.
    pub fn wait(&mut self, timeout: Option<Duration>) -> Result<Wait, FrontendError> {
        if self.ring.pending()? != 0 {
            return Ok(Wait::Ready);
        }
        self.follow_link()?;
        let deadline = timeout.map(|t| Instant::now() + t);
        if !self.parts.spin.is_zero() && self.spin(deadline)? {
            return Ok(Wait::Ready);
        }
        let woken = self.sleep(deadline);
        self.ring.disarm()?;
        woken
    }

    fn spin(&self, deadline: Option<Instant>) -> Result<bool, OutOfRange> {
        let end = Instant::now() + self.parts.spin;
        let end = deadline.map_or(end, |d| d.min(end));
        loop {
            for _ in 0..64 {
                if self.ring.pending()? != 0 {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if Instant::now() >= end {
                return Ok(false);
            }
        }
    }

    fn sleep(&mut self, deadline: Option<Instant>) -> Result<Wait, FrontendError> {
        let mut gone = false;
        loop {
            if self.ring.arm()? {
                return Ok(Wait::Ready);
            }
            if gone {
                return Err(FrontendError::BackendGone);
            }
            let left = deadline.map(|d| d.saturating_duration_since(Instant::now()));
            let timespec = left.map(|left| rustix::event::Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(CALL) }; 2];
            let count = match epoll::wait(&self.epoll, &mut events, timespec.as_ref()) {
                Ok(count) => count,
                Err(rustix::io::Errno::INTR) => continue,
                Err(errno) => return Err(FrontendError::system("epoll_wait")(errno)),
            };
            gone = events[..count].iter().any(|e| e.data.u64() == SOCKET);
            if count == 0 && left == Some(Duration::ZERO) {
                return Ok(Wait::TimedOut);
            }
        }
    }

    /// Watches the new socket after a reconnect.
    fn follow_link(&mut self) -> Result<(), FrontendError> {
        let generation = self.parts.link.generation();
        if generation == self.generation {
            return Ok(());
        }
        let socket = self.parts.link.socket();
        epoll::delete(&self.epoll, &self.watched).map_err(FrontendError::system("leaving the old socket"))?;
        watch(&self.epoll, &socket)?;
        self.watched = socket;
        self.generation = generation;
        Ok(())
    }

    /// Low-level access: any bytes in the rings, for tests of hostile guests. Requests submitted the decent way must
    /// have been taken back before, or the two get in each other's way.
    pub fn raw(&mut self) -> RawQueue<'_> {
        RawQueue::new(self)
    }

    pub(super) fn ring_mut(&mut self) -> &mut DriverRing {
        &mut self.ring
    }

    pub(super) fn ring(&self) -> &DriverRing {
        &self.ring
    }
}

fn borrow(event: &EventFd) -> rustix::fd::BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open for as long as `event`, whose lifetime the borrow has.
    unsafe { rustix::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

fn watch(epoll: &OwnedFd, socket: &UnixStream) -> Result<(), FrontendError> {
    // Hang-ups only: replies on this socket are the guest's affair.
    epoll::add(epoll, socket, EventData::new_u64(SOCKET), EventFlags::RDHUP)
        .map_err(FrontendError::system("watching the back end's socket"))
}
