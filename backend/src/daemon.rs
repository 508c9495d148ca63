//! The daemon: puts the rooms together, and takes them apart again in an order that loses nothing.
//!
//! Start: every disk is opened and locked before the first socket exists, so a daemon that cannot start leaves nothing
//! behind. End: jobs are cancelled and their bitmaps reclaimed, the control socket closes, every accepted request is
//! finished, the disks are synced, the bitmap stores are closed.

use crate::config::{DiskOptions, ServeOptions, SocketSpec};
use crate::disk::{DiskFile, OpenOptions};
use crate::lockdown;
use crate::persistence;
use crate::session::{Endpoint, Session};
use crate::write_path::{ServedDisk, ThreadOptions};
use anyhow::{Context, Result, bail};
use blkmark_backup::control::{Control, Sandbox, Settings};
use blkmark_backup::node::Node;
use blkmark_backup::qmp::{Events, Server};
use blkmark_backup::resume::{Found, Haven};
use blkmark_backup::scratch::ScratchSettings;
use blkmark_backup::source::Source;
use blkmark_bitmap::Tracker;
use rustix::fs::FileType;
use serde_json::json;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// How often a disk with a handed-over connection is looked at: when that ends, so does its service.
const HANDED_OVER_LOOK: Duration = Duration::from_millis(200);

/// How much of a disk's scratch may be memory: what a busy guest overwrites in the first moments of a backup.
const SCRATCH_MEMORY: u64 = 64 << 20;

/// Why a daemon ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// SIGTERM or SIGINT.
    Signal,
    /// `quit` on the control socket.
    Quit,
}

struct Disk {
    served: Arc<ServedDisk>,
    session: Session,
    /// One front end, once, instead of a socket.
    handed_over: bool,
}

/// A daemon that serves.
pub struct Daemon {
    disks: Vec<Disk>,
    control: Arc<Control>,
    server: Option<Server>,
    events: Events,
    ends: (Sender<End>, Receiver<End>),
}

impl Daemon {
    /// Serves all that `options` ask for. On an error nothing is left behind. Nothing is locked down: the process has other
    /// things to do.
    pub fn start(options: &ServeOptions) -> Result<Self> {
        Self::start_in(options, Sandbox::default())
    }

    fn start_in(options: &ServeOptions, sandbox: Sandbox) -> Result<Self> {
        let mut opened = Vec::new();
        for disk in &options.disks {
            match open(disk, options).with_context(|| format!("disk '{}'", disk.id)) {
                Ok(disk_and_node) => opened.push((disk, disk_and_node)),
                Err(error) => return Err(give_back(&opened, error)),
            }
        }
        let served: Vec<_> = opened.iter().map(|(_, (served, _))| Arc::clone(served)).collect();
        Self::start_opened(options, sandbox, opened)
            .inspect_err(|_| served.iter().for_each(|served| give_back_one(served)))
    }

    fn start_opened(options: &ServeOptions, sandbox: Sandbox, opened: Vec<(&DiskOptions, OpenedDisk)>) -> Result<Self> {
        let mut endpoints = Vec::new();
        for (disk, _) in &opened {
            endpoints.push(endpoint(&disk.socket).with_context(|| format!("disk '{}'", disk.id))?);
        }
        let events = Events::new();
        let ends = channel();
        let quit = ends.0.clone();
        let settings = Settings {
            roots: options.allow_paths.clone(),
            sandbox,
            on_quit: Box::new(move || {
                // Nobody to tell means that the end is under way.
                let _ = quit.send(End::Quit);
            }),
        };
        let nodes = opened.iter().map(|(_, (_, node))| Arc::clone(node)).collect();
        let control = Control::new(nodes, events.clone(), settings);
        let server = options.control.as_deref().map(Server::bind).transpose()?;
        // Before the first client, and before the first request of a guest.
        control.resume();
        let server = server.map(|server| server.start(Arc::clone(&control) as _, events.clone())).transpose()?;
        let mut disks = Vec::new();
        for ((options, (served, _)), endpoint) in opened.into_iter().zip(endpoints) {
            let handed_over = matches!(endpoint, Endpoint::Connected(_));
            let session = Session::spawn(&options.id, endpoint, Arc::clone(&served) as _)?;
            disks.push(Disk { served, session, handed_over });
        }
        Ok(Self { disks, control, server, events, ends })
    }

