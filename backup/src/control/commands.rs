//! Every command that is served and every event that is sent, each declared once.
//!
//! Not declared, since QMP's schema has no way to say "one of the two", are the spellings of 2015 that are accepted as
//! well: `device` for `node` of a bitmap, `node` for `device` of a backup, a granularity as a decimal string,
//! `dirty-bitmap` for `incremental`; and dotted names of `blockdev-add`.

use super::schema::{EMPTY, Member, Object, Type, object, optional, required};
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
    Command { name, handler, arguments, returns: NOTHING, features: &[] }
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

const NOTHING: Type = Type::Object(&EMPTY);

// ---- bitmaps

const NAMED: &[Member] = &[required("node", Str), required("name", Str)];

static BITMAP: Object = object(&[NAMED]);

static BITMAP_ADD: Object =
    object(&[NAMED, &[optional("granularity", Int), optional("persistent", Bool), optional("disabled", Bool)]]);

const BITMAPS: Type = Type::Array(&Type::Alternate(&BITMAP_OR_NAME));

static BITMAP_OR_NAME: [Type; 2] = [Str, Type::Object(&BITMAP)];

static BITMAP_MERGE: Object =
    object(&[&[required("node", Str), required("target", Str), required("bitmaps", BITMAPS)]]);

static BITMAP_FREEZE: Object = object(&[NAMED, &[optional("freeze-id", Str)]]);

// ---- bits in pages

const PAGE: &[Member] = &[optional("offset", Int), optional("limit", Int)];

const REGIONS: &[Member] = &[
    required("size", Int),
    required("granularity", Int),
    required("count", Int),
    required("dirty-regions", Type::Array(&REGION)),
    optional("next-offset", Int),
];

static REGION: Type = Type::Object(&object(&[&[required("start", Int), required("count", Int)]]));

static BITMAP_PAGE: Object = object(&[NAMED, PAGE]);

static BITMAP_REGIONS: Object =
    object(&[NAMED, &[required("recording", Bool), required("busy", Bool), optional("freeze-id", Str)], REGIONS]);

// ---- checkpoints

static CHECKPOINT: Object =
    object(&[&[required("name", Str), optional("nodes", Type::Array(&Str)), optional("granularity", Int)]]);

static CHECKPOINT_DELETE: Object = object(&[&[required("name", Str)]]);

static CHANGES: Object = object(&[&[required("node", Str), required("from", Str), optional("to", Str)], PAGE]);

static CHANGED_REGIONS: Object =
    object(&[&[required("node", Str), required("from", Str), optional("to", Str)], REGIONS]);

static CHECKPOINT_INFO: Object = object(&[&[
    required("name", Str),
    required("id", Str),
    required("created", Type::Object(&object(&[&[required("seconds", Int), required("microseconds", Int)]]))),
    required(
        "nodes",
        Type::Array(&Type::Object(&object(&[&[
            required("node", Str),
            required("size", Int),
            required("granularity", Int),
        ]]))),
    ),
]]);

// ---- points in time

static POINT_ADD: Object = object(&[NAMED, &[optional("on-cbw-error", ON_CBW_ERROR), optional("cbw-timeout", Int)]]);

static POINT_REMOVE: Object = object(&[&[required("name", Str)]]);

const ON_CBW_ERROR: Type = Type::Enum(&["break-snapshot", "break-guest-write"]);

// ---- jobs

static JOB: Object = object(&[&[required("id", Str)]]);

const JOB_DEVICE: &[Member] = &[required("device", Str)];

const JOB_TYPE: Type = Type::Enum(&["backup", "bitmap-populate"]);

static JOB_CHANGE: Object =
    object(&[&[required("id", Str), required("type", JOB_TYPE), required("max-guest-latency", Int)]]);

