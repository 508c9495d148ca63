//! QEMU's QMP on a Unix socket: framing, negotiation, replies, events, and typed access to arguments.
//!
//! This room knows the protocol and no command of blkmark: whoever serves implements [`Commands`], binds a
//! [`Server`] and emits through [`Events`]; whoever asks uses [`Client`]. Error classes and texts are those of
//! QEMU 10.0.2, since scripts match them; docs/control.md lists the differences and their reasons.
//!
//! Roads through the room: bytes -> [`lexer`] -> [`parser`] -> `session` (one per client) -> [`Commands`] ->
//! [`wire`] -> `outbox` -> bytes. Events enter at the outbox.

pub mod arguments;
pub mod client;
pub mod error;
pub mod event;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod lexer;
mod outbox;
pub mod parser;
pub mod server;
mod session;
pub(crate) mod socket;
pub mod wire;

pub use arguments::Arguments;
pub use client::{Client, ClientError};
pub use error::{ErrorClass, QmpError};
pub use event::{Event, Events, Subscription, SubscriptionEnd};
pub use server::{BoundServer, Server};
pub use socket::BindError;

use serde_json::{Map, Value, json};
use std::time::SystemTime;

/// The version of QEMU whose QMP is spoken: major, minor, micro.
pub const QEMU_VERSION: [u64; 3] = [10, 0, 2];

/// What the daemon can be asked to do. Called from the thread of each client, many at a time.
pub trait Commands: Send + Sync {
    /// Executes command `name`, or answers `None` where there is no such command.
    ///
    /// The reply is sent after this returns, and the client's later commands wait for it: long work belongs into a
    /// job. A panic becomes a GenericError of this one command.
    fn execute(&self, name: &str, arguments: Map<String, Value>) -> Option<Result<Value, QmpError>>;

    /// Events from before a client came that it is told of as soon as it has negotiated, with the time at which they happened.
    /// Called with the client's queue locked: it must not wait, nor tell events.
    fn told_before(&self) -> Vec<(SystemTime, Event)> {
        Vec::new()
    }
}

/// The `version` of the greeting, which is what `query-version` returns too.
pub fn version() -> Value {
    let [major, minor, micro] = QEMU_VERSION;
    json!({
        "qemu": { "micro": micro, "minor": minor, "major": major },
        "package": concat!("blkmark ", env!("CARGO_PKG_VERSION")),
    })
}

/// Locks a mutex whether or not a thread panicked while it held it: what these mutexes guard is consistent between
/// any two statements.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