    /// Tells [`Daemon::wait`] to return.
    pub fn ender(&self) -> Sender<End> {
        self.ends.0.clone()
    }

    /// The control room, for those in this process.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Where the changes of a disk are marked, for those in this process.
    pub fn tracker(&self, disk: &str) -> Option<&Arc<Tracker>> {
        self.disks.iter().find(|served| served.served.id() == disk).map(|served| served.served.tracker())
    }

    /// Returns when the daemon is told to end, or when its only front ends were handed over and are gone.
    pub fn wait(&self) -> End {
        let handed_over = !self.disks.is_empty() && self.disks.iter().all(|disk| disk.handed_over);
        loop {
            match self.ends.1.recv_timeout(HANDED_OVER_LOOK) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => {
                    if handed_over && self.disks.iter().all(|disk| disk.session.is_finished()) {
                        return End::Quit;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return End::Quit,
            }
        }
    }

    /// Ends the service. Errors name the disks that could not be synced; all else is done then too.
    pub fn stop(mut self, end: End) -> Result<()> {
        // Whoever sends `quit` has been told of it.
        if end == End::Signal {
            self.events.emit("SHUTDOWN", json!({ "guest": false, "reason": "host-signal" }));
        }
        self.control.shutdown();
        if let Some(server) = self.server.take() {
            server.stop();
        }
        let stoppers: Vec<_> = self.disks.iter().map(|disk| disk.session.stopper()).collect();
        stoppers.iter().for_each(|stopper| stopper.stop());
        let mut failed = Vec::new();
        for disk in self.disks {
            disk.session.join();
            let file = disk.served.disk();
            let synced = if file.read_only() { Ok(()) } else { file.sync_all() };
            match synced {
                Ok(()) => failed.extend(persistence::close(disk.served.tracker(), file)),
                // Nor are the bitmaps closed: they go by what was marked, as after a crash.
                Err(error) => failed.push(format!("could not sync '{}': {error}", file.path().display())),
            }
        }
        if failed.is_empty() { Ok(()) } else { bail!(failed.join("; ")) }
    }
}

type OpenedDisk = (Arc<ServedDisk>, Arc<Node>);

/// A start that fails leaves clean stores behind.
fn give_back(opened: &[(&DiskOptions, OpenedDisk)], error: anyhow::Error) -> anyhow::Error {
    opened.iter().for_each(|(_, (served, _))| give_back_one(served));
    error
}

fn give_back_one(served: &ServedDisk) {
    if let Some(failed) = persistence::close(served.tracker(), served.disk()) {
        tracing::error!(disk = served.id(), failed, "its bitmap store was not closed");
    }
}

/// `blkmark serve`: until a signal or `quit`.
pub fn run(options: &ServeOptions) -> Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGTERM, libc::SIGINT])?;
    // A write past RLIMIT_FSIZE is to be an error of that write, not the end of every disk.
    // SAFETY: ignoring a signal runs no code of ours.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // Before the first thread: each inherits it.
    let sandbox = lockdown::apply(&what_remains(options));
    let daemon = Daemon::start_in(options, sandbox)?;
    let ender = daemon.ender();
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            if ender.send(End::Signal).is_err() {
                return;
            }
        }
    })?;
    println!("{}", ready_line(options));
    // Not under systemd is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let end = daemon.wait();
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!(?end, "ending");
    daemon.stop(end)
}

/// What a daemon with these options has to be able to do. What is not there is for the start to tell.
fn what_remains(options: &ServeOptions) -> lockdown::Rules {
    let wish = options.sandbox.unwrap_or_default();
    let mut directories: Vec<PathBuf> = options.runtime_dir.iter().cloned().collect();
    let mut sockets: Vec<PathBuf> = options.control.iter().cloned().collect();
    let mut files = Vec::new();
    for disk in &options.disks {
        directories.extend(scratch_directory(disk, options));
        directories.extend(persistence::directory(disk));
        files.extend(std::fs::canonicalize(&disk.path));
        if let SocketSpec::Path(path) = &disk.socket {
            sockets.push(path.clone());
        }
    }
    lockdown::Rules {
        seccomp: wish.seccomp(),
        landlock: wish.landlock(),
        // Targets and exports over TCP are ordered on the control socket.
        network: options.control.is_some(),
        roots: options.allow_paths.clone(),
        directories,
        files,
        sockets,
    }
}

