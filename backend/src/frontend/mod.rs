//! An embedded vhost-user-blk front end: what a VMM and its guest's virtio-blk driver do, in one process.
//!
//! `blkmark demo`, the tests and the benchmark attach disks through it, to blkmark as to any other vhost-user-blk
//! back end. It knows nothing of the daemon: only the protocol (`vhost`), the split virtqueue (virtio 1.2, section
//! 2.7) and the block device (section 5.2).
//!
//! ```text
//! Guest ── the vhost-user session: features, config space, memory, rings; reconnects
//!   └─ Queue (one a thread) ── submit … kick … wait … completions
//!        ├─ RawQueue ── any bytes in the rings, for tests of hostile guests
//!        └─ Disk ── blocking read_at, write_at, flush, discard, write_zeroes, id
//! ```
//!
//! ```no_run
//! use blkmark::frontend::{Buffer, Guest, Options, Request};
//! # fn main() -> Result<(), blkmark::frontend::FrontendError> {
//! let mut guest = Guest::connect("drive0.sock".as_ref(), Options::default().queues(2))?;
//! for mut queue in guest.take_queues() {
//!     std::thread::spawn(move || {
//!         let buffer = Buffer::slot(0, 4096);
//!         queue.write_data(buffer.offset, &[7; 4096])?;
//!         queue.submit(Request::Write { sector: 8, buffer }, 1)?;
//!         queue.kick()?;
//!         queue.wait(None)?;
//!         let mut done = Vec::new();
//!         queue.completions(&mut done)
//!     });
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Invariants: nothing that a back end writes into shared memory is trusted (a used entry that names no request in
//! flight is an error, never a lost or a doubled completion); a call that waits also sees the back end die.

mod config;
mod disk;
mod error;
mod guest;
mod histogram;
mod layout;
mod link;
mod memory;
mod options;
mod queue;
#[cfg(test)]
mod queue_tests;
mod raw;
mod request;
mod ring;
#[cfg(test)]
mod ring_tests;

pub use config::DeviceConfig;
pub use disk::Disk;
pub use error::{FrontendError, OutOfRange};
pub use guest::Guest;
pub use histogram::Histogram;
pub use memory::GuestMemory;
pub use options::{MemoryMessage, Options};
pub use queue::{Queue, Wait};
pub use raw::{Descriptor, RawQueue};
pub use request::{Buffer, Completion, Request, Status};
