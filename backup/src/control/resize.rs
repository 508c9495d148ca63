//! `block_resize`: a served disk gets another size while its guest runs.
//!
//! Three things have to follow each other in the right order: the file, the bitmaps (with the bound that the write path
//! admits by), and the bound that requests are judged by, which is also what the guest is shown.
//!
//! | | larger | smaller |
//! |---|---|---|
//! | 1 | the file grows | requests are judged by the new size |
//! | 2 | bitmaps follow, in one commit | bitmaps follow, in one commit; from here on no change goes beyond |
//! | 3 | requests are judged by the new size | changes in flight at that instant end |
//! | 4 | | the file is cut |
//!
//! So no request ever meets a file or a bitmap that ends before it. Not while a job, a point in time or an export needs the
//! disk: those are of one size. Invariant: the registry is not locked while the file is changed or writes are waited for.

use super::{Control, done};
use crate::node::Node;
use crate::qmp::{Arguments, QmpError};
use blkmark_bitmap::ByteRange;
use blkmark_bitmap::flip::Cut;
use serde_json::Value;
use std::sync::PoisonError;

/// QEMU rounds up to this.
const SECTOR: u64 = 512;

/// QEMU's limit of an image's size.
const MAX_SIZE: u64 = 9_223_372_035_781_033_984;

pub(super) fn block_resize(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let device = arguments.opt_string("device")?.unwrap_or_default();
    let node = arguments.opt_string("node-name")?.unwrap_or_default();
    let size = arguments.i64("size")?;
    arguments.finish()?;
    let mut names = [&device, &node].into_iter().filter(|name| !name.is_empty());
    let named = names.clone().find(|name| control.disk(name).is_some());
    let Some(disk) = named.and_then(|name| control.disk(name)) else {
        if let Some(target) = names.find(|name| control.target_node(name).is_some()) {
            return Err(QmpError::generic(format!("Node '{target}' is a target: only served disks can be resized")));
        }
        return Err(QmpError::generic(format!("Cannot find device='{device}' nor node-name='{node}'")));
    };
    let size = checked(disk, size)?;
    let _alone = disk.resizing.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(export) = control.exports.of(&disk.id) {
        return Err(QmpError::generic(format!("Node '{}' is busy: it is exported as '{export}'", disk.id)));
    }
    resize(control, disk, size)?;
    done()
}

fn checked(disk: &Node, size: i64) -> Result<u64, QmpError> {
    let Ok(size) = u64::try_from(size) else {
        return Err(QmpError::generic("Parameter 'size' expects a >0 size"));
    };
    if disk.read_only {
        return Err(QmpError::generic("Image is read-only"));
    }
    if size > MAX_SIZE {
        return Err(QmpError::generic(format!("offset({size}) exceeds maximum({MAX_SIZE})")));
    }
    let size = size.next_multiple_of(SECTOR);
    let block = u64::from(disk.source.alignment());
    if !size.is_multiple_of(block) {
        return Err(QmpError::generic(format!("Parameter 'size' expects a multiple of {block}, the block size")));
    }
    if size == 0 {
        return Err(QmpError::generic("Parameter 'size' expects a >0 size: a served disk cannot be empty"));
    }
    Ok(size)
}

fn resize(control: &Control, disk: &Node, size: u64) -> Result<(), QmpError> {
    let old = disk.tracker.size();
    let show = |bytes| {
        if let Some(front) = &disk.front {
            front.set_capacity(bytes);
        }
    };
    let changed = |source: std::io::Error| QmpError::generic(format!("Failed to resize '{}': {source}", disk.id));
    // What would be refused later is refused before the file, or a bitmap, is touched.
    disk.source.may_resize(size).map_err(changed)?;
    follow(control, disk, size, false)?;
    if size >= old {
        // Of the same size too: that of a device is looked at again.
        disk.source.resize(size).map_err(changed)?;
        if let Err(error) = follow(control, disk, size, true) {
            // Nobody can have written there.
            if let Err(error) = disk.source.resize(old) {
                tracing::warn!(disk = disk.id, %error, "could not be given its old size back");
            }
            return Err(error);
        }
        show(size);
        return Ok(());
    }
    show(size);
    let cut = match follow(control, disk, size, true) {
        Ok(cut) => cut,
        Err(error) => {
            show(old);
            return Err(error);
        }
    };
    if let Some(cut) = cut {
        cut.pre_cut.wait(ByteRange::new(size, old - size));
    }
    if let Err(error) = disk.source.resize(size) {
        // What was beyond the end is there still; it counts as written.
        follow(control, disk, old, true)?;
        show(old);
        return Err(changed(error));
    }
    Ok(())
}

/// The bitmaps, and the bound of what is admitted, get the new size; or it is only seen whether they could.
fn follow(control: &Control, disk: &Node, size: u64, real: bool) -> Result<Option<Cut>, QmpError> {
    let mut locked = control.jobs.lock();
    if let Some(point) = control.points.of(&disk.id) {
        return Err(QmpError::generic(format!("Node '{}' is busy: '{point}' is a point in time of it", disk.id)));
    }
    let mut commit = disk.tracker.begin();
    if commit.is_gated() {
        return Err(QmpError::generic(format!(
            "Node '{}' is busy: block device is in use by block job: backup",
            disk.id
        )));
    }
    commit.draft.resize(size)?;
    if !real {
        return Ok(None);
    }
    let cuts = locked.commit(vec![commit]).map_err(|error| QmpError::generic(error.to_string()))?;
    Ok(cuts.into_iter().next())
}
