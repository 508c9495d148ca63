//! Every command that is served and every event that is sent, each declared once.
//!
//! Not declared, since QMP's schema has no way to say "one of the two", are the spellings of 2015 that are accepted as
//! well: `device` for `node` of a bitmap, `node` for `device` of a backup, a granularity as a decimal string,
//! `dirty-bitmap` for `incremental`; and dotted names of `blockdev-add`.

use super::schema::{EMPTY, Object, Type, object, optional, required};
use super::shapes::answers::{BLOCK_INFO, NODE_INFO, SANDBOX, SCHEMA_INFO, VERSION};
use super::shapes::bitmaps::{
    BITMAP, BITMAP_ADD, BITMAP_FREEZE, BITMAP_MERGE, BITMAP_PAGE, BITMAP_REGIONS, CHANGED_REGIONS, CHANGES, CHECKPOINT,
    CHECKPOINT_DELETE, CHECKPOINT_INFO,
};
use super::shapes::exports::{EXPORT, EXPORT_DEL, EXPORT_INFO, OBJECT, SERVER_START};
use super::shapes::jobs::{
    BLOCK_JOB_INFO, BLOCKDEV_BACKUP, DRIVE_BACKUP, JOB, JOB_CHANGE, JOB_DEVICE, JOB_END, JOB_INFO, JOB_STATUS,
    JOB_TYPE, POPULATE, RETRY, TRANSACTION,
};
use super::shapes::nodes::{NODE, POINT_ADD, POINT_REMOVE, RESIZE};
use super::{
    Control, backup, bitmaps, checkpoints, exports, jobs, nodes, objects, points, populate, queries, resize, sandbox,
    schema, transaction,
};
use crate::qmp::{Arguments, QmpError};
use Type::{Bool, Int, Str};
use serde_json::Value;

pub(super) type Handler = fn(&Control, Arguments) -> Result<Value, QmpError>;

/// One command.
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) handler: Handler,
    pub(super) arguments: &'static Object,
    pub(super) returns: Type,
    pub(super) features: &'static [&'static str],
}

/// A command that answers `{}`.
const fn order(name: &'static str, handler: Handler, arguments: &'static Object) -> Command {
    Command { name, handler, arguments, returns: Type::Object(&EMPTY), features: &[] }
}

/// A command that answers something.
const fn query(name: &'static str, handler: Handler, arguments: &'static Object, returns: Type) -> Command {
    Command { name, handler, arguments, returns, features: &[] }
}

