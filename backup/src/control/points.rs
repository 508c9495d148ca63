//! Points in time as nodes: `point-add` and `point-remove`, alone or as actions of a transaction, and who reads them.
//!
//! A point is a kept [`Point`] with a name, read-only, of one served disk. Exports, backups and comparisons take it as their
//! source, many at a time; each holds a [`PointUse`] meanwhile. It is armed in the commit of its transaction, so that points of
//! several disks, and whatever is done to bitmaps with them, are of one instant.
//!
//! Invariants: a name belongs to one node, of any kind; a point that is read is not removed, and one that is about to be
//! removed is not read any more; after [`Points::shut_down`] there are none.

use super::transaction::{self, Action, Stage};
use super::{Control, done, options};
use crate::job::{Kind, Locked};
use crate::node::Node;
use crate::point::{Point, PointOptions, Wanted};
use crate::qmp::{Arguments, QmpError};
use crate::resume::{Note, Phase, Role};
use crate::scratch::ScratchFiles;
use blkmark_bitmap::flip::Cut;
use blkmark_bitmap::{Granularity, PreCut};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What readers of a point take at once at least, if its disk has no other points of finer clusters.
const CLUSTER: Granularity = Granularity::DEFAULT;

/// A point in time with a name.
pub(super) struct PointNode {
    pub(super) name: String,
    pub(super) disk: Arc<Node>,
    pub(super) point: Arc<Point>,
    users: Mutex<Users>,
}

#[derive(Default)]
struct Users {
    /// What they do, as errors put it.
    reading: Vec<(u64, String)>,
    next: u64,
    /// A transaction that removes it is under way.
    leaving: bool,
}

/// The right to read a point; given back when dropped.
#[derive(Debug)]
pub(super) struct PointUse {
    node: Arc<PointNode>,
    number: u64,
}

impl PointNode {
    /// Nobody reads it yet.
    pub(super) fn new(name: String, disk: Arc<Node>, point: Arc<Point>) -> Self {
        Self { name, disk, point, users: Mutex::default() }
    }

    /// Nobody is to go on with it after a kill, though it takes a while to go.
    fn forget(&self) {
        if let Some(ledger) = self.point.ledger()
            && let Err(error) = ledger.set_phase(Phase::Over)
        {
            tracing::error!(point = self.name, %error, "its ledger cannot say that it is gone");
        }
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To read it, for a purpose that is told to whoever wants it gone.
    pub(super) fn take(self: &Arc<Self>, purpose: impl Into<String>) -> Result<PointUse, QmpError> {
        let mut users = self.users();
        if users.leaving {
            return Err(QmpError::generic(format!("Node '{}' is being removed", self.name)));
        }
        let number = users.next;
        users.next += 1;
        users.reading.push((number, purpose.into()));
        drop(users);
        Ok(PointUse { node: Arc::clone(self), number })
    }

    /// To read it in a job.
    pub(super) fn take_for(self: &Arc<Self>, job: Kind) -> Result<PointUse, QmpError> {
        self.take(format!("block device is in use by block job: {}", job.name()))
    }

    /// What `query-named-block-nodes` tells of it besides the members of every node.
    pub(super) fn info(&self) -> Value {
        let cost = self.point.cost();
        let broken = self.point.broken();
        let mut info = json!({
            "node": self.disk.id,
            "state": if broken.is_some() { "broken" } else { "whole" },
            "overwritten": cost.overwritten,
            "scratch": cost.scratch,
            "readers": self.users().reading.len(),
        });
        if let Some(broken) = broken {
            info["error"] = broken.to_string().into();
        }
        info
    }
}

impl Drop for PointUse {
    fn drop(&mut self) {
        self.node.users().reading.retain(|(number, _)| *number != self.number);
    }
}

impl fmt::Debug for PointNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PointNode").field("name", &self.name).field("point", &self.point).finish_non_exhaustive()
    }
}

/// All points with names.
#[derive(Default)]
pub(super) struct Points(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Oldest first.
    nodes: Vec<Arc<PointNode>>,
    /// Names of points to come.
    reserved: HashSet<String>,
}

/// A name for a point to come; free again when dropped.
#[derive(Debug)]
struct Reserved {
    name: String,
    points: Arc<Mutex<State>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("nodes", &self.nodes).finish_non_exhaustive()
    }
}

fn lock(points: &Mutex<State>) -> MutexGuard<'_, State> {
    points.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Reserved {
    fn drop(&mut self) {
        lock(&self.points).reserved.remove(&self.name);
    }
}

impl Points {
    pub(super) fn list(&self) -> Vec<Arc<PointNode>> {
        lock(&self.0).nodes.clone()
    }

    /// Adds one that is in force.
    pub(super) fn add(&self, node: Arc<PointNode>) {
        lock(&self.0).nodes.push(node);
    }

