//! The bitmap commands, each an action of a transaction that may stand alone.
//!
//! Arguments are read here; what an action does, it does to a draft of a disk's bitmaps (`apply`), which the transaction
//! puts in force or drops.

use super::regions::Page;
use super::transaction::{self, Action, Stage};
use super::{Control, done};
use crate::qmp::arguments::StringOrObject;
use crate::qmp::{Arguments, QmpError};
use blkmark_bitmap::{BitmapError, Granularity};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// A bitmap of a disk, by name.
#[derive(Clone, Debug)]
pub(super) struct Named {
    node: String,
    name: String,
}

/// What can be done to bitmaps.
#[derive(Clone, Debug)]
pub(super) enum BitmapAction {
    /// A new one.
    Add { bitmap: Named, granularity: Option<u32>, persistent: Option<bool>, disabled: bool },
    /// It is gone.
    Remove(Named),
    /// It is empty.
    Clear(Named),
    /// It records.
    Enable(Named),
    /// It records no more.
    Disable(Named),
    /// It is frozen for the client, and a successor records.
    CreateSuccessor(Named),
    /// The client's freeze ends in success: the successor is the bitmap.
    Abdicate(Named, Option<String>),
    /// The client's freeze ends in failure: both are the bitmap.
    Reclaim(Named, Option<String>),
    /// It takes in others.
    Merge { target: Named, sources: Vec<Named> },
}

/// Reads the disk's name, which was called `device` in 2015.
fn node(arguments: &mut Arguments) -> Result<String, QmpError> {
    arguments.string_of(&["node", "device"])
}

fn named(arguments: &mut Arguments) -> Result<Named, QmpError> {
    Ok(Named { node: node(arguments)?, name: arguments.string("name")? })
}

/// Which freeze is meant, if the client says.
fn freeze(id: Option<&String>) -> Result<Option<Uuid>, QmpError> {
    let Some(id) = id else { return Ok(None) };
    let wrong = |_| QmpError::generic(format!("Parameter 'freeze-id' expects a UUID, not '{id}'"));
    Uuid::parse_str(id).map(Some).map_err(wrong)
}

impl BitmapAction {
    pub(super) fn read_add(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(BitmapAction::Add {
            bitmap: named(arguments)?,
            granularity: arguments.opt_u32_or_decimal("granularity")?,
            persistent: arguments.opt_bool("persistent")?,
            disabled: arguments.opt_bool("disabled")?.unwrap_or(false),
        })
    }

    pub(super) fn read_remove(arguments: &mut Arguments) -> Result<Self, QmpError> {
        named(arguments).map(BitmapAction::Remove)
    }

    pub(super) fn read_clear(arguments: &mut Arguments) -> Result<Self, QmpError> {
        named(arguments).map(BitmapAction::Clear)
    }

    pub(super) fn read_enable(arguments: &mut Arguments) -> Result<Self, QmpError> {
        named(arguments).map(BitmapAction::Enable)
    }

    pub(super) fn read_disable(arguments: &mut Arguments) -> Result<Self, QmpError> {
        named(arguments).map(BitmapAction::Disable)
    }

    pub(super) fn read_create_successor(arguments: &mut Arguments) -> Result<Self, QmpError> {
        named(arguments).map(BitmapAction::CreateSuccessor)
    }

    pub(super) fn read_abdicate(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(BitmapAction::Abdicate(named(arguments)?, arguments.opt_string("freeze-id")?))
    }

    pub(super) fn read_reclaim(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(BitmapAction::Reclaim(named(arguments)?, arguments.opt_string("freeze-id")?))
    }

    pub(super) fn read_merge(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let target = Named { node: node(arguments)?, name: arguments.string("target")? };
        let mut sources = Vec::new();
        for element in arguments.list("bitmaps")? {
            sources.push(match element.string_or_object("BlockDirtyBitmapOrStr")? {
                StringOrObject::String(name) => Named { node: target.node.clone(), name },
                StringOrObject::Object(mut members) => {
                    let source = named(&mut members)?;
                    members.finish()?;
                    source
                }
            });
        }
        Ok(BitmapAction::Merge { target, sources })
    }