/// All of them, in the order of `query-commands`.
pub(super) static COMMANDS: &[Command] = &[
    order("block-dirty-bitmap-abdicate", bitmaps::abdicate, &BITMAP_FREEZE),
    order("block-dirty-bitmap-add", bitmaps::add, &BITMAP_ADD),
    order("block-dirty-bitmap-clear", bitmaps::clear, &BITMAP),
    order("block-dirty-bitmap-create-successor", bitmaps::create_successor, &BITMAP),
    order("block-dirty-bitmap-disable", bitmaps::disable, &BITMAP),
    order("block-dirty-bitmap-enable", bitmaps::enable, &BITMAP),
    order("block-dirty-bitmap-merge", bitmaps::merge, &BITMAP_MERGE),
    order("block-dirty-bitmap-populate", populate::populate, &POPULATE),
    order("block-dirty-bitmap-reclaim", bitmaps::reclaim, &BITMAP_FREEZE),
    order("block-dirty-bitmap-remove", bitmaps::remove, &BITMAP),
    order("block-export-add", exports::add, &EXPORT),
    order("block-export-del", exports::delete, &EXPORT_DEL),
    order("block-job-cancel", jobs::block_cancel, &object(&[JOB_DEVICE, &[optional("force", Bool)]])),
    order("block-job-change", jobs::block_change, &JOB_CHANGE),
    order("block-job-complete", jobs::block_complete, &object(&[JOB_DEVICE])),
    order("block-job-dismiss", jobs::block_dismiss, &JOB),
    order("block-job-finalize", jobs::block_finalize, &JOB),
    order("block-job-pause", jobs::block_pause, &object(&[JOB_DEVICE])),
    order("block-job-resume", jobs::block_resume, &object(&[JOB_DEVICE])),
    order("block-job-set-speed", jobs::block_set_speed, &object(&[JOB_DEVICE, &[required("speed", Int)]])),
    order("block_resize", resize::block_resize, &RESIZE),
    order("blockdev-add", nodes::add, &NODE),
    order("blockdev-backup", backup::blockdev_backup, &BLOCKDEV_BACKUP),
    order("blockdev-del", nodes::delete, &object(&[&[required("node-name", Str)]])),
    order("checkpoint-create", checkpoints::add, &CHECKPOINT),
    order("checkpoint-delete", checkpoints::delete, &CHECKPOINT_DELETE),
    order("drive-backup", backup::drive_backup, &DRIVE_BACKUP),
    order("job-cancel", jobs::cancel, &JOB),
    order("job-complete", jobs::complete, &JOB),
    order("job-dismiss", jobs::dismiss, &JOB),
    order("job-finalize", jobs::finalize, &JOB),
    order("job-pause", jobs::pause, &JOB),
    order("job-resume", jobs::resume, &JOB),
    order("job-retry", backup::retry, &RETRY),
    order("nbd-server-start", exports::start, &SERVER_START),
    order("nbd-server-stop", exports::stop, &EMPTY),
    order("object-add", objects::add, &OBJECT),
    order("object-del", objects::delete, &object(&[&[required("id", Str)]])),
    order("point-add", points::add, &POINT_ADD),
    order("point-remove", points::remove, &POINT_REMOVE),
    query("query-block", queries::block, &EMPTY, Type::Array(&Type::Object(&BLOCK_INFO))),
    query("query-block-dirty-bitmap", bitmaps::query, &BITMAP_PAGE, Type::Object(&BITMAP_REGIONS)),
    query("query-block-exports", exports::query, &EMPTY, Type::Array(&Type::Object(&EXPORT_INFO))),
    query("query-block-jobs", jobs::query_block, &EMPTY, Type::Array(&Type::Object(&BLOCK_JOB_INFO))),
    query("query-changes", checkpoints::changes, &CHANGES, Type::Object(&CHANGED_REGIONS)),
    query("query-checkpoints", checkpoints::query, &EMPTY, Type::Array(&Type::Object(&CHECKPOINT_INFO))),
    query(
        "query-commands",
        queries::commands,
        &EMPTY,
        Type::Array(&Type::Object(&object(&[&[required("name", Str)]]))),
    ),
    query("query-jobs", jobs::query, &EMPTY, Type::Array(&Type::Object(&JOB_INFO))),
    query(
        "query-named-block-nodes",
        queries::named_block_nodes,
        &object(&[&[optional("flat", Bool)]]),
        Type::Array(&Type::Object(&NODE_INFO)),
    ),
    query("query-qmp-schema", schema::query, &EMPTY, Type::Array(&Type::Object(&SCHEMA_INFO))),
    query("query-sandbox", sandbox::query, &EMPTY, Type::Object(&SANDBOX)),
    query("query-version", queries::version, &EMPTY, Type::Object(&VERSION)),
    order("quit", queries::quit, &EMPTY),
    order("transaction", transaction::transaction, &TRANSACTION),
    Command {
        features: &["unstable"],
        ..query(
            "x-debug-block-dirty-bitmap-sha256",
            bitmaps::sha256,
            &BITMAP,
            Type::Object(&object(&[&[required("sha256", Str)]])),
        )
    },
];

/// What the session answers itself, before anybody else is asked.
pub(super) static NEGOTIATION: Command = order(
    "qmp_capabilities",
    |_, _| unreachable!("the session takes it"),
    &object(&[&[optional("enable", Type::Array(&Type::Enum(&["oob"])))]]),
);

/// Every event and its data.
pub(super) static EVENTS: &[(&str, &Object)] = &[
    ("BLOCK_EXPORT_DELETED", &object(&[&[required("id", Str)]])),
    ("BLOCK_JOB_CANCELLED", &object(&[JOB_END])),
    ("BLOCK_JOB_COMPLETED", &object(&[JOB_END, &[optional("error", Str)]])),
    (
        "BLOCK_JOB_ERROR",
        &object(&[&[
            required("device", Str),
            required("operation", Type::Enum(&["read", "write"])),
            required("action", Type::Enum(&["ignore", "report", "stop"])),
        ]]),
    ),
    ("BLOCK_JOB_PENDING", &object(&[&[required("type", JOB_TYPE), required("id", Str)]])),
    ("JOB_STATUS_CHANGE", &object(&[&[required("id", Str), required("status", JOB_STATUS)]])),
    (
        "SHUTDOWN",
        &object(&[&[required("guest", Bool), required("reason", Type::Enum(&["host-qmp-quit", "host-signal"]))]]),
    ),
];
