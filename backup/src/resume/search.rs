//! What a populate notes in its slip, so that the process that comes after a kill searches anew over the same freeze.
//!
//! Nothing of what was found so far is in it: a search sees the disk as it is, and the store keeps what was written since the freeze.

use super::note::{
    MASKS, file, group, name_of, named, opt, path, settings, string, to_file, to_group, to_path, to_settings, uuid,
};
use crate::job::{Older, Settings};
use crate::source::FileId;
use blkmark_bitmap::Mask;
use serde_json::{Value, json};
use uuid::Uuid;

/// What is looked for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Sought {
    /// Every block.
    All,
    /// Blocks that the disk itself holds.
    Allocated,
    /// Blocks in which the disk differs from this.
    Differing(Older),
}

/// A populate, alone or of a group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Search {
    pub(crate) disk: FileId,
    /// The run of the disk's store, where there is one.
    pub(crate) run: Option<Uuid>,
    pub(crate) settings: Settings,
    pub(crate) paused: bool,
    pub(crate) bitmap: String,
    pub(crate) freeze: Uuid,
    pub(crate) sought: Sought,
    pub(crate) mask: Mask,
    /// The group, and how many belong to it.
    pub(crate) group: Option<(Uuid, usize)>,
}

impl Search {
    pub(super) fn encode(&self) -> Value {
        let mut value = json!({
            "disk": file(self.disk),
            "run": self.run.map(|run| run.to_string()),
            "paused": self.paused,
            "bitmap": self.bitmap,
            "freeze": self.freeze.to_string(),
            "pattern": self.sought.encode(),
            "mode": name_of(MASKS, self.mask),
            "group": self.group.map(group),
        });
        if let Some(members) = value.as_object_mut() {
            members.extend(settings(&self.settings));
        }
        value
    }

    pub(super) fn decode(value: &Value) -> Option<Self> {
        Some(Self {
            disk: to_file(&value["disk"])?,
            run: opt(&value["run"], uuid)?,
            settings: to_settings(value)?,
            paused: value["paused"].as_bool()?,
            bitmap: string(&value["bitmap"])?,
            freeze: uuid(&value["freeze"])?,
            sought: Sought::decode(&value["pattern"])?,
            mask: named(MASKS, &value["mode"])?,
            group: opt(&value["group"], to_group)?,
        })
    }
}

impl Sought {
    fn encode(&self) -> Value {
        match self {
            Self::All => "all".into(),
            Self::Allocated => "allocation-top".into(),
            Self::Differing(Older::Path { path: image, format, file: id }) => {
                json!({ "image": path(image), "format": format, "file": id.map(file) })
            }
            Self::Differing(Older::Node { name, options, file: id }) => {
                json!({ "node": name, "options": options, "file": id.map(file) })
            }
            Self::Differing(Older::Point(id)) => json!({ "point": id.to_string() }),
        }
    }

    fn decode(value: &Value) -> Option<Self> {
        match value.as_str() {
            Some("all") => return Some(Self::All),
            Some("allocation-top") => return Some(Self::Allocated),
            _ => {}
        }
        let id = || opt(&value["file"], to_file);
        Some(Self::Differing(if !value["point"].is_null() {
            Older::Point(uuid(&value["point"])?)
        } else if let Some(name) = string(&value["node"]) {
            Older::Node { name, options: value["options"].as_array()?.clone(), file: id()? }
        } else {
            Older::Path { path: to_path(&value["image"])?, format: string(&value["format"])?, file: id()? }
        }))
    }
}
