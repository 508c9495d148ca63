//! What jobs do: the one place that tells their types apart.
//!
//! `registry` and `life` know states, groups and events; of the work they know that it runs once, can be interrupted, and is
//! settled in a commit.

use super::backup::{self, Backup, Content, Failure, Outcome};
use super::populate::{Pattern, Populate};
use crate::copy::{Action, CopyControl, Side};
use crate::node::Node;
use crate::point::Point;
use crate::source::Source;
use crate::target::Target;
use blkmark_bitmap::{Bits, Commit, Granularity};
use std::io;
use std::sync::{Arc, Weak};
use uuid::Uuid;

/// The type of a job. The names are QEMU's, that of `Populate` from its proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Copies a disk.
    Backup,
    /// Fills a bitmap.
    Populate,
}

impl Kind {
    /// All there are.
    pub const ALL: [Kind; 2] = [Kind::Backup, Kind::Populate];

    /// QEMU's name.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Backup => "backup",
            Kind::Populate => "bitmap-populate",
        }
    }
}

/// What a job is to do.
#[derive(Debug)]
pub enum Work {
    /// Copy a disk.
    Backup(Backup),
    /// Fill a bitmap.
    Populate(Populate),
}

/// What is left of it until the job is over.
#[derive(Debug)]
pub(super) enum Held {
    Backup(backup::Held),
    Populate(Populate),
}

/// The side that may hang.
pub(super) enum Far {
    Target(Weak<dyn Target>),
    Image(Weak<dyn Source>),
    Nothing,
}

impl Far {
    /// Makes what waits for it fail, if it is still there.
    pub(super) fn interrupt(&self) {
        match self {
            Far::Target(target) => drop(target.upgrade().map(|target| target.interrupt())),
            Far::Image(image) => drop(image.upgrade().map(|image| image.interrupt())),
            Far::Nothing => {}
        }
    }
}

impl Work {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Work::Backup(_) => Kind::Backup,
            Work::Populate(_) => Kind::Populate,
        }
    }

    /// The freeze that it holds.
    pub(super) fn freeze(&self) -> Option<Uuid> {
        match self {
            Work::Backup(backup) => backup.held.hold.as_ref().map(|hold| hold.freeze),
            Work::Populate(populate) => Some(populate.frozen.id()),
        }
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        match self {
            Work::Backup(backup) => backup.held.point.size(),
            Work::Populate(populate) => populate.node.tracker.size(),
        }
    }

    pub(super) fn far(&self) -> Far {
        match self {
            Work::Backup(backup) => Far::Target(Arc::downgrade(&backup.target)),
            Work::Populate(Populate { pattern: Pattern::Differing(image), .. }) => Far::Image(Arc::downgrade(image)),
            Work::Populate(_) => Far::Nothing,
        }
    }

    /// What ends a job that would follow the guest's writes for ever.
    pub(super) fn endless(&self) -> Option<(Arc<Node>, Arc<Point>)> {
        match self {
            Work::Backup(Backup { held, .. }) if held.content == Content::Overwritten => {
                Some((Arc::clone(&held.node), Arc::clone(&held.point)))
            }
            _ => None,
        }
    }

    /// Does it. `on_error` decides about a failed read or write; `on_fatal` hears of an error that nothing can be done about.
    pub(super) fn run(
        &self,
        control: &CopyControl,
        on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync),
        on_fatal: &dyn Fn(&io::Error),
    ) -> Outcome {
        match self {
            Work::Backup(backup) => backup.run(control, on_error, on_fatal),
            Work::Populate(populate) => populate.run(control, on_error),
        }
    }

    /// What it comes to where nothing was done.
    pub(super) fn failed(&self, error: String) -> Outcome {
        let uncopied = match self {
            Work::Backup(backup) => backup.held.point.clusters(),
            Work::Populate(_) => Bits::new(Granularity::MAX, 0),
        };
        Outcome { result: Err(Failure::Error(error)), uncopied }
    }

    /// Closes what was read or written, and gives back the rest.
    pub(super) fn close(self) -> Held {
        match self {
            Work::Backup(backup) => Held::Backup(backup.close()),
            Work::Populate(populate) => Held::Populate(populate.close()),
        }
    }
}

impl Held {
    pub(super) fn node(&self) -> &Node {
        match self {
            Held::Backup(held) => &held.node,
            Held::Populate(populate) => &populate.node,
        }
    }

    /// Whether something of use to a later try is left after a failure. A broken point is of no use to anybody.
    pub(super) fn can_be_kept(&self) -> bool {
        matches!(self, Held::Backup(held) if held.point.broken().is_none())
    }

    /// Frees what others may want although the job's point stays.
    pub(super) fn give_up_claim(&mut self) {
        match self {
            Held::Backup(held) => held.claim = None,
            Held::Populate(populate) => populate.claim = None,
        }
    }

    /// Puts into `commit` what the end of the job means for its disk.
    pub(super) fn settle(&self, commit: &mut Commit<'_>, success: bool, outcome: Option<&Outcome>) {
        let settled = match self {
            Held::Backup(held) => {
                commit.disarm(held.point.gate());
                held.settle(&mut commit.draft, success, outcome)
            }
            Held::Populate(populate) => populate.settle(&mut commit.draft, success),
        };
        if let Err(error) = settled {
            // Nobody else may end this job's freeze.
            tracing::error!(node = self.node().id, %error, "a bitmap was not as its job had left it");
        }
    }

    /// It is settled: lets go of what the gate may still hold. The point is to be dropped with no lock held.
    pub(super) fn end(self) -> Option<Arc<Point>> {
        match self {
            Held::Backup(held) => {
                held.point.end();
                Some(held.point)
            }
            Held::Populate(_) => None,
        }
    }
}
