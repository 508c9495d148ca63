//! The commands: what the control socket (and the daemon's own clients) can ask for.
//!
//! `qmp` brings names and arguments, this room knows what they mean. Each command reads all of its arguments before it does
//! anything; one that is refused leaves nothing behind. Rooms: `commands` (which there are, and what they look like),
//! `schema` (to tell it), `options` (members that several commands share), `nodes` (disks, and targets as nodes), `bitmaps`,
//! `checkpoints`, `regions` (bits in pages), `backup`, `populate`, `transaction` (through which every change of bitmaps and every
//! backup goes, alone or with others), `jobs`,
//! `queries`, `resize`, `points` (points in time as nodes), `exports` (disks and points over NBD) with
//! `standing` (the bits of bitmaps that go with them), `objects` (credentials), `sandbox`.
//!
//! Invariant: every change of bitmaps or gates is one commit, made under the lock of the job registry; files are opened
//! and created before that lock is taken.

mod backup;
mod bitmaps;
mod checkpoints;
mod claim;
mod commands;
mod destination;
mod exports;
mod jobs;
mod nodes;
mod objects;
mod options;
mod points;
mod populate;
mod queries;
mod regions;
mod resize;
mod resume;
mod sandbox;
mod schema;
mod shapes;
mod standing;
mod transaction;

use crate::job::{JobError, Jobs};
use crate::node::Node;
use crate::qmp::{Arguments, Commands, Event, Events, QmpError};
use crate::resume::Haven;
use crate::target::{Policy, TargetError};
use blkmark_bitmap::BitmapError;
use commands::COMMANDS;
use exports::Exports;
use nodes::TargetNode;
use objects::Objects;
use points::Points;
use serde_json::{Map, Value, json};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, mpsc};
use std::time::{Duration, SystemTime};

/// How long an end waits for file systems to take away what points in time had there.
const CLEAN_UP: Duration = Duration::from_secs(2);

pub use sandbox::{Confinement, Sandbox};

/// What the operator decides.
pub struct Settings {
    /// Directories that paths named by clients must lie beneath. Empty: anywhere that the daemon may write.
    pub roots: Vec<PathBuf>,
    /// What the process has given up, to be told.
    pub sandbox: Sandbox,
    /// Called by `quit`, once for each such command, on the thread of the client. It must not wait for the shutdown.
    pub on_quit: Box<dyn Fn() + Send + Sync>,
}

/// The answer to commands, over a fixed set of served disks.
pub struct Control {
    disks: Vec<Arc<Node>>,
    targets: Mutex<Vec<Arc<TargetNode>>>,
    jobs: Arc<Jobs>,
    exports: Exports,
    points: Points,
    objects: Objects,
    events: Events,
    settings: Settings,
}

impl Control {
    /// Over `disks`, whose ids differ; jobs tell of themselves through `events`.
    pub fn new(disks: Vec<Arc<Node>>, events: Events, settings: Settings) -> Arc<Self> {
        let jobs = Jobs::new(events.clone());
        Arc::new(Self {
            disks,
            targets: Mutex::default(),
            jobs,
            exports: Exports::default(),
            points: Points::default(),
            objects: Objects::default(),
            events,
            settings,
        })
    }

    /// Ends the exports, cancels all jobs, and drops all points in time; returns when they are over and their bitmaps
    /// reclaimed. No job, no point and no server comes any more; everything else still answers.
    pub fn shutdown(&self) {
        self.exports.shut_down(&self.events);
        self.jobs.shut_down();
        self.points.shut_down(self.jobs.lock());
        self.leave_nothing();
    }

    /// Whoever was the last to use a scratch takes it away, and may be about to: a process that ends does not wait for its
    /// threads. Nor for long for a file system that hangs.
    fn leave_nothing(&self) {
        let havens: Vec<_> = self.disks.iter().filter_map(|disk| disk.haven().cloned()).collect();
        let (done, over) = mpsc::channel();
        let clean = move || {
            havens.iter().for_each(Haven::let_all_go);
            // Nobody may be waiting any more.
            let _ = done.send(());
        };
        if let Err(error) = std::thread::Builder::new().name("clean-up".into()).spawn(clean) {
            tracing::warn!(%error, "files of points in time may be left to the next start");
        } else if over.recv_timeout(CLEAN_UP).is_err() {
            tracing::warn!("files of points in time are left to the next start: a file system does not answer");
        }
    }

    /// The jobs, for those who watch them in this process.
    pub fn jobs(&self) -> &Arc<Jobs> {
        &self.jobs
    }

    fn targets(&self) -> MutexGuard<'_, Vec<Arc<TargetNode>>> {
        self.targets.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn disk(&self, id: &str) -> Option<&Arc<Node>> {
        self.disks.iter().find(|disk| disk.id == id)
    }

    /// The rules for paths that a client names: no served disk is a target.
    fn policy(&self) -> Policy {
        Policy {
            roots: self.settings.roots.clone(),
            forbidden: self.disks.iter().filter_map(|disk| disk.source.file_id()).collect(),
        }
    }
}

impl Commands for Control {
    fn execute(&self, name: &str, arguments: Map<String, Value>) -> Option<Result<Value, QmpError>> {
        let command = COMMANDS.iter().find(|command| command.name == name)?;
        Some((command.handler)(self, Arguments::new(arguments)))
    }

    fn told_before(&self) -> Vec<(SystemTime, Event)> {
        self.jobs.told_before()
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("disks", &self.disks).field("jobs", &self.jobs).finish_non_exhaustive()
    }
}

/// What a command answers that has nothing to say.
fn done() -> Result<Value, QmpError> {
    Ok(json!({}))
}

impl From<BitmapError> for QmpError {
    fn from(error: BitmapError) -> Self {
        QmpError::generic(error.to_string())
    }
}

impl From<JobError> for QmpError {
    fn from(error: JobError) -> Self {
        QmpError::generic(error.to_string())
    }
}

impl From<TargetError> for QmpError {
    fn from(error: TargetError) -> Self {
        QmpError::generic(error.to_string())
    }
}
