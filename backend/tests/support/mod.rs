//! What the session tests share: a disk in memory behind the [`Device`] trait, and a guest that
//! drives rings by hand and keeps `vhost`'s `Frontend` as its VMM would.
#![allow(dead_code)] // Each test binary uses its part.

pub mod disk;
pub mod guest;

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use blkmark::session::{Endpoint, Session};
use vhost::vhost_user::Frontend;

pub use disk::MemoryDisk;
pub use guest::Guest;

/// Long enough for any machine; only a hang reaches it.
pub const GIVE_UP_MS: i32 = 60_000;

/// A session over a disk in memory, at a socket of its own.
pub struct Served {
    pub disk: Arc<MemoryDisk>,
    pub session: Option<Session>,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Served {
    pub fn new(disk: MemoryDisk) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.sock");
        let disk = Arc::new(disk);
        let endpoint = Endpoint::bind(&path).unwrap();
        let session = Session::spawn("disk", endpoint, disk.clone()).unwrap();
        Self { disk, session: Some(session), path, _dir: dir }
    }

    pub fn stream(&self) -> UnixStream {
        UnixStream::connect(&self.path).unwrap()
    }

    /// A front end with no check of its own on queue indexes.
    pub fn front_end(&self) -> Frontend {
        Frontend::from_stream(self.stream(), 0x8000)
    }

    /// The session still serves: a whole front end comes, does a request and goes.
    pub fn assert_serves(&self) {
        let guest = Guest::new(1, 16);
        let mut vmm = self.front_end();
        guest.attach(&mut vmm, 0);
        guest.ring(0).check_io();
        drop(vmm);
    }

    pub fn stop(mut self) {
        self.session.take().unwrap().stop();
    }
}
