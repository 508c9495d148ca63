//! `block-dirty-bitmap-populate`: what may be asked, what is refused, and how the job comes to be.
//!
//! The command is the one that QEMU's developers proposed and never merged, with what they thought of next: a `mode`, and the
//! comparison with an older image of the mail of 2016. As there, the bitmap has to exist; a transaction makes one and fills it.
//! An action is applied once or twice (see `transaction`); what it took the first time it keeps, and gives back by being
//! dropped.

use super::claim::{Claim, Use};
use super::nodes::not_found;
use super::options;
use super::transaction::{self, Action, Stage};
use super::{Control, done};
use crate::job::{JobError, Kind, NewJob, Older as Known, Pattern, Populate, Reservation, Settings, Work};
use crate::node::Node;
use crate::point::PointSource;
use crate::qmp::{Arguments, QmpError};
use crate::source::Source;
use crate::target::Format;
use crate::target::image::Image;
use blkmark_bitmap::Mask;
use serde_json::Value;
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Looked {
    Top,
    All,
    Diff,
}

const PATTERNS: &[(&str, Looked)] = &[("allocation-top", Looked::Top), ("all", Looked::All), ("diff", Looked::Diff)];

const MODES: &[(&str, Mask)] =
    &[("overwrite", Mask::Overwrite), ("union", Mask::Union), ("difference", Mask::Difference)];

/// The older image, as the client named it.
#[derive(Clone, Debug, Default)]
struct Older {
    path: Option<PathBuf>,
    format: Option<String>,
    node: Option<String>,
}

impl Older {
    fn read(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(Self {
            path: arguments.opt_string("image")?.map(PathBuf::from),
            format: arguments.opt_string("format")?,
            node: arguments.opt_string("image-node")?,
        })
    }

    fn is_some(&self) -> bool {
        self.path.is_some() || self.node.is_some()
    }

    /// Whether what was given makes sense together, and for what is looked for.
    fn check(&self, looked: Looked) -> Result<(), QmpError> {
        let refuse = |text: &str| Err(QmpError::generic(text));
        match (looked, &self.path, &self.format, &self.node) {
            (Looked::Diff, Some(_), _, Some(_)) => refuse("Only one of 'image' and 'image-node' may be given"),
            (Looked::Diff, None, Some(_), _) => refuse("Parameter 'image' is missing"),
            (Looked::Diff, None, None, None) => refuse("pattern 'diff' needs an older image: 'image' or 'image-node'"),
            (Looked::Diff, Some(_), None, None) => {
                refuse("Parameter 'format' is missing: an existing image is never probed")
            }
            (Looked::Diff, Some(_), Some(format), None) => format.parse::<Format>().map(|_| ()).map_err(QmpError::from),
            (Looked::Diff, None, None, Some(_)) | (Looked::Top | Looked::All, None, None, None) => Ok(()),
            (Looked::Top | Looked::All, ..) => refuse("An older image has a meaning with pattern 'diff' only"),
        }
    }

    fn name(&self) -> String {
        match (&self.path, &self.node) {
            (Some(path), _) => path.display().to_string(),
            (None, node) => node.clone().unwrap_or_default(),
        }
    }
}

/// A populate to be started.
pub(super) struct PopulateAction {
    node: String,
    name: String,
    job_id: Option<String>,
    looked: Looked,
    mask: Mask,
    older: Older,
    speed: i64,
    settings: Settings,
    /// Of the node that the older image is.
    claim: Option<Box<dyn Any + Send + Sync>>,
    image: Option<Arc<dyn Source>>,
    /// How to find it again.
    known: Option<Known>,
    id: Option<Reservation>,
    populate: Option<Populate>,
}

impl std::fmt::Debug for PopulateAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PopulateAction")
            .field("node", &self.node)
            .field("name", &self.name)
            .field("looked", &self.looked)
            .field("older", &self.older)
            .finish_non_exhaustive()
    }
}

impl PopulateAction {
    pub(super) fn read(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(Self {
            node: arguments.string_of(&["node", "device"])?,
            name: arguments.string("name")?,
            job_id: arguments.opt_string("job-id")?,
            looked: arguments.choice("pattern", PATTERNS)?,
            mask: arguments.opt_choice("mode", MODES)?.unwrap_or(Mask::Union),
            older: Older::read(arguments)?,
            speed: arguments.opt_i64("speed")?.unwrap_or(0),
            settings: options::populate_settings(arguments)?,
            claim: None,
            image: None,
            known: None,
            id: None,
            populate: None,
        })
    }

