//! A contender with its disk, served to a guest, and its backups.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkmark_backup::file_lock::{LockMode, lock_within};
use blkmark_backup::qmp::Client;
use clap::ValueEnum;
use serde_json::{Value, json};

use super::options::Options;
use super::place::Place;
use crate::bench::cpu::process_time;
use crate::daemon::blkmark_binary;
use crate::process::{GIVE_UP, Process};

/// A program with its way to make backups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Contender {
    /// `blkmark serve`.
    Blkmark,
    /// The build that `--before` names.
    BlkmarkBefore,
    /// The same without regard for the guest: `max-guest-latency` 0.
    BlkmarkUnbounded,
    /// `qemu-storage-daemon` as it comes.
    Qsd,
    /// The same with `x-perf` `max-workers` 1.
    #[value(name = "qsd-1")]
    QsdOne,
    /// The same with copy-before-write into a local image, from which the backup is made.
    QsdFleecing,
}

impl Contender {
    /// Its name on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Contender::Blkmark => "blkmark",
            Contender::BlkmarkBefore => "blkmark-before",
            Contender::BlkmarkUnbounded => "blkmark-unbounded",
            Contender::Qsd => "qsd",
            Contender::QsdOne => "qsd-1",
            Contender::QsdFleecing => "qsd-fleecing",
        }
    }

    /// Whether it is of this workspace.
    pub fn is_blkmark(self) -> bool {
        matches!(self, Contender::Blkmark | Contender::BlkmarkBefore | Contender::BlkmarkUnbounded)
    }
}

const DISK: &str = "drive0";
const TARGET: &str = "target0";
const JOB: &str = "job0";

/// How a backup went.
#[derive(Clone, Copy, Debug)]
pub struct Backup {
    /// When it was ordered, and when it was over.
    pub began: Instant,
    /// See `began`.
    pub ended: Instant,
    /// Bytes that it had copied by then.
    pub bytes: u64,
    /// What blkmark said of held writes while it ran.
    pub holds: Holds,
}

/// How long copy-before-write held writes, as far as a look every tenth of a second shows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Holds {
    /// The longest that a write was held.
    pub longest_hold: Duration,
    /// The longest that one read of the disk and one write of scratch took together.
    pub longest_save: Duration,
}

impl Holds {
    fn max(self, other: Self) -> Self {
        Self {
            longest_hold: self.longest_hold.max(other.longest_hold),
            longest_save: self.longest_save.max(other.longest_save),
        }
    }
}

impl Backup {
    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.ended.duration_since(self.began).as_secs_f64()
    }
}

/// A running server with one disk.
pub struct Server {
    contender: Contender,
    process: Process,
    qmp: Client,
    socket: PathBuf,
    latency: Option<u64>,
}

impl Server {
    /// Starts it; returns when it serves.
    pub fn start(options: &Options, place: &Place, contender: Contender) -> Result<Self> {
        let socket = place.path("disk.sock");
        let control = place.path("control.sock");
        let _ = std::fs::remove_file(&socket);
        // The kernel may still be at requests of a server that was killed, and keeps its locks until they have ended.
        let disk = std::fs::OpenOptions::new().read(true).write(true).open(place.disk())?;
        lock_within(&disk, LockMode::Writer, GIVE_UP).context("the disk does not get free")?;
        drop(disk);
        let (monitor, theirs) = UnixStream::pair().context("socketpair")?;
        let mut command = match contender {
            Contender::Blkmark | Contender::BlkmarkBefore | Contender::BlkmarkUnbounded => {
                let mut command = match contender {
                    Contender::BlkmarkBefore => Command::new(options.before()?),
                    _ => Command::new(blkmark_binary()?),
                };
                let (disk, scratch) = (place.disk().display(), place.path("").display().to_string());
                command
                    .args(["serve", "--disk"])
                    .arg(format!("id={DISK},path={disk},socket={},scratch={scratch}", socket.display()))
                    .arg("--control")
                    .arg(&control)
                    .stdin(Stdio::null());
                command
            }
            _ => qsd(options, place, contender, &socket, theirs)?,
        };
        let name = contender.name();
        let mut process = Process::start(name, &mut command, &place.path("server.log"))?;
        // It keeps the other end of the monitor's socket open.
        drop(command);
        let mut qmp = if contender.is_blkmark() {
            process.first_line()?;
            Client::connect(&control)
        } else {
            Client::negotiate(monitor)
        }
        .with_context(|| process.log_tail())?;
        qmp.set_reply_limit(GIVE_UP * 3);
        let latency = match contender {
            Contender::BlkmarkUnbounded => Some(0),
            Contender::Blkmark | Contender::BlkmarkBefore => options.max_guest_latency,
            _ => None,
        };
        Ok(Self { contender, process, qmp, socket, latency })
    }

    /// The vhost-user socket.
    pub fn socket(&self) -> &PathBuf {
        &self.socket
    }

    /// Processor time used so far.
    pub fn cpu_time(&self) -> Result<Duration> {
        process_time(self.process.pid())
    }

    /// How it is, for whoever has to explain a failure: whether it runs, and what it said last.
    pub fn state(&mut self) -> String {
        let runs = if self.process.is_running() { "still runs" } else { "has ended" };
        format!("{} {runs}\n{}", self.contender.name(), self.process.log_tail())
    }

