//! `blockdev-backup` and `drive-backup`: what may be asked, what is refused, and how a job comes to be.
//!
//! The checks and their order are QEMU's. An action is applied once or twice (see `transaction`); what it took the first
//! time (claim, job id, opened file) it keeps, and gives back by being dropped.

use super::destination::{Destination, check_size};
use super::options::{self, Perf};
use super::points::{PointNode, PointUse};
use super::transaction::{self, Action, Stage};
use super::{Control, done};
use crate::job::backup::Held;
use crate::job::{Backup, BitmapMode, Content, Hold, JobError, Kind, NewJob, OnFailure, Reservation, Settings, Work};
use crate::node::Node;
use crate::point::{Point, PointOptions, Wanted};
use crate::qmp::{Arguments, QmpError};
use crate::scratch::ScratchFiles;
use crate::target::Target;
use blkmark_bitmap::{Bits, Frozen, Granularity};
use serde_json::Value;
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
    point: PointOptions,
    filter: Option<String>,
    perf: Perf,
    destination: Destination,
    id: Option<Reservation>,
    scratch: Option<ScratchFiles>,
    backup: Option<Backup>,
    of_point: Option<OfPoint>,
}

/// What a backup of a point in time is made of.
struct OfPoint {
    node: Arc<PointNode>,
    lease: PointUse,
    cluster: Granularity,
    target: Arc<dyn Target>,
}

impl std::fmt::Debug for OfPoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("OfPoint").field(&self.node).finish()
    }
}

impl BackupAction {
    /// Reads what both commands have in common, in the order of QEMU's schema.
    fn read(
        arguments: &mut Arguments,
        destination: fn(&mut Arguments) -> Result<Destination, QmpError>,
    ) -> Result<Self, QmpError> {
        let mut action = Self {
            job_id: arguments.opt_string("job-id")?,
            device: arguments.string_of(&["device", "node"])?,
            sync: arguments.choice("sync", SYNC_MODES)?,
            speed: arguments.opt_i64("speed")?.unwrap_or(0),
            bitmap: arguments.opt_string("bitmap")?,
            bitmap_mode: arguments.opt_choice("bitmap-mode", BITMAP_MODES)?,
            compress: arguments.opt_bool("compress")?.unwrap_or(false),
            settings: options::job_settings(arguments)?,
            point: options::point_options(arguments)?,
            filter: arguments.opt_string("filter-node-name")?,
            perf: options::perf(arguments)?,
            destination: destination(arguments)?,
            id: None,
            scratch: None,
            backup: None,
            of_point: None,
        };
        action.settings.sharing = action.perf.copy_range;
        action.point.keep = action.settings.on_failure == OnFailure::Keep;
        action.point.outlive = true;
        if action.point.keep && action.sync == SyncMode::None {
            return Err(QmpError::generic("on-failure 'keep' has no meaning with sync mode 'none'"));
        }
        Ok(action)
    }

    pub(super) fn read_blockdev(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Self::read(arguments, Destination::read_node)
    }

    pub(super) fn read_drive(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Self::read(arguments, Destination::read_path)
    }

    /// Makes scratch, with no lock held: its file system may take its time. A point in time has its own already.
    pub(super) fn open_scratch(&mut self, control: &Control) -> Result<(), QmpError> {
        if control.point(&self.device).is_some() {
            return Ok(());
        }
        let scratch = control.device(&self.device)?.open_scratch();
        self.scratch = Some(scratch.map_err(|error| QmpError::generic(error.to_string()))?);
        Ok(())
    }

    /// Opens or makes the file, with no lock held. What made no sense was refused before.
    pub(super) fn open(&mut self, control: &Control, overwrite: bool) -> Result<(), QmpError> {
        let size = match control.point(&self.device) {
            Some(node) => node.point.size(),
            None => control.device(&self.device)?.tracker.size(),
        };
        self.destination.open(control, size, overwrite)
    }

    /// What of it was not needed, since the disk has scratch already.
    pub(super) fn spare_scratch(&mut self) -> Option<ScratchFiles> {
        self.scratch.take()
    }

    /// Checks all there is to check and takes what has to be taken; in a real walk, freezes and arms.
    pub(super) fn apply(&mut self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        let control = stage.control();
        if let Some(node) = control.point(&self.device) {
            return self.apply_to_point(stage, &node);
        }
        let disk = control.device(&self.device)?;
        self.destination.check(control)?;
        let (sync, mode) = self.check_bitmap(stage)?;
        let target = self.take_target(control, disk)?;
        let frozen = match &self.bitmap {
            Some(bitmap) => Some(stage.draft(disk).freeze(bitmap)?),
            None => None,
        };
        let granularity = frozen.as_ref().filter(|_| sync == SyncMode::Bitmap).map(Frozen::granularity);
        let cluster = self.check_job(control, disk, target.as_deref(), granularity)?;
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
        let point = Point::prepare_with(disk, &mut self.scratch, wanted, cluster, self.point)
            .map_err(|error| QmpError::generic(error.to_string()))?;
        commit.arm(point.gate());
        let content = if sync == SyncMode::None { Content::Overwritten } else { Content::Wanted };
        let destination = self.destination.named().clone();
        let held =
            Held { node: Arc::clone(disk), point, hold, destination, content, compress: self.compress, claim: None };
        self.backup = Some(Backup { held, target });
        Ok(())
    }

    fn take_target(&mut self, control: &Control, disk: &Node) -> Result<Option<Arc<dyn Target>>, QmpError> {
        let target = self.destination.take(control, disk)?;
        if self.compress {
            self.destination.check_compression(target.as_deref())?;
        }
        Ok(target)
    }

