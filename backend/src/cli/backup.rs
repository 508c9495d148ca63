//! `blkmark backup`: drive-backup, and where more than that has to happen at once, a transaction.
//!
//! QMP makes targets without a backing file only. An image that stands on another is made here, before the daemon is
//! asked, and removed again if the backup does not come about.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use blkmark_backup::qmp::Client;
use blkmark_backup::target::{self, Backing, CreateOptions, Format, Policy};
use serde_json::{Value, json};

use super::args::{BackupArgs, BackupKind, ImageFormat};
use super::failure::Failure;
use super::output::Output;
use super::query;
use super::wait::Wait;

/// Runs it.
pub(super) fn run(client: &mut Client, args: &BackupArgs, output: &Output) -> Result<(), Failure> {
    let mut made = Made::default();
    let mut actions = Vec::new();
    let mut jobs = Vec::new();
    for (at, (disk, path)) in args.disks.iter().zip(&args.targets).enumerate() {
        let path = absolute(path)?;
        let mode = target_mode(client, args, disk, &path, args.backings.get(at), &mut made)?;
        if let (BackupKind::Full, Some(bitmap)) = (args.kind, &args.bitmap) {
            let exists = query::has_bitmap(client, disk, bitmap)?;
            let kind = if exists { "block-dirty-bitmap-clear" } else { "block-dirty-bitmap-add" };
            actions.push(json!({ "type": kind, "data": { "node": disk, "name": bitmap } }));
        }
        let job = args.job.as_ref().unwrap_or(disk).clone();
        actions.push(json!({ "type": "drive-backup", "data": drive_backup(args, disk, &job, &path, mode)? }));
        jobs.push(job);
    }
    // Several disks succeed together or not at all. QMP takes no bitmap actions in such a group, since they cannot be
    // taken back at its end: where bitmaps start with full backups, each disk stands alone, and a disk whose backup
    // failed needs another full one.
    let mode = if actions.len() == jobs.len() && jobs.len() > 1 { "grouped" } else { "individual" };
    match &mut actions[..] {
        [single] => client.execute("drive-backup", single["data"].take())?,
        _ => {
            let properties = json!({ "completion-mode": mode });
            client.execute("transaction", json!({ "actions": actions, "properties": properties }))?
        }
    };
    if args.no_wait {
        made.keep();
        output.result(&json!({ "return": { "jobs": jobs } }), || jobs.join("\n"));
        return Ok(());
    }
    let result = Wait::new(jobs).run(client, output);
    // Out of reach, the jobs may go on, and their targets are theirs.
    if matches!(result, Ok(()) | Err(Failure::Unreachable(_))) {
        made.keep();
    }
    result
}

fn drive_backup(args: &BackupArgs, disk: &str, job: &str, path: &Path, mode: &str) -> Result<Value, Failure> {
    let path = told(path)?;
    let mut arguments = json!({
        "job-id": job,
        "device": disk,
        "target": path,
        "format": format(args.format).name(),
        "mode": mode,
        "sync": match args.kind {
            BackupKind::Full => "full",
            BackupKind::Incremental => "incremental",
            BackupKind::Differential => "bitmap",
            BackupKind::Top => "top",
        },
    });
    if let (BackupKind::Incremental | BackupKind::Differential, Some(bitmap)) = (args.kind, &args.bitmap) {
        arguments["bitmap"] = json!(bitmap);
        if args.kind == BackupKind::Differential {
            arguments["bitmap-mode"] = json!("never");
        }
    }
    if let Some(speed) = args.speed {
        arguments["speed"] = json!(speed);
    }
    if args.compress {
        arguments["compress"] = json!(true);
    }
    if let Some(limit) = args.max_guest_latency {
        arguments["max-guest-latency"] = json!(limit);
    }
    if args.reflink {
        arguments["x-perf"] = json!({ "use-copy-range": true });
    }
    if args.keep {
        arguments["on-failure"] = json!("keep");
    }
    Ok(arguments)
}

/// Sees to it that a target can be made or is there, and tells the `mode` that goes with it.
fn target_mode(
    client: &mut Client,
    args: &BackupArgs,
    disk: &str,
    path: &Path,
    backing: Option<&PathBuf>,
    made: &mut Made,
) -> Result<&'static str, Failure> {
    if args.existing {
        return Ok("existing");
    }
    // drive-backup empties what is there. People who mistype a name should not lose a backup by it.
    if !args.overwrite && fs::symlink_metadata(path).is_ok() {
        let text = "exists: use --overwrite to replace it, or --existing to write into it";
        return Err(Failure::Failed(format!("'{}' {text}", path.display())));
    }
    let Some(backing) = backing else { return Ok("absolute-paths") };
    let options = CreateOptions {
        overwrite: args.overwrite,
        backing: Some(Backing { path: name_from(path, &absolute(backing)?), format: format(args.backing_format) }),
        ..CreateOptions::new(query::node_size(client, disk)?)
    };
    let image = target::create(path, format(args.format), &options, &Policy::default()).map_err(failed)?;
    made.paths.push(path.to_owned());
    image.conclude().map_err(|error| failed(format_args!("Could not create '{}': {error}", path.display())))?;
    Ok("existing")
}

fn failed(error: impl Display) -> Failure {
    Failure::Failed(error.to_string())
}

/// The name of `backing` as `image` should have it: images that lie side by side can be moved together.
fn name_from(image: &Path, backing: &Path) -> PathBuf {
    match backing.file_name() {
        Some(name) if image.parent() == backing.parent() => name.into(),
        _ => backing.to_owned(),
    }
}

/// A path as the daemon, which works in another directory, has to be told it.
fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| failed(format_args!("'{}': {error}", path.display())))
}

/// A path as QMP can carry it, and the daemon find it.
pub(super) fn told(path: &Path) -> Result<String, Failure> {
    let path = absolute(path)?;
    match path.to_str() {
        Some(path) => Ok(path.to_owned()),
        None => Err(Failure::Usage(format!("'{}' is not UTF-8, which QMP needs", path.display()))),
    }
}

pub(super) fn format(format: ImageFormat) -> Format {
    match format {
        ImageFormat::Raw => Format::Raw,
        ImageFormat::Qcow2 => Format::Qcow2,
    }
}

/// Images that were made for a backup, and that go if it does not come about.
#[derive(Default)]
struct Made {
    paths: Vec<PathBuf>,
}

impl Made {
    fn keep(&mut self) {
        self.paths.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_side_by_side_name_each_other_without_their_directory() {
        let name = |image: &str, backing: &str| name_from(Path::new(image), Path::new(backing));
        assert_eq!(name("/a/inc", "/a/full"), Path::new("full"));
        assert_eq!(name("/a/inc", "/b/full"), Path::new("/b/full"));
    }
}
