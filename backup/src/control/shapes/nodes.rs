//! Nodes that are added, and points in time.

use super::bitmaps::NAMED;
use super::exports::{INET, UNIX};
use crate::control::schema::{Member, Object, Type, object, optional, required};
use Type::{Bool, Int, Str};

pub(in crate::control) static NODE: Object = Object {
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

pub(in crate::control) const DETECT_ZEROES: Type = Type::Enum(&["off", "on", "unmap"]);

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

pub(in crate::control) static RESIZE: Object =
    object(&[&[optional("device", Str), optional("node-name", Str), required("size", Int)]]);

pub(in crate::control) static POINT_ADD: Object =
    object(&[NAMED, &[optional("on-cbw-error", ON_CBW_ERROR), optional("cbw-timeout", Int)]]);

pub(in crate::control) static POINT_REMOVE: Object = object(&[&[required("name", Str)]]);

pub(in crate::control) const ON_CBW_ERROR: Type = Type::Enum(&["break-snapshot", "break-guest-write"]);
