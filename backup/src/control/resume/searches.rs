//! Going on with populates: each searches anew, over the freeze that it began with.
//!
//! Nothing is armed for them, and what they had found is forgotten: the disk is looked at as it is now, and what was written since the
//! freeze the store has kept. One whose older image is a point in time with a name comes behind that point, as the backups of it do.
//!
//! Invariant: a populate is told to have succeeded only if the store is as the run that was storing it left it, for only such a run can
//! have ended the freeze with what was found.

use super::super::claim::Claim;
use super::super::nodes::TargetNode;
use super::super::points::PointUse;
use super::super::{Control, nodes};
use super::Restored;
use crate::job::{Kind, NewJob, Older, Pattern, Populate, Reservation, Work};
use crate::node::Node;
use crate::point::PointSource;
use crate::resume::{Notice, Search, Sought, UNKNOWN_END};
use crate::source::{FileId, Source};
use crate::target::image::Image;
use blkmark_bitmap::Frozen;
use blkmark_bitmap::store::Before;
use std::any::Any;
use std::path::Path;
use std::sync::Arc;
use uuid::Uuid;

/// What was left of a populate.
pub(super) struct Unsearched<'a> {
    pub(super) disk: &'a Arc<Node>,
    pub(super) id: Uuid,
    pub(super) notice: Notice,
    pub(super) search: Search,
}

/// A populate with all that it needs, to be started.
pub(super) struct Searching {
    search: Search,
    notice: Notice,
    reservation: Reservation,
    populate: Populate,
    /// The nodes that the older image consists of, if it is one.
    nodes: Vec<Arc<TargetNode>>,
}

/// An older image that was found again, and what is kept meanwhile.
struct Again {
    image: Arc<dyn Source>,
    nodes: Vec<Arc<TargetNode>>,
    claim: Option<Box<dyn Any + Send + Sync>>,
}

impl Control {
    /// Finds their older images again, among `points` too.
    pub(super) fn restore_searches(&self, searches: Vec<Unsearched<'_>>, points: &[Restored]) -> Vec<Searching> {
        searches.into_iter().filter_map(|found| self.restore_search(found, points)).collect()
    }

    fn restore_search(&self, found: Unsearched<'_>, points: &[Restored]) -> Option<Searching> {
        let (disk, name) = (found.disk, found.notice.name.clone());
        match found.frozen() {
            Some(frozen) => match self.searching(found, frozen, points) {
                Ok(searching) => return Some(searching),
                Err(reason) => self.over(disk, Some(Kind::Populate), &name, Some(&reason)),
            },
            None if found.is_done() => self.over(disk, Some(Kind::Populate), &name, None),
            None => {
                let ended = "its bitmap is not in the freeze any more that it began with";
                let reason = if found.notice.commits { UNKNOWN_END } else { ended };
                self.over(disk, Some(Kind::Populate), &name, Some(reason));
            }
        }
        None
    }

    pub(super) fn search_is_over(&self, one: &Searching, reason: &str) {
        self.over(one.disk(), Some(Kind::Populate), one.name(), Some(reason));
    }

    fn searching(&self, found: Unsearched<'_>, frozen: Frozen, points: &[Restored]) -> Result<Searching, String> {
        let Unsearched { disk, id, notice, search } = found;
        let reservation = self.jobs.reserve(&notice.name).map_err(|error| error.to_string())?;
        let (pattern, older, nodes, claim) = match &search.sought {
            Sought::All => (Pattern::All, None, Vec::new(), None),
            Sought::Allocated => (Pattern::Allocated, None, Vec::new(), None),
            Sought::Differing(older) => {
                let Again { image, nodes, claim } = self.find_again(older, disk.tracker.size(), points)?;
                (Pattern::Differing(image), Some(older.clone()), nodes, claim)
            }
        };
        let (disk, bitmap) = (Arc::clone(disk), search.bitmap.clone());
        let mut populate = Populate::new(disk, bitmap, frozen, pattern, search.mask);
        (populate.older, populate.slip, populate.claim) = (older, id, claim);
        Ok(Searching { search, notice, reservation, populate, nodes })
    }

