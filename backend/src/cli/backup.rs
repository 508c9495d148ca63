//! `blkmark backup`: drive-backup, and where more than that has to happen at once, a transaction.
//!
//! QMP makes targets without a backing file only. An image that stands on another is made here, before the daemon is
//! asked, and removed again if the backup does not come about.

use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

use blkmark_backup::qmp::Client;
use blkmark_backup::target::{self, Backing, CreateOptions, Format, Policy};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::Output;
use super::query;
use super::size;
use super::wait::Wait;

/// Which blocks a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackupKind {
    /// Everything. With --bitmap, that bitmap then records what changes from this very instant
    Full,
    /// What changed since the last backup with --bitmap, which then starts anew
    Incremental,
    /// What changed since --bitmap started, which goes on
    Differential,
    /// What is allocated in the disk's topmost image
    Top,
}

/// `blkmark backup`.
#[derive(Debug, Args)]
#[command(after_help = "Several disks, each with its own target, are backed up as of one instant:\n  \
    blkmark backup full --disk a --target a.qcow2 --disk b --target b.qcow2 --bitmap daily\n\
    If one of them fails, all do; only with a full backup that starts bitmaps each disk stands alone.\n\
    Interrupting the wait leaves the jobs running; `blkmark job` steers them.\n\n\
    Exit status: 0 success; 1 refused, or a job failed; 2 wrong usage; 3 the daemon cannot be reached.")]
pub struct BackupArgs {
    /// What to copy
    #[arg(value_enum)]
    pub kind: BackupKind,
    /// The disk (repeatable)
    #[arg(long = "disk", required = true, value_name = "DISK")]
    pub disks: Vec<String>,
    /// The image to write, one a disk; made unless --existing is given
    #[arg(long = "target", required = true, value_name = "FILE")]
    pub targets: Vec<PathBuf>,
    /// Format of the image
    #[arg(long, value_enum, default_value_t = ImageFormat::Qcow2)]
    pub format: ImageFormat,
    /// The bitmap, of this name on each disk
    #[arg(long)]
    pub bitmap: Option<String>,
    /// The image that the new one stands on, one a disk: usually the backup before
    #[arg(long = "backing", value_name = "FILE")]
    pub backings: Vec<PathBuf>,
    /// Format of the backing image
    #[arg(long, value_enum, default_value_t = ImageFormat::Qcow2, requires = "backings")]
    pub backing_format: ImageFormat,
    /// Write into an image or block device that is there already
    #[arg(long, conflicts_with_all = ["backings", "overwrite"])]
    pub existing: bool,
    /// Empty and reuse a file that is there already
    #[arg(long)]
    pub overwrite: bool,
    /// Deflate what is written: smaller images, more processor time (qcow2 only)
    #[arg(long)]
    pub compress: bool,
    /// Bytes a second at most, a disk [default: no limit]
    #[arg(long, value_parser = size::parse_signed)]
    pub speed: Option<u64>,
    /// Leave room while the guest's requests take longer than this many microseconds; 0 does not look [default: 1000]
    #[arg(long, value_name = "US")]
    pub max_guest_latency: Option<u64>,
    /// Share blocks with the disk where the file system can: a raw image beside a raw disk, on XFS or btrfs
    #[arg(long)]
    pub reflink: bool,
    /// If it fails, keep its point in time for `job retry`; until then the bitmap stays frozen
    #[arg(long)]
    pub keep: bool,
    /// Id of the job, for a single disk [default: the disk's]
    #[arg(long)]
    pub job: Option<String>,
    /// Wait until it is done; this is the default
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,
    /// Return as soon as it runs
    #[arg(long, overrides_with = "wait")]
    pub no_wait: bool,
}

/// Image formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
}

impl BackupArgs {
    /// What clap cannot check.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
        let needs_bitmap = matches!(self.kind, BackupKind::Incremental | BackupKind::Differential);
        if self.targets.len() != self.disks.len() {
            return usage("every --disk needs its own --target");
        }
        if !self.backings.is_empty() && self.backings.len() != self.disks.len() {
            return usage("give a --backing for every --disk, or none");
        }
        if needs_bitmap && self.bitmap.is_none() {
            return usage("this kind of backup needs --bitmap");
        }
        if self.kind == BackupKind::Top && self.bitmap.is_some() {
            return usage("a backup of the topmost image takes no --bitmap");
        }
        if self.job.is_some() && self.disks.len() > 1 {
            return usage("--job names the job of a single disk");
        }
        if self.format == ImageFormat::Raw && !self.backings.is_empty() {
            return usage("a raw image cannot stand on a backing file");
        }
        if self.format == ImageFormat::Raw && self.compress {
            return usage("a raw image cannot be compressed");
        }
        if self.kind != BackupKind::Full && self.format == ImageFormat::Raw && !self.existing {
            return usage(
                "a new raw image cannot tell what was copied: use qcow2, or update a full one with --existing",
            );
        }
        Ok(())
    }
}

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
    use clap::Parser;

    use super::super::args::{Cli, ClientCommand, Command};
    use super::*;

    fn backup(words: &str) -> BackupArgs {
        match Cli::try_parse_from(format!("blkmark backup {words}").split(' ')).unwrap().command {
            Some(Command::Client(ClientCommand::Backup(args))) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn backups_that_make_no_sense_are_refused_before_anything_is_done() {
        for words in [
            "full --disk a --target b --target c",
            "incremental --disk a --target b",
            "top --disk a --target b --bitmap c",
            "full --disk a --target b --disk c --target d --job e",
            "full --disk a --target b --backing c --format raw",
            "full --disk a --target b --compress --format raw",
            "incremental --disk a --target b --bitmap c --format raw",
            "incremental --disk a --target b --disk c --target d --bitmap e --backing f",
        ] {
            assert!(matches!(backup(words).check(), Err(Failure::Usage(_))), "{words}");
        }
        for words in [
            "full --disk a --target b --bitmap c --speed 10M",
            "full --disk a --target b --compress",
            "full --disk a --target b --format raw --max-guest-latency 500 --reflink",
            "incremental --disk a --target b --bitmap c --backing d",
            "incremental --disk a --target b --bitmap c --format raw --existing",
        ] {
            assert!(backup(words).check().is_ok(), "{words}");
        }
        assert!(!backup("full --disk a --target b --no-wait --wait").no_wait);
        assert!(backup("full --disk a --target b --wait --no-wait").no_wait);
    }

    #[test]
    fn images_side_by_side_name_each_other_without_their_directory() {
        let name = |image: &str, backing: &str| name_from(Path::new(image), Path::new(backing));
        assert_eq!(name("/a/inc", "/a/full"), Path::new("full"));
        assert_eq!(name("/a/inc", "/b/full"), Path::new("/b/full"));
    }
}
