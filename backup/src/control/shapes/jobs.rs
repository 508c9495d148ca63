//! Jobs: backups, comparisons, transactions of them.

use super::bitmaps::{BITMAP, BITMAP_ADD, BITMAP_FREEZE, BITMAP_MERGE, CHECKPOINT, CHECKPOINT_DELETE, NAMED};
use super::nodes::{ON_CBW_ERROR, POINT_ADD, POINT_REMOVE};
use crate::control::schema::{EMPTY, Member, Object, Type, object, optional, required};
use Type::{Bool, Int, Str};

pub(in crate::control) static JOB: Object = object(&[&[required("id", Str)]]);

pub(in crate::control) const JOB_DEVICE: &[Member] = &[required("device", Str)];

pub(in crate::control) const JOB_TYPE: Type = Type::Enum(&["backup", "bitmap-populate"]);

pub(in crate::control) static JOB_CHANGE: Object =
    object(&[&[required("id", Str), required("type", JOB_TYPE), required("max-guest-latency", Int)]]);

pub(in crate::control) const JOB_STATUS: Type = Type::Enum(&[
    "undefined",
    "created",
    "running",
    "paused",
    "ready",
    "standby",
    "waiting",
    "pending",
    "aborting",
    "concluded",
    "null",
]);

pub(in crate::control) const JOB_END: &[Member] = &[
    required("type", JOB_TYPE),
    required("device", Str),
    required("len", Int),
    required("offset", Int),
    required("speed", Int),
];

pub(in crate::control) static JOB_INFO: Object = object(&[&[
    required("id", Str),
    required("type", JOB_TYPE),
    required("status", JOB_STATUS),
    required("current-progress", Int),
    required("total-progress", Int),
    optional("error", Str),
    optional("kept", Bool),
]]);

pub(in crate::control) static BLOCK_JOB_INFO: Object = object(&[
    JOB_END,
    &[
        required("busy", Bool),
        required("paused", Bool),
        required("max-guest-latency", Int),
        required("io-status", Type::Enum(&["ok", "failed", "nospace"])),
        required("ready", Bool),
        required("status", JOB_STATUS),
        required("auto-finalize", Bool),
        required("auto-dismiss", Bool),
        optional("error", Str),
    ],
]);

const ON_ERROR: Type = Type::Enum(&["report", "ignore", "enospc", "stop", "auto"]);

const BACKUP: &[Member] = &[
    optional("job-id", Str),
    required("device", Str),
    required("sync", Type::Enum(&["top", "full", "none", "incremental", "bitmap"])),
    optional("speed", Int),
    optional("bitmap", Str),
    optional("bitmap-mode", Type::Enum(&["on-success", "never", "always"])),
    optional("compress", Bool),
    optional("on-source-error", ON_ERROR),
    optional("on-target-error", ON_ERROR),
    optional("auto-finalize", Bool),
    optional("auto-dismiss", Bool),
    optional("filter-node-name", Str),
    optional("discard-source", Bool),
    Member { features: &["unstable"], ..optional("x-perf", Type::Object(&PERF)) },
    optional("on-failure", Type::Enum(&["reclaim", "keep"])),
    optional("on-cbw-error", ON_CBW_ERROR),
    optional("cbw-timeout", Int),
    optional("max-guest-latency", Int),
];

static PERF: Object = object(&[&[
    optional("use-copy-range", Bool),
    optional("max-workers", Int),
    optional("max-chunk", Int),
    optional("min-cluster-size", Int),
]]);

pub(in crate::control) static BLOCKDEV_BACKUP: Object = object(&[BACKUP, &[required("target", Str)]]);

pub(in crate::control) static DRIVE_BACKUP: Object = object(&[BACKUP, &[required("target", Str)], PATH]);

const PATH: &[Member] = &[optional("format", Str), optional("mode", Type::Enum(&["existing", "absolute-paths"]))];

pub(in crate::control) static RETRY: Object = object(&[
    &[required("id", Str), optional("target-node", Str), optional("target", Str), optional("compress", Bool)],
    PATH,
]);

pub(in crate::control) static POPULATE: Object = object(&[
    NAMED,
    &[
        optional("job-id", Str),
        required("pattern", Type::Enum(&["allocation-top", "all", "diff"])),
        optional("mode", Type::Enum(&["overwrite", "union", "difference"])),
        optional("image", Str),
        optional("format", Str),
        optional("image-node", Str),
        optional("speed", Int),
        optional("on-error", ON_ERROR),
        optional("on-source-error", ON_ERROR),
        optional("on-target-error", ON_ERROR),
        optional("auto-finalize", Bool),
        optional("auto-dismiss", Bool),
        optional("max-guest-latency", Int),
    ],
]);

pub(in crate::control) static TRANSACTION: Object = object(&[&[
    required("actions", Type::Array(&Type::Object(&ACTION))),
    optional("properties", Type::Object(&PROPERTIES)),
]]);

static PROPERTIES: Object = object(&[&[optional("completion-mode", Type::Enum(&["individual", "grouped"]))]]);

static ACTION: Object = Object {
    members: &[&[required(
        "type",
        Type::Enum(&[
            "abort",
            "block-dirty-bitmap-add",
            "block-dirty-bitmap-remove",
            "block-dirty-bitmap-clear",
            "block-dirty-bitmap-enable",
            "block-dirty-bitmap-disable",
            "block-dirty-bitmap-merge",
            "block-dirty-bitmap-populate",
            "block-dirty-bitmap-create-successor",
            "block-dirty-bitmap-abdicate",
            "block-dirty-bitmap-reclaim",
            "checkpoint-create",
            "checkpoint-delete",
            "point-add",
            "point-remove",
            "blockdev-backup",
            "drive-backup",
        ]),
    )]],
    union: Some((
        "type",
        &[
            ("abort", &object(&[&[required("data", Type::Object(&EMPTY))]])),
            ("block-dirty-bitmap-add", &object(&[&[required("data", Type::Object(&BITMAP_ADD))]])),
            ("block-dirty-bitmap-remove", &ON_BITMAP),
            ("block-dirty-bitmap-clear", &ON_BITMAP),
            ("block-dirty-bitmap-enable", &ON_BITMAP),
            ("block-dirty-bitmap-disable", &ON_BITMAP),
            ("block-dirty-bitmap-merge", &object(&[&[required("data", Type::Object(&BITMAP_MERGE))]])),
            ("block-dirty-bitmap-populate", &object(&[&[required("data", Type::Object(&POPULATE))]])),
            ("block-dirty-bitmap-create-successor", &ON_BITMAP),
            ("block-dirty-bitmap-abdicate", &ON_FREEZE),
            ("block-dirty-bitmap-reclaim", &ON_FREEZE),
            ("checkpoint-create", &object(&[&[required("data", Type::Object(&CHECKPOINT))]])),
            ("checkpoint-delete", &object(&[&[required("data", Type::Object(&CHECKPOINT_DELETE))]])),
            ("point-add", &object(&[&[required("data", Type::Object(&POINT_ADD))]])),
            ("point-remove", &object(&[&[required("data", Type::Object(&POINT_REMOVE))]])),
            ("blockdev-backup", &object(&[&[required("data", Type::Object(&BLOCKDEV_BACKUP))]])),
            ("drive-backup", &object(&[&[required("data", Type::Object(&DRIVE_BACKUP))]])),
        ],
    )),
};

static ON_FREEZE: Object = object(&[&[required("data", Type::Object(&BITMAP_FREEZE))]]);

static ON_BITMAP: Object = object(&[&[required("data", Type::Object(&BITMAP))]]);