    /// A command that has to succeed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let name = self.contender.name();
        self.qmp.execute(command, arguments.clone()).with_context(|| format!("{name}: {command} {arguments}"))
    }

    /// Records what the guest writes from now on. QSD's disk is raw, where its bitmaps cannot be `persistent`.
    pub fn add_bitmap(&mut self, granularity: u64, persistent: bool) -> Result<()> {
        let persistent = persistent && self.contender.is_blkmark();
        let arguments = json!({"node": DISK, "name": "b", "granularity": granularity, "persistent": persistent});
        self.run("block-dirty-bitmap-add", arguments).map(|_| ())
    }

    /// Opens what `node` describes as the target of backups.
    pub fn add_target(&mut self, node: Value) -> Result<()> {
        self.run("blockdev-add", node).map(|_| ())
    }

    /// A file as a target.
    pub fn file_target(path: &std::path::Path) -> Value {
        json!({"driver": "file", "node-name": TARGET, "filename": path})
    }

    /// The node name that targets need.
    pub const fn target_name() -> &'static str {
        TARGET
    }

    /// Closes the target.
    pub fn remove_target(&mut self) -> Result<()> {
        self.run("blockdev-del", json!({"node-name": TARGET})).map(|_| ())
    }

    /// A full backup, or an increment of the bitmap, until it is over. One that takes longer than `patience` is cancelled.
    /// `meanwhile` is called about ten times a second.
    pub fn backup(
        &mut self,
        increment: bool,
        patience: Duration,
        meanwhile: &mut dyn FnMut(Duration) -> Result<()>,
    ) -> Result<Backup> {
        let device = if self.contender == Contender::QsdFleecing { "snapshot" } else { DISK };
        let sync = if increment { "incremental" } else { "full" };
        let mut arguments = json!({"job-id": JOB, "device": device, "target": TARGET, "sync": sync});
        if increment {
            arguments["bitmap"] = "b".into();
        }
        if self.contender == Contender::QsdOne {
            arguments["x-perf"] = json!({"max-workers": 1});
        }
        if let Some(latency) = self.latency {
            arguments["max-guest-latency"] = latency.into();
        }
        let mut holds = Holds::default();
        let began = Instant::now();
        self.run("blockdev-backup", arguments)?;
        let is_end = |name: &str| matches!(name, "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED");
        let end = loop {
            let end = self.qmp.wait_event(Duration::from_millis(100), |event| is_end(&event.name))?;
            if let Some(end) = end {
                break Some(end);
            }
            meanwhile(began.elapsed())?;
            if self.contender.is_blkmark() {
                holds = holds.max(self.holds()?);
            }
            if began.elapsed() > patience {
                break None;
            }
        };
        let ended = Instant::now();
        let Some(end) = end else {
            let jobs = self.run("query-block-jobs", json!({}))?;
            let bytes = jobs[0]["offset"].as_u64().unwrap_or(0);
            self.run("block-job-cancel", json!({"device": JOB, "force": true}))?;
            let end = self.qmp.wait_event(GIVE_UP * 3, |event| is_end(&event.name))?;
            end.context("the backup cannot be cancelled")?;
            self.await_null()?;
            return Ok(Backup { began, ended, bytes, holds });
        };
        if let Some(error) = end.data["error"].as_str() {
            bail!("{}: the backup failed: {error}\n{}", self.contender.name(), self.process.log_tail());
        }
        let bytes = end.data["offset"].as_u64().unwrap_or(0);
        self.await_null()?;
        Ok(Backup { began, ended, bytes, holds })
    }

    fn holds(&mut self) -> Result<Holds> {
        let nodes = self.run("query-named-block-nodes", json!({}))?;
        let micros = |name: &str| Duration::from_micros(nodes[0]["scratch"][name].as_u64().unwrap_or(0));
        Ok(Holds { longest_hold: micros("longest-hold"), longest_save: micros("longest-save") })
    }

    /// The job is gone, and what it held is free again.
    fn await_null(&mut self) -> Result<()> {
        let gone = self.qmp.wait_event(GIVE_UP, |event| {
            event.name == "JOB_STATUS_CHANGE" && event.data["id"] == JOB && event.data["status"] == "null"
        })?;
        gone.context("the job does not go away")?;
        Ok(())
    }

    /// Ends it as an operator does.
    pub fn stop(mut self) -> Result<()> {
        self.process.terminate().map(|_| ())
    }
}

fn qsd(
    options: &Options,
    place: &Place,
    contender: Contender,
    socket: &std::path::Path,
    monitor: UnixStream,
) -> Result<Command> {
    let mut command = Command::new(&options.qsd);
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name={DISK},filename={},cache.direct=on,aio=native,discard=unmap",
        place.disk().display()
    ));
    let mut served = DISK;
    if contender == Contender::QsdFleecing {
        let image = place.target("fleecing.raw")?;
        served = "filter";
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=fleece,filename={},cache.direct=on,aio=native", image.display()))
            .args(["--blockdev", "driver=copy-before-write,node-name=filter,file=drive0,target=fleece"])
            .args(["--blockdev", "driver=snapshot-access,node-name=snapshot,file=filter"]);
    }
    command
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=e,node-name={served},addr.type=unix,addr.path={},writable=on",
            socket.display()
        ))
        .args(["--chardev", "socket,id=m,fd=0", "--monitor", "m"])
        .stdin(Stdio::from(OwnedFd::from(monitor)));
    Ok(command)
}
