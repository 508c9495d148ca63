//! A guest with rings in a memfd, driven by hand: as little as a driver needs.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::GIVE_UP_MS;

/// Guest memory in two regions, as a PC has it: rings and buffers lie in the first.
pub const LOW: (u64, usize) = (0x0, 1 << 20);
pub const HIGH: (u64, usize) = (4 << 30, 1 << 20);
/// Bytes of guest memory a ring and its buffers take.
const RING_ROOM: u64 = 0x20000;

pub struct Guest {
    pub file: File,
    pub mem: GuestMemoryMmap,
    rings: Vec<Ring>,
}

impl Guest {
    pub fn new(queues: u16, size: u16) -> Self {
        let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len((LOW.1 + HIGH.1) as u64).unwrap();
        let part = |at: u64| Some(FileOffset::new(file.try_clone().unwrap(), at));
        let mem = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(LOW.0), LOW.1, part(0)),
            (GuestAddress(HIGH.0), HIGH.1, part(LOW.1 as u64)),
        ])
        .unwrap();
        let rings = (0..queues).map(|i| Ring::new(mem.clone(), i, size)).collect();
        Self { file, mem, rings }
    }

    pub fn ring(&self, index: usize) -> &Ring {
        &self.rings[index]
    }

    /// The regions, in the words of SET_MEM_TABLE.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        [(LOW, 0), (HIGH, LOW.1 as u64)]
            .into_iter()
            .map(|((guest, size), mmap_offset)| VhostUserMemoryRegionInfo {
                guest_phys_addr: guest,
                memory_size: size as u64,
                userspace_addr: self.mem.get_host_address(GuestAddress(guest)).unwrap() as u64,
                mmap_offset,
                mmap_handle: self.file.as_raw_fd(),
            })
            .collect()
    }

    /// The addresses of a ring, in the words of SET_VRING_ADDR.
    pub fn config(&self, index: usize) -> VringConfigData {
        let ring = &self.rings[index];
        let user = |addr| self.mem.get_host_address(addr).unwrap() as u64;
        VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: user(ring.desc()),
            used_ring_addr: user(ring.used()),
            avail_ring_addr: user(ring.avail()),
            log_addr: None,
        }
    }

    /// Features, protocol features and memory, in the plainest order.
    pub fn negotiate(&self, vmm: &mut Frontend) {
        vmm.set_owner().unwrap();
        let features = vmm.get_features().unwrap();
        let protocol = vmm.get_protocol_features().unwrap();
        vmm.set_protocol_features(protocol).unwrap();
        vmm.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        vmm.set_features(features).unwrap();
        vmm.set_mem_table(&self.regions()).unwrap();
    }

    /// Everything up to running rings that go on at `base`.
    pub fn attach(&self, vmm: &mut Frontend, base: u16) {
        self.negotiate(vmm);
        for index in 0..self.rings.len() {
            self.start_ring(vmm, index, base);
            vmm.set_vring_enable(index, true).unwrap();
        }
    }

    pub fn start_ring(&self, vmm: &mut Frontend, index: usize, base: u16) {
        let ring = &self.rings[index];
        vmm.set_vring_num(index, ring.size).unwrap();
        vmm.set_vring_addr(index, &self.config(index)).unwrap();
        vmm.set_vring_base(index, base).unwrap();
        vmm.set_vring_call(index, &ring.call()).unwrap();
        vmm.set_vring_kick(index, &ring.kick()).unwrap();
    }
}

