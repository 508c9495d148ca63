//! The vhost-user session: one socket, one front end at a time, rings that start and stop.
//!
//! [`listen`] makes the socket, [`serve`] runs one thread a disk that accepts and serves front ends
//! one after the other, `handler` answers their messages, `ring` decides when a ring may run,
//! [`api`] is what the write path implements. `inflight` keeps what a crash must not
//! lose. Built on `vhost`'s protocol layer alone, so that migration logging can join it.
//!
//! Invariant: nothing a front end sends ends more than its own connection, and a connection is
//! closed only after its rings have stopped: front ends read the used index when they see it close.

pub mod api;
mod error;
mod handler;
mod inflight;
pub mod listen;
mod notices;
mod ring;
pub mod serve;

#[cfg(any(test, fuzzing))]
pub(crate) use inflight::fuzzing;

pub use api::{Device, Hangup, RingParts, RunningRing};
pub use inflight::InflightQueue;
pub use listen::{Endpoint, ListenError};
pub use notices::Notices;
pub use serve::{Session, Stopper};
