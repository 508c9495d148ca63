//! Transactions: any number of actions, in force at one instant, or not at all.
//!
//! The actions are walked in order, each on the drafts that those before it left. If there are backups or points in time, which need files,
//! there are two walks: the first only checks, so that a transaction that cannot succeed touches no file; then scratch and
//! targets are opened, with no lock held; the second one is for real and ends in the commit. Whatever fails on the way, all that
//! was prepared is dropped, and dropping undoes it: drafts, frozen sets, points, claims, reservations, files made.

use super::backup::BackupAction;
use super::bitmaps::BitmapAction;
use super::checkpoints::CheckpointAction;
use super::points::{self, PointAction};
use super::populate::PopulateAction;
use super::{Control, done};
use crate::job::{Locked, NewJob};
use crate::node::Node;
use crate::qmp::{Arguments, QmpError};
use blkmark_bitmap::Commit;
use blkmark_bitmap::flip::Cut;
use blkmark_bitmap::named::Draft;
use serde_json::Value;
use std::sync::Arc;

/// One action.
#[derive(Debug)]
pub(super) enum Action {
    /// Makes the transaction fail.
    Abort,
    /// A bitmap operation.
    Bitmap(BitmapAction),
    /// A checkpoint that is made or deleted.
    Checkpoint(CheckpointAction),
    /// A point in time that is made or dropped.
    Point(Box<PointAction>),
    /// A backup job.
    Backup(Box<BackupAction>),
    /// A populate job.
    Populate(Box<PopulateAction>),
}

/// The drafts of a walk: one commit for each disk that an action touched.
pub(super) struct Stage<'a> {
    control: &'a Control,
    commits: Vec<(&'a Arc<Node>, Commit<'a>)>,
    /// Disks and names of bitmaps that were added in this walk.
    made: Vec<(String, String)>,
    /// Whether this walk ends in the commit.
    pub(super) real: bool,
    /// Names of points that the actions so far remove.
    pub(super) removed: Vec<String>,
}

impl<'a> Stage<'a> {
    /// Only while the job registry is locked: that is what keeps two stages apart.
    fn new(control: &'a Control, _locked: &Locked<'_>, real: bool) -> Self {
        Self { control, commits: Vec::new(), made: Vec::new(), real, removed: Vec::new() }
    }

    pub(super) fn control(&self) -> &'a Control {
        self.control
    }

    /// Whether an action so far is about this disk: then its tracker is locked, and only the draft may be asked.
    pub(super) fn touches(&self, disk: &Arc<Node>) -> bool {
        self.commits.iter().any(|(node, _)| Arc::ptr_eq(node, disk))
    }

    fn position(&mut self, disk: &'a Arc<Node>) -> usize {
        match self.commits.iter().position(|(node, _)| Arc::ptr_eq(node, disk)) {
            Some(position) => position,
            None => {
                self.commits.push((disk, disk.tracker.begin()));
                self.commits.len() - 1
            }
        }
    }

    /// The part of `disk` in the commit to come.
    pub(super) fn commit(&mut self, disk: &'a Arc<Node>) -> &mut Commit<'a> {
        let position = self.position(disk);
        &mut self.commits[position].1
    }

    /// Whether bitmap `name` of `disk` is of this transaction's making.
    pub(super) fn has_made(&self, disk: &Node, name: &str) -> bool {
        self.made.iter().any(|(node, made)| *node == disk.id && made == name)
    }

    /// It is.
    pub(super) fn note_made(&mut self, disk: &Node, name: &str) {
        self.made.push((disk.id.clone(), name.to_owned()));
    }

    /// The bitmaps of `disk`, as the actions so far leave them.
    pub(super) fn draft(&mut self, disk: &'a Arc<Node>) -> &mut Draft {
        &mut self.commit(disk).draft
    }
}