/// The feature bit of vhost-user itself.
pub fn protocol_bit() -> u64 {
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// One ring, its driver and its event descriptors.
pub struct Ring {
    mem: GuestMemoryMmap,
    base: GuestAddress,
    pub size: u16,
    events: Mutex<(EventFd, EventFd)>,
    state: Mutex<Indices>,
}

#[derive(Default)]
struct Indices {
    avail: u16,
    used: u16,
}

impl Ring {
    fn new(mem: GuestMemoryMmap, index: u16, size: u16) -> Self {
        assert!(size <= 256 && index < 7, "the layout below has no more room");
        Self {
            mem,
            base: GuestAddress(0x10000 + u64::from(index) * RING_ROOM),
            size,
            events: Mutex::new((event(), event())),
            state: Mutex::default(),
        }
    }

    fn at(&self, offset: u64) -> GuestAddress {
        GuestAddress(self.base.0 + offset)
    }

    pub fn desc(&self) -> GuestAddress {
        self.base
    }

    pub fn avail(&self) -> GuestAddress {
        self.at(0x8000)
    }

    pub fn used(&self) -> GuestAddress {
        self.at(0x9000)
    }

    pub fn kick(&self) -> EventFd {
        self.events.lock().unwrap().0.try_clone().unwrap()
    }

    pub fn call(&self) -> EventFd {
        self.events.lock().unwrap().1.try_clone().unwrap()
    }

    pub fn renew_kick(&self) -> EventFd {
        self.events.lock().unwrap().0 = event();
        self.kick()
    }

    pub fn renew_call(&self) -> EventFd {
        self.events.lock().unwrap().1 = event();
        self.call()
    }

    /// As after a reset: both indexes start again.
    pub fn forget(&self) {
        *self.state.lock().unwrap() = Indices::default();
        self.mem.write_slice(&[0; 4], self.avail()).unwrap();
        self.mem.write_slice(&[0; 4], self.used()).unwrap();
    }

    pub fn avail_idx(&self) -> u16 {
        self.mem.load(self.at(0x8002), Ordering::Acquire).unwrap()
    }

    pub fn used_idx(&self) -> u16 {
        self.mem.load(self.at(0x9002), Ordering::Acquire).unwrap()
    }

    /// Puts a request of header, data and status into the ring without telling anybody.
    pub fn put(&self, kind: u32, sector: u64, data: &[u8], indirect: bool) {
        let (head, status, room) = (self.at(0xa000), self.at(0xa100), self.at(0xb000));
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.mem.write_slice(&header, head).unwrap();
        self.mem.write_slice(data, room).unwrap();
        self.mem.write_obj(0xffu8, status).unwrap();
        let into_guest = if matches!(kind, 0 | 8) { VRING_DESC_F_WRITE } else { 0 } as u16;
        let next = VRING_DESC_F_NEXT as u16;
        let mut chain = vec![Descriptor::new(head.0, 16, next, 1)];
        if !data.is_empty() {
            let len = data.len() as u32;
            chain.push(Descriptor::new(room.0, len, next | into_guest, 2));
        }
        chain.push(Descriptor::new(status.0, 1, VRING_DESC_F_WRITE as u16, 0));
        let table = if indirect { self.at(0xa200) } else { self.desc() };
        for (i, desc) in chain.iter().enumerate() {
            self.mem.write_obj(*desc, GuestAddress(table.0 + 16 * i as u64)).unwrap();
        }
        if indirect {
            let len = 16 * chain.len() as u32;
            let desc = Descriptor::new(table.0, len, VRING_DESC_F_INDIRECT as u16, 0);
            self.mem.write_obj(desc, self.desc()).unwrap();
        }
        self.publish(0);
    }

    /// Polls for completions, as a front end without a call descriptor does.
    pub fn poll_used(&self, want: u16) {
        let start = Instant::now();
        while self.used_idx() != want {
            assert!(start.elapsed().as_millis() < GIVE_UP_MS as u128, "gave up polling");
            std::thread::yield_now();
        }
    }

    /// Makes a head available.
    pub fn publish(&self, head: u16) {
        let mut state = self.state.lock().unwrap();
        let slot = 4 + 2 * u64::from(state.avail % self.size);
        self.mem.write_obj(head, GuestAddress(self.avail().0 + slot)).unwrap();
        state.avail = state.avail.wrapping_add(1);
        // Signal every completion: the event index follows.
        let used_event = 4 + 2 * u64::from(self.size);
        self.mem.write_obj(state.used, GuestAddress(self.avail().0 + used_event)).unwrap();
        let idx = GuestAddress(self.avail().0 + 2);
        self.mem.store(state.avail, idx, Ordering::Release).unwrap();
    }

    /// Puts a request into the ring and kicks.
    pub fn submit(&self, kind: u32, sector: u64, data: &[u8]) {
        self.put(kind, sector, data, false);
        self.kick().write(1).unwrap();
    }

    /// Waits for the next completion, by the call descriptor; answers the status byte and the data.
    pub fn complete(&self, len: usize) -> (u8, Vec<u8>) {
        let call = self.call();
        let want = self.state.lock().unwrap().used.wrapping_add(1);
        while self.used_idx() != want {
            wait_readable_event(&call, "a completion");
            let _ = call.read();
        }
        self.state.lock().unwrap().used = want;
        let status = self.mem.read_obj(self.at(0xa100)).unwrap();
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, self.at(0xb000)).unwrap();
        (status, data)
    }

    /// One request, from submission to completion.
    pub fn request(&self, kind: u32, sector: u64, data: &[u8]) -> (u8, Vec<u8>) {
        self.submit(kind, sector, data);
        self.complete(data.len())
    }

    /// Writes a sector and reads it back.
    pub fn check_io(&self) {
        let pattern = vec![self.state.lock().unwrap().avail as u8 | 1; 512];
        assert_eq!(self.request(1, 9, &pattern).0, 0);
        assert_eq!(self.request(0, 9, &[0; 512]), (0, pattern));
    }
}

pub fn event() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

/// Waits until an event has been signalled; panics if that never comes.
pub fn wait_readable_event(event: &EventFd, what: &str) {
    // SAFETY: the descriptor is open as long as `event` is.
    wait_readable(unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }, what);
}

/// Waits until a descriptor is readable or hung up; panics if that never comes.
pub fn wait_readable(fd: impl AsFd, what: &str) {
    let mut fds = [PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN)];
    let limit = rustix::event::Timespec { tv_sec: i64::from(GIVE_UP_MS / 1000), tv_nsec: 0 };
    let n = rustix::event::poll(&mut fds, Some(&limit)).unwrap();
    assert!(n > 0, "gave up waiting for {what}");
}
