//! Where a backup goes, from what the client named to a target that is claimed and open. What is not used in the end is
//! given back by being dropped: the claim on a node, a file that was made here.

use super::Control;
use super::claim::{Claim, Use};
use super::nodes::not_found;
use crate::job::Destination as Named;
use crate::node::Node;
use crate::qmp::{Arguments, QmpError};
use crate::source::FileId;
use crate::target::{self, CreateOptions, Format, Target, TargetError};
use std::any::Any;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

/// A destination, and what was taken of it so far.
#[derive(Debug)]
pub(super) struct Destination {
    named: Named,
    claim: Option<Claim>,
    opened: Opened,
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

impl Destination {
    pub(super) fn new(named: Named) -> Self {
        Self { named, claim: None, opened: Opened::default() }
    }

    /// A node of this name.
    pub(super) fn of_node(name: String) -> Self {
        Self::new(Named::Node { name, options: Vec::new() })
    }

    /// Reads the members that name a file or device: `target`, `format`, `mode`.
    pub(super) fn read_path(arguments: &mut Arguments) -> Result<Self, QmpError> {
        if !arguments.has("target") {
            return Err(arguments.missing("target"));
        }
        Self::read_opt_path(arguments)?.ok_or_else(|| arguments.missing("target"))
    }

    /// The same where they may be left out, but not only the first of them.
    pub(super) fn read_opt_path(arguments: &mut Arguments) -> Result<Option<Self>, QmpError> {
        let path = arguments.opt_string("target")?;
        let format = arguments.opt_string("format")?;
        let modes = [("existing", true), ("absolute-paths", false)];
        let mode = arguments.opt_choice("mode", &modes)?;
        match path {
            Some(path) => {
                let existing = mode.unwrap_or(false);
                Ok(Some(Self::new(Named::Path { path: path.into(), format, existing })))
            }
            None if format.is_some() || mode.is_some() => Err(arguments.missing("target")),
            None => Ok(None),
        }
    }

    /// Reads the member that names a node.
    pub(super) fn read_node(arguments: &mut Arguments) -> Result<Self, QmpError> {
        Ok(Self::of_node(arguments.string("target")?))
    }

    /// As the client named it.
    pub(super) fn named(&self) -> &Named {
        &self.named
    }

    /// What can be said before anything is taken or opened.
    pub(super) fn check(&self, control: &Control) -> Result<(), QmpError> {
        match &self.named {
            Named::Node { name, .. } => match control.disk(name).is_some() || control.target_node(name).is_some() {
                true => Ok(()),
                false => Err(control.if_point(name, "nothing is written to it").unwrap_or_else(|| not_found(name))),
            },
            Named::Path { format, .. } => {
                // Whether one is needed is seen when the file is: nobody's file is looked at under the lock.
                format.as_deref().map(str::parse::<Format>).transpose()?;
                Ok(())
            }
        }
    }

    /// Refused in QEMU's words unless what is written there can be compressed; a file that is not opened yet is judged by its
    /// format, so that none is made in vain.
    pub(super) fn check_compression(&self, target: Option<&dyn Target>) -> Result<(), QmpError> {
        let (can, name) = match (target, &self.named) {
            (Some(target), _) => (target.compresses(), target.name()),
            (None, Named::Path { path, format, existing }) => {
                let format = format.as_deref().map(str::parse::<Format>).transpose()?;
                let raw = format.map_or(!existing, |format| format == Format::Raw);
                (!raw, path.display().to_string())
            }
            (None, Named::Node { .. }) => return Ok(()),
        };
        match can {
            true => Ok(()),
            false => Err(QmpError::generic(format!("Compression is not supported for this drive {name}"))),
        }
    }

    /// Opens or makes the file, with no lock held; `size` is the disk's. A file that is there already and would be emptied
    /// is left alone unless `overwrite`: that cannot be undone, so it is done last.
    pub(super) fn open(&mut self, control: &Control, size: u64, overwrite: bool) -> Result<(), QmpError> {
        let Named::Path { path, format, existing } = &self.named else { return Ok(()) };
        if self.opened.0.is_some() {
            return Ok(());
        }
        let format = format_of(path, format.as_deref(), *existing)?;
        let policy = control.policy();
        let target = if *existing {
            target::open(path, format, &policy)?
        } else {
            match target::create(path, format, &CreateOptions { overwrite, ..CreateOptions::new(size) }, &policy) {
                Err(TargetError::Create { source, .. }) if !overwrite && source.kind() == ErrorKind::AlreadyExists => {
                    return Ok(());
                }
                made => made?,
            }
        };
        self.opened.0 = Some(target.into());
        Ok(())
    }

    /// The target, claimed; `None` while its file is not opened yet.
    pub(super) fn take(&mut self, control: &Control, disk: &Node) -> Result<Option<Arc<dyn Target>>, QmpError> {
        let (name, options) = match &mut self.named {
            Named::Path { .. } => return Ok(self.opened.0.clone()),
            Named::Node { name, options } => (name, options),
        };
        if *name == disk.id {
            return Err(QmpError::generic("Source and target cannot be the same"));
        }
        if control.disk(name).is_some() {
            return Err(QmpError::generic(format!("Node '{name}' is busy: it is served to a guest")));
        }
        let node = control.target_node(name).ok_or_else(|| not_found(name))?;
        *options = node.options();
        if self.claim.is_none() {
            self.claim = Some(Claim::take(&node, Use::Job)?);
        }
        node.target().map(Some)
    }

    /// The job has come to be: what was made here belongs to it, and the claim does.
    pub(super) fn hand_over(&mut self) -> Option<Box<dyn Any + Send + Sync>> {
        self.opened.0 = None;
        self.claim.take().map(|claim| Box::new(claim) as Box<dyn Any + Send + Sync>)
    }
}

/// Opens the file again that a killed process was writing, which has to be `known`: the image of that process, and no other.
pub(super) fn reopen(
    control: &Control,
    path: &Path,
    format: Option<&str>,
    existing: bool,
    known: Option<FileId>,
) -> Result<Arc<dyn Target>, QmpError> {
    let format = format_of(path, format, existing)?;
    let target = target::reopen(path, format, &control.policy())?;
    if known.is_none() || target.file_id() != known {
        return Err(QmpError::generic(format!("'{}' is another file", path.display())));
    }
    Ok(target.into())
}

/// Refused unless both have the same number of bytes.
pub(super) fn check_size(target: &dyn Target, disk: &Node) -> Result<(), QmpError> {
    if target.size() == disk.tracker.size() {
        return Ok(());
    }
    Err(QmpError::generic("Source and target image have different sizes"))
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
