//! The place a test works in: a temporary folder with disks, sockets and images, gone with the test.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::process::Process;

/// Mebibytes to bytes.
pub const MIB: u64 = 1 << 20;

/// A temporary folder and how to make things in it.
#[derive(Debug)]
pub struct Lab {
    folder: TempDir,
}

/// A disk that a daemon is to serve.
#[derive(Debug, Clone)]
pub struct Disk {
    /// Its id on the control socket.
    pub id: String,
    /// The raw file.
    pub path: PathBuf,
    /// The vhost-user socket.
    pub socket: PathBuf,
    /// Virtqueues offered.
    pub queues: u16,
    /// Served without write access.
    pub readonly: bool,
    /// Served past the host's page cache or through it, if it matters.
    pub direct: Option<bool>,
}

impl Lab {
    /// A fresh folder. Under `TMPDIR`, or `/tmp`.
    pub fn new() -> Result<Lab> {
        let folder =
            tempfile::Builder::new().prefix("blkmark-test-").tempdir().context("cannot make a temporary folder")?;
        Ok(Lab { folder })
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// An empty (sparse) disk of `bytes` and the names it goes by; one queue.
    pub fn disk(&self, id: &str, bytes: u64) -> Result<Disk> {
        let path = self.path(&format!("{id}.raw"));
        let file = File::create_new(&path).with_context(|| format!("cannot create {}", path.display()))?;
        file.set_len(bytes)?;
        Ok(Disk {
            id: id.to_owned(),
            path,
            socket: self.path(&format!("{id}.sock")),
            queues: 1,
            readonly: false,
            direct: None,
        })
    }

    /// A disk of `bytes` filled with a pattern that differs in every sector.
    pub fn filled_disk(&self, id: &str, bytes: u64) -> Result<Disk> {
        let disk = self.disk(id, bytes)?;
        let file = OpenOptions::new().write(true).open(&disk.path)?;
        let mut chunk = Vec::with_capacity(MIB as usize);
        let mut sector = 0u64;
        let mut at = 0u64;
        while at < bytes {
            chunk.clear();
            while chunk.len() < MIB as usize && at + (chunk.len() as u64) < bytes {
                chunk.extend_from_slice(&pattern_sector(sector));
                sector += 1;
            }
            let length = chunk.len().min((bytes - at) as usize);
            file.write_all_at(&chunk[..length], at)?;
            at += length as u64;
        }
        Ok(disk)
    }

    /// Starts a program of any kind with its log in the folder.
    pub fn start(&self, name: &str, command: &mut std::process::Command) -> Result<Process> {
        let mut file = OsString::from(name);
        file.push(".log");
        let mut log = self.folder.path().join(file);
        let mut again = 1;
        while log.exists() {
            again += 1;
            log = self.path(&format!("{name}-{again}.log"));
        }
        Process::start(name, command, &log)
    }

    /// Writes a small file.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path(name);
        File::create(&path)?.write_all(content.as_ref())?;
        Ok(path)
    }
}

impl Disk {
    /// The same disk with another number of queues.
    pub fn with_queues(mut self, queues: u16) -> Disk {
        self.queues = queues;
        self
    }

    /// The same disk, past the host's page cache or through it.
    pub fn with_direct(mut self, direct: bool) -> Disk {
        self.direct = Some(direct);
        self
    }

    /// The content of the raw file.
    pub fn content(&self) -> Result<Vec<u8>> {
        fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))
    }
}

/// 512 bytes that tell the sector they belong to.
fn pattern_sector(sector: u64) -> [u8; 512] {
    let mut bytes = [0u8; 512];
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = (sector << 8 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}
