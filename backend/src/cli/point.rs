//! `blkmark point`: points in time as nodes, with the bitmaps that go with them in the same instant.

use blkmark_backup::qmp::Client;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::{Output, table, text};
use super::query::{bytes, elements, has_bitmap};

/// `blkmark point`.
#[derive(Debug, Args)]
pub struct PointArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: PointAction,
}

/// What to do with points in time.
#[derive(Debug, Subcommand)]
pub enum PointAction {
    /// Freeze disks as of one instant, each as a node of its own that can be exported and backed up
    #[command(after_help = "Several disks are frozen as of one instant:\n  \
        blkmark point add a a-now b b-now --freeze daily")]
    Add {
        /// The disk, and the name of its point; then the next disk
        #[arg(required = true, value_names = ["DISK", "NAME"])]
        points: Vec<String>,
        /// This bitmap of each disk records what changes from this very instant: for a full pull
        #[arg(long, value_name = "BITMAP")]
        start: Option<String>,
        /// Freeze this bitmap of each disk in the same instant: for an incremental pull; `bitmap abdicate` or `reclaim` ends that
        #[arg(long, value_name = "BITMAP", conflicts_with = "start")]
        freeze: Option<String>,
    },
    /// Drop points that nobody reads, all or none
    Remove {
        /// The points
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// List points and what they cost
    List,
}

/// Runs it.
pub(super) fn run(client: &mut Client, args: &PointArgs, output: &Output) -> Result<(), Failure> {
    let mut actions = Vec::new();
    match &args.action {
        PointAction::List => return list(client, output),
        PointAction::Add { points, start, freeze } => {
            if !points.len().is_multiple_of(2) {
                return Err(Failure::Usage("every disk needs a name for its point".into()));
            }
            for pair in points.chunks_exact(2) {
                let (disk, name) = (&pair[0], &pair[1]);
                if let Some(bitmap) = start {
                    let kind = match has_bitmap(client, disk, bitmap)? {
                        true => "block-dirty-bitmap-clear",
                        false => "block-dirty-bitmap-add",
                    };
                    actions.push(json!({ "type": kind, "data": { "node": disk, "name": bitmap } }));
                }
                if let Some(bitmap) = freeze {
                    let data = json!({ "node": disk, "name": bitmap });
                    actions.push(json!({ "type": "block-dirty-bitmap-create-successor", "data": data }));
                }
                actions.push(json!({ "type": "point-add", "data": { "node": disk, "name": name } }));
            }
        }
        PointAction::Remove { names } => {
            actions.extend(names.iter().map(|name| json!({ "type": "point-remove", "data": { "name": name } })));
        }
    }
    output.done(&client.execute("transaction", json!({ "actions": actions }))?);
    Ok(())
}

fn list(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let nodes = client.execute("query-named-block-nodes", Value::Null)?;
    let found: Vec<Value> = elements(&nodes).iter().filter(|node| node.get("point").is_some()).cloned().collect();
    let row = |node: &Value| {
        let point = &node["point"];
        [
            text(node, "node-name"),
            text(point, "node"),
            bytes(&node["image"], "virtual-size"),
            text(point, "state"),
            bytes(point, "overwritten"),
            bytes(point, "scratch"),
            text(point, "readers"),
            text(point, "error"),
        ]
    };
    let header = ["POINT", "DISK", "SIZE", "STATE", "OVERWRITTEN", "SCRATCH", "READERS", "ERROR"];
    output.result(&json!(found), || table(header, found.iter().map(row)));
    Ok(())
}
