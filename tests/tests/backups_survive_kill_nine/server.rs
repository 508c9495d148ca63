//! An NBD server that can be killed, and then has lost what it was not told to flush.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Result, ensure};
use blkmark_tests::lab::Lab;
use blkmark_tests::process::Process;
use blkmark_tests::tools;

use crate::stage::SIZE;

/// An NBD server that keeps what it is sent to itself until it is flushed.
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) socket: PathBuf,
    pub(crate) file: PathBuf,
}

impl Server {
    pub(crate) fn start(lab: &Lab) -> Result<Server> {
        let (socket, file) = (lab.path("nbd.sock"), lab.path("export.raw"));
        let image = fs::OpenOptions::new().write(true).create(true).truncate(false).open(&file)?;
        image.set_len(SIZE)?;
        Ok(Server { process: Server::process(lab, &socket, &file)?, socket, file })
    }

    pub(crate) fn process(lab: &Lab, socket: &Path, file: &Path) -> Result<Process> {
        let _ = fs::remove_file(socket);
        let mut command = tools::command("nbdkit")?;
        command.args(["-f", "--filter=cache", "-U"]).arg(socket).arg("file").arg(file).arg("cache=writeback");
        let mut process = Process::start("nbdkit", command.stdin(Stdio::null()), &lab.path("nbdkit.log"))?;
        // It says nowhere that it is ready.
        while UnixStream::connect(socket).is_err() {
            ensure!(process.is_running(), "{}", process.log_tail());
            std::thread::yield_now();
        }
        Ok(process)
    }
}
