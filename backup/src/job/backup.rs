//! One backup: what a job of that type works with, how it copies, and what it leaves in its bitmap.
//!
//! Made by `control` before the commit that freezes its point, run by the job's own thread, settled by `life` when the
//! job (or the group it belongs to) is over. Knows nothing of states and events.
//!
//! | bitmap-mode | success | failure or cancel |
//! |---|---|---|
//! | on-success | S | old ∪ S |
//! | never | old ∪ S | old ∪ S |
//! | always | S | S ∪ uncopied |
//!
//! S is what was written since the freeze. Invariant I5: the frozen set goes only after the target is durable, and
//! under `always` a cluster counts as copied only if a conclusion of the target covers it.

use crate::buffer::{AlignedBuffer, is_zero};
use crate::copy::{self, Action, CopyControl, CopyError, Side};
use crate::node::Node;
use crate::point::{Point, PointError};
use crate::target::{Target, os_text};
use blkmark_bitmap::named::Draft;
use blkmark_bitmap::{BitmapError, Bits, ByteRange};
use serde_json::Value;
use std::any::Any;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use uuid::Uuid;

/// What happens to the bitmap afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapMode {
    /// It is advanced if the job succeeds.
    OnSuccess,
    /// It stays as if there had been no job.
    Never,
    /// It is advanced by what was copied, whatever becomes of the job.
    Always,
}

/// What the job copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// All that the point wants, then it is done.
    Wanted,
    /// Only what the guest overwrites, before it does, until the job is cancelled (sync=none).
    Overwritten,
}

/// A bitmap that is frozen for the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// Its name.
    pub bitmap: String,
    /// The freeze.
    pub freeze: Uuid,
    /// What becomes of it.
    pub mode: BitmapMode,
}

/// Where a backup goes, as the client named it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A node that `blockdev-add` made.
    Node {
        /// Its name.
        name: String,
        /// What `blockdev-add` was given to make it, those beneath it first; empty until it is claimed.
        options: Vec<Value>,
    },
    /// A file or device that the command opens or makes.
    Path {
        /// Where it is.
        path: PathBuf,
        /// Its format, if the client named one.
        format: Option<String>,
        /// Whether it has to be there already.
        existing: bool,
    },
}

/// What a backup holds until its job is over, in success or not; longer if its point is kept after a failure.
pub struct Held {
    /// The disk.
    pub node: Arc<Node>,
    /// It as of the instant of the job's transaction; armed in the same commit that froze the bitmap.
    pub point: Arc<Point>,
    /// The bitmap, if one is given.
    pub hold: Option<Hold>,
    /// Where it goes, to go there again.
    pub destination: Destination,
    /// What is copied.
    pub content: Content,
    /// Whether the target is to hold it compressed; it can, if so.
    pub compress: bool,
    /// Whatever has to be kept while the job is there, for instance the claim on a target node.
    pub claim: Option<Box<dyn Any + Send + Sync>>,
}

/// All that a backup works with.
pub struct Backup {
    /// What stays until the job is over.
    pub held: Held,
    /// Where it goes; closed when the copying is over.
    pub target: Arc<dyn Target>,
}

/// Why a backup did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// By command, or with its group.
    Cancelled,
    /// The reason, as the job's `error` shows it.
    Error(String),
}

/// How a backup ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Whether the target holds all that it should, durably.
    pub result: Result<(), Failure>,
    /// The clusters that the target does not durably hold. Only of meaning after a failure.
    pub uncopied: Bits,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Cancelled => f.write_str("Operation canceled"),
            Failure::Error(text) => f.write_str(text),
        }
    }
}

impl From<CopyError> for Failure {
    fn from(error: CopyError) -> Self {
        match &error {
            CopyError::Cancelled => Failure::Cancelled,
            CopyError::Target { error, .. } => Failure::Error(os_text(error)),
            CopyError::Point(PointError::Source { error, .. }) => Failure::Error(os_text(error)),
            CopyError::Point(_) => Failure::Error(error.to_string()),
        }
    }
}

impl From<PointError> for Failure {
    fn from(error: PointError) -> Self {
        CopyError::from(error).into()
    }
}

