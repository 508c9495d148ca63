//! `blkmark checkpoint`, and the regions that it and `blkmark bitmap show` print.

use blkmark_backup::qmp::Client;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::{Output, table, text};
use super::query::elements;
use super::size;

/// `blkmark checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: CheckpointAction,
}

/// What to do with checkpoints.
#[derive(Debug, Subcommand)]
pub enum CheckpointAction {
    /// Name this instant, to ask later what has changed since
    Create {
        /// The checkpoint
        name: String,
        /// The disk (repeatable) [default: all disks]
        #[arg(long = "disk", value_name = "DISK")]
        disks: Vec<String>,
        /// Bytes that one bit stands for, a power of two [default: 64K]
        #[arg(long, value_parser = size::parse)]
        granularity: Option<u64>,
    },
    /// Forget a checkpoint; what is known between the others stays
    Delete {
        /// The checkpoint
        name: String,
    },
    /// List checkpoints, the oldest first
    List,
    /// Show what was written to a disk between two checkpoints, or since one
    Changes {
        /// The disk
        disk: String,
        /// From this checkpoint
        from: String,
        /// To this one [default: now]
        to: Option<String>,
    },
}

/// Runs it.
pub(super) fn run(client: &mut Client, args: &CheckpointArgs, output: &Output) -> Result<(), Failure> {
    let (command, arguments) = match &args.action {
        CheckpointAction::List => return list(client, output),
        CheckpointAction::Changes { disk, from, to } => {
            let mut arguments = json!({ "node": disk, "from": from });
            if let Some(to) = to {
                arguments["to"] = json!(to);
            }
            return regions(client, "query-changes", arguments, output);
        }
        CheckpointAction::Create { name, disks, granularity } => {
            let mut arguments = json!({ "name": name });
            if !disks.is_empty() {
                arguments["nodes"] = json!(disks);
            }
            if let Some(granularity) = granularity {
                arguments["granularity"] = json!(granularity);
            }
            ("checkpoint-create", arguments)
        }
        CheckpointAction::Delete { name } => ("checkpoint-delete", json!({ "name": name })),
    };
    output.done(&client.execute(command, arguments)?);
    Ok(())
}

fn list(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-checkpoints", Value::Null)?;
    let row = |checkpoint: &Value| {
        let disks: Vec<String> = elements(&checkpoint["nodes"]).iter().map(|node| text(node, "node")).collect();
        [text(checkpoint, "name"), text(&checkpoint["created"], "seconds"), disks.join(", ")]
    };
    let header = ["CHECKPOINT", "CREATED (UNIX TIME)", "DISKS"];
    output.result(&found, || table(header, elements(&found).iter().map(row)));
    Ok(())
}

/// All pages of a query, as one answer.
pub(super) fn regions(
    client: &mut Client,
    command: &str,
    mut arguments: Value,
    output: &Output,
) -> Result<(), Failure> {
    let mut regions: Vec<Value> = Vec::new();
    let whole = loop {
        let mut page = client.execute(command, arguments.clone())?;
        regions.extend(elements(&page["dirty-regions"]).iter().cloned());
        match page.get("next-offset") {
            Some(next) => arguments["offset"] = next.clone(),
            None => {
                page["dirty-regions"] = json!(regions);
                break page;
            }
        }
    };
    let row = |region: &Value| [text(region, "start"), text(region, "count")];
    output.result(&whole, || table(["START", "BYTES"], regions.iter().map(row)));
    Ok(())
}
