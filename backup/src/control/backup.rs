//! `blockdev-backup` and `drive-backup`: what may be asked, what is refused, and how a job comes to be.
//!
//! The checks and their order are QEMU's. An action is applied once or twice (see `transaction`); what it took the first
//! time (claim, job id, opened file) it keeps, and gives back by being dropped.

use super::claim::{Claim, Use};
use super::nodes::not_found;
use super::options::{self, Perf};
use super::transaction::{self, Action, Stage};
use super::{Control, done};
use crate::job::backup::Held;
use crate::job::{Backup, BitmapMode, Content, Hold, JobError, NewJob, Reservation, Settings};
use crate::node::Node;
use crate::point::{Point, PointOptions, Wanted};
use crate::qmp::{Arguments, QmpError};
use crate::target::{self, CreateOptions, Format, Target, TargetError};
use blkmark_bitmap::Granularity;
use serde_json::Value;
use std::any::Any;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SyncMode {
    Top,
    Full,
    None,
    Incremental,
    Bitmap,
}

/// `dirty-bitmap` is what `incremental` was called in the first mails of 2015.
const SYNC_MODES: &[(&str, SyncMode)] = &[
    ("top", SyncMode::Top),
    ("full", SyncMode::Full),
    ("none", SyncMode::None),
    ("incremental", SyncMode::Incremental),
    ("bitmap", SyncMode::Bitmap),
    ("dirty-bitmap", SyncMode::Incremental),
];

const BITMAP_MODES: &[(&str, BitmapMode)] =
    &[("on-success", BitmapMode::OnSuccess), ("never", BitmapMode::Never), ("always", BitmapMode::Always)];

impl SyncMode {
    fn name(self) -> &'static str {
        SYNC_MODES.iter().find(|(_, mode)| *mode == self).map_or("", |(name, _)| name)
    }
}

/// Where the backup goes.
#[derive(Debug)]
enum Destination {
    /// A node, and the claim on it once it was taken.
    Node { name: String, taken: Option<Claim> },
    /// A file or device that the command names, and it once it was opened.
    Path { path: PathBuf, format: Option<String>, existing: bool, opened: Opened },
}

/// A file that was opened for a job; made here, it goes again if the job does not come to be.
#[derive(Default)]
struct Opened(Option<Arc<dyn Target>>);

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Opened").field(&self.0.as_ref().map(|target| target.name())).finish()
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Some(target) = self.0.take()
            && let Err(error) = target.abandon()
        {
            tracing::warn!(target = target.name(), %error, "could not remove the target of a refused command");
        }
    }
}

/// A backup to be started.
#[derive(Debug)]
pub(super) struct BackupAction {
    job_id: Option<String>,
    device: String,
    sync: SyncMode,
    speed: i64,
    bitmap: Option<String>,
    bitmap_mode: Option<BitmapMode>,
    compress: bool,
    settings: Settings,
    filter: Option<String>,
    perf: Perf,
    destination: Destination,
    id: Option<Reservation>,
    backup: Option<Backup>,
}

impl BackupAction {
    /// Reads what both commands have in common, in the order of QEMU's schema.
    fn read(
        arguments: &mut Arguments,
        destination: fn(&mut Arguments) -> Result<Destination, QmpError>,
    ) -> Result<Self, QmpError> {
        Ok(Self {
            job_id: arguments.opt_string("job-id")?,
            device: arguments.string_of(&["device", "node"])?,
            sync: arguments.choice("sync", SYNC_MODES)?,
            speed: arguments.opt_i64("speed")?.unwrap_or(0),
            bitmap: arguments.opt_string("bitmap")?,
            bitmap_mode: arguments.opt_choice("bitmap-mode", BITMAP_MODES)?,
            compress: arguments.opt_bool("compress")?.unwrap_or(false),
            settings: options::job_settings(arguments)?,
            filter: arguments.opt_string("filter-node-name")?,
            perf: options::perf(arguments)?,
            destination: destination(arguments)?,
            id: None,
            backup: None,
        })
    }

    pub(super) fn read_blockdev(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Self::read(arguments, |arguments| Ok(Destination::Node { name: arguments.string("target")?, taken: None }))
    }

    pub(super) fn read_drive(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Self::read(arguments, |arguments| {
            let modes = [("existing", true), ("absolute-paths", false)];
            Ok(Destination::Path {
                path: arguments.string("target")?.into(),
                format: arguments.opt_string("format")?,
                existing: arguments.opt_choice("mode", &modes)?.unwrap_or(false),
                opened: Opened::default(),
            })
        })
    }

