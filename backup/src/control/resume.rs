//! Going on with what a killed process left: points in time with names, jobs that copy, jobs whose point is kept for another try, and
//! populates.
//!
//! Called once by the daemon, before the control socket and the guests' sockets exist, so that gates are armed before the first
//! request, those that are submitted again included. What cannot be gone on with ends here: its bitmap is reclaimed, its files go,
//! the log says why, and a job is shown as concluded with that reason.
//!
//! Backups of points in time with names come behind those points (`readers`), and so do populates (`searches`).
//!
//! Invariant: after this, no bitmap is frozen for a job that is not there, and no file of a point is left that nobody uses.

mod readers;
mod searches;

use super::claim::Claim;
use super::destination::{Destination, check_size};
use super::nodes::TargetNode;
use super::points::PointNode;
use super::{Control, nodes, points};
use crate::cbw::CopyBeforeWrite;
use crate::job::backup::Held;
use crate::job::{Backup, Content, Destination as Named, Ended, Kind, NewJob, Reservation, Work, commit_until_done};
use crate::node::Node;
use crate::point::{Point, Wanted};
use crate::resume::{Found, Left, Loaded, Member, Note, Phase, Place, Role};
use crate::scratch::Blocks;
use crate::target::Target;
use blkmark_bitmap::flip::Cut;
use blkmark_bitmap::store::Before;
use blkmark_bitmap::{Owner, flip};
use searches::{Searching, Unsearched};
use std::any::Any;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// A point that is armed anew, and what it is for.
struct Restored {
    disk: Arc<Node>,
    id: Uuid,
    note: Note,
    /// To be armed, unless it is a view of one that is.
    point: Arc<Point>,
    /// Of a point with a name.
    named: Option<Arc<PointNode>>,
    /// Of a job that copies.
    target: Option<Arc<dyn Target>>,
    /// The nodes that the target consists of, if it is one, and the claim on it.
    nodes: Vec<Arc<TargetNode>>,
    claim: Option<Claim>,
    reservation: Option<Reservation>,
}

/// What was left of a disk and can be read.
struct Whole<'a> {
    disk: &'a Arc<Node>,
    id: Uuid,
    note: Note,
    loaded: Loaded,
}

impl Control {
    /// Goes on with what a killed process left of all disks. Call it once, before anybody else can ask for anything.
    pub fn resume(&self) {
        let (mut whole, mut searches) = (Vec::new(), Vec::new());
        for disk in &self.disks {
            for Found { id, state, notice } in disk.take_left() {
                match state {
                    Ok(Left::Point(point)) => {
                        let (note, loaded) = *point;
                        whole.push(Whole { disk, id, note, loaded });
                    }
                    Ok(Left::Search(search)) => {
                        let (notice, search) = *search;
                        searches.push(Unsearched { disk, id, notice, search });
                    }
                    Err(reason) => match notice {
                        Some(notice) => self.over(disk, notice.job, &notice.name, Some(&reason)),
                        None => {
                            tracing::warn!(disk = disk.id, point = %id, reason, "a point in time ended with the process")
                        }
                    },
                }
            }
        }
        let done = done(&whole, &searches);
        let whole = whole.into_iter().filter_map(|found| self.may_go_on(found, &done));
        let (readers, whole): (Vec<_>, Vec<_>) = whole.partition(|found| found.point().is_some());
        let mut restored = self.restore(whole);
        let readers = self.restore_readers(readers, &restored);
        restored.extend(readers);
        let searching = self.restore_searches(searches, &restored);
        let (restored, searching) = self.whole_groups(restored, searching);
        for disk in &self.disks {
            if let Some(haven) = disk.haven() {
                let ledgers = restored.iter().filter_map(|one| one.point.ledger());
                let points = ledgers.flat_map(|ledger| [ledger.id(), ledger.scratch()]);
                haven.clean_up(&points.chain(searching.iter().map(Searching::slip)).collect::<Vec<_>>());
            }
        }
        self.begin(restored, searching);
        for disk in &self.disks {
            reclaim_the_rest(disk, &self.jobs.freezes());
        }
    }