    /// Whether [`PopulateAction::open`] has something to do.
    pub(super) fn opens_a_file(&self) -> bool {
        self.older.is_some()
    }

    /// Opens the older image, with no lock held; a point in time is there already. What made no sense was refused before.
    pub(super) fn open(&mut self, control: &Control) -> Result<(), QmpError> {
        if self.image.is_some() {
            return Ok(());
        }
        let policy = control.policy();
        let (image, known): (Arc<dyn Source>, _) = match (&self.older.path, &self.older.format, &self.older.node) {
            (Some(path), Some(format), _) => {
                let image = Image::open(path, format.parse()?, &policy)?;
                let file = image.file_id();
                (Arc::new(image), Known::Path { path: path.clone(), format: format.clone(), file })
            }
            (_, _, Some(name)) => {
                let node = control.target_node(name).ok_or_else(|| not_found(name))?;
                let image = node.source(&policy)?;
                let file = image.file_id();
                (image, Known::Node { name: name.clone(), options: node.options(), file })
            }
            _ => return Ok(()),
        };
        (self.image, self.known) = (Some(image), Some(known));
        Ok(())
    }

    /// What can be said of the older image before it is opened; claims a node.
    fn check_older(&mut self, control: &Control, disk: &Node) -> Result<(), QmpError> {
        self.older.check(self.looked)?;
        match &self.older.node {
            None => {}
            Some(name) if *name == disk.id => {
                return Err(QmpError::generic("Source and target cannot be the same"));
            }
            Some(name) if control.disk(name).is_some() => {
                return Err(QmpError::generic(format!("Node '{name}' is busy: it is served to a guest")));
            }
            Some(_) if self.claim.is_some() => {}
            Some(name) => match control.point(name) {
                Some(point) => {
                    self.claim = Some(Box::new(point.take_for(Kind::Populate)?));
                    self.known = point.point.ledger().map(|ledger| Known::Point(ledger.id()));
                    self.image = Some(Arc::new(PointSource::new(Arc::clone(&point.point))));
                }
                None => {
                    let node = control.target_node(name).ok_or_else(|| not_found(name))?;
                    self.claim = Some(Box::new(Claim::take(&node, Use::Populate)?));
                }
            },
        }
        let Some(image) = &self.image else { return Ok(()) };
        let (size, theirs) = (disk.tracker.size(), image.size());
        if size != theirs {
            return Err(QmpError::generic(format!(
                "Source and target image have different sizes: '{}' has {size} bytes, '{}' has {theirs}",
                disk.id,
                self.older.name()
            )));
        }
        Ok(())
    }

    /// Checks all there is to check and takes what has to be taken; in a real walk, freezes.
    pub(super) fn apply(&mut self, stage: &mut Stage<'_>) -> Result<(), QmpError> {
        let control = stage.control();
        let disk = control.bitmap_node(&self.node)?;
        // Is it there, and free?
        stage.draft(disk).dirty_set(&self.name)?;
        self.check_older(control, disk)?;
        if self.id.is_none() {
            self.id = Some(control.jobs.reserve(self.job_id.as_deref().unwrap_or(&disk.id))?);
        }
        self.settings.speed = u64::try_from(self.speed).map_err(|_| JobError::Speed)?;
        let frozen = stage.draft(disk).freeze_recording(&self.name)?;
        if !stage.real {
            return Ok(());
        }
        let pattern = match (self.looked, &self.image) {
            (Looked::All, _) => Pattern::All,
            (Looked::Top, _) => Pattern::Allocated,
            (Looked::Diff, Some(image)) => Pattern::Differing(Arc::clone(image)),
            (Looked::Diff, None) => unreachable!("a real walk comes after the images were opened"),
        };
        let frozen = stage.commit(disk).closing(frozen);
        if stage.has_made(disk, &self.name) {
            stage.draft(disk).await_fill(&self.name)?;
        }
        let mut populate = Populate::new(Arc::clone(disk), self.name.clone(), frozen, pattern, self.mask);
        populate.older = self.known.take();
        self.populate = Some(populate);
        Ok(())
    }

    /// The job, once the commit is in force.
    pub(super) fn into_job(self) -> Option<NewJob> {
        let mut populate = self.populate?;
        populate.claim = self.claim;
        Some(NewJob { id: self.id?, settings: self.settings, work: Work::Populate(populate), paused: false })
    }
}

pub(super) fn populate(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let action = PopulateAction::read(&mut arguments)?;
    arguments.finish()?;
    transaction::run(control, vec![Action::Populate(Box::new(action))], false)?;
    done()
}