impl Action {
    /// Whether files are to be opened or made for it, with no lock held.
    fn opens_a_file(&self) -> bool {
        match self {
            Action::Abort | Action::Bitmap(_) | Action::Checkpoint(_) => false,
            Action::Backup(_) | Action::Point(_) => true,
            Action::Populate(populate) => populate.opens_a_file(),
        }
    }

    fn read(kind: &Kind, data: &mut Arguments) -> Result<Self, QmpError> {
        Ok(match kind {
            Kind::Abort => Action::Abort,
            Kind::Bitmap(read) => Action::Bitmap(read(data)?),
            Kind::Checkpoint(read) => Action::Checkpoint(read(data)?),
            Kind::Point(read) => Action::Point(Box::new(read(data)?)),
            Kind::Backup(read) => Action::Backup(Box::new(read(data)?)),
            Kind::Populate => Action::Populate(Box::new(PopulateAction::read(data)?)),
        })
    }
}

#[derive(Clone)]
enum Kind {
    Abort,
    Bitmap(fn(&mut Arguments) -> Result<BitmapAction, QmpError>),
    Checkpoint(fn(&mut Arguments) -> Result<CheckpointAction, QmpError>),
    Point(fn(&mut Arguments) -> Result<PointAction, QmpError>),
    Backup(fn(&mut Arguments) -> Result<BackupAction, QmpError>),
    Populate,
}

/// What can be an action, by its name.
const KINDS: &[(&str, Kind)] = &[
    ("abort", Kind::Abort),
    ("block-dirty-bitmap-add", Kind::Bitmap(BitmapAction::read_add)),
    ("block-dirty-bitmap-remove", Kind::Bitmap(BitmapAction::read_remove)),
    ("block-dirty-bitmap-clear", Kind::Bitmap(BitmapAction::read_clear)),
    ("block-dirty-bitmap-enable", Kind::Bitmap(BitmapAction::read_enable)),
    ("block-dirty-bitmap-disable", Kind::Bitmap(BitmapAction::read_disable)),
    ("block-dirty-bitmap-merge", Kind::Bitmap(BitmapAction::read_merge)),
    ("block-dirty-bitmap-populate", Kind::Populate),
    ("block-dirty-bitmap-create-successor", Kind::Bitmap(BitmapAction::read_create_successor)),
    ("block-dirty-bitmap-abdicate", Kind::Bitmap(BitmapAction::read_abdicate)),
    ("block-dirty-bitmap-reclaim", Kind::Bitmap(BitmapAction::read_reclaim)),
    ("checkpoint-create", Kind::Checkpoint(CheckpointAction::read_create)),
    ("checkpoint-delete", Kind::Checkpoint(CheckpointAction::read_delete)),
    ("point-add", Kind::Point(PointAction::read_add)),
    ("point-remove", Kind::Point(PointAction::read_remove)),
    ("blockdev-backup", Kind::Backup(BackupAction::read_blockdev)),
    ("drive-backup", Kind::Backup(BackupAction::read_drive)),
];

pub(super) fn transaction(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let names: Vec<(&str, (&str, Kind))> = KINDS.iter().map(|(name, kind)| (*name, (*name, kind.clone()))).collect();
    let mut actions = Vec::new();
    for element in arguments.list("actions")? {
        let mut members = element.object()?;
        let (name, kind) = members.choice("type", &names)?;
        let mut data = members.object("data")?;
        actions.push((name, Action::read(&kind, &mut data)?));
        data.finish()?;
        members.finish()?;
    }
    let mut grouped = false;
    if let Some(mut properties) = arguments.opt_object("properties")? {
        let modes = [("individual", false), ("grouped", true)];
        grouped = properties.opt_choice("completion-mode", &modes)?.unwrap_or(false);
        properties.finish()?;
    }
    arguments.finish()?;
    let is_job = |action: &Action| matches!(action, Action::Backup(_) | Action::Populate(_));
    if grouped && let Some((name, _)) = actions.iter().find(|(_, action)| !is_job(action)) {
        return Err(QmpError::generic(format!(
            "Action '{name}' does not support transaction property completion-mode = grouped"
        )));
    }
    run(control, actions.into_iter().map(|(_, action)| action).collect(), grouped)?;
    done()
}

