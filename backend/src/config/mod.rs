//! What an operator asks for, as plain checked values: `--disk` options, the TOML file, and the
//! command line that QEMU's vhost-user back ends share.
//!
//! The command line fills these types and the daemon reads them; nothing here opens, creates or
//! looks at a file. Every mistake is a [`ConfigError`] that names the key and the known ones.
//!
//! Invariant: a value that exists has been checked, whichever of the three ways it came.

mod convention;
mod disk;
mod error;
mod file;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod pairs;
mod value;

pub use convention::{BACKEND_DESCRIPTOR, CAPABILITIES, from_convention};
pub use disk::{Bitmaps, DISK_KEYS, DiskOptions, SocketSpec};
pub use error::ConfigError;
pub use file::{LogFormat, SandboxWish, ServeOptions};
pub use value::{parse_size, parse_switch};

#[cfg(test)]
mod tests;
