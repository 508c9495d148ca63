//! A server under load: started for one run, with its bitmaps, and ended after it.

use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use blkmark_backup::qmp::Client;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::cell::Cell;
use super::cpu::{private_memory, process_time};
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

/// How many bitmaps, as `64` on the command line, or `64t` for ones in memory alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bitmaps {
    /// Their number, on each disk.
    pub count: u32,
    /// Whether they survive.
    pub persistent: bool,
}

impl FromStr for Bitmaps {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (number, persistent) = text.strip_suffix('t').map_or((text, true), |number| (number, false));
        let count = number.parse().with_context(|| format!("`{text}` is no number of bitmaps: give 64, or 64t"))?;
        Ok(Self { count, persistent })
    }
}

impl fmt::Display for Bitmaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transient = if self.persistent || self.count == 0 { "" } else { "t" };
        write!(f, "{}{transient}", self.count)
    }
}

/// A program with its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contender {
    /// `blkmark serve`.
    Blkmark {
        /// Not the usual build, but the one that it is compared with.
        other: bool,
        /// Dirty bitmaps on each disk.
        bitmaps: Bitmaps,
    },
    /// `qemu-storage-daemon`.
    Qsd {
        /// How it does its I/O.
        aio: Aio,
        /// Dirty bitmaps on each disk, in memory alone.
        bitmaps: u32,
    },
    /// No server: fio on the disk itself.
    Fio,
}

impl Contender {
    /// Dirty bitmaps on each disk. Those of QSD are in memory: a raw disk has no place for them.
    pub fn bitmaps(&self) -> Bitmaps {
        match self {
            Contender::Blkmark { bitmaps, .. } => *bitmaps,
            Contender::Qsd { bitmaps, .. } => Bitmaps { count: *bitmaps, persistent: false },
            Contender::Fio => Bitmaps { count: 0, persistent: false },
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

/// A disk's node name in either program.
fn node(disk: usize) -> String {
    format!("drive{disk}")
}

/// A path as an option's value: a comma ends one unless it is doubled.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A running server with its disks.
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
        let sockets: Vec<PathBuf> = (0..target.disks()).map(|disk| socket(dir.path(), disk)).collect();
        // qemu-storage-daemon gets its monitor as a connected socket: with a listening one, a client that comes before
        // the monitor is set up is now and then greeted twice.
        let (monitor, theirs) = UnixStream::pair().context("socketpair")?;
        let mut command = match contender {
            Contender::Blkmark { other, .. } => {
                let program = options.blkmark(*other)?;
                let command = callgrind.map_or_else(|| Command::new(&program), |callgrind| callgrind.wrap(&program));
                blkmark(command, options, target, cell, &sockets, &control)
            }
            Contender::Qsd { aio, .. } => qsd(options, target, cell, *aio, &sockets, theirs),
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
        let Bitmaps { count, persistent } = contender.bitmaps();
        for disk in 0..target.disks() {
            let actions: Vec<Value> = (0..count)
                .map(|i| {
                    let data = json!({"node": node(disk), "name": format!("b{i}"), "persistent": persistent});
                    json!({"type": "block-dirty-bitmap-add", "data": data})
                })
                .collect();
            if !actions.is_empty() {
                qmp.execute("transaction", json!({"actions": actions}))
                    .with_context(|| format!("block-dirty-bitmap-add on {name}"))?;
            }
        }
        Ok(server)
    }

    /// The vhost-user socket of a disk.
    pub fn socket(&self, disk: usize) -> PathBuf {
        socket(self.dir.path(), disk)
    }

    /// Bytes of memory that it alone has.
    pub fn memory(&self) -> Result<u64> {
        private_memory(self.process.pid())
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

fn socket(dir: &Path, disk: usize) -> PathBuf {
    dir.join(format!("disk{disk}.sock"))
}

fn blkmark(
    mut command: Command,
    options: &Options,
    target: &Target,
    cell: &Cell,
    sockets: &[PathBuf],
    control: &Path,
) -> Command {
    command.arg("serve");
    for (index, socket) in sockets.iter().enumerate() {
        let medium = match target.is_null() {
            true => format!("null={}", target.size()),
            false => {
                let direct = if options.direct() { "on" } else { "off" };
                format!("path={},direct={direct}", escaped(target.path(index)))
            }
        };
        let mut disk = format!("id={},{medium},socket={},queues={}", node(index), socket.display(), cell.queues);
        let more = options.blkmark_disk.as_deref().unwrap_or_default();
        if !more.contains("bitmaps=") {
            disk.push_str(&format!(",bitmaps={}", escaped(&target.store(index))));
        }
        if options.instructions && !more.contains("poll=") {
            // Looking around has as many instructions as there is time.
            disk.push_str(",poll=0");
        }
        if !more.is_empty() {
            disk.push_str(&format!(",{more}"));
        }
        command.args(["--disk", &disk]);
    }
    command.arg("--control").arg(control).stdin(Stdio::null());
    command
}

fn qsd(options: &Options, target: &Target, cell: &Cell, aio: Aio, sockets: &[PathBuf], monitor: UnixStream) -> Command {
    let driver = if target.is_block_device() { "host_device" } else { "file" };
    let mut command = Command::new(&options.qsd);
    for (index, socket) in sockets.iter().enumerate() {
        let name = node(index);
        let node = match target.is_null() {
            true => format!("driver=null-co,node-name={name},size={},read-zeroes=off", target.size()),
            false => format!(
                "driver={driver},node-name={name},filename={},cache.direct={},aio={},discard=unmap",
                escaped(target.path(index)),
                if options.direct() { "on" } else { "off" },
                aio.name(),
            ),
        };
        command.args(["--blockdev", &node, "--export"]).arg(format!(
            "type=vhost-user-blk,id=e{index},node-name={name},addr.type=unix,addr.path={},writable=on,num-queues={}",
            socket.display(),
            cell.queues,
        ));
    }
    command.args(["--chardev", "socket,id=m,fd=0", "--monitor", "m"]).stdin(Stdio::from(OwnedFd::from(monitor)));
    command
}
