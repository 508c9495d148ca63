//! Network block devices: a client that backups are pushed through and a server that they are pulled from, written from the
//! protocol document of the NBD project (`doc/proto.md`, with its extension of extended headers).
//!
//! Nothing here knows of jobs or commands. Rooms: `protocol` (numbers and errors of the wire), `address` (sockets and time
//! limits); `handshake` and `client` (the client's side), `payload` (what replies bring),
//! `target` (an export that a backup is written into), `reader` (one that is read, as an older image); `export` (what can
//! be exported), `negotiate`, `transmission` and `link` (the server's side of one connection), `tls`, `server` (all
//! connections), `exports` (what blkmark exports).
//!
//! Invariants: whatever the other side sends, or does not send, ends at worst its own connection, with an error that
//! says why; nothing is allocated for a length that was not checked.

pub mod address;
pub mod client;
pub mod export;
pub mod exports;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod handshake;
pub mod late;
mod link;
mod negotiate;
mod payload;
pub mod protocol;
pub mod reader;
pub mod server;
pub mod target;
pub mod tls;
mod transmission;

pub use address::Address;
pub use client::{Client, ClientError, ClientSettings, ExportInfo};
pub use export::{Export, Extent};
pub use exports::{BitmapExportError, SourceExport};
pub use late::{LateReader, LateTarget};
pub use reader::NbdReader;
pub use server::{ExportError, NbdServer, Removal, ServerError, ServerSettings};
pub use target::NbdTarget;
pub use tls::{TlsCredentials, TlsError};