    /// Whether [`BackupAction::open`] has something to do.
    pub(super) fn opens_a_file(&self) -> bool {
        matches!(self.destination, Destination::Path { .. })
    }

    /// Opens or makes the file, with no lock held. What made no sense was refused before. A file that is there already
    /// and would be emptied is left alone unless `overwrite`: that cannot be undone, so it is done last.
    pub(super) fn open(&mut self, control: &Control, overwrite: bool) -> Result<(), QmpError> {
        let Destination::Path { path, format, existing, opened } = &mut self.destination else { return Ok(()) };
        if opened.0.is_some() {
            return Ok(());
        }
        let format = format_of(path, format.as_deref(), *existing)?;
        let policy = control.policy();
        let target = if *existing {
            target::open(path, format, &policy)?
        } else {
            let size = control.device(&self.device)?.tracker.size();
            match target::create(path, format, &CreateOptions { overwrite, ..CreateOptions::new(size) }, &policy) {
                Err(TargetError::Create { source, .. }) if !overwrite && source.kind() == ErrorKind::AlreadyExists => {
                    return Ok(());
                }
                made => made?,
            }
        };
        opened.0 = Some(target.into());
        Ok(())
    }

    /// Checks all there is to check and takes what has to be taken; in a real walk, freezes and arms.
    pub(super) fn apply(&mut self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        let control = stage.control();
        let disk = control.device(&self.device)?;
        self.destination.check(control)?;
        let (sync, mode) = self.check_bitmap(stage)?;
        let target = self.destination.take(control, disk)?;
        if self.compress {
            let name = target.as_ref().map_or_else(String::new, |target| target.name());
            return Err(QmpError::generic(format!("Compression is not supported for this drive {name}")));
        }
        let cluster = self.perf.cluster(target.as_deref())?;
        let frozen = match &self.bitmap {
            Some(bitmap) => Some(stage.draft(disk).freeze(bitmap)?),
            None => None,
        };
        if target.as_ref().is_some_and(|target| target.size() != disk.tracker.size()) {
            return Err(QmpError::generic("Source and target image have different sizes"));
        }
        if let Some(filter) = &self.filter {
            control
                .check_new_name(filter)
                .map_err(|error| QmpError::generic(format!("Could not create node: {error}")))?;
        }
        if self.id.is_none() {
            self.id = Some(control.jobs.reserve(self.job_id.as_deref().unwrap_or(&disk.id))?);
        }
        self.settings.speed = u64::try_from(self.speed).map_err(|_| JobError::Speed)?;

        let (true, Some(target)) = (stage.real, target) else { return Ok(()) };
        let hold = match (&frozen, &self.bitmap, mode) {
            (Some(frozen), Some(bitmap), Some(mode)) => {
                Some(Hold { bitmap: bitmap.clone(), freeze: frozen.id(), mode })
            }
            _ => None,
        };
        let commit = stage.commit(disk);
        let wanted = match frozen {
            Some(frozen) if sync == SyncMode::Bitmap => Wanted::Frozen(commit.closing(frozen)),
            // A raw disk stands on nothing, so all of it is its top layer, as in QEMU.
            _ => Wanted::All,
        };
        let point = prepare(disk, wanted, cluster)?;
        commit.arm(point.gate());
        let content = if sync == SyncMode::None { Content::Overwritten } else { Content::Wanted };
        let held = Held { node: Arc::clone(disk), point, hold, claim: self.destination.claim() };
        self.backup = Some(Backup { held, content, target });
        Ok(())
    }