    /// Says that something ended with the process before; `error`: it had not succeeded.
    fn over(&self, disk: &Node, job: Option<Kind>, name: &str, error: Option<&str>) {
        match (job, error) {
            (Some(kind), Some(reason)) => {
                tracing::error!(disk = disk.id, job = name, reason, "a job ended with the process before this one");
                let error = format!("The job ended with the daemon that ran it: {reason}");
                self.show_ended(disk, name, kind, Some(error));
            }
            (Some(kind), None) => {
                tracing::info!(disk = disk.id, job = name, "a job had succeeded when its daemon was killed");
                self.show_ended(disk, name, kind, None);
            }
            (None, reason) => {
                tracing::error!(
                    disk = disk.id,
                    point = name,
                    reason,
                    "a point in time ended with the process before this one"
                );
            }
        }
    }

    fn show_ended(&self, disk: &Node, name: &str, kind: Kind, error: Option<String>) {
        let size = disk.tracker.size();
        self.jobs.show_ended(Ended { id: name.to_owned(), kind, size, error });
    }

    fn over_for(&self, disk: &Node, note: &Note, reason: &str) {
        let notice = note.notice();
        self.over(disk, notice.job, &notice.name, Some(reason));
    }

    /// What can be said without looking at scratch or targets.
    fn may_go_on<'a>(&self, found: Whole<'a>, done: &HashSet<Uuid>) -> Option<Whole<'a>> {
        let Whole { disk, note, loaded, .. } = &found;
        let freeze_is_there = found.freeze_is_there();
        let store_is_as_left = match (disk.tracker.before(), note.run) {
            // Whoever opened the store meanwhile has kept the freeze, and would have ended it before serving a guest without
            // the gate.
            _ if freeze_is_there == Some(true) => true,
            (Some(Before::Killed(run)), noted) => noted == Some(run),
            // Nobody can tell whether somebody else has served the disk.
            (None | Some(Before::Nothing | Before::Other), _) => false,
        };
        let reason = match (loaded.phase, freeze_is_there) {
            (Phase::Over, _) => {
                tracing::info!(disk = disk.id, point = %found.id, "a point in time was over when its daemon was killed");
                return None;
            }
            // With a group, all of it.
            (Phase::Committing, _) if found.group().map_or_else(|| found.is_done(), |group| done.contains(&group)) => {
                self.over(disk, Some(Kind::Backup), &note.notice().name, None);
                return None;
            }
            (Phase::Broken, _) => "its point in time was broken",
            (_, Some(false)) => "its bitmap is not in the freeze any more that it began with",
            (Phase::Running | Phase::Committing, _) if !store_is_as_left => {
                "no bitmap store tells that nobody else has served the disk since"
            }
            (Phase::Running | Phase::Committing, _) if loaded.plan.size != disk.tracker.size() => {
                "the disk has another size"
            }
            (Phase::Running | Phase::Committing, _) => return Some(found),
        };
        self.over_for(disk, note, reason);
        None
    }

    /// Makes points of them, one scratch after another.
    fn restore(&self, whole: Vec<Whole<'_>>) -> Vec<Restored> {
        let mut by_scratch: BTreeMap<Uuid, Vec<Whole<'_>>> = BTreeMap::new();
        for found in whole {
            by_scratch.entry(found.loaded.plan.scratch).or_default().push(found);
        }
        let mut restored = Vec::new();
        for (scratch, group) in by_scratch {
            let (disk, unit, size) = (group[0].disk, group[0].loaded.plan.unit, group[0].loaded.plan.size);
            let fits = |found: &Whole<'_>| {
                Arc::ptr_eq(found.disk, disk) && found.loaded.plan.unit == unit && found.note.cluster >= unit
            };
            let places: Vec<(Place, u64)> = group
                .iter()
                .flat_map(|found| &found.loaded.saved)
                .map(|(start, place)| (*place, unit.bytes().min(size.saturating_sub(*start))))
                .collect();
            let opened = match group.iter().all(fits) {
                true => disk.restore_copy_before_write(scratch, unit, &places).map_err(|error| error.to_string()),
                false => Err("its points do not agree".to_owned()),
            };
            match opened {
                Ok((cbw, blocks)) => {
                    for found in group {
                        // One more than those that come to be, until all are there.
                        let joined = cbw.join();
                        debug_assert!(joined, "nobody has left yet");
                        restored.extend(self.restore_one(found, &cbw, &blocks));
                    }
                    cbw.leave(u64::MAX);
                }
                Err(reason) => {
                    let reason = format!("its scratch cannot be used: {reason}");
                    group.iter().for_each(|found| self.over_for(found.disk, &found.note, &reason));
                }
            }
        }
        restored
    }

    fn restore_one(&self, found: Whole<'_>, cbw: &Arc<CopyBeforeWrite>, blocks: &Blocks) -> Option<Restored> {
        let Whole { disk, id, note, loaded } = found;
        let frozen = |job: &Member| {
            let hold = job.hold.as_ref().filter(|_| job.of_bitmap)?;
            disk.tracker.frozen(&hold.bitmap, hold.freeze)
        };
        let wanted = match &note.role {
            Role::Job(job) if job.of_bitmap => frozen(job).map(Wanted::Frozen).ok_or("its bitmap is gone"),
            Role::Job(_) | Role::Point { .. } => Ok(Wanted::All),
        };
        let point = wanted.and_then(|wanted| {
            Point::restore(disk, Arc::clone(cbw), wanted, note.cluster, note.options, loaded, blocks)
        });
        let point = match point {
            Ok(point) => point,
            Err(reason) => {
                cbw.leave(u64::MAX);
                self.over_for(disk, &note, reason);
                return None;
            }
        };
        let disk = Arc::clone(disk);
        self.furnished(Restored::new(disk, id, note, point))
    }

    /// It with all that it needs, or nothing.
    fn furnished(&self, mut restored: Restored) -> Option<Restored> {
        match self.furnish(&mut restored) {
            Ok(()) => Some(restored),
            Err(reason) => {
                self.over_for(&restored.disk, &restored.note, &reason);
                None
            }
        }
    }

    /// The rest of what it needs: a name, a target.
    fn furnish(&self, restored: &mut Restored) -> Result<(), String> {
        let job = match &restored.note.role {
            Role::Point { name } if self.points.has(name) || self.disk(name).is_some() => {
                return Err("another node has its name".to_owned());
            }
            Role::Point { name } => {
                let (disk, point) = (Arc::clone(&restored.disk), Arc::clone(&restored.point));
                restored.named = Some(Arc::new(PointNode::new(name.clone(), disk, point)));
                return Ok(());
            }
            Role::Job(job) => job,
        };
        restored.reservation = Some(self.jobs.reserve(&job.id).map_err(|error| error.to_string())?);
        if job.error.is_some() {
            return Ok(());
        }
        let size = restored.disk.tracker.size();
        let target = match &job.destination {
            Named::Path { path, format, existing } => {
                match super::destination::reopen(self, path, format.as_deref(), *existing, job.target) {
                    Ok(target) => target,
                    // The target is gone, but nothing has to be in it.
                    Err(_) if !*existing && !restored.point.has_released() && !path.exists() => {
                        let mut destination = Destination::new(job.destination.clone());
                        destination.open(self, size, false).map_err(|error| error.to_string())?;
                        let target = destination.take(self, &restored.disk).map_err(|error| error.to_string())?;
                        drop(destination.hand_over());
                        target.ok_or("its target could not be made")?
                    }
                    Err(error) => return Err(format!("its target cannot be gone on with: {error}")),
                }
            }
            Named::Node { name, options } => {
                let cannot = |reason: &str| format!("its target, node '{name}', cannot be gone on with: {reason}");
                let again = nodes::reopen(self, options, size, restored.note.cluster.bytes())
                    .map_err(|error| cannot(&error.to_string()))?;
                // An export has no such number.
                if again.opened.file_id() != job.target {
                    return Err(cannot("it is another file"));
                }
                (restored.nodes, restored.claim) = (again.nodes, Some(again.claim));
                again.opened
            }
        };
        check_size(&*target, &restored.disk).map_err(|error| error.to_string())?;
        restored.target = Some(target);
        Ok(())
    }

    /// A group is gone on with as a whole, or not at all.
    fn whole_groups(&self, restored: Vec<Restored>, searching: Vec<Searching>) -> (Vec<Restored>, Vec<Searching>) {
        let mut there: HashMap<Uuid, usize> = HashMap::new();
        let groups = restored.iter().filter_map(Restored::group).chain(searching.iter().filter_map(Searching::group));
        for (id, _) in groups {
            *there.entry(id).or_default() += 1;
        }
        let is_whole = |group: Option<(Uuid, usize)>| group.is_none_or(|(id, members)| there[&id] == members);
        let (whole, parts): (Vec<_>, Vec<_>) = restored.into_iter().partition(|one| is_whole(one.group()));
        let (searching, ended): (Vec<_>, Vec<_>) = searching.into_iter().partition(|one| is_whole(one.group()));
        let reason = "another job of its group cannot be gone on with";
        parts.iter().for_each(|part| self.over_for(&part.disk, &part.note, reason));
        ended.iter().for_each(|one| self.search_is_over(one, reason));
        (whole, searching)
    }

    /// Arms the gates, and lets everything begin.
    fn begin(&self, restored: Vec<Restored>, searching: Vec<Searching>) {
        let mut locked = self.jobs.lock();
        let mut disks: Vec<&Arc<Node>> = Vec::new();
        for disk in &self.disks {
            if restored.iter().any(|one| Arc::ptr_eq(&one.disk, disk)) {
                disks.push(disk);
            }
        }
        let armed = || restored.iter().filter(|one| !one.point.is_view());
        let arm = || {
            let commits = disks.iter().map(|disk| {
                let mut commit = disk.tracker.begin();
                let of_disk = armed().filter(|one| Arc::ptr_eq(disk, &one.disk));
                of_disk.for_each(|one| commit.arm(one.point.gate()));
                commit
            });
            commits.collect::<Vec<_>>()
        };
        let begun = |cuts: &[Cut]| {
            let cut_of = points::cut_of(&disks, cuts);
            armed().for_each(|one| one.point.begin(cut_of(&one.disk)));
        };
        // No queue thread is there yet, and nothing has to be stored.
        if let Err(error) = flip::commit_then(arm(), begun) {
            drop(locked);
            restored.iter().for_each(|one| self.over_for(&one.disk, &one.note, &error.to_string()));
            searching.iter().for_each(|one| self.search_is_over(one, &error.to_string()));
            return;
        }
        let mut groups = Groups::default();
        for one in restored {
            tracing::warn!(disk = one.disk.id, point = %one.id, name = one.note.notice().name, "goes on after a kill");
            let Restored { disk, note, point, named, target, mut nodes, claim, reservation, .. } = one;
            self.targets().append(&mut nodes);
            match note.role {
                Role::Point { name } => {
                    points::note(&name, &disk, &point);
                    named.into_iter().for_each(|node| self.points.add(node));
                }
                Role::Job(job) => {
                    let Some(id) = reservation else { continue };
                    let held = Held {
                        node: disk,
                        point,
                        hold: job.hold,
                        destination: job.destination,
                        content: if job.follows { Content::Overwritten } else { Content::Wanted },
                        compress: job.compress,
                        claim: claim.map(|claim| Box::new(claim) as Box<dyn Any + Send + Sync>),
                    };
                    match (job.error, target) {
                        (None, Some(target)) => {
                            let work = Work::Backup(Backup { held, target });
                            let new = NewJob { id, settings: job.settings, work, paused: job.paused };
                            groups.push(job.group, new);
                        }
                        (error, _) => locked.put_back(id, job.settings, held, error),
                    }
                }
            }
        }
        for one in searching {
            tracing::warn!(disk = one.disk().id, job = one.name(), "is searched anew after a kill");
            let (group, mut nodes, new) = one.into_job();
            self.targets().append(&mut nodes);
            groups.push(group, new);
        }
        for (group, jobs) in groups.0 {
            locked.start(jobs, group.is_some());
        }
    }
}

