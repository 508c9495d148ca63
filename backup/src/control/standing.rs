//! Bitmaps that go with an export: how clients name them, and their bits.
//!
//! Invariant: all bits of one request are of one instant, and of bitmaps that stand still.

use super::Control;
use crate::nbd::{BitmapExportError, SourceExport};
use crate::node::Node;
use crate::qmp::arguments::StringOrObject;
use crate::qmp::{Arguments, QmpError};
use blkmark_bitmap::Bits;
use std::sync::Arc;

/// A bitmap that goes with an export, as the client named it.
pub(super) enum Wanted {
    /// Of the exported disk.
    Own(String),
    /// Of any disk of that size.
    Of { node: String, name: String },
}

/// Reads the member `bitmaps`.
pub(super) fn read(arguments: &mut Arguments) -> Result<Vec<Wanted>, QmpError> {
    let elements = arguments.opt_list("bitmaps")?.unwrap_or_default();
    let read = |element: crate::qmp::arguments::Element| match element.string_or_object("BlockDirtyBitmapOrStr")? {
        StringOrObject::String(name) => Ok(Wanted::Own(name)),
        StringOrObject::Object(mut members) => {
            let wanted = Wanted::Of { node: members.string("node")?, name: members.string("name")? };
            members.finish()?;
            Ok(wanted)
        }
    };
    elements.into_iter().map(read).collect()
}

impl Control {
    /// The bits of bitmaps at one instant.
    pub(super) fn standing(&self, disk: &Arc<Node>, wanted: Vec<Wanted>) -> Result<Vec<(String, Bits)>, QmpError> {
        let size = disk.tracker.size();
        let mut found: Vec<(String, String, Bits)> = Vec::new();
        let _no_commits = self.jobs.lock();
        for wanted in wanted {
            let (node, name, own) = match wanted {
                Wanted::Own(name) => (disk, name, true),
                Wanted::Of { node, name } => (self.bitmap_node(&node)?, name, false),
            };
            let bits = SourceExport::standing_bits(node, &name).map_err(|error| match error {
                BitmapExportError::NotFound(name) if !own => {
                    QmpError::generic(format!("Dirty bitmap '{name}' not found"))
                }
                error => QmpError::generic(error.to_string()),
            })?;
            if bits.size() != size {
                return Err(QmpError::generic(format!(
                    "Bitmap '{name}' of node '{}' is of another size than node '{}'",
                    node.id, disk.id
                )));
            }
            match found.iter().find(|(_, other, _)| *other == name) {
                // Named twice.
                Some((owner, ..)) if *owner == node.id => {}
                Some((owner, ..)) => {
                    let text = format!("Bitmap '{name}' is named of node '{owner}' and of node '{}'", node.id);
                    return Err(QmpError::generic(text));
                }
                None => found.push((node.id.clone(), name, bits)),
            }
        }
        Ok(found.into_iter().map(|(_, name, bits)| (name, bits)).collect())
    }
}