    /// Does it to the drafts of `stage`.
    pub(super) fn apply(&self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        match self {
            BitmapAction::Add { bitmap, granularity, persistent, disabled } => {
                let disk = stage.control().device(&bitmap.node)?;
                if bitmap.name.is_empty() {
                    return Err(BitmapError::NameEmpty.into());
                }
                let granularity = match granularity {
                    None => Granularity::DEFAULT,
                    Some(bytes) => Granularity::new(u64::from(*bytes)).ok_or(BitmapError::Granularity)?,
                };
                // By default it survives the daemon, unless the operator has decided that none does.
                let persistent = persistent.unwrap_or_else(|| disk.tracker.has_store());
                let draft = stage.draft(disk);
                draft.add(&bitmap.name, granularity, *disabled)?;
                if persistent {
                    draft.keep(&bitmap.name)?;
                }
                stage.note_made(disk, &bitmap.name);
                Ok(())
            }
            BitmapAction::Remove(bitmap) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                Ok(stage.draft(disk).remove(&bitmap.name)?)
            }
            BitmapAction::Clear(bitmap) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                Ok(stage.draft(disk).clear(&bitmap.name)?)
            }
            BitmapAction::Enable(bitmap) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                Ok(stage.draft(disk).enable(&bitmap.name)?)
            }
            BitmapAction::Disable(bitmap) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                Ok(stage.draft(disk).disable(&bitmap.name)?)
            }
            BitmapAction::CreateSuccessor(bitmap) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                stage.draft(disk).create_successor(&bitmap.name)?;
                Ok(())
            }
            BitmapAction::Abdicate(bitmap, id) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                Ok(stage.draft(disk).client_abdicate(&bitmap.name, freeze(id.as_ref())?)?)
            }
            BitmapAction::Reclaim(bitmap, id) => {
                let disk = stage.control().bitmap_node(&bitmap.node)?;
                Ok(stage.draft(disk).client_reclaim(&bitmap.name, freeze(id.as_ref())?)?)
            }
            BitmapAction::Merge { target, sources } => {
                let into = stage.control().bitmap_node(&target.node)?;
                // The target has to be there and free, even if nothing is merged into it.
                stage.draft(into).dirty_set(&target.name)?;
                // All sources as they stand before this action: the target may be among them.
                let mut sets = Vec::new();
                for source in sources {
                    let from = stage.control().bitmap_node(&source.node)?;
                    let commit = stage.commit(from);
                    let set = commit.draft.dirty_set(&source.name)?;
                    sets.push(if from.id == into.id { set } else { commit.foreign(set) });
                }
                let draft = stage.draft(into);
                sets.iter().try_for_each(|set| draft.merge(&target.name, set))?;
                Ok(())
            }
        }
    }
}

fn alone(
    control: &Control,
    mut arguments: Arguments,
    read: fn(&mut Arguments) -> Result<BitmapAction, QmpError>,
) -> Result<Value, QmpError> {
    let action = read(&mut arguments)?;
    arguments.finish()?;
    transaction::run(control, vec![Action::Bitmap(action)], false)?;
    done()
}

pub(super) fn add(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_add)
}

pub(super) fn remove(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_remove)
}

pub(super) fn clear(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_clear)
}

pub(super) fn enable(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_enable)
}

pub(super) fn disable(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_disable)
}

pub(super) fn merge(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_merge)
}

pub(super) fn create_successor(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_create_successor)
}

pub(super) fn abdicate(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_abdicate)
}

pub(super) fn reclaim(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BitmapAction::read_reclaim)
}

/// The bits as they stand; of the frozen set while there is one. The guest does not notice.
pub(super) fn query(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let bitmap = named(&mut arguments)?;
    let page = Page::read(&mut arguments)?;
    arguments.finish()?;
    let disk = control.bitmap_node(&bitmap.node)?;
    let (info, bits) = disk.tracker.look(&bitmap.name)?;
    let mut answer = Map::new();
    answer.insert("node".into(), disk.id.clone().into());
    answer.insert("name".into(), bitmap.name.into());
    answer.insert("recording".into(), info.recording.into());
    answer.insert("busy".into(), info.busy.into());
    if let Some(freeze) = info.frozen {
        answer.insert("freeze-id".into(), freeze.to_string().into());
    }
    page.show(&bits, &mut answer)?;
    Ok(answer.into())
}

/// A hash of the bits as they stand, for tests; a busy bitmap may be asked too.
pub(super) fn sha256(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let bitmap = named(&mut arguments)?;
    arguments.finish()?;
    let disk = control.bitmap_node(&bitmap.node)?;
    let bits = disk.tracker.bits(&bitmap.name)?;
    Ok(json!({ "sha256": bits.sha256() }))
}