fn ready_line(options: &ServeOptions) -> String {
    let disks: Vec<&str> = options.disks.iter().map(|disk| disk.id.as_str()).collect();
    match &options.control {
        Some(control) => format!("blkmark: ready, serving {}, control socket {}", disks.join(", "), control.display()),
        None => format!("blkmark: ready, serving {}", disks.join(", ")),
    }
}

fn endpoint(socket: &SocketSpec) -> Result<Endpoint> {
    match socket {
        SocketSpec::Path(path) => Ok(Endpoint::bind(path)?),
        SocketSpec::Fd(fd) => {
            // SAFETY: only borrowed for one call, which fails cleanly on a number that is no descriptor.
            let borrowed = unsafe { BorrowedFd::borrow_raw(*fd) };
            let fd: OwnedFd = borrowed.try_clone_to_owned().with_context(|| format!("descriptor {fd}"))?;
            Ok(Endpoint::adopt(fd)?)
        }
    }
}

fn open(disk: &DiskOptions, options: &ServeOptions) -> Result<OpenedDisk> {
    let open = OpenOptions { path: disk.path.clone(), read_only: disk.read_only, direct: disk.direct };
    let file = match disk.null {
        Some(size) => DiskFile::null(size, disk.read_only).context("no memory for a null disk")?,
        None => DiskFile::open(&open)?,
    };
    let file = Arc::new(file);
    let scratch = ScratchSettings {
        directory: scratch_directory(disk, options)?,
        cap: disk.scratch_size.unwrap_or_else(|| file.size()),
        memory: SCRATCH_MEMORY,
    };
    let serial = disk.serial.as_deref().unwrap_or(&disk.id);
    let runtime = options.runtime_dir.as_deref();
    // Nobody else has the disk, so nobody else is at what was left of its points in time.
    let haven = persistence::haven(disk, &file, runtime, &scratch.directory);
    let left = haven.as_ref().map(Haven::find).unwrap_or_default();
    let resume = left.iter().filter_map(Found::freeze).collect();
    let place = persistence::place(disk, &file, runtime, resume)?;
    let threads = ThreadOptions { cpus: disk.cpus.clone(), spin: disk.poll };
    let served = ServedDisk::new(&disk.id, Arc::clone(&file), serial, disk.queues, disk.queue_size, threads, place);
    let served = Arc::new(served);
    let node = Node::new(&disk.id, &disk.path, disk.read_only, Arc::clone(served.tracker()), file, scratch);
    let node = node.shown_by(Arc::clone(&served) as _);
    let node = match haven {
        Some(haven) => node.with_haven(haven, left),
        None => node,
    };
    Ok((served, Arc::new(node)))
}

/// Beside the disk, since that is as fast as the disk; for a device, where the operator keeps short-lived state.
fn scratch_directory(disk: &DiskOptions, options: &ServeOptions) -> Result<PathBuf> {
    let directory = match (&disk.scratch, &options.runtime_dir) {
        (Some(directory), _) => directory.clone(),
        (None, runtime) if disk.null.is_some() => runtime.clone().unwrap_or_else(std::env::temp_dir),
        (None, runtime) => {
            let stat = rustix::fs::stat(&disk.path)?;
            match (FileType::from_raw_mode(stat.st_mode), runtime) {
                (FileType::BlockDevice, Some(runtime)) => runtime.clone(),
                (FileType::BlockDevice, None) => std::env::temp_dir(),
                _ => {
                    let path = std::fs::canonicalize(&disk.path)?;
                    path.parent().unwrap_or(Path::new("/")).to_owned()
                }
            }
        }
    };
    if !directory.is_dir() {
        bail!("scratch={}: there is no such directory", directory.display());
    }
    Ok(directory)
}