    pub(super) fn find(&self, name: &str) -> Option<Arc<PointNode>> {
        lock(&self.0).nodes.iter().find(|node| node.name == name).cloned()
    }

    /// The name of a point of this disk, if there is one.
    pub(super) fn of(&self, disk: &str) -> Option<String> {
        lock(&self.0).nodes.iter().find(|node| node.disk.id == disk).map(|node| node.name.clone())
    }

    /// Whether a point has this name, or is about to.
    pub(super) fn has(&self, name: &str) -> bool {
        let points = lock(&self.0);
        points.reserved.contains(name) || points.nodes.iter().any(|node| node.name == name)
    }

    /// Ends all of them. Nobody reads any more, and the registry accepts no new ones.
    pub(super) fn shut_down(&self, locked: Locked<'_>) {
        let gone = std::mem::take(&mut lock(&self.0).nodes);
        let mut disks: Vec<&Arc<Node>> = Vec::new();
        for node in &gone {
            if !disks.iter().any(|disk| Arc::ptr_eq(disk, &node.disk)) {
                disks.push(&node.disk);
            }
        }
        crate::job::commit_until_done(|| {
            let disarmed = disks.iter().map(|disk| {
                let mut commit = disk.tracker.begin();
                let of_disk = gone.iter().filter(|node| Arc::ptr_eq(disk, &node.disk));
                of_disk.for_each(|node| commit.disarm(node.point.gate()));
                commit
            });
            disarmed.collect()
        });
        gone.iter().for_each(|node| node.forget());
        drop(locked);
        gone.iter().for_each(|node| node.point.end());
    }
}

/// Notes what the process that comes after a kill has to know of a point.
pub(super) fn note(name: &str, disk: &Node, point: &Point) {
    let Some(ledger) = point.ledger() else { return };
    let note = Note {
        boot: ledger.haven().boot(),
        disk: ledger.haven().disk(),
        run: disk.tracker.run(),
        cluster: point.cluster(),
        options: point.options(),
        role: Role::Point { name: name.to_owned() },
    };
    ledger.set_note(&note);
    ledger.announce(note.notice());
}

impl Control {
    /// The point in time of this name.
    pub(super) fn point(&self, name: &str) -> Option<Arc<PointNode>> {
        self.points.find(name)
    }