    /// What QEMU's `sync` and `bitmap-mode` may be together; `incremental` becomes `bitmap` with `on-success`.
    fn check_bitmap(&self, stage: &mut Stage<'_>) -> Result<(SyncMode, Option<BitmapMode>), QmpError> {
        let refuse = |text: String| Err(QmpError::generic(text));
        let sync = self.sync.name();
        if matches!(self.sync, SyncMode::Bitmap | SyncMode::Incremental) && self.bitmap.is_none() {
            return refuse(format!("must provide a valid bitmap name for '{sync}' sync mode"));
        }
        let mode = match (self.sync, self.bitmap_mode) {
            (SyncMode::Incremental, None | Some(BitmapMode::OnSuccess)) => Some(BitmapMode::OnSuccess),
            (SyncMode::Incremental, Some(_)) => {
                return refuse(format!("Bitmap sync mode must be 'on-success' when using sync mode '{sync}'"));
            }
            (_, mode) => mode,
        };
        let Some(bitmap) = &self.bitmap else {
            if mode.is_some() {
                return refuse("Cannot specify bitmap sync mode without a bitmap".to_owned());
            }
            return Ok((self.sync, None));
        };
        let disk = stage.control().device(&self.device)?;
        let draft = stage.draft(disk);
        if !draft.has(bitmap) {
            return refuse(format!("Bitmap '{bitmap}' could not be found"));
        }
        let Some(mode) = mode else {
            return refuse("Bitmap sync mode must be given when providing a bitmap".to_owned());
        };
        // Is it free?
        draft.dirty_set(bitmap)?;
        match self.sync {
            SyncMode::None => refuse(format!("sync mode '{sync}' does not produce meaningful bitmap outputs")),
            SyncMode::Top | SyncMode::Full if mode == BitmapMode::Never => refuse(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{sync}'"
            )),
            SyncMode::Top | SyncMode::Full => Ok((self.sync, Some(mode))),
            SyncMode::Bitmap | SyncMode::Incremental => Ok((SyncMode::Bitmap, Some(mode))),
        }
    }

    /// The job, once the commit is in force.
    pub(super) fn into_job(mut self) -> Option<NewJob> {
        if let Destination::Path { opened, .. } = &mut self.destination {
            // The file belongs to the job from here on.
            opened.0 = None;
        }
        Some(NewJob { id: self.id?, settings: self.settings, backup: self.backup? })
    }
}

fn prepare(disk: &Arc<Node>, wanted: Wanted, cluster: Granularity) -> Result<Arc<Point>, QmpError> {
    Point::prepare(disk, wanted, cluster, PointOptions::default()).map_err(|error| QmpError::generic(error.to_string()))
}

impl Destination {
    /// What can be said before anything is taken or opened.
    fn check(&self, control: &Control) -> Result<(), QmpError> {
        match self {
            Destination::Node { name, .. } => match control.disk(name).is_some() || control.target_node(name).is_some()
            {
                true => Ok(()),
                false => Err(not_found(name)),
            },
            Destination::Path { format, .. } => {
                // Whether one is needed is seen when the file is: nobody's file is looked at under the lock.
                format.as_deref().map(str::parse::<Format>).transpose()?;
                Ok(())
            }
        }
    }

    /// The target, claimed; `None` while its file is not opened yet.
    fn take(&mut self, control: &Control, disk: &Node) -> Result<Option<Arc<dyn Target>>, QmpError> {
        match self {
            Destination::Path { opened, .. } => Ok(opened.0.clone()),
            Destination::Node { name, .. } if *name == disk.id => {
                Err(QmpError::generic("Source and target cannot be the same"))
            }
            Destination::Node { name, taken } => {
                if control.disk(name).is_some() {
                    return Err(QmpError::generic(format!("Node '{name}' is busy: it is served to a guest")));
                }
                let node = control.target_node(name).ok_or_else(|| not_found(name))?;
                if taken.is_none() {
                    *taken = Some(Claim::take(&node, Use::Job)?);
                }
                node.target().map(Some)
            }
        }
    }

    fn claim(&mut self) -> Option<Box<dyn Any + Send + Sync>> {
        match self {
            Destination::Node { taken, .. } => taken.take().map(|claim| Box::new(claim) as Box<dyn Any + Send + Sync>),
            Destination::Path { .. } => None,
        }
    }
}

/// The format of a file to be made is the source's, which is raw, unless another is named. What is there already is never
/// probed: a guest that can write a raw disk can make it look like anything. A block device can be taken as raw.
fn format_of(path: &Path, format: Option<&str>, existing: bool) -> Result<Format, QmpError> {
    match format {
        Some(format) => Ok(format.parse()?),
        None if !existing => Ok(Format::Raw),
        None if std::fs::metadata(path).is_ok_and(|file| file.file_type().is_block_device()) => Ok(Format::Raw),
        None => Err(QmpError::generic("Parameter 'format' is missing: an existing image is never probed")),
    }
}

fn alone(
    control: &Control,
    mut arguments: Arguments,
    read: fn(&mut Arguments) -> Result<BackupAction, QmpError>,
) -> Result<Value, QmpError> {
    let action = read(&mut arguments)?;
    arguments.finish()?;
    transaction::run(control, vec![Action::Backup(Box::new(action))], false)?;
    done()
}

pub(super) fn blockdev_backup(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BackupAction::read_blockdev)
}

pub(super) fn drive_backup(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    alone(control, arguments, BackupAction::read_drive)
}
