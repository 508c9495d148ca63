//! What can go wrong between this front end and a back end. Returned by every fallible call of the room.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::request::Status;

/// An access that would leave guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest address {address:#x}, {len} bytes, is outside guest memory")]
pub struct OutOfRange {
    /// Guest physical address.
    pub address: u64,
    /// Bytes accessed.
    pub len: usize,
}

/// Why a front end call failed.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// Nobody listens at the socket.
    #[error("cannot connect to {}: {source}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What connect(2) said.
        source: io::Error,
    },
    /// A vhost-user message was refused, or the connection ended in the middle of it.
    #[error("vhost-user {step}: {source}")]
    Protocol {
        /// The message.
        step: &'static str,
        /// What the protocol layer said.
        source: vhost::Error,
    },
    /// The back end does not offer what this front end cannot do without.
    #[error("the back end does not offer {0}")]
    MissingFeature(&'static str),
    /// More queues were asked for than the back end has.
    #[error("{wanted} queues wanted, but the back end has {offered}")]
    TooManyQueues {
        /// From the options.
        wanted: usize,
        /// From GET_QUEUE_NUM.
        offered: u64,
    },
    /// The options contradict themselves or the device.
    #[error("bad front end options: {0}")]
    BadOptions(String),
    /// A system call on this side failed.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: &'static str,
        /// The errno.
        source: io::Error,
    },
    /// The back end closed its side of the socket, or died.
    #[error("the back end is gone")]
    BackendGone,
    /// The back end gave no answer in time.
    #[error("the back end gave no answer within {0:?}")]
    TimedOut(Duration),
    /// The ring has no room for the request: take completions first.
    #[error("the virtqueue is full")]
    QueueFull,
    /// A buffer does not fit into the data area or into the largest request.
    #[error("buffer at {offset}, {len} bytes, does not fit: {limit}")]
    BadBuffer {
        /// Byte offset in the queue's data area.
        offset: usize,
        /// Length in bytes.
        len: usize,
        /// The limit that it breaks.
        limit: String,
    },
    /// A raw access beyond guest memory.
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    /// The back end completed a request that is not in flight (or completed it twice).
    #[error("the back end completed descriptor {head}, which heads no request in flight")]
    UnexpectedCompletion {
        /// The id in the used ring.
        head: u32,
    },
    /// More entries appeared in the used ring than there are requests in flight.
    #[error("the used index jumped from {from} to {to} with {in_flight} requests in flight")]
    UsedIndexJump {
        /// The last index consumed.
        from: u16,
        /// What the ring says.
        to: u16,
        /// Requests in flight.
        in_flight: usize,
    },
    /// A blocking request ended with a status other than OK.
    #[error("{request} at byte {offset} failed: {status}")]
    Failed {
        /// read, write, ...
        request: &'static str,
        /// Where on the disk, in bytes.
        offset: u64,
        /// The status byte.
        status: Status,
    },
    /// An offset or length of a blocking request is no multiple of 512, or too large to express.
    #[error("{request} at byte {offset}, {len} bytes: not in whole sectors of this disk")]
    NotInSectors {
        /// read, write, ...
        request: &'static str,
        /// Where on the disk, in bytes.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
}

impl FrontendError {
    /// For `map_err` after a system call.
    pub(super) fn system(what: &'static str) -> impl Fn(rustix::io::Errno) -> FrontendError {
        move |errno| FrontendError::System { what, source: errno.into() }
    }

    /// For `map_err` after a standard library call.
    pub(super) fn io(what: &'static str) -> impl Fn(io::Error) -> FrontendError {
        move |source| FrontendError::System { what, source }
    }
}
