//! Why a message of a front end was refused. The connection ends with it, and the log names it.

use std::io;

use thiserror::Error;

use super::inflight::InflightError;
use crate::memory::MemoryError;

/// A refused message.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("queue {index} does not exist: there are {queues}")]
    Index { index: u32, queues: usize },
    #[error("features {0:#x} were not offered")]
    Features(u64),
    #[error("protocol features {0:#x} were not offered")]
    ProtocolFeatures(u64),
    #[error("queue {index}: a size of {size} is not a power of two up to {max} (see queue-size)")]
    Size { index: u16, size: u32, max: u16 },
    #[error("queue {index}: base {base} is not an index")]
    Base { index: u16, base: u32 },
    #[error("queue {0}: cannot be changed while it runs")]
    Running(u16),
    #[error("queue {index}: its {part} is not inside guest memory")]
    Outside { index: u16, part: &'static str },
    #[error("queue {0}: misaligned")]
    Misaligned(u16),
    #[error("queue {index}: the {what} descriptor is not a kind that can be signalled")]
    NotAnEvent { index: u16, what: &'static str },
    #[error("queue {index}: {source}")]
    Start { index: u16, source: io::Error },
    #[error("queue {index}: {source}")]
    Descriptor { index: u16, source: io::Error },
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("inflight region: {0}")]
    Inflight(#[from] InflightError),
    #[error("queue {index}: inflight region: {source}")]
    Recover { index: u16, source: InflightError },
    #[error("{0} was not negotiated")]
    NotOffered(&'static str),
}

impl From<Refusal> for vhost::vhost_user::Error {
    fn from(refusal: Refusal) -> Self {
        Self::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, refusal))
    }
}