impl Backup {
    /// Copies until all is in the target and durable there, or until it is over otherwise. Blocks. `on_error` decides
    /// about a failed read or write; `on_fatal` hears of an error of the target that nothing can be done about.
    pub fn run(
        &self,
        control: &CopyControl,
        on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync),
        on_fatal: &dyn Fn(&io::Error),
    ) -> Outcome {
        // What is remaining is copied; what is not durable in the end is more than that.
        let plan = self.held.point.clusters();
        let remaining = self.held.point.remaining(&plan);
        let remaining = remaining.as_ref().unwrap_or(&plan);
        if self.mode() == Some(BitmapMode::Always) {
            control.keep_account();
        }
        let accepted = self.target.accept().map_err(|error| {
            on_fatal(&error);
            Failure::Error(os_text(&error))
        });
        self.target.set_compression(self.held.compress);
        let copied = accepted.and_then(|()| match self.held.content {
            Content::Wanted => {
                copy::run(&self.held.point, remaining, &*self.target, control, on_error).map_err(Failure::from)
            }
            Content::Overwritten => self.follow(control, on_error),
        });
        let result = copied.and_then(|()| self.conclude(on_fatal));
        let uncopied = match &result {
            // All was copied, also if the job is told to end after all.
            Ok(()) => Some(Bits::new(plan.granularity(), plan.size())),
            // What was copied is to count, so it has to be as durable as if it were all.
            Err(_) if self.mode() == Some(BitmapMode::Always) && self.target.conclude().is_ok() => control.uncopied(),
            Err(_) => None,
        };
        Outcome { result, uncopied: uncopied.unwrap_or(plan) }
    }

    fn mode(&self) -> Option<BitmapMode> {
        self.held.hold.as_ref().map(|hold| hold.mode)
    }

    /// No second try: after a failed fsync nobody knows what the target holds.
    fn conclude(&self, on_fatal: &dyn Fn(&io::Error)) -> Result<(), Failure> {
        self.target.conclude().map_err(|error| {
            on_fatal(&error);
            Failure::Error(os_text(&error))
        })
    }

    /// sync=none: brings what the point saved to the target, until the point ends and nothing of it is left.
    fn follow(
        &self,
        control: &CopyControl,
        on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync),
    ) -> Result<(), Failure> {
        let mut buffer = AlignedBuffer::new(self.held.point.cluster().bytes() as usize);
        while let Some(cluster) = self.held.point.next_saved()? {
            control.admit(cluster.len())?;
            let data = &mut buffer[..cluster.len() as usize];
            self.held.point.take(cluster, data)?;
            // What is not noted down is not given up, and nothing else is taken before.
            while let Err(error) = self.put(cluster, data).and_then(|()| self.note_down()) {
                match on_error(Side::Target, &error) {
                    Action::Report => return Err(Failure::Error(os_text(&error))),
                    Action::Retry | Action::Stop => {
                        control.rest(copy::RETRY_PAUSE);
                        control.admit(0)?;
                    }
                }
            }
            self.held.point.release(&[cluster]);
            control.add_done(cluster.len());
        }
        Ok(())
    }

    /// Where somebody could go on with it.
    fn note_down(&self) -> io::Result<()> {
        if self.held.point.is_released() { self.target.note_down() } else { Ok(()) }
    }

    /// Old data is written even where it is zero and the target reads as zero: it says that this cluster is covered.
    fn put(&self, cluster: ByteRange, data: &[u8]) -> io::Result<()> {
        if is_zero(data) {
            self.target.write_zeroes_at(cluster.start(), cluster.len())
        } else {
            self.target.write_at(data, cluster.start())
        }
    }

    /// Closes the target and gives back the rest.
    pub fn close(self) -> Held {
        self.held
    }
}

impl Held {
    /// Leaves in the bitmap what the table above says. `outcome` is `None` if the job never ran.
    pub fn settle(&self, draft: &mut Draft, success: bool, outcome: Option<&Outcome>) -> Result<(), BitmapError> {
        let Some(hold) = &self.hold else { return Ok(()) };
        match (hold.mode, success) {
            (BitmapMode::Never, _) | (BitmapMode::OnSuccess, false) => draft.reclaim(&hold.bitmap, hold.freeze),
            (BitmapMode::OnSuccess | BitmapMode::Always, true) => draft.abdicate(&hold.bitmap, hold.freeze),
            (BitmapMode::Always, false) => match outcome {
                // All was copied, and a sibling failed: nothing is left to copy.
                Some(Outcome { result: Ok(()), .. }) => draft.abdicate(&hold.bitmap, hold.freeze),
                Some(outcome) => draft.abdicate_except(&hold.bitmap, hold.freeze, &outcome.uncopied),
                None => draft.reclaim(&hold.bitmap, hold.freeze),
            },
        }
    }
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Held").field("node", &self.node).field("hold", &self.hold).finish_non_exhaustive()
    }
}

impl fmt::Debug for Backup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backup").field("held", &self.held).field("target", &self.target.name()).finish_non_exhaustive()
    }
}