    /// The rest of what is checked, and the job's id. Answers the unit of copying.
    fn check_job(
        &mut self,
        control: &Control,
        disk: &Node,
        target: Option<&dyn Target>,
        granularity: Option<Granularity>,
    ) -> Result<Granularity, QmpError> {
        let cluster = self.perf.cluster(target, granularity)?;
        if let Some(target) = target {
            check_size(target, disk)?;
        }
        if let Some(filter) = &self.filter {
            control
                .check_new_name(filter)
                .map_err(|error| QmpError::generic(format!("Could not create node: {error}")))?;
        }
        if self.id.is_none() {
            self.id = Some(control.jobs.reserve(self.job_id.as_deref().unwrap_or(&self.device))?);
        }
        self.settings.speed = u64::try_from(self.speed).map_err(|_| JobError::Speed)?;
        Ok(cluster)
    }

    /// The same where the device is a point in time: nothing is frozen or armed, since that was done when it was made.
    fn apply_to_point(&mut self, stage: &mut Stage<'_>, node: &Arc<PointNode>) -> Result<(), QmpError> {
        let control = stage.control();
        let refuse = |text: String| Err(QmpError::generic(text));
        self.destination.check(control)?;
        let bitmap = match (self.sync, &self.bitmap, self.bitmap_mode) {
            (SyncMode::None, ..) => {
                return refuse("sync mode 'none' is of no use: a point in time does not change".into());
            }
            (SyncMode::Full | SyncMode::Top, None, None) => None,
            (SyncMode::Bitmap, Some(bitmap), Some(BitmapMode::Never)) => Some(bitmap.clone()),
            _ => {
                return refuse(format!(
                    "'{}' is a point in time: of it, all is copied (sync 'full'), or what a bitmap holds that stands \
                     still (sync 'bitmap' with bitmap-mode 'never')",
                    node.name
                ));
            }
        };
        let granularity = match &bitmap {
            Some(bitmap) => {
                let disk = control.device(&node.disk.id)?;
                let Some(granularity) = stage.draft(disk).standing(bitmap)? else {
                    return refuse(format!(
                        "Bitmap '{bitmap}' changes with every write: freeze it, or take a copy that is disabled"
                    ));
                };
                Some(granularity)
            }
            None => None,
        };
        let target = self.take_target(control, &node.disk)?;
        let cluster = self.check_job(control, &node.disk, target.as_deref(), granularity)?;
        if let (true, Some(target)) = (stage.real, target) {
            let lease = node.take_for(Kind::Backup)?;
            self.of_point = Some(OfPoint { node: Arc::clone(node), lease, cluster, target });
        }
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

    /// What the commit to come arms, and where.
    pub(super) fn armed(&self) -> Option<(&Arc<Node>, &Arc<Point>)> {
        let held = self.backup.as_ref().map(|backup| &backup.held).filter(|held| !held.point.is_view());
        held.map(|held| (&held.node, &held.point))
    }

    /// The job, once the commit is in force.
    pub(super) fn into_job(mut self) -> Option<NewJob> {
        if let Some(OfPoint { node, lease, cluster, target }) = self.of_point.take() {
            // It was there, and standing still, when the commit was made.
            let bits =
                |name: &String| node.disk.tracker.bits(name).unwrap_or_else(|_| Bits::full(cluster, node.point.size()));
            let plan = self.bitmap.as_ref().map(bits);
            // Another try may go elsewhere.
            let once = self.settings.on_failure == OnFailure::Reclaim;
            let held = Held {
                node: Arc::clone(&node.disk),
                point: node.point.lasting_view(cluster, plan, once, Box::new(lease)),
                hold: None,
                destination: self.destination.named().clone(),
                content: Content::Wanted,
                compress: self.compress,
                claim: None,
            };
            self.backup = Some(Backup { held, target });
        }
        let mut backup = self.backup?;
        backup.held.claim = self.destination.hand_over();
        Some(NewJob { id: self.id?, settings: self.settings, work: Work::Backup(backup), paused: false })
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

/// `job-retry`: the very image of a failed job again, from its kept point in time, to where it went or elsewhere.
pub(super) fn retry(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let id = arguments.string("id")?;
    let node = arguments.opt_string("target-node")?;
    let path = Destination::read_opt_path(&mut arguments)?;
    let compress = arguments.opt_bool("compress")?;
    arguments.finish()?;
    let elsewhere = match (node, path) {
        (Some(_), Some(_)) => return Err(QmpError::generic("Only one of 'target' and 'target-node' may be given")),
        (Some(node), None) => Some(Destination::of_node(node)),
        (None, path) => path,
    };
    let retry = control.jobs.prepare_retry(&id)?;
    let mut destination = elsewhere.unwrap_or_else(|| Destination::new(retry.destination.clone()));
    destination.check(control)?;
    let compress = compress.unwrap_or(retry.compress);
    if compress {
        destination.check_compression(None)?;
    }
    for overwrite in [false, true] {
        destination.open(control, retry.disk.tracker.size(), overwrite)?;
    }
    let mut locked = control.jobs.lock();
    locked.may_start()?;
    let Some(target) = destination.take(control, &retry.disk)? else {
        unreachable!("a file was opened, and a node has a target")
    };
    if compress {
        destination.check_compression(Some(&*target))?;
    }
    check_size(&*target, &retry.disk)?;
    let named = destination.named().clone();
    locked.retry(&retry, target, compress, named, destination.hand_over());
    // Its drop takes the lock.
    drop(locked);
    drop(retry);
    done()
}
