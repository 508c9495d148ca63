//! The write path: where the device's requests, the disk's engine and the tracker meet.
//!
//! [`ServedDisk`] is the device that a vhost-user session drives. Each virtqueue has a thread of its own with its own
//! io_uring and its own lane through the tracker (`queue`), a table of requests in flight (`table`), and an inbox for what
//! other threads have to tell it (`inbox`).

mod inbox;
mod queue;
mod served;
mod spin;
mod stage;
#[cfg(test)]
mod stage_tests;
mod table;

pub use served::{ServedDisk, ThreadOptions};
