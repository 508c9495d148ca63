//! Network block devices: a client that backups are pushed through, written from the protocol document of the NBD project
//! (`doc/proto.md`, with its extension of extended headers).
//!
//! Nothing here knows of bitmaps, jobs or commands. Rooms: `protocol` (numbers and errors of the wire), `address` (sockets and time
//! limits), `handshake` and `client` (the client's side), `target` (an export that a backup is written into).
//!
//! Invariants: whatever the other side sends, or does not send, ends at worst its own connection, with an error that
//! says why; nothing is allocated for a length that was not checked.

pub mod address;
pub mod client;
mod handshake;
pub mod protocol;
pub mod target;

pub use address::Address;
pub use client::{Client, ClientError, ClientSettings, Export};
pub use target::NbdTarget;
