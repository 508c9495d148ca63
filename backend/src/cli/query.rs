//! `blkmark query` and the lists of `blkmark bitmap` and `blkmark job`: what the daemon answers, as tables.
//!
//! For machines, the answer of the QMP command as it is; only bitmaps, which QMP lists within nodes, get a list of
//! their own.

use blkmark_backup::qmp::Client;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::{Output, table, text};
use super::size;

/// `blkmark query`.
#[derive(Debug, Args)]
pub struct QueryArgs {
    /// What to show
    #[arg(value_enum)]
    pub what: Query,
}

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Query {
    /// The disks that are served
    Disks,
    /// Jobs and their progress
    Jobs,
    /// Dirty bitmaps of all disks
    Bitmaps,
    /// Block devices, as QMP's query-block lists them
    Block,
    /// All nodes, targets included
    NamedBlockNodes,
    /// What the daemon has given up since it serves
    Sandbox,
}

/// Runs it.
pub(super) fn run(client: &mut Client, args: &QueryArgs, output: &Output) -> Result<(), Failure> {
    match args.what {
        Query::Disks => disks(client, output),
        Query::Jobs => jobs(client, output),
        Query::Bitmaps => bitmaps(client, None, output),
        Query::Block => block(client, output),
        Query::NamedBlockNodes => nodes(client, output),
        Query::Sandbox => sandbox(client, output),
    }
}

pub(super) fn elements(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

pub(super) fn bytes(value: &Value, member: &str) -> String {
    value.get(member).and_then(Value::as_u64).map_or_else(String::new, size::human)
}

fn disks(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-block", Value::Null)?;
    let row = |device: &Value| {
        let node = &device["inserted"];
        [
            text(device, "device"),
            bytes(&node["image"], "virtual-size"),
            text(node, "ro"),
            elements(&node["dirty-bitmaps"]).len().to_string(),
            text(node, "file"),
        ]
    };
    let header = ["DISK", "SIZE", "READ-ONLY", "BITMAPS", "FILE"];
    output.result(&found, || table(header, elements(&found).iter().map(row)));
    Ok(())
}

fn block(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-block", Value::Null)?;
    let row = |device: &Value| {
        let node = &device["inserted"];
        [
            text(device, "device"),
            text(node, "node-name"),
            text(node, "drv"),
            bytes(&node["image"], "virtual-size"),
            text(device, "io-status"),
            text(node, "file"),
        ]
    };
    let header = ["DEVICE", "NODE", "DRIVER", "SIZE", "IO-STATUS", "FILE"];
    output.result(&found, || table(header, elements(&found).iter().map(row)));
    Ok(())
}

fn nodes(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-named-block-nodes", Value::Null)?;
    let row = |node: &Value| {
        [
            text(node, "node-name"),
            text(node, "drv"),
            bytes(&node["image"], "virtual-size"),
            text(node, "ro"),
            elements(&node["dirty-bitmaps"]).len().to_string(),
            text(node, "file"),
        ]
    };
    let header = ["NODE", "DRIVER", "SIZE", "READ-ONLY", "BITMAPS", "FILE"];
    output.result(&found, || table(header, elements(&found).iter().map(row)));
    Ok(())
}

fn sandbox(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-sandbox", Value::Null)?;
    let row = ["seccomp", "landlock", "paths"].map(|member| text(&found, member));
    output.result(&found, || table(["SECCOMP", "LANDLOCK", "PATHS"], [row]));
    Ok(())
}

/// Lists bitmaps, of all nodes or of one, which then has to exist.
pub(super) fn bitmaps(client: &mut Client, disk: Option<&str>, output: &Output) -> Result<(), Failure> {
    let nodes = client.execute("query-named-block-nodes", Value::Null)?;
    if let Some(disk) = disk {
        find(&nodes, disk)?;
    }
    let mut found = Vec::new();
    for node in elements(&nodes) {
        let name = text(node, "node-name");
        if disk.is_some_and(|disk| disk != name) {
            continue;
        }
        for bitmap in elements(&node["dirty-bitmaps"]) {
            let mut bitmap = bitmap.clone();
            if let Some(members) = bitmap.as_object_mut() {
                members.shift_insert(0, "node".into(), json!(name));
            }
            found.push(bitmap);
        }
    }
    let row = |bitmap: &Value| {
        [
            text(bitmap, "node"),
            text(bitmap, "name"),
            bytes(bitmap, "count"),
            bytes(bitmap, "granularity"),
            state(bitmap),
            text(bitmap, "persistent"),
        ]
    };
    let header = ["DISK", "BITMAP", "DIRTY", "GRANULARITY", "STATE", "PERSISTENT"];
    output.result(&json!(found), || table(header, found.iter().map(row)));
    Ok(())
}

fn state(bitmap: &Value) -> String {
    let recording = if bitmap["recording"] == true { "recording" } else { "disabled" };
    let mut states = vec![recording];
    states.extend(["frozen"].into_iter().filter(|_| bitmap["frozen-by"] == "client"));
    states.extend(["busy", "inconsistent"].into_iter().filter(|state| bitmap[state] == true));
    states.join(", ")
}

/// Lists jobs.
pub(super) fn jobs(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let found = client.execute("query-jobs", Value::Null)?;
    let row = |job: &Value| {
        let (done, total) = progress(job);
        let percent = if total == 0 { 0.0 } else { 100.0 * done as f64 / total as f64 };
        [
            text(job, "id"),
            text(job, "type"),
            text(job, "status"),
            format!("{percent:.1} %"),
            size::human(done),
            size::human(total),
            text(job, "error"),
        ]
    };
    let header = ["JOB", "TYPE", "STATUS", "PROGRESS", "DONE", "TOTAL", "ERROR"];
    output.result(&found, || table(header, elements(&found).iter().map(row)));
    Ok(())
}

/// How far a job is, and how far it has to go, in bytes.
pub(super) fn progress(job: &Value) -> (u64, u64) {
    let number = |member: &str| job.get(member).and_then(Value::as_u64).unwrap_or(0);
    (number("current-progress"), number("total-progress"))
}

/// The virtual size of a node.
pub(super) fn node_size(client: &mut Client, name: &str) -> Result<u64, Failure> {
    let nodes = client.execute("query-named-block-nodes", Value::Null)?;
    let node = find(&nodes, name)?;
    node["image"]["virtual-size"].as_u64().ok_or_else(|| Failure::Failed(format!("Node '{name}' tells no size")))
}

/// Whether a node has a bitmap of that name.
pub(super) fn has_bitmap(client: &mut Client, node: &str, bitmap: &str) -> Result<bool, Failure> {
    let nodes = client.execute("query-named-block-nodes", Value::Null)?;
    Ok(elements(&find(&nodes, node)?["dirty-bitmaps"]).iter().any(|found| found["name"] == bitmap))
}

fn find<'a>(nodes: &'a Value, name: &str) -> Result<&'a Value, Failure> {
    let found = elements(nodes).iter().find(|node| node["node-name"] == name);
    // The text that the daemon has for it.
    found.ok_or_else(|| Failure::Failed(format!("Cannot find device='{name}' nor node-name='{name}'")))
}
