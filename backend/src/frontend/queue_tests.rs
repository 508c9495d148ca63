//! A queue against a device that the test plays itself, `virtio-queue` or worse: one that lies.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use virtio_queue::{Queue as DeviceQueue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::config::DeviceConfig;
use super::error::FrontendError;
use super::layout::Layout;
use super::link::Link;
use super::memory::GuestMemory;
use super::queue::{Parts, Queue, Wait};
use super::request::{Buffer, Request, Status};

const SIZE: u16 = 16;
const SEGMENT: usize = 1024;
const MAX_REQUEST: usize = 8 * SEGMENT;

struct Bench {
    queue: Queue,
    device: DeviceQueue,
    view: GuestMemoryMmap,
    layout: Layout,
    call: Arc<EventFd>,
    /// The back end's end of the socket.
    peer: Option<UnixStream>,
}

fn bench(indirect: bool) -> Bench {
    let layout = Layout::new(0, SIZE, MAX_REQUEST / SEGMENT + 2, 64 << 10);
    let memory = Arc::new(GuestMemory::new(layout.end).unwrap());
    let view = GuestMemoryMmap::<()>::from_ranges_with_files([(
        GuestAddress(memory.guest_base()),
        memory.size(),
        Some(FileOffset::new(memory.file().try_clone().unwrap(), 0)),
    )])
    .unwrap();
    let mut device = DeviceQueue::new(SIZE).unwrap();
    let at = |offset| GuestAddress(memory.guest_address(offset));
    device.set_size(SIZE);
    device.try_set_desc_table_address(at(layout.descriptors)).unwrap();
    device.try_set_avail_ring_address(at(layout.avail)).unwrap();
    device.try_set_used_ring_address(at(layout.used)).unwrap();
    device.set_event_idx(true);
    device.set_ready(true);
    let (socket, peer) = UnixStream::pair().unwrap();
    let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let call = event();
    let queue = Queue::new(Parts {
        index: 0,
        memory,
        layout,
        event_idx: true,
        indirect,
        segment: SEGMENT,
        max_request: MAX_REQUEST,
        call: Arc::clone(&call),
        kick: event(),
        link: Arc::new(Link::new(socket)),
        config: Arc::new(DeviceConfig::parse(&[])),
        spin: Duration::ZERO,
        answer_within: Duration::from_secs(60),
    })
    .unwrap();
    Bench { queue, device, view, layout, call, peer: Some(peer) }
}

impl Bench {
    fn submit(&mut self, len: usize, token: u64) -> Result<(), FrontendError> {
        self.queue.submit(Request::Write { sector: token, buffer: Buffer { offset: 0, len } }, token)
    }

    /// The device's side: takes all chains, checks their shape, answers OK; the heads in order.
    fn serve(&mut self) -> Vec<u16> {
        let mut heads = Vec::new();
        while let Some(chain) = self.device.pop_descriptor_chain(&self.view) {
            let head = chain.head_index();
            let parts: Vec<_> = chain.collect();
            let (status, readable) = parts.split_last().unwrap();
            assert!(status.is_write_only() && status.len() == 1);
            assert!(readable.iter().all(|part| !part.is_write_only()));
            assert_eq!(readable[0].len(), 16);
            let sector: u64 = self.view.read_obj(GuestAddress(readable[0].addr().0 + 8)).unwrap();
            let data: u32 = readable[1..].iter().map(|part| part.len()).sum();
            assert_eq!(data as usize, length_of(sector), "request {sector}");
            self.view.write_obj(0u8, status.addr()).unwrap();
            self.device.add_used(&self.view, head, 1).unwrap();
            heads.push(head);
        }
        heads
    }

    fn used(&mut self, head: u32, idx: u16) {
        let memory = Arc::clone(self.queue.memory());
        let at = self.layout.used_entry(idx.wrapping_sub(1));
        memory.write_at(at, &head.to_le_bytes()).unwrap();
        memory.write_at(self.layout.used_idx(), &idx.to_le_bytes()).unwrap();
    }
}

/// Requests of many lengths, none, one and several segments.
fn length_of(token: u64) -> usize {
    [512, 1024, 1536, 5000, MAX_REQUEST, 0][token as usize % 6]
}

