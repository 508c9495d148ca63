//! The virtio block device, as a model: bytes in, requests and status bytes out.
//!
//! [`request`] parses what a guest put into a ring, [`config`] answers its configuration space.
//! Neither does I/O, keeps state or knows what a disk is; the write path calls both.

pub mod chain;
pub mod config;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod request;
