//! The NBD server and what it exports.

use super::bitmaps::BITMAPS;
use crate::control::schema::{Object, Type, object, optional, required};
use Type::{Bool, Int, Str};

pub(in crate::control) static SERVER_START: Object = object(&[&[
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

pub(in crate::control) static INET: Object =
    object(&[&[required("host", Str), required("port", Str), optional("keep-alive", Bool)]]);

pub(in crate::control) static UNIX: Object = object(&[&[required("path", Str)]]);

const EXPORT_TYPE: Type = Type::Enum(&["nbd"]);

pub(in crate::control) static EXPORT: Object = Object {
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

pub(in crate::control) static EXPORT_DEL: Object =
    object(&[&[required("id", Str), optional("mode", Type::Enum(&["safe", "hard"]))]]);

pub(in crate::control) static EXPORT_INFO: Object = object(&[&[
    required("id", Str),
    required("type", EXPORT_TYPE),
    required("node-name", Str),
    required("shutting-down", Bool),
]]);

pub(in crate::control) static OBJECT: Object = Object {
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
