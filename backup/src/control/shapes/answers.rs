//! What is answered of disks, nodes and the process.

use super::nodes::DETECT_ZEROES;
use crate::control::sandbox;
use crate::control::schema::{Object, Type, object, optional, required};
use Type::{Bool, Int, Str};

pub(in crate::control) static VERSION: Object = object(&[&[
    required(
        "qemu",
        Type::Object(&object(&[&[required("major", Int), required("minor", Int), required("micro", Int)]])),
    ),
    required("package", Str),
]]);

const CONFINEMENT: Type = Type::Enum(sandbox::Confinement::NAMES);

pub(in crate::control) static SANDBOX: Object = object(&[&[
    required("seccomp", CONFINEMENT),
    required("landlock", CONFINEMENT),
    required("paths", Type::Enum(&["anywhere", "allowed-paths"])),
]]);

pub(in crate::control) static BLOCK_INFO: Object = object(&[&[
    required("device", Str),
    optional("qdev", Str),
    required("type", Str),
    required("removable", Bool),
    required("locked", Bool),
    optional("inserted", Type::Object(&NODE_INFO)),
]]);

pub(in crate::control) static NODE_INFO: Object = object(&[&[
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
        Type::Object(&object(&[&[
            required("memory", Int),
            required("file", Int),
            required("held-writes", Int),
            required("longest-hold", Int),
            required("longest-save", Int),
        ]])),
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

pub(in crate::control) static SCHEMA_INFO: Object = Object {
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
