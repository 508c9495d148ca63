//! A raw mirror of a disk behind an NBD server that dies and fails: increments are written over it, again and again until
//! one comes to its end. What a broken one left half written is in the bitmap of the next.

use std::fs::{self, File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::place::Place;
use crate::process::{GIVE_UP, Process};
use crate::tools::command;

/// The mirror of one disk.
pub struct Mirror {
    /// What it has to be brought up to date with; none: with everything.
    pub bitmap: Option<String>,
    /// The raw file.
    pub file: PathBuf,
    socket: PathBuf,
    failing: PathBuf,
    log: PathBuf,
    server: Option<Process>,
}

impl Mirror {
    /// A mirror that was never written.
    pub fn new(place: &Place, number: u8) -> Mirror {
        let path = |what: &str| place.path(&format!("mirror{number}.{what}"));
        Mirror {
            bitmap: None,
            file: path("raw"),
            socket: path("sock"),
            failing: path("fails"),
            log: path("log"),
            server: None,
        }
    }

    /// Makes it as large as the disk, and its server run.
    pub fn serve(&mut self, bytes: u64) -> Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(&self.file)?;
        if file.metadata()?.len() != bytes {
            file.set_len(bytes)?;
            self.kill();
        }
        if self.server.as_mut().is_some_and(Process::is_running) {
            return Ok(());
        }
        let _ = fs::remove_file(&self.socket);
        let mut server = command("nbdkit")?;
        server.args(["-f", "--filter=error", "-U"]).arg(&self.socket).arg("file").arg(&self.file);
        server.args(["error-rate=5%", "error-pread-rate=0"]).arg(format!("error-file={}", self.failing.display()));
        let mut process = Process::start("nbdkit", server.stdin(Stdio::null()), &self.log)?;
        // It says nowhere that it is ready.
        let deadline = Instant::now() + GIVE_UP;
        while UnixStream::connect(&self.socket).is_err() {
            if !process.is_running() {
                bail!("nbdkit ended with {}\n{}", process.wait(GIVE_UP)?, process.log_tail());
            }
            ensure!(Instant::now() < deadline, "nbdkit does not serve\n{}", process.log_tail());
            std::thread::sleep(Duration::from_millis(2));
        }
        self.server = Some(process);
        Ok(())
    }

    /// Its server is gone.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Its server answers some requests with errors, or no longer does.
    pub fn fail(&self, on: bool) -> Result<()> {
        match on {
            true => drop(File::create(&self.failing)?),
            false => drop(fs::remove_file(&self.failing)),
        }
        Ok(())
    }

    /// The arguments of `blockdev-add`.
    pub fn node(&self, name: &str) -> Value {
        json!({ "driver": "nbd", "node-name": name, "export": "", "server": { "type": "unix", "path": self.socket } })
    }
}