    fn find_again(&self, older: &Older, size: u64, points: &[Restored]) -> Result<Again, String> {
        let (again, name) = match older {
            Older::Path { path, format, file } => {
                let name = format!("'{}'", path.display());
                let image = self.open_again(path, format, *file).map_err(|error| cannot(&name, &error))?;
                (Again { image, nodes: Vec::new(), claim: None }, name)
            }
            Older::Node { name, options, file } => {
                let name = format!("node '{name}'");
                let again = nodes::reopen_to_read(self, options, size);
                let again = again.map_err(|error| cannot(&name, &error.to_string()))?;
                // An export has no such number.
                same_file(&*again.opened, *file).map_err(|error| cannot(&name, error))?;
                let claim: Claim = again.claim;
                (Again { image: again.opened, nodes: again.nodes, claim: Some(Box::new(claim)) }, name)
            }
            Older::Point(id) => {
                let node = points.iter().find(|one| one.id == *id).and_then(|one| one.named.as_ref());
                let node = node.ok_or("the point in time that it compares with did not go on")?;
                let lease: PointUse = node.take_for(Kind::Populate).map_err(|error| error.to_string())?;
                let image = Arc::new(PointSource::new(Arc::clone(&node.point)));
                (Again { image, nodes: Vec::new(), claim: Some(Box::new(lease)) }, format!("node '{}'", node.name))
            }
        };
        match again.image.size() == size {
            true => Ok(again),
            false => Err(cannot(&name, "it has another size")),
        }
    }

    fn open_again(&self, path: &Path, format: &str, known: Option<FileId>) -> Result<Arc<dyn Source>, String> {
        let format = format.parse().map_err(|error: crate::target::TargetError| error.to_string())?;
        let image = Image::open(path, format, &self.policy()).map_err(|error| error.to_string())?;
        same_file(&image, known)?;
        Ok(Arc::new(image))
    }
}

fn cannot(image: &str, reason: &str) -> String {
    format!("its older image, {image}, cannot be gone on with: {reason}")
}

fn same_file(image: &dyn Source, known: Option<FileId>) -> Result<(), &'static str> {
    if image.file_id() == known { Ok(()) } else { Err("it is another file") }
}

impl Unsearched<'_> {
    /// What is frozen for it, if that is so still.
    pub(super) fn frozen(&self) -> Option<Frozen> {
        // Whoever opened the store meanwhile has kept the freeze, and would have ended it if this were not to go on.
        self.disk.tracker.frozen(&self.search.bitmap, self.search.freeze)
    }

    /// Whether the commit that ended it in success is in force.
    pub(super) fn is_done(&self) -> bool {
        let is_there = || {
            let bitmaps = self.disk.tracker.list();
            bitmaps.iter().any(|bitmap| bitmap.name == self.search.bitmap && !bitmap.inconsistent)
        };
        let own = self.search.run.is_some_and(|run| self.disk.tracker.before() == Some(Before::Killed(run)));
        self.notice.commits && own && self.frozen().is_none() && is_there()
    }

    pub(super) fn group(&self) -> Option<Uuid> {
        self.search.group.map(|(group, _)| group)
    }
}

impl Searching {
    pub(super) fn disk(&self) -> &Arc<Node> {
        &self.populate.node
    }

    pub(super) fn name(&self) -> &str {
        &self.notice.name
    }

    pub(super) fn slip(&self) -> Uuid {
        self.populate.slip
    }

    pub(super) fn group(&self) -> Option<(Uuid, usize)> {
        self.search.group
    }

    /// Its group, its nodes and the job.
    pub(super) fn into_job(self) -> (Option<(Uuid, usize)>, Vec<Arc<TargetNode>>, NewJob) {
        let Self { search, reservation, populate, nodes, .. } = self;
        let (settings, paused) = (search.settings, search.paused);
        let new = NewJob { id: reservation, settings, work: Work::Populate(populate), paused };
        (search.group, nodes, new)
    }
}