    /// Takes a name for a point to come. `leaving`: points that the same transaction removes before.
    fn reserve_point(&self, name: &str, leaving: &[String]) -> Result<Reserved, QmpError> {
        // Nodes of the other kind are added under this lock.
        let targets = self.targets();
        let taken = targets.iter().any(|node| node.name == name);
        let mut points = lock(&self.points.0);
        let lives = points.nodes.iter().any(|node| node.name == name) && !leaving.iter().any(|gone| gone == name);
        if taken || lives || !points.reserved.insert(name.to_owned()) {
            return Err(QmpError::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(Reserved { name: name.to_owned(), points: Arc::clone(&self.points.0) })
    }
}

/// A point to be made or dropped.
#[derive(Debug)]
pub(super) enum PointAction {
    /// Makes one.
    Add(AddPoint),
    /// Drops one.
    Remove(RemovePoint),
}

/// `point-add`.
#[derive(Debug)]
pub(super) struct AddPoint {
    disk: String,
    name: String,
    options: PointOptions,
    reserved: Option<Reserved>,
    scratch: Option<ScratchFiles>,
    made: Option<Arc<PointNode>>,
}

/// `point-remove`.
#[derive(Debug)]
pub(super) struct RemovePoint {
    name: String,
    leaving: Option<Leaving>,
}

/// A point that nobody may begin to read; if it is not removed after all, everything is as before.
#[derive(Debug)]
struct Leaving {
    node: Arc<PointNode>,
    gone: bool,
}

impl Drop for Leaving {
    fn drop(&mut self) {
        // Who has found one that is gone may not read it either.
        self.node.users().leaving = self.gone;
    }
}

impl PointAction {
    pub(super) fn read_add(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let (disk, name) = (arguments.string("node")?, arguments.string("name")?);
        let options = PointOptions { keep: true, outlive: true, ..options::point_options(arguments)? };
        Ok(Self::Add(AddPoint { disk, name, options, reserved: None, scratch: None, made: None }))
    }

    pub(super) fn read_remove(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(Self::Remove(RemovePoint { name: arguments.string("name")?, leaving: None }))
    }

    /// Makes scratch, with no lock held: its file system may take its time.
    pub(super) fn open_scratch(&mut self, control: &Control) -> Result<(), QmpError> {
        if let Self::Add(add) = self {
            let scratch = control.device(&add.disk)?.open_scratch();
            add.scratch = Some(scratch.map_err(|error| QmpError::generic(error.to_string()))?);
        }
        Ok(())
    }

    /// What of it was not needed, since the disk has scratch already.
    pub(super) fn spare_scratch(&mut self) -> Option<ScratchFiles> {
        match self {
            Self::Add(add) => add.scratch.take(),
            Self::Remove(_) => None,
        }
    }

    /// Takes what has to be taken; in a real walk, arms or disarms.
    pub(super) fn apply(&mut self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        match self {
            Self::Add(add) => add.apply(stage),
            Self::Remove(remove) => remove.apply(stage),
        }
    }

    /// What the commit to come arms, and where.
    pub(super) fn armed(&self) -> Option<(&Arc<Node>, &Arc<Point>)> {
        match self {
            Self::Add(AddPoint { made: Some(node), .. }) => Some((&node.disk, &node.point)),
            Self::Add(_) | Self::Remove(_) => None,
        }
    }

    /// The commit succeeded. What is dropped takes time, and is to be dropped without the registry's lock.
    pub(super) fn in_force(self, control: &Control) -> Option<Arc<PointNode>> {
        match self {
            Self::Add(AddPoint { made: Some(node), reserved, .. }) => {
                note(&node.name, &node.disk, &node.point);
                control.points.add(node);
                drop(reserved);
                None
            }
            Self::Remove(RemovePoint { leaving: Some(mut leaving), .. }) => {
                leaving.gone = true;
                let node = Arc::clone(&leaving.node);
                lock(&control.points.0).nodes.retain(|other| !Arc::ptr_eq(other, &node));
                node.forget();
                node.point.end();
                Some(node)
            }
            Self::Add(_) | Self::Remove(_) => None,
        }
    }
}

impl AddPoint {
    fn apply(&mut self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        let control = stage.control();
        let disk = control.device(&self.disk)?;
        if self.reserved.is_none() {
            control.check_node_name(&self.name)?;
            self.reserved = Some(control.reserve_point(&self.name, &stage.removed)?);
        }
        if stage.real {
            let point = Point::prepare_with(disk, &mut self.scratch, Wanted::All, CLUSTER, self.options)
                .map_err(|error| QmpError::generic(error.to_string()))?;
            stage.commit(disk).arm(point.gate());
            self.made = Some(Arc::new(PointNode::new(self.name.clone(), Arc::clone(disk), point)));
        }
        Ok(())
    }
}

impl RemovePoint {
    fn apply(&mut self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        let control = stage.control();
        if self.leaving.is_none() {
            let node = control.point(&self.name).ok_or_else(|| control.no_point(&self.name))?;
            let mut users = node.users();
            if let Some((_, purpose)) = users.reading.first() {
                return Err(QmpError::generic(format!("Node '{}' is busy: {purpose}", self.name)));
            }
            if std::mem::replace(&mut users.leaving, true) {
                return Err(QmpError::generic(format!("Node '{}' is being removed", self.name)));
            }
            drop(users);
            self.leaving = Some(Leaving { node, gone: false });
        }
        stage.removed.push(self.name.clone());
        if let (true, Some(leaving)) = (stage.real, &self.leaving) {
            let disk = control.device(&leaving.node.disk.id)?;
            stage.commit(disk).disarm(leaving.node.point.gate());
        }
        Ok(())
    }
}

impl Control {
    fn no_point(&self, name: &str) -> QmpError {
        match self.disk(name).is_some() || self.target_node(name).is_some() {
            true => QmpError::generic(format!("Node '{name}' is no point in time")),
            false => QmpError::generic(format!("Failed to find node with node-name='{name}'")),
        }
    }
}

/// The writes that were in flight when the point of `disk` was armed.
pub(super) fn cut_of<'c>(disks: &'c [&Arc<Node>], cuts: &'c [Cut]) -> impl Fn(&Arc<Node>) -> Arc<PreCut> + use<'c> {
    let pairs: Vec<_> =
        disks.iter().zip(cuts).map(|(disk, cut)| (Arc::clone(disk), Arc::clone(&cut.pre_cut))).collect();
    move |wanted| {
        let found = pairs.iter().find(|(disk, _)| Arc::ptr_eq(disk, wanted));
        let Some((_, pre_cut)) = found else { unreachable!("the disk is in the commit that armed its gate") };
        Arc::clone(pre_cut)
    }
}

fn alone(
    control: &Control,
    mut arguments: Arguments,
    read: fn(&mut Arguments) -> Result<PointAction, QmpError>,
) -> Result<Value, QmpError> {
    let action = read(&mut arguments)?;
    arguments.finish()?;
    transaction::run(control, vec![Action::Point(Box::new(action))], false)?;
    done()
}

pub(super) fn add(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, PointAction::read_add)
}

pub(super) fn remove(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, PointAction::read_remove)
}
