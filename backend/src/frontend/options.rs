//! What a guest is made of: queues, memory, features. Checked once, before anything is allocated.

use std::time::Duration;

use virtio_bindings::virtio_blk as vb;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::error::FrontendError;

/// Which message tells the back end of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryMessage {
    /// ADD_MEM_REG where the back end has CONFIGURE_MEM_SLOTS, else SET_MEM_TABLE: as QEMU does.
    Preferred,
    /// SET_MEM_TABLE always, as Firecracker and older VMMs do.
    Table,
}

/// How to build the guest. `Options::default()` is one queue of 256 entries with 8 MiB of buffers.
#[derive(Clone, Debug)]
pub struct Options {
    /// Virtqueues to set up, at least 1.
    pub queues: usize,
    /// Entries of each virtqueue: a power of two up to 32768.
    pub queue_size: u16,
    /// Bytes of the data area of each queue.
    pub data_size: usize,
    /// Virtio feature bits to accept when offered; see [`Options::ALL_FEATURES`]. VERSION_1 is needed.
    pub features: u64,
    /// Use indirect descriptors (one ring entry a request) when the feature is negotiated.
    pub indirect: bool,
    /// Largest read or write in bytes.
    pub max_request: usize,
    /// Cut data into descriptors of at most this many bytes; `None` makes one descriptor, unless SIZE_MAX is smaller.
    pub segment: Option<usize>,
    /// Negotiate inflight tracking when offered, as QEMU does. Without it a reconnect loses what was in flight.
    pub inflight: bool,
    /// How guest memory is announced.
    pub memory_message: MemoryMessage,
    /// Ask for REPLY_ACK on every message when offered.
    pub reply_ack: bool,
    /// Busy-poll the used ring this long before sleeping. It steals the server's core where cores are few.
    pub spin: Duration,
    /// Give up on a back end that does not answer a message or a blocking request within this time.
    pub answer_within: Duration,
}

const fn bit(feature: u32) -> u64 {
    1 << feature
}

impl Options {
    /// Every virtio feature that this front end can use.
    pub const ALL_FEATURES: u64 = bit(VIRTIO_F_VERSION_1)
        | bit(VIRTIO_RING_F_EVENT_IDX)
        | bit(VIRTIO_RING_F_INDIRECT_DESC)
        | bit(vb::VIRTIO_BLK_F_SIZE_MAX)
        | bit(vb::VIRTIO_BLK_F_SEG_MAX)
        | bit(vb::VIRTIO_BLK_F_RO)
        | bit(vb::VIRTIO_BLK_F_BLK_SIZE)
        | bit(vb::VIRTIO_BLK_F_FLUSH)
        | bit(vb::VIRTIO_BLK_F_TOPOLOGY)
        | bit(vb::VIRTIO_BLK_F_MQ)
        | bit(vb::VIRTIO_BLK_F_DISCARD)
        | bit(vb::VIRTIO_BLK_F_WRITE_ZEROES);

    /// The same options without the feature bit `feature` (a `VIRTIO_*_F_*` number).
    pub fn without(mut self, feature: u32) -> Self {
        self.features &= !bit(feature);
        self
    }

    /// The same options with another number of queues.
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    pub(super) fn check(&self) -> Result<(), FrontendError> {
        let bad = |what: String| Err(FrontendError::BadOptions(what));
        if self.queues == 0 || self.queues > 256 {
            return bad(format!("{} queues: 1 to 256 can be had", self.queues));
        }
        if !self.queue_size.is_power_of_two() || self.queue_size < 4 {
            return bad(format!("a queue size of {} is no power of two from 4 to 32768", self.queue_size));
        }
        if self.features & bit(VIRTIO_F_VERSION_1) == 0 {
            return bad("VERSION_1 cannot be left out: the rings are little-endian".into());
        }
        if self.max_request == 0 || self.max_request > u32::MAX as usize {
            return bad(format!("a largest request of {} bytes is impossible", self.max_request));
        }
        if self.segment == Some(0) {
            return bad("segments of no bytes".into());
        }
        if self.data_size > 1 << 40 {
            return bad(format!("{} bytes of buffers a queue", self.data_size));
        }
        Ok(())
    }
}

impl Default for Options {
    fn default() -> Self {
        Options {
            queues: 1,
            queue_size: 256,
            data_size: 8 << 20,
            features: Self::ALL_FEATURES,
            indirect: true,
            max_request: 1 << 20,
            segment: None,
            inflight: true,
            memory_message: MemoryMessage::Preferred,
            reply_ack: true,
            spin: Duration::ZERO,
            answer_within: Duration::from_secs(30),
        }
    }
}