/// Jobs that begin together, by their group.
#[derive(Default)]
struct Groups(Vec<(Option<Uuid>, Vec<NewJob>)>);

impl Groups {
    fn push(&mut self, group: Option<(Uuid, usize)>, new: NewJob) {
        let group = group.map(|(group, _)| group);
        match self.0.iter_mut().find(|(known, _)| group.is_some() && *known == group) {
            Some((_, members)) => members.push(new),
            None => self.0.push((group, vec![new])),
        }
    }
}

/// The groups whose end was committed. A freeze that is still in force tells that it was not, whatever is gone.
fn done(whole: &[Whole<'_>], searches: &[Unsearched<'_>]) -> HashSet<Uuid> {
    let frozen = whole.iter().filter(|found| found.freeze_is_there() == Some(true)).filter_map(Whole::group);
    let frozen = frozen.chain(searches.iter().filter(|found| found.frozen().is_some()).filter_map(Unsearched::group));
    let frozen: HashSet<Uuid> = frozen.collect();
    let done = whole.iter().filter(|found| found.is_done()).filter_map(Whole::group);
    let done = done.chain(searches.iter().filter(|found| found.is_done()).filter_map(Unsearched::group));
    done.filter(|group| !frozen.contains(group)).collect()
}

impl Whole<'_> {
    /// Whether the freeze is in force that it began with, if it did with one.
    fn freeze_is_there(&self) -> Option<bool> {
        let Role::Job(job) = &self.note.role else { return None };
        job.hold.as_ref().map(|hold| self.disk.tracker.frozen(&hold.bitmap, hold.freeze).is_some())
    }

    /// Whether the commit that ended it is in force.
    fn is_done(&self) -> bool {
        match self.loaded.phase {
            Phase::Over => true,
            Phase::Committing => self.freeze_is_there() == Some(false),
            Phase::Running | Phase::Broken => false,
        }
    }

    fn group(&self) -> Option<Uuid> {
        match &self.note.role {
            Role::Job(job) => job.group.map(|(group, _)| group),
            Role::Point { .. } => None,
        }
    }

    /// The point that it copies, if that belongs to somebody else.
    fn point(&self) -> Option<Uuid> {
        match &self.note.role {
            Role::Job(job) => job.point,
            Role::Point { .. } => None,
        }
    }
}

