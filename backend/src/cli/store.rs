//! `blkmark store`: looks into a bitmap store without a daemon. Writes nothing, takes no lock; of a store that is in use it shows
//! what the last record says.

use super::Output;
use super::failure::Failure;
use super::output::table;
use super::size;
use crate::persistence::default_path;
use blkmark_bitmap::store::reading::{self, FoundBitmap, How, Slots};
use blkmark_bitmap::store::{Directory, Maps, NoMaps, Shm};
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// `blkmark store`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 all that was asked for could be read (check: and can be relied on); 1 not so; 2 wrong usage."
)]
pub struct StoreArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: StoreAction,
}

/// What can be done with a store.
#[derive(Debug, Subcommand)]
pub enum StoreAction {
    /// Read all of it, and fail if anything in it cannot be relied on
    Check {
        /// The store's directory, or the disk it belongs to
        path: PathBuf,
    },
    /// Show the bitmaps in it
    Show {
        /// The store's directory, or the disk it belongs to
        path: PathBuf,
    },
}

/// Runs it.
pub fn run(action: &StoreAction, output: &Output) -> Result<(), Failure> {
    let (StoreAction::Check { path } | StoreAction::Show { path }) = action;
    let path = directory(path)?;
    let (shown, rows, unsound) = look(&path)?;
    let check = matches!(action, StoreAction::Check { .. });
    if check && !unsound.is_empty() {
        if !matches!(shown, Value::Null) {
            output.done(&shown);
        }
        return Err(Failure::Failed(unsound.join("; ")));
    }
    output.result(&shown, || match check {
        true => format!("{}: sound, {} bitmaps", path.display(), rows.len()),
        false => table(["BITMAP", "DIRTY", "GRANULARITY", "STATE", "REASON"], rows),
    });
    Ok(())
}

/// The store itself, or that beside a disk.
fn directory(path: &Path) -> Result<PathBuf, Failure> {
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    let there = default_path(path).map_err(|error| Failure::Failed(format!("{}: {error}", path.display())))?;
    match there.is_dir() {
        true => Ok(there),
        false => Err(Failure::Failed(format!("{}: there is no such store", there.display()))),
    }
}

type Row = [String; 5];

fn look(path: &Path) -> Result<(Value, Vec<Row>, Vec<String>), Failure> {
    let failed = |text: String| Failure::Failed(format!("{}: {text}", path.display()));
    let medium = Directory::inspect(path).map_err(|error| failed(error.to_string()))?;
    let (record, other) = match reading::slots(&medium) {
        Slots::Fresh => return Ok((json!({ "bitmaps": [] }), Vec::new(), Vec::new())),
        Slots::Newer(version) => {
            return Err(failed(format!("it has version {version}, which this blkmark cannot read")));
        }
        Slots::Damaged(reason) => return Err(failed(format!("it cannot be read: {reason}"))),
        Slots::Found(record, other) => (record, other),
    };
    let mut maps: Box<dyn Maps> = match Shm::new(Path::new("/dev/shm")) {
        Some(shm) => Box::new(shm),
        None => Box::new(NoMaps),
    };
    let reading = reading::read(&medium, &record, None, &mut *maps);
    let how = match &reading.how {
        How::Clean => "clean",
        How::Killed => "in use, or killed",
        How::PowerCut { .. } => "power cut, or live maps elsewhere",
        How::Unknown => "unknown",
    };
    let bitmaps: Vec<Value> = reading.bitmaps.iter().map(show).collect();
    let shown = json!({
        "store": record.store.to_string(),
        "sequence": record.sequence,
        "size": record.size,
        "end": how,
        "whole-slots": if other.is_some() { 1 } else { 2 },
        "bitmaps": bitmaps,
        "checkpoints": reading.checkpoints.as_ref().map_or(0, Vec::len),
    });
    let mut unsound: Vec<String> = reading
        .bitmaps
        .iter()
        .filter_map(|bitmap| {
            Some(format!("bitmap '{}' is inconsistent: {}", bitmap.name, bitmap.dirty.as_ref().err()?))
        })
        .collect();
    unsound.extend(reading.checkpoints.as_ref().err().map(|reason| format!("the checkpoints are lost: {reason}")));
    Ok((shown, reading.bitmaps.iter().map(row).collect(), unsound))
}

fn dirty(bitmap: &FoundBitmap) -> u64 {
    let bits = bitmap.dirty.as_ref().ok().and_then(|dirty| dirty.bits.as_ref());
    bits.map_or(0, |bits| bits.dirty_bytes())
}

fn show(bitmap: &FoundBitmap) -> Value {
    let mut shown = json!({
        "name": bitmap.name,
        "count": dirty(bitmap),
        "granularity": bitmap.granularity.bytes(),
        "recording": bitmap.recording,
        "inconsistent": bitmap.dirty.is_err(),
    });
    if let Err(reason) = &bitmap.dirty {
        shown["reason"] = reason.clone().into();
    }
    if let Some(freeze) = bitmap.frozen {
        shown["freeze-id"] = freeze.to_string().into();
    }
    shown
}

fn row(bitmap: &FoundBitmap) -> Row {
    let state = match (&bitmap.dirty, bitmap.recording, bitmap.frozen) {
        (Err(_), ..) => "inconsistent",
        (Ok(_), true, None) => "recording",
        (Ok(_), true, Some(_)) => "recording, frozen",
        (Ok(_), false, _) => "disabled",
    };
    [
        bitmap.name.clone(),
        size::human(dirty(bitmap)),
        size::human(bitmap.granularity.bytes()),
        state.to_owned(),
        bitmap.dirty.as_ref().err().cloned().unwrap_or_default(),
    ]
}