/// Does all of `actions`, or nothing.
pub(super) fn run(control: &Control, mut actions: Vec<Action>, grouped: bool) -> Result<(), QmpError> {
    if actions.iter().any(Action::opens_a_file) {
        let locked = control.jobs.lock();
        walk(&mut Stage::new(control, &locked, false), &locked, &mut actions)?;
        drop(locked);
        for action in &mut actions {
            match action {
                Action::Backup(backup) => backup.open_scratch(control)?,
                Action::Point(point) => point.open_scratch(control)?,
                Action::Abort | Action::Bitmap(_) | Action::Checkpoint(_) | Action::Populate(_) => {}
            }
        }
        for overwrite in [false, true] {
            for action in &mut actions {
                match action {
                    Action::Backup(backup) => backup.open(control, overwrite)?,
                    Action::Populate(populate) => populate.open(control)?,
                    Action::Abort | Action::Bitmap(_) | Action::Checkpoint(_) | Action::Point(_) => {}
                }
            }
        }
    }
    // Closed when the lock is free again.
    let mut spare = Vec::new();
    let mut locked = control.jobs.lock();
    let mut stage = Stage::new(control, &locked, true);
    walk(&mut stage, &locked, &mut actions)?;
    let (disks, commits): (Vec<_>, Vec<_>) = stage.commits.into_iter().unzip();
    let begun = |cuts: &[Cut]| {
        // Points begin before the commit is durable: what they hold of their guests must not wait for a store.
        let cut_of = points::cut_of(&disks, cuts);
        for action in &actions {
            let armed = match action {
                Action::Backup(backup) => backup.armed(),
                Action::Point(point) => point.armed(),
                Action::Abort | Action::Bitmap(_) | Action::Checkpoint(_) | Action::Populate(_) => None,
            };
            if let Some((disk, point)) = armed {
                point.begin(cut_of(disk));
            }
        }
    };
    locked.commit_then(commits, begun).map_err(|error| QmpError::generic(error.to_string()))?;
    // From here on there is no way back, and nothing that could fail but a job.
    for action in &mut actions {
        match action {
            Action::Backup(backup) => spare.push(backup.spare_scratch()),
            Action::Point(point) => spare.push(point.spare_scratch()),
            Action::Abort | Action::Bitmap(_) | Action::Checkpoint(_) | Action::Populate(_) => {}
        }
    }
    let (mut new, mut gone): (Vec<NewJob>, Vec<_>) = (Vec::new(), Vec::new());
    for action in actions {
        match action {
            Action::Backup(backup) => new.extend(backup.into_job()),
            Action::Populate(populate) => new.extend(populate.into_job()),
            Action::Point(point) => gone.extend(point.in_force(control)),
            Action::Abort | Action::Bitmap(_) | Action::Checkpoint(_) => {}
        }
    }
    locked.start(new, grouped);
    drop(locked);
    // What points kept is given back without the lock.
    drop(gone);
    Ok(())
}

fn walk<'a>(stage: &mut Stage<'a>, locked: &Locked<'_>, actions: &mut [Action]) -> Result<(), QmpError> {
    for action in actions {
        match action {
            Action::Abort => return Err(QmpError::generic("Transaction aborted using Abort action")),
            Action::Bitmap(action) => action.apply(stage)?,
            Action::Checkpoint(action) => action.apply(stage)?,
            Action::Point(action) => {
                action.apply(stage)?;
                locked.may_start()?;
            }
            Action::Backup(action) => {
                action.apply(stage)?;
                locked.may_start()?;
            }
            Action::Populate(action) => {
                action.apply(stage)?;
                locked.may_start()?;
            }
        }
    }
    Ok(())
}