const JOB_STATUS: Type = Type::Enum(&[
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

const JOB_END: &[Member] = &[
    required("type", JOB_TYPE),
    required("device", Str),
    required("len", Int),
    required("offset", Int),
    required("speed", Int),
];

static JOB_INFO: Object = object(&[&[
    required("id", Str),
    required("type", JOB_TYPE),
    required("status", JOB_STATUS),
    required("current-progress", Int),
    required("total-progress", Int),
    optional("error", Str),
    optional("kept", Bool),
]]);

static BLOCK_JOB_INFO: Object = object(&[
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

// ---- backups

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

static BLOCKDEV_BACKUP: Object = object(&[BACKUP, &[required("target", Str)]]);

static DRIVE_BACKUP: Object = object(&[BACKUP, &[required("target", Str)], PATH]);

const PATH: &[Member] = &[optional("format", Str), optional("mode", Type::Enum(&["existing", "absolute-paths"]))];

static RETRY: Object = object(&[
    &[required("id", Str), optional("target-node", Str), optional("target", Str), optional("compress", Bool)],
    PATH,
]);

// ---- populate

static POPULATE: Object = object(&[
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

// ---- transactions

static TRANSACTION: Object = object(&[&[
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
            ("abort", &object(&[&[required("data", NOTHING)]])),
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

// ---- nodes

static NODE: Object = Object {
    members: &[&[
        required("driver", Type::Enum(&["file", "host_device", "raw", "qcow2", "nbd"])),
        optional("node-name", Str),
        optional("discard", Type::Enum(&["ignore", "unmap"])),
        optional("cache", Type::Object(&object(&[&[optional("direct", Bool), optional("no-flush", Bool)]]))),
        optional("read-only", Bool),
        optional("auto-read-only", Bool),
        optional("force-share", Bool),
        optional("detect-zeroes", DETECT_ZEROES),
    ]],
    union: Some((
        "driver",
        &[
            ("file", &FILE),
            ("host_device", &FILE),
            ("raw", &object(&[&BELOW])),
            ("qcow2", &object(&[&BELOW, QCOW2])),
            ("nbd", &NBD),
        ],
    )),
};

const DETECT_ZEROES: Type = Type::Enum(&["off", "on", "unmap"]);

static FILE: Object = object(&[&[
    required("filename", Str),
    optional("locking", Type::Enum(&["auto", "on", "off"])),
    optional("aio", Type::Enum(&["threads", "native", "io_uring"])),
    optional("aio-max-batch", Int),
    optional("drop-cache", Bool),
]]);

static NODE_OR_NAME: [Type; 2] = [Type::Object(&NODE), Str];

static BELOW: [Member; 1] = [required("file", Type::Alternate(&NODE_OR_NAME))];

const QCOW2: &[Member] = &[
    optional("lazy-refcounts", Bool),
    optional("pass-discard-request", Bool),
    optional("pass-discard-snapshot", Bool),
    optional("pass-discard-other", Bool),
    optional("cache-size", Int),
    optional("l2-cache-size", Int),
    optional("l2-cache-entry-size", Int),
    optional("refcount-cache-size", Int),
    optional("cache-clean-interval", Int),
];

static NBD: Object = object(&[&[
    required("server", Type::Object(&SERVER)),
    optional("export", Str),
    optional("reconnect-delay", Int),
    optional("open-timeout", Int),
]]);

static SERVER: Object = Object {
    members: &[&[required("type", Type::Enum(&["inet", "unix"]))]],
    union: Some(("type", &[("inet", &INET), ("unix", &UNIX)])),
};

static RESIZE: Object = object(&[&[optional("device", Str), optional("node-name", Str), required("size", Int)]]);

// ---- exports

static SERVER_START: Object = object(&[&[
    optional("handshake-max-seconds", Int),
    optional("tls-creds", Str),
    optional("max-connections", Int),
    required("addr", Type::Object(&LISTEN)),
]]);

static LISTEN: Object = Object {
    members: &[&[required("type", Type::Enum(&["inet", "unix"]))]],
    union: Some((
        "type",
        &[
            ("inet", &object(&[&[required("data", Type::Object(&INET))]])),
            ("unix", &object(&[&[required("data", Type::Object(&UNIX))]])),
        ],
    )),
};

static INET: Object = object(&[&[required("host", Str), required("port", Str), optional("keep-alive", Bool)]]);

static UNIX: Object = object(&[&[required("path", Str)]]);

const EXPORT_TYPE: Type = Type::Enum(&["nbd"]);

static EXPORT: Object = Object {
    members: &[&[
        required("type", EXPORT_TYPE),
        required("id", Str),
        optional("fixed-iothread", Bool),
        optional("iothread", Str),
        required("node-name", Str),
        optional("writable", Bool),
        optional("writethrough", Bool),
        optional("allow-inactive", Bool),
    ]],
    union: Some((
        "type",
        &[(
            "nbd",
            &object(&[&[
                optional("name", Str),
                optional("description", Str),
                optional("bitmaps", BITMAPS),
                optional("allocation-depth", Bool),
            ]]),
        )],
    )),
};

static EXPORT_DEL: Object = object(&[&[required("id", Str), optional("mode", Type::Enum(&["safe", "hard"]))]]);

static EXPORT_INFO: Object = object(&[&[
    required("id", Str),
    required("type", EXPORT_TYPE),
    required("node-name", Str),
    required("shutting-down", Bool),
]]);

static OBJECT: Object = Object {
    members: &[&[required("qom-type", Type::Enum(&["tls-creds-x509"])), required("id", Str)]],
    union: Some((
        "qom-type",
        &[(
            "tls-creds-x509",
            &object(&[&[
                optional("verify-peer", Bool),
                optional("dir", Str),
                optional("endpoint", Type::Enum(&["client", "server"])),
            ]]),
        )],
    )),
};

// ---- answers

static VERSION: Object = object(&[&[
    required(
        "qemu",
        Type::Object(&object(&[&[required("major", Int), required("minor", Int), required("micro", Int)]])),
    ),
    required("package", Str),
]]);

const CONFINEMENT: Type = Type::Enum(sandbox::Confinement::NAMES);

static SANDBOX: Object = object(&[&[
    required("seccomp", CONFINEMENT),
    required("landlock", CONFINEMENT),
    required("paths", Type::Enum(&["anywhere", "allowed-paths"])),
]]);

static BLOCK_INFO: Object = object(&[&[
    required("device", Str),
    optional("qdev", Str),
    required("type", Str),
    required("removable", Bool),
    required("locked", Bool),
    optional("inserted", Type::Object(&NODE_INFO)),
]]);

static NODE_INFO: Object = object(&[&[
    required("file", Str),
    optional("node-name", Str),
    required("ro", Bool),
    required("drv", Str),
    required("backing_file_depth", Int),
    required("active", Bool),
    required("encrypted", Bool),
    required("detect_zeroes", DETECT_ZEROES),
    required("bps", Int),
    required("bps_rd", Int),
    required("bps_wr", Int),
    required("iops", Int),
    required("iops_rd", Int),
    required("iops_wr", Int),
    required("image", Type::Object(&IMAGE_INFO)),
    required(
        "cache",
        Type::Object(&object(&[&[required("writeback", Bool), required("direct", Bool), required("no-flush", Bool)]])),
    ),
    required("write_threshold", Int),
    optional("dirty-bitmaps", Type::Array(&Type::Object(&BITMAP_INFO))),
    optional(
        "scratch",
        Type::Object(&object(&[&[required("memory", Int), required("file", Int), required("held-writes", Int)]])),
    ),
    optional("point", Type::Object(&POINT_INFO)),
]]);

static POINT_INFO: Object = object(&[&[
    required("node", Str),
    required("state", Type::Enum(&["whole", "broken"])),
    required("overwritten", Int),
    required("scratch", Int),
    required("readers", Int),
    optional("error", Str),
]]);

static IMAGE_INFO: Object = object(&[&[
    required("filename", Str),
    required("format", Str),
    optional("dirty-flag", Bool),
    optional("actual-size", Int),
    required("virtual-size", Int),
]]);

static BITMAP_INFO: Object = object(&[&[
    optional("name", Str),
    required("count", Int),
    required("granularity", Int),
    required("recording", Bool),
    required("busy", Bool),
    required("persistent", Bool),
    optional("inconsistent", Bool),
    required("frozen", Bool),
    optional("freeze-id", Str),
    optional("frozen-by", Type::Enum(&["client", "job"])),
]]);

static SCHEMA_INFO: Object = Object {
    members: &[&[
        required("name", Str),
        required("meta-type", Type::Enum(&["builtin", "enum", "array", "object", "alternate", "command", "event"])),
        optional("features", Type::Array(&Str)),
    ]],
    union: Some((
        "meta-type",
        &[
            (
                "builtin",
                &object(&[&[required(
                    "json-type",
                    Type::Enum(&["string", "number", "int", "boolean", "null", "object", "array", "value"]),
                )]]),
            ),
            (
                "enum",
                &object(&[&[
                    required("members", Type::Array(&Type::Object(&object(&[&[required("name", Str)]])))),
                    required("values", Type::Array(&Str)),
                ]]),
            ),
            ("array", &object(&[&[required("element-type", Str)]])),
            (
                "object",
                &object(&[&[
                    required("members", Type::Array(&Type::Object(&SCHEMA_MEMBER))),
                    optional("tag", Str),
                    optional("variants", Type::Array(&Type::Object(&SCHEMA_VARIANT))),
                ]]),
            ),
            (
                "alternate",
                &object(&[&[required("members", Type::Array(&Type::Object(&object(&[&[required("type", Str)]]))))]]),
            ),
            ("command", &object(&[&[required("arg-type", Str), required("ret-type", Str)]])),
            ("event", &object(&[&[required("arg-type", Str)]])),
        ],
    )),
};

/// `default` is always null: it only tells that the member is optional.
static SCHEMA_MEMBER: Object = object(&[&[
    required("name", Str),
    required("type", Str),
    optional("default", Type::Any),
    optional("features", Type::Array(&Str)),
]]);

static SCHEMA_VARIANT: Object = object(&[&[required("case", Str), required("type", Str)]]);