#[test]
fn chains_of_every_length_go_round_and_round() {
    for indirect in [true, false] {
        let mut b = bench(indirect);
        let (mut token, mut expected, mut done) = (0, 0, Vec::new());
        // Past the wrap of the ring's indices.
        while expected < 70_000 {
            let full = loop {
                match b.submit(length_of(token), token) {
                    Ok(()) => token += 1,
                    Err(e) => break e,
                }
            };
            assert!(matches!(full, FrontendError::QueueFull), "{full}");
            assert!(b.queue.kick().unwrap(), "the device sleeps and must be notified");
            let served = b.serve().len();
            assert_eq!(served, b.queue.in_flight());
            b.device.enable_notification(&b.view).unwrap();
            assert_eq!(b.queue.completions(&mut done).unwrap(), served);
            for completion in done.drain(..) {
                assert_eq!((completion.token, completion.status), (expected, Status::Ok));
                expected += 1;
            }
        }
    }
}

#[test]
fn a_completion_of_nothing_is_an_error() {
    for head in [1, u32::from(SIZE), 0x1_0000, u32::MAX] {
        let mut b = bench(true);
        b.submit(512, 0).unwrap();
        b.queue.kick().unwrap();
        // The one request has head 0.
        b.used(head, 1);
        let error = b.queue.completions(&mut Vec::new()).unwrap_err();
        assert!(matches!(error, FrontendError::UnexpectedCompletion { head: h } if h == head), "{error}");
        assert_eq!(b.queue.in_flight(), 1, "the request is still there");
    }
}

#[test]
fn a_doubled_completion_is_an_error() {
    let mut b = bench(true);
    b.submit(512, 0).unwrap();
    b.submit(512, 6).unwrap();
    b.queue.kick().unwrap();
    let mut done = Vec::new();
    b.used(0, 1);
    assert_eq!(b.queue.completions(&mut done).unwrap(), 1);
    assert_eq!(done[0].status, Status::Missing, "nobody wrote a status");
    b.used(0, 2);
    let error = b.queue.completions(&mut done).unwrap_err();
    assert!(matches!(error, FrontendError::UnexpectedCompletion { head: 0 }), "{error}");
}

#[test]
fn a_used_index_that_jumps_is_an_error() {
    let mut b = bench(true);
    b.submit(512, 0).unwrap();
    b.queue.kick().unwrap();
    b.used(0, 2);
    let error = b.queue.completions(&mut Vec::new()).unwrap_err();
    assert!(matches!(error, FrontendError::UsedIndexJump { from: 0, to: 2, in_flight: 1 }), "{error}");
}

#[test]
fn buffers_and_requests_too_large_are_refused_and_cost_nothing() {
    let mut b = bench(false);
    assert!(matches!(b.submit(MAX_REQUEST + 1, 0), Err(FrontendError::BadBuffer { .. })));
    let outside = Buffer { offset: b.queue.data_size() - 511, len: 512 };
    let error = b.queue.submit(Request::Read { sector: 0, buffer: outside }, 0).unwrap_err();
    assert!(matches!(error, FrontendError::BadBuffer { .. }), "{error}");
    let wild = Buffer { offset: usize::MAX, len: 512 };
    assert!(b.queue.submit(Request::Read { sector: 0, buffer: wild }, 0).is_err());
    assert_eq!(b.queue.in_flight(), 0);
    assert!(!b.queue.kick().unwrap(), "nothing was put into the ring");
}

#[test]
fn a_call_wakes_and_completions_outlive_the_back_end() {
    let mut b = bench(true);
    assert_eq!(b.queue.wait(Some(Duration::ZERO)).unwrap(), Wait::TimedOut);
    b.submit(512, 0).unwrap();
    b.queue.kick().unwrap();
    b.serve();
    assert!(b.device.needs_notification(&b.view).unwrap());
    b.call.write(1).unwrap();
    drop(b.peer.take());
    // What the back end finished before it went is seen first, then that it is gone.
    assert_eq!(b.queue.wait(None).unwrap(), Wait::Ready);
    assert_eq!(b.queue.completions(&mut Vec::new()).unwrap(), 1);
    assert!(matches!(b.queue.wait(None), Err(FrontendError::BackendGone)));
}
