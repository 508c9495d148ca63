//! The one way to a store's files: what it needs of a directory, and nothing more.
//!
//! [`Directory`](super::directory::Directory) is the real one. The crash tests put another one under the store that keeps
//! what was not synced apart, and drops, tears and reorders it at a simulated power cut.
//!
//! What is relied on: bytes written are durable once [`Medium::sync`] of their file succeeded *and*, for a new file,
//! [`Medium::sync_dir`] did; until then any of their 512-byte sectors may or may not be. Nothing else may change. After a failed
//! sync nothing is known of what it was to cover.

use std::fmt;
use std::io;

/// A directory of small files, named by the store alone.
pub trait Medium: Send + Sync {
    /// What to call it in messages and in the records of other stores.
    fn name(&self) -> String;

    /// Whether the directory is there.
    fn is_there(&self) -> bool;

    /// Makes the directory, durably, and locks it against other processes.
    fn make(&self) -> io::Result<()>;

    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;

    /// A whole file, `limit` bytes of it at most.
    fn read(&self, file: &str, limit: u64) -> io::Result<Vec<u8>>;

    /// Makes a file of `len` zero bytes, space for which is taken, or lets one grow to that. Never shortens one.
    fn allocate(&self, file: &str, len: u64) -> io::Result<()>;

    /// Writes all of `data`. The file is there.
    fn write(&self, file: &str, at: u64, data: &[u8]) -> io::Result<()>;

    /// Makes the bytes and the length of a file durable.
    fn sync(&self, file: &str) -> io::Result<()>;

    /// Makes it durable which files there are.
    fn sync_dir(&self) -> io::Result<()>;

    /// Takes a file away.
    fn remove(&self, file: &str) -> io::Result<()>;

    /// Gives the whole directory another name, to be looked at by somebody; answers the new one. It is not there any more.
    fn put_aside(&self) -> io::Result<String>;

    /// A file of the store that another record names by [`Medium::name`].
    fn read_elsewhere(&self, directory: &str, file: &str, limit: u64) -> io::Result<Vec<u8>>;
}

impl fmt::Debug for dyn Medium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}
