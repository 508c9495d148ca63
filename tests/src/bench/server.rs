//! A server under load: started for one run, with its bitmaps, and ended after it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use blkmark_backup::qmp::Client;
use clap::ValueEnum;
use serde_json::json;

use super::cell::Cell;
use super::cpu::process_time;
use super::instructions::Callgrind;
use super::options::Options;
use super::target::Target;
use crate::process::Process;

/// Which program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// This workspace's.
    Blkmark,
    /// `qemu-storage-daemon`.
    Qsd,
    /// fio on the disk itself.
    Fio,
}

/// How `qemu-storage-daemon` does its I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Aio {
    /// Linux AIO; needs O_DIRECT.
    Native,
    /// io_uring.
    IoUring,
    /// A pool of threads.
    Threads,
}

impl Aio {
    fn name(self) -> &'static str {
        match self {
            Aio::Native => "native",
            Aio::IoUring => "io_uring",
            Aio::Threads => "threads",
        }
    }
}

/// A program with its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contender {
    /// `blkmark serve`.
    Blkmark {
        /// Not the usual build, but the one that it is compared with.
        other: bool,
        /// Dirty bitmaps on the disk.
        bitmaps: u32,
    },
    /// `qemu-storage-daemon`.
    Qsd {
        /// How it does its I/O.
        aio: Aio,
        /// Dirty bitmaps on the disk.
        bitmaps: u32,
    },
    /// No server: fio on the disk itself.
    Fio,
}

impl Contender {
    /// Dirty bitmaps on the disk.
    pub fn bitmaps(&self) -> u32 {
        match self {
            Contender::Blkmark { bitmaps, .. } | Contender::Qsd { bitmaps, .. } => *bitmaps,
            Contender::Fio => 0,
        }
    }

    /// The program, with what distinguishes it.
    pub fn program(&self) -> String {
        match self {
            Contender::Blkmark { other: false, .. } => "blkmark".into(),
            Contender::Blkmark { other: true, .. } => "blkmark-before".into(),
            Contender::Fio => "fio".into(),
            Contender::Qsd { aio, .. } => format!("qsd-{}", aio.name()),
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.program(), self.bitmaps())
    }
}

/// The disk's node name in either program.
const NODE: &str = "drive0";

/// A running server with one disk.
pub struct Server {
    process: Process,
    /// Sockets and the log.
    dir: tempfile::TempDir,
}

impl Server {
    /// Starts it over `target` with the cell's queues, adds the bitmaps, and returns when it serves.
    pub fn start(options: &Options, target: &Target, cell: &Cell, contender: &Contender) -> Result<Self> {
        Self::start_under(options, target, cell, contender, None)
    }

    /// The same under callgrind, if that is wished.
    pub(super) fn start_under(
        options: &Options,
        target: &Target,
        cell: &Cell,
        contender: &Contender,
        callgrind: Option<&Callgrind>,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("bench-").tempdir().context("cannot make a folder for sockets")?;
        let control = dir.path().join("control.sock");
        let socket = dir.path().join("disk.sock");
        // qemu-storage-daemon gets its monitor as a connected socket: with a listening one, a client that comes before
        // the monitor is set up is now and then greeted twice.
        let (monitor, theirs) = UnixStream::pair().context("socketpair")?;
        let mut command = match contender {
            Contender::Blkmark { other, .. } => {
                let program = options.blkmark(*other)?;
                let command = callgrind.map_or_else(|| Command::new(&program), |callgrind| callgrind.wrap(&program));
                blkmark(command, options, target, cell, &socket, &control)
            }
            Contender::Qsd { aio, .. } => qsd(options, target, cell, *aio, &socket, theirs),
            Contender::Fio => bail!("fio is no server"),
        };
        let name = contender.program();
        let log = dir.path().join("log");
        let mut start = || Process::start(&name, &mut command, &log);
        let process = match &options.pin {
            Some(pin) => pin.server.pin_child(start)?,
            None => start()?,
        };
        // It keeps the other end of the monitor's socket open, whose closing tells of a server that cannot start.
        drop(command);
        let mut server = Server { process, dir };
        let mut qmp = match contender {
            Contender::Blkmark { .. } | Contender::Fio => {
                server.process.first_line()?;
                Client::connect(&control)
            }
            // It greets once everything before the monitor on its command line is served.
            Contender::Qsd { .. } => Client::negotiate(monitor),
        }
        .with_context(|| server.process.log_tail())?;
        for i in 0..contender.bitmaps() {
            let persistent = options.persistent && matches!(contender, Contender::Blkmark { .. });
            let arguments = json!({"node": NODE, "name": format!("b{i}"), "persistent": persistent});
            qmp.execute("block-dirty-bitmap-add", arguments)
                .with_context(|| format!("block-dirty-bitmap-add on {name}"))?;
        }
        Ok(server)
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("disk.sock")
    }

    /// Processor time used so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        process_time(self.process.pid())
    }

    /// Ends it as an operator does, so that it lets go of the disk before the next one comes.
    pub fn stop(mut self) -> Result<()> {
        self.process.terminate().map(|_| ())
    }

    /// What it said, for error messages.
    pub fn log(&self) -> String {
        self.process.log()
    }
}

fn blkmark(
    mut command: Command,
    options: &Options,
    target: &Target,
    cell: &Cell,
    socket: &Path,
    control: &Path,
) -> Command {
    let medium = match target.is_null() {
        true => format!("null={}", target.size()),
        false => format!(
            "path={},direct={}",
            target.path().display().to_string().replace(',', ",,"),
            if options.direct() { "on" } else { "off" }
        ),
    };
    let mut disk = format!("id={NODE},{medium},socket={},queues={}", socket.display(), cell.queues);
    if let Some(more) = &options.blkmark_disk {
        disk.push(',');
        disk.push_str(more);
    }
    command.args(["serve", "--disk", &disk, "--control"]).arg(control).stdin(Stdio::null());
    command
}

fn qsd(options: &Options, target: &Target, cell: &Cell, aio: Aio, socket: &Path, monitor: UnixStream) -> Command {
    let driver = if target.is_block_device() { "host_device" } else { "file" };
    let node = match target.is_null() {
        true => format!("driver=null-co,node-name={NODE},size={},read-zeroes=off", target.size()),
        false => format!(
            "driver={driver},node-name={NODE},filename={},cache.direct={},aio={},discard=unmap",
            // A comma ends an option unless it is doubled.
            target.path().display().to_string().replace(',', ",,"),
            if options.direct() { "on" } else { "off" },
            aio.name(),
        ),
    };
    let mut command = Command::new(&options.qsd);
    command
        .arg("--blockdev")
        .arg(node)
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name={NODE},addr.type=unix,addr.path={},writable=on,num-queues={}",
            socket.display(),
            cell.queues,
        ))
        .args(["--chardev", "socket,id=m,fd=0", "--monitor", "m"])
        .stdin(Stdio::from(OwnedFd::from(monitor)));
    command
}
