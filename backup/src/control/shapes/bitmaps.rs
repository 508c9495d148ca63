//! Bitmaps, their bits in pages, checkpoints.

use crate::control::schema::{Member, Object, Type, object, optional, required};
use Type::{Bool, Int, Str};

pub(in crate::control) const NAMED: &[Member] = &[required("node", Str), required("name", Str)];

pub(in crate::control) static BITMAP: Object = object(&[NAMED]);

pub(in crate::control) static BITMAP_ADD: Object =
    object(&[NAMED, &[optional("granularity", Int), optional("persistent", Bool), optional("disabled", Bool)]]);

pub(in crate::control) const BITMAPS: Type = Type::Array(&Type::Alternate(&BITMAP_OR_NAME));

static BITMAP_OR_NAME: [Type; 2] = [Str, Type::Object(&BITMAP)];

pub(in crate::control) static BITMAP_MERGE: Object =
    object(&[&[required("node", Str), required("target", Str), required("bitmaps", BITMAPS)]]);

pub(in crate::control) static BITMAP_FREEZE: Object = object(&[NAMED, &[optional("freeze-id", Str)]]);

const PAGE: &[Member] = &[optional("offset", Int), optional("limit", Int)];

const REGIONS: &[Member] = &[
    required("size", Int),
    required("granularity", Int),
    required("count", Int),
    required("dirty-regions", Type::Array(&REGION)),
    optional("next-offset", Int),
];

static REGION: Type = Type::Object(&object(&[&[required("start", Int), required("count", Int)]]));

pub(in crate::control) static BITMAP_PAGE: Object = object(&[NAMED, PAGE]);

pub(in crate::control) static BITMAP_REGIONS: Object =
    object(&[NAMED, &[required("recording", Bool), required("busy", Bool), optional("freeze-id", Str)], REGIONS]);

pub(in crate::control) static CHECKPOINT: Object =
    object(&[&[required("name", Str), optional("nodes", Type::Array(&Str)), optional("granularity", Int)]]);

pub(in crate::control) static CHECKPOINT_DELETE: Object = object(&[&[required("name", Str)]]);

pub(in crate::control) static CHANGES: Object =
    object(&[&[required("node", Str), required("from", Str), optional("to", Str)], PAGE]);

pub(in crate::control) static CHANGED_REGIONS: Object =
    object(&[&[required("node", Str), required("from", Str), optional("to", Str)], REGIONS]);

pub(in crate::control) static CHECKPOINT_INFO: Object = object(&[&[
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
