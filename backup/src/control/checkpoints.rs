//! Checkpoints: points in time that are named for change tracking alone, of one disk or of several at one instant.
//!
//! They are a part of the drafts of their disks, so each order is an action of a transaction that may stand alone. A checkpoint
//! has one name on all of its disks, and no other checkpoint has it. What lies between two of them is a question for one disk.

use super::regions::Page;
use super::transaction::{self, Action, Stage};
use super::{Control, done};
use crate::node::Node;
use crate::qmp::{Arguments, QmpError};
use blkmark_bitmap::{BitmapError, CheckpointInfo, CheckpointMark, Granularity};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// A checkpoint to be made or deleted.
#[derive(Clone, Debug)]
pub(super) enum CheckpointAction {
    /// The instant of the transaction gets a name.
    Create { name: String, nodes: Option<Vec<String>>, granularity: Option<u32> },
    /// It is gone, from all of its disks.
    Delete(String),
}

impl CheckpointAction {
    pub(super) fn read_create(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let name = arguments.string("name")?;
        let nodes = match arguments.opt_list("nodes")? {
            None => None,
            Some(nodes) => Some(nodes.into_iter().map(|node| node.string()).collect::<Result<_, _>>()?),
        };
        Ok(Self::Create { name, nodes, granularity: arguments.opt_u32_or_decimal("granularity")? })
    }

    pub(super) fn read_delete(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(Self::Delete(arguments.string("name")?))
    }

    /// Does it to the drafts of `stage`.
    pub(super) fn apply(&self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        match self {
            Self::Create { name, nodes, granularity } => create(stage, name, nodes.as_deref(), *granularity),
            Self::Delete(name) => {
                let mut found = false;
                for disk in stage.control().disks.iter() {
                    if checkpoints(stage, disk).iter().any(|checkpoint| checkpoint.mark.name == *name) {
                        stage.draft(disk).remove_checkpoint(name)?;
                        found = true;
                    }
                }
                if found { Ok(()) } else { Err(BitmapError::CheckpointNotFound(name.clone()).into()) }
            }
        }
    }
}

/// Those of a disk, as the actions so far leave them.
fn checkpoints<'a>(stage: &mut Stage<'a>, disk: &'a Arc<Node>) -> Vec<CheckpointInfo> {
    match stage.touches(disk) {
        true => stage.draft(disk).list_checkpoints(),
        false => disk.tracker.checkpoints(),
    }
}

fn create(
    stage: &mut Stage<'_>,
    name: &str,
    nodes: Option<&[String]>,
    granularity: Option<u32>,
) -> Result<(), QmpError> {
    let control = stage.control();
    let granularity = match granularity {
        None => Granularity::DEFAULT,
        Some(bytes) => Granularity::new(u64::from(bytes)).ok_or(BitmapError::Granularity)?,
    };
    let disks: Vec<&Arc<Node>> = match nodes {
        None => control.disks.iter().collect(),
        Some(nodes) => nodes.iter().map(|node| control.bitmap_node(node)).collect::<Result<_, _>>()?,
    };
    if disks.is_empty() {
        return Err(QmpError::generic("Parameter 'nodes' expects at least one node"));
    }
    let mut created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_micros() as u64);
    for disk in &control.disks {
        for checkpoint in checkpoints(stage, disk) {
            if checkpoint.mark.name == name {
                return Err(BitmapError::CheckpointExists(name.to_owned()).into());
            }
            // The order of their times is that of the chain, whatever the clock does.
            created = created.max(checkpoint.mark.created + 1);
        }
    }
    let mark = CheckpointMark { name: name.to_owned(), id: Uuid::new_v4(), created };
    for disk in disks {
        stage.draft(disk).add_checkpoint(mark.clone(), granularity)?;
    }
    Ok(())
}

fn alone(
    control: &Control,
    mut arguments: Arguments,
    read: fn(&mut Arguments) -> Result<CheckpointAction, QmpError>,
) -> Result<Value, QmpError> {
    let action = read(&mut arguments)?;
    arguments.finish()?;
    transaction::run(control, vec![Action::Checkpoint(action)], false)?;
    done()
}

pub(super) fn add(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, CheckpointAction::read_create)
}

pub(super) fn delete(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, CheckpointAction::read_delete)
}

/// Oldest first, each with its disks.
pub(super) fn query(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    let mut found: Vec<(CheckpointMark, Vec<Value>)> = Vec::new();
    // Of one instant over all disks.
    let _no_commits = control.jobs.lock();
    for disk in &control.disks {
        for checkpoint in disk.tracker.checkpoints() {
            let node = json!({
                "node": disk.id, "size": checkpoint.size, "granularity": checkpoint.granularity.bytes(),
            });
            match found.iter_mut().find(|(mark, _)| *mark == checkpoint.mark) {
                Some((_, nodes)) => nodes.push(node),
                None => found.push((checkpoint.mark, vec![node])),
            }
        }
    }
    found.sort_by_key(|(mark, _)| mark.created);
    let shown = found.into_iter().map(|(mark, nodes)| {
        let (seconds, microseconds) = (mark.created / 1_000_000, mark.created % 1_000_000);
        json!({
            "name": mark.name,
            "id": mark.id.to_string(),
            "created": { "seconds": seconds, "microseconds": microseconds },
            "nodes": nodes,
        })
    });
    Ok(shown.collect())
}

/// What was written to a disk between two of its checkpoints, or since one.
pub(super) fn changes(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let node = arguments.string("node")?;
    let from = arguments.string("from")?;
    let to = arguments.opt_string("to")?;
    let page = Page::read(&mut arguments)?;
    arguments.finish()?;
    let disk = control.bitmap_node(&node)?;
    let bits = disk.tracker.changes(&from, to.as_deref())?;
    let mut answer = Map::new();
    answer.insert("node".into(), node.into());
    answer.insert("from".into(), from.into());
    if let Some(to) = to {
        answer.insert("to".into(), to.into());
    }
    page.show(&bits, &mut answer)?;
    Ok(answer.into())
}