impl Restored {
    /// Without what it needs besides.
    fn new(disk: Arc<Node>, id: Uuid, note: Note, point: Arc<Point>) -> Self {
        let (nodes, claim) = (Vec::new(), None);
        Self { disk, id, note, point, named: None, target: None, nodes, claim, reservation: None }
    }

    fn group(&self) -> Option<(Uuid, usize)> {
        match &self.note.role {
            Role::Job(job) => job.group,
            Role::Point { .. } => None,
        }
    }
}

/// Ends the freezes of jobs that are not there, and takes away the files of points that are not.
fn reclaim_the_rest(disk: &Arc<Node>, alive: &[Uuid]) {
    let left: Vec<(String, Uuid)> = disk
        .tracker
        .list()
        .into_iter()
        .filter(|bitmap| bitmap.owner == Some(Owner::Job))
        .filter_map(|bitmap| Some((bitmap.name, bitmap.frozen?)))
        .filter(|(_, freeze)| !alive.contains(freeze))
        .collect();
    if !left.is_empty() {
        commit_until_done(|| {
            let mut commit = disk.tracker.begin();
            for (bitmap, freeze) in &left {
                if let Err(error) = commit.draft.reclaim(bitmap, *freeze) {
                    tracing::error!(disk = disk.id, bitmap, %error, "a freeze of a job that is gone could not be ended");
                }
            }
            vec![commit]
        });
        for (bitmap, freeze) in &left {
            tracing::warn!(disk = disk.id, bitmap, %freeze, "a freeze ended with the process: reclaimed");
        }
    }
}
