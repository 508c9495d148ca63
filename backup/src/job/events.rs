//! What the world is told of a job, member for member as QEMU does it.

use super::entry::Entry;
use super::policy::Reaction;
use super::state::Status;
use super::work::Kind;
use crate::copy::Side;
use crate::qmp::Events;
use serde_json::{Value, json};

pub(super) fn status(events: &Events, id: &str, status: Status) {
    events.emit("JOB_STATUS_CHANGE", json!({ "status": status.name(), "id": id }));
}

fn end(entry: &Entry) -> serde_json::Map<String, Value> {
    let (offset, len) = entry.progress();
    let mut data = serde_json::Map::new();
    data.insert("device".into(), entry.id().into());
    data.insert("len".into(), len.into());
    data.insert("offset".into(), offset.into());
    data.insert("speed".into(), entry.speed.into());
    data.insert("type".into(), entry.kind.name().into());
    data
}

pub(super) fn completed(events: &Events, entry: &Entry) {
    let mut data = end(entry);
    if let Some(error) = &entry.error {
        data.insert("error".into(), error.clone().into());
    }
    events.emit("BLOCK_JOB_COMPLETED", data.into());
}

pub(super) fn cancelled(events: &Events, entry: &Entry) {
    events.emit("BLOCK_JOB_CANCELLED", end(entry).into());
}

pub(super) fn pending(events: &Events, entry: &Entry) {
    events.emit("BLOCK_JOB_PENDING", json!({ "type": entry.kind.name(), "id": entry.id() }));
}

pub(super) fn error(events: &Events, entry: &Entry, side: Side, reaction: Reaction) {
    let operation = match (entry.kind, side) {
        (Kind::Backup, Side::Target) => "write",
        // A populate reads both.
        (Kind::Backup | Kind::Populate, _) => "read",
    };
    let data = json!({ "device": entry.id(), "operation": operation, "action": reaction.name() });
    events.emit("BLOCK_JOB_ERROR", data);
}
