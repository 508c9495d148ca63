//! `blkmark export`: disks and points in time over NBD.

use std::path::PathBuf;

use blkmark_backup::qmp::Client;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::backup::told;
use super::failure::Failure;
use super::output::{Output, table, text};
use super::query::elements;

/// `blkmark export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: ExportAction,
}

/// What to do with exports.
#[derive(Debug, Subcommand)]
pub enum ExportAction {
    /// Start the NBD server on a Unix socket
    Start {
        /// The socket to make
        socket: PathBuf,
    },
    /// End all exports and the NBD server
    Stop,
    /// Export a disk or a point in time, read-only
    Add {
        /// The node: a disk, or a point
        node: String,
        /// What NBD clients call it, and its id [default: the node's name]
        #[arg(long)]
        name: Option<String>,
        /// A bitmap of the disk that stands still, as context `qemu:dirty-bitmap:BITMAP` (repeatable)
        #[arg(long = "bitmap", value_name = "BITMAP")]
        bitmaps: Vec<String>,
    },
    /// End an export
    Remove {
        /// The export
        id: String,
        /// Hang up on its clients
        #[arg(long)]
        hard: bool,
    },
    /// List exports
    List,
}

/// Runs it.
pub(super) fn run(client: &mut Client, args: &ExportArgs, output: &Output) -> Result<(), Failure> {
    let (command, arguments) = match &args.action {
        ExportAction::List => return list(client, output),
        ExportAction::Start { socket } => {
            let data = json!({ "path": told(socket)? });
            ("nbd-server-start", json!({ "addr": { "type": "unix", "data": data } }))
        }
        ExportAction::Stop => ("nbd-server-stop", json!({})),
        ExportAction::Add { node, name, bitmaps } => {
            let name = name.as_ref().unwrap_or(node);
            let arguments = json!({ "type": "nbd", "id": name, "name": name, "node-name": node, "bitmaps": bitmaps });
            ("block-export-add", arguments)
        }
        ExportAction::Remove { id, hard } => {
            ("block-export-del", json!({ "id": id, "mode": if *hard { "hard" } else { "safe" } }))
        }
    };
    output.done(&client.execute(command, arguments)?);
    Ok(())
}

fn list(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-block-exports", Value::Null)?;
    let row = |export: &Value| [text(export, "id"), text(export, "node-name"), text(export, "type")];
    output.result(&found, || table(["EXPORT", "NODE", "TYPE"], elements(&found).iter().map(row)));
    Ok(())
}
