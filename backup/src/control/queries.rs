//! What can be asked without changing anything, and `quit`.

use super::commands::{COMMANDS, NEGOTIATION};
use super::nodes::TargetNode;
use super::points::PointNode;
use super::{Control, done};
use crate::node::Node;
use crate::qmp::{Arguments, QmpError, version as qmp_version};
use blkmark_bitmap::{BitmapInfo, Owner};
use serde_json::{Map, Value, json};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

type Answer = Result<Value, QmpError>;

pub(super) fn version(_: &Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(qmp_version())
}

pub(super) fn commands(_: &Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(COMMANDS.iter().chain([&NEGOTIATION]).map(|command| json!({ "name": command.name })).collect())
}

/// Tells that the daemon is about to end, and has it end. The reply is on its way when the socket closes.
pub(super) fn quit(control: &Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    control.events.emit("SHUTDOWN", json!({ "guest": false, "reason": "host-qmp-quit" }));
    (control.settings.on_quit)();
    done()
}

pub(super) fn block(control: &Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    let shown = control.disks.iter().map(|disk| {
        json!({
            "device": disk.id,
            "qdev": disk.id,
            "type": "unknown",
            "removable": false,
            "locked": false,
            "inserted": disk_info(disk),
        })
    });
    Ok(shown.collect())
}

pub(super) fn named_block_nodes(control: &Control, mut arguments: Arguments) -> Answer {
    arguments.opt_bool("flat")?;
    arguments.finish()?;
    let targets: Vec<_> = control.targets().clone();
    let targets = targets.iter().filter(|node| !node.name.is_empty()).map(|node| target_info(node));
    let points = control.points.list();
    let points = points.iter().map(|node| point_info(node));
    Ok(control.disks.iter().map(|disk| disk_info(disk)).chain(points).chain(targets).collect())
}

/// The driver is called as in QEMU: what gives a disk as of an instant.
fn point_info(node: &PointNode) -> Value {
    let mut info = node_info(&node.name, "snapshot-access", &node.disk.path, true, Some(node.point.size()));
    info.insert("point".into(), node.info());
    info.into()
}

fn disk_info(disk: &Node) -> Value {
    let mut info = node_info(&disk.id, "raw", &disk.path, disk.read_only, Some(disk.tracker.size()));
    // The newest first, as in QEMU.
    info.insert("dirty-bitmaps".into(), disk.tracker.list().iter().rev().map(bitmap_info).collect());
    let load = disk.load();
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    let scratch = json!({
        "memory": load.memory, "file": load.file, "held-writes": load.held,
        "longest-hold": micros(load.longest_hold), "longest-save": micros(load.longest_save),
    });
    info.insert("scratch".into(), scratch);
    info.into()
}

fn target_info(node: &TargetNode) -> Value {
    node_info(&node.name, node.driver.name(), &node.path, node.read_only, node.size()).into()
}

/// Of a file that another node has open: where it ends.
fn end_of(path: &Path) -> u64 {
    std::fs::File::open(path).and_then(|mut file| file.seek(SeekFrom::End(0))).unwrap_or(0)
}

/// The members of QEMU's BlockDeviceInfo. There are no I/O limits yet, so all of those are 0.
fn node_info(name: &str, driver: &str, path: &Path, read_only: bool, size: Option<u64>) -> Map<String, Value> {
    let file = path.display().to_string();
    let mut image = Map::new();
    image.insert("filename".into(), file.clone().into());
    image.insert("format".into(), driver.into());
    image.insert("dirty-flag".into(), false.into());
    image.insert("virtual-size".into(), size.unwrap_or_else(|| end_of(path)).into());
    if let Ok(metadata) = std::fs::metadata(path) {
        image.insert("actual-size".into(), (metadata.blocks() * 512).into());
    }
    let info = json!({
        "node-name": name,
        "drv": driver,
        "file": file,
        "ro": read_only,
        "encrypted": false,
        "active": true,
        "backing_file_depth": 0,
        "detect_zeroes": "off",
        "write_threshold": 0,
        "bps": 0, "bps_rd": 0, "bps_wr": 0,
        "iops": 0, "iops_rd": 0, "iops_wr": 0,
        "cache": { "writeback": true, "direct": false, "no-flush": false },
        "image": image,
    });
    let Value::Object(info) = info else { unreachable!("made as an object") };
    info
}

/// QEMU's members, and those of the first series: `frozen`, here with the id of the freeze.
fn bitmap_info(bitmap: &BitmapInfo) -> Value {
    let mut info = json!({
        "name": bitmap.name,
        "count": bitmap.count,
        "granularity": bitmap.granularity.bytes(),
        "recording": bitmap.recording,
        "busy": bitmap.busy,
        "persistent": bitmap.persistent,
        "frozen": bitmap.frozen.is_some(),
    });
    if bitmap.inconsistent {
        info["inconsistent"] = true.into();
    }
    if let Some(freeze) = bitmap.frozen {
        info["freeze-id"] = freeze.to_string().into();
        info["frozen-by"] = if bitmap.owner == Some(Owner::Client) { "client" } else { "job" }.into();
    }
    info
}
