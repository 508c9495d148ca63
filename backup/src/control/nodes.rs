//! Nodes: the served disks, and targets that `blockdev-add` opens and `blockdev-del` closes.
//!
//! A target is a chain of at most two nodes, a format (`raw`, `qcow2`) over a protocol (`file`, `host_device`, `nbd`), described in
//! one command or in two; a protocol node alone serves as a raw target. One node of a chain holds the open file, for it
//! is locked against everybody else: a `qcow2` borrows it from its `file` for as long as it is there.
//!
//! Invariant: files are opened and closed without the registry's lock; a node in use is never closed.

use super::claim::{Claim, Claims, Use, busy};
use super::{Control, done, options};
use crate::job::well_formed;
use crate::node::Node;
use crate::qmp::arguments::StringOrObject;
use crate::qmp::{Arguments, QmpError};
use crate::source::Source;
use crate::target::image::Image;
use crate::target::{self, Format, Policy, Target};
use serde_json::{Map, Value};
use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Longest node name, as in QEMU.
const NAME_MAX: usize = 31;

/// What a node is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Driver {
    /// A regular file.
    File,
    /// A block device.
    HostDevice,
    /// The bytes of its file, one to one.
    Raw,
    /// A qcow2 image in its file.
    Qcow2,
    /// An export of an NBD server.
    Nbd,
}

const DRIVERS: &[(&str, Driver)] = &[
    ("file", Driver::File),
    ("host_device", Driver::HostDevice),
    ("raw", Driver::Raw),
    ("qcow2", Driver::Qcow2),
    ("nbd", Driver::Nbd),
];

impl Driver {
    /// QEMU's name.
    pub(super) fn name(self) -> &'static str {
        DRIVERS.iter().find(|(_, driver)| *driver == self).map_or("", |(name, _)| name)
    }
}

/// What a node has open.
enum Opened {
    /// To be written.
    Writable(Arc<dyn Target>),
    /// Only to be read: its size is what is of interest.
    ReadOnly(u64),
    /// The node over it has the file.
    Lent,
}

/// A node that `blockdev-add` made.
pub(super) struct TargetNode {
    pub(super) name: String,
    pub(super) driver: Driver,
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    pub(super) claims: Claims,
    /// The claim on the node beneath, where there is one.
    file: Option<(Arc<TargetNode>, Claim)>,
    /// Where an `nbd` node connects to.
    server: Option<options::NbdServer>,
    /// Described within another node, and goes with it.
    inner: bool,
    /// What `blockdev-add` was given, unless that is said within another node.
    options: Option<Value>,
    opened: Mutex<Opened>,
}

/// A node as it was described, with names and files still to be looked at.
struct Description {
    name: Option<String>,
    driver: Driver,
    read_only: bool,
    file: FileOf,
}

/// How files are opened.
#[derive(Clone, Copy)]
enum How {
    /// As they are.
    New,
    /// As a killed process left them that was writing a disk of this size, in clusters of that size, or reading one.
    Left { size: u64, cluster: u64 },
}

enum FileOf {
    /// A protocol node's own.
    Path(PathBuf),
    /// An `nbd` node's own.
    Server(options::NbdServer),
    Named(String),
    Described(Box<Description>),
}

impl TargetNode {
    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// What a job can write to.
    pub(super) fn target(&self) -> Result<Arc<dyn Target>, QmpError> {
        match &*self.opened() {
            Opened::Writable(target) => Ok(Arc::clone(target)),
            Opened::ReadOnly(_) => Err(QmpError::generic("Could not create node: Block node is read-only")),
            Opened::Lent => Err(QmpError::generic(format!("Node '{}' could not be opened again", self.name))),
        }
    }

    /// What `blockdev-add` was given for it and, before that, for the node beneath.
    pub(super) fn options(&self) -> Vec<Value> {
        let below = self.file.as_ref().and_then(|(below, _)| below.options.clone());
        below.into_iter().chain(self.options.clone()).collect()
    }

    /// What a job can read, opened anew: nobody may be writing to it.
    pub(super) fn source(&self, policy: &Policy) -> Result<Arc<dyn Source>, QmpError> {
        self.read_with(policy, |server| server.open_to_read(policy))
    }

    fn read_with(
        &self,
        policy: &Policy,
        connect: impl FnOnce(&options::NbdServer) -> Result<Arc<dyn Source>, QmpError>,
    ) -> Result<Arc<dyn Source>, QmpError> {
        if !matches!(*self.opened(), Opened::ReadOnly(_)) {
            let text = format!("Node '{}' is open for writing: add it with 'read-only' to read it", self.name);
            return Err(QmpError::generic(text));
        }
        match (&self.server, self.driver) {
            (Some(server), _) => connect(server),
            (None, Driver::Qcow2) => Ok(Arc::new(Image::open(&self.path, Format::Qcow2, policy)?)),
            (None, _) => Ok(Arc::new(Image::open(&self.path, Format::Raw, policy)?)),
        }
    }

    /// Virtual size in bytes, unless another node has the file.
    pub(super) fn size(&self) -> Option<u64> {
        match &*self.opened() {
            Opened::Writable(target) => Some(target.size()),
            Opened::ReadOnly(size) => Some(*size),
            Opened::Lent => None,
        }
    }

    /// Opens the file again that a node over it had, whose claim still stands.
    fn take_back(&self, policy: &Policy) {
        if !matches!(*self.opened(), Opened::Lent) {
            return;
        }
        let again = open(&self.path, Format::Raw, self.read_only, policy, How::New);
        match again {
            Ok(opened) => *self.opened() = opened,
            Err(error) => tracing::warn!(node = self.name, %error, "could not be opened again"),
        }
    }
}

impl fmt::Debug for TargetNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetNode").field("name", &self.name).field("path", &self.path).finish_non_exhaustive()
    }
}

impl Control {
    /// The disk that a backup or a new bitmap is for.
    pub(super) fn device(&self, name: &str) -> Result<&Arc<Node>, QmpError> {
        self.disk(name).ok_or_else(|| match self.target_node(name) {
            Some(_) => not_served(name),
            None => self.if_point(name, "bitmaps and points are of served disks").unwrap_or_else(|| not_found(name)),
        })
    }

    /// What is wrong with naming a point in time, if that was done.
    pub(super) fn if_point(&self, name: &str, why: &str) -> Option<QmpError> {
        let is_point = self.point(name).is_some();
        is_point.then(|| QmpError::generic(format!("Node '{name}' is a point in time: {why}")))
    }

    /// The disk whose bitmap is meant.
    pub(super) fn bitmap_node(&self, name: &str) -> Result<&Arc<Node>, QmpError> {
        self.disk(name).ok_or_else(|| match self.target_node(name) {
            Some(_) => not_served(name),
            None => {
                let point = self.if_point(name, "bitmaps are of served disks");
                point.unwrap_or_else(|| QmpError::generic(format!("Node '{name}' not found")))
            }
        })
    }

    pub(super) fn target_node(&self, name: &str) -> Option<Arc<TargetNode>> {
        self.targets().iter().find(|node| node.name == name).cloned()
    }

    /// Refused unless a node may have this name.
    pub(super) fn check_new_name(&self, name: &str) -> Result<(), QmpError> {
        self.check_node_name(name)?;
        if self.target_node(name).is_some() || self.points.has(name) {
            return Err(QmpError::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        Ok(())
    }

    /// Refused unless a node that comes and goes may have this name, if no other such node has it.
    pub(super) fn check_node_name(&self, name: &str) -> Result<(), QmpError> {
        if !well_formed(name) {
            return Err(QmpError::generic(format!("Invalid node-name: '{name}'")));
        }
        if self.disk(name).is_some() {
            return Err(QmpError::generic(format!("Duplicate nodes with node-name='{name}'")));
        }
        if name.len() > NAME_MAX {
            return Err(QmpError::generic("Node name too long"));
        }
        Ok(())
    }
}

pub(super) fn not_found(name: &str) -> QmpError {
    QmpError::generic(format!("Cannot find device='{name}' nor node-name='{name}'"))
}

fn not_served(name: &str) -> QmpError {
    QmpError::generic(format!("Node '{name}' is a target: bitmaps and backups are of served disks"))
}

// ---- blockdev-add

fn describe(arguments: &mut Arguments) -> Result<Description, QmpError> {
    let driver = arguments.choice("driver", DRIVERS)?;
    let common = options::node_options(arguments)?;
    let file = match driver {
        Driver::Nbd => FileOf::Server(options::nbd_options(arguments)?),
        Driver::File | Driver::HostDevice => {
            options::file_options(arguments)?;
            FileOf::Path(arguments.string("filename")?.into())
        }
        Driver::Raw | Driver::Qcow2 => {
            if driver == Driver::Qcow2 {
                options::qcow2_options(arguments)?;
            }
            match arguments.string_or_object("file", "BlockdevRef")? {
                StringOrObject::String(name) => FileOf::Named(name),
                StringOrObject::Object(mut members) => {
                    let file = describe(&mut members)?;
                    members.finish()?;
                    FileOf::Described(Box::new(file))
                }
            }
        }
    };
    Ok(Description { name: common.name, driver, read_only: common.read_only, file })
}

/// Describes a node as `blockdev-add` was given it.
fn describe_whole(members: Map<String, Value>) -> Result<Description, QmpError> {
    let mut arguments = options::nested(Arguments::new(members))?;
    let description = describe(&mut arguments)?;
    arguments.finish()?;
    if description.name.is_none() {
        return Err(QmpError::generic("'node-name' must be specified for the root node"));
    }
    Ok(description)
}

pub(super) fn add(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    let members = arguments.into_members();
    let description = describe_whole(members.clone())?;
    let mut made = Vec::new();
    make(control, description, Some(members.into()), How::New, &mut made)?;
    // Somebody else may have taken a name meanwhile; then all that was opened here is closed again.
    let taken = {
        let mut targets = control.targets();
        let names = || made.iter().map(|node: &Arc<TargetNode>| node.name.clone()).filter(|name| !name.is_empty());
        let taken = names().find(|name| {
            targets.iter().any(|node| node.name == *name)
                || control.points.has(name)
                || names().filter(|other| other == name).count() > 1
        });
        match taken {
            None => {
                targets.append(&mut made);
                None
            }
            taken => taken,
        }
    };
    match taken {
        None => done(),
        Some(name) => Err(QmpError::generic(format!("Duplicate nodes with node-name='{name}'"))),
    }
}

/// Makes a node and, before it, what is described within it. `options`: what it is described by, none for one within another.
fn make(
    control: &Control,
    description: Description,
    options: Option<Value>,
    how: How,
    made: &mut Vec<Arc<TargetNode>>,
) -> Result<Arc<TargetNode>, QmpError> {
    let Description { name, driver, read_only, file } = description;
    let policy = control.policy();
    if let Some(name) = &name {
        control.check_new_name(name)?;
    }
    // Only a node within another can be without a name.
    let name = name.unwrap_or_default();
    let (path, opened, file, server) = match file {
        FileOf::Path(path) => {
            check_kind(driver, &path)?;
            let opened = open(&path, Format::Raw, read_only, &policy, how)?;
            (path, opened, None, None)
        }
        FileOf::Server(server) => {
            let opened = match (read_only, how) {
                (true, How::New) => Opened::ReadOnly(server.size(&policy)?),
                (true, How::Left { size, .. }) => Opened::ReadOnly(size),
                (false, How::New) => Opened::Writable(server.open(&policy)?),
                (false, How::Left { size, cluster }) => Opened::Writable(server.open_late(&policy, size, cluster)),
            };
            (server.name().into(), opened, None, Some(server))
        }
        FileOf::Described(description) if is_protocol(description.driver) => {
            let read_only_below = description.read_only;
            let child = make(control, *description, None, how, made)?;
            let claim = Claim::take(&child, Use::FileOf(name.clone()))?;
            let opened = borrow(&child, driver, read_only || read_only_below, &policy, how)?;
            (child.path.clone(), opened, Some((Arc::clone(&child), claim)), child.server.clone())
        }
        FileOf::Described(_) => return Err(stacked()),
        FileOf::Named(below) => {
            let of_these = made.iter().find(|node| node.name == below).cloned();
            let child = of_these.or_else(|| control.target_node(&below)).ok_or_else(|| match control.disk(&below) {
                Some(_) => QmpError::generic(format!("Node '{below}' is busy: it is served to a guest")),
                None => control.if_point(&below, "nothing stands on it").unwrap_or_else(|| not_found(&below)),
            })?;
            if !is_protocol(child.driver) {
                return Err(stacked());
            }
            let claim = Claim::take(&child, Use::FileOf(name.clone()))?;
            let opened = borrow(&child, driver, read_only, &policy, how)?;
            (child.path.clone(), opened, Some((Arc::clone(&child), claim)), child.server.clone())
        }
    };
    let node = Arc::new(TargetNode {
        name,
        driver,
        path,
        read_only: read_only || matches!(opened, Opened::ReadOnly(_)),
        claims: Claims::default(),
        file,
        server,
        inner: options.is_none(),
        options,
        opened: Mutex::new(opened),
    });
    made.push(Arc::clone(&node));
    Ok(node)
}

/// A node that a job of a killed process was using, opened again and claimed for that job, with those beneath it; none of them is in the
/// list yet.
pub(super) struct Reopened<T: ?Sized> {
    pub(super) nodes: Vec<Arc<TargetNode>>,
    pub(super) claim: Claim,
    pub(super) opened: Arc<T>,
}

/// Opens the node again that `options` made, in the form of [`TargetNode::options`]. No server is asked for anything.
fn remake(control: &Control, options: &[Value], how: How) -> Result<(Vec<Arc<TargetNode>>, Arc<TargetNode>), QmpError> {
    let mut nodes = Vec::new();
    let mut last = None;
    for options in options {
        let members = options.as_object().cloned().unwrap_or_default();
        let description = describe_whole(members)?;
        last = Some(make(control, description, Some(options.clone()), how, &mut nodes)?);
    }
    let node = last.ok_or_else(|| QmpError::generic("nothing was noted of its node"))?;
    Ok((nodes, node))
}

/// The same, to go on writing a disk of this size into it, in clusters of that size.
pub(super) fn reopen(
    control: &Control,
    options: &[Value],
    size: u64,
    cluster: u64,
) -> Result<Reopened<dyn Target>, QmpError> {
    let (nodes, node) = remake(control, options, How::Left { size, cluster })?;
    let claim = Claim::take(&node, Use::Job)?;
    Ok(Reopened { nodes, claim, opened: node.target()? })
}

/// The same, to compare a disk of this size with it.
pub(super) fn reopen_to_read(
    control: &Control,
    options: &[Value],
    size: u64,
) -> Result<Reopened<dyn Source>, QmpError> {
    let (nodes, node) = remake(control, options, How::Left { size, cluster: size })?;
    let claim = Claim::take(&node, Use::Populate)?;
    let policy = control.policy();
    let opened = node.read_with(&policy, |server| Ok(server.open_late_to_read(&policy, size)))?;
    Ok(Reopened { nodes, claim, opened })
}

fn is_protocol(driver: Driver) -> bool {
    matches!(driver, Driver::File | Driver::HostDevice | Driver::Nbd)
}

fn stacked() -> QmpError {
    QmpError::generic("A format node stands on a 'file', 'host_device' or 'nbd' node")
}

fn open(path: &Path, format: Format, read_only: bool, policy: &Policy, how: How) -> Result<Opened, QmpError> {
    if read_only {
        return Ok(Opened::ReadOnly(Image::open(path, format, policy)?.size()));
    }
    let target = match how {
        How::New => target::open(path, format, policy)?,
        How::Left { .. } => target::reopen(path, format, policy)?,
    };
    Ok(Opened::Writable(target.into()))
}

/// Opens the format over `child`, which is claimed. The file is locked by who has it open, so the child closes it first.
fn borrow(child: &TargetNode, driver: Driver, read_only: bool, policy: &Policy, how: How) -> Result<Opened, QmpError> {
    let mut below = child.opened();
    if let (Driver::Raw, false, Opened::Writable(target)) = (driver, read_only, &*below) {
        return Ok(Opened::Writable(Arc::clone(target)));
    }
    if child.driver == Driver::Nbd {
        return match (driver, &*below) {
            (Driver::Raw, Opened::Writable(target)) => Ok(Opened::ReadOnly(target.size())),
            (Driver::Raw, Opened::ReadOnly(size)) => Ok(Opened::ReadOnly(*size)),
            _ => Err(QmpError::generic("An 'nbd' node holds a raw image: let the server open the format")),
        };
    }
    let read_only = read_only || matches!(*below, Opened::ReadOnly(_));
    *below = Opened::Lent;
    drop(below);
    let format = if driver == Driver::Qcow2 { Format::Qcow2 } else { Format::Raw };
    let opened = open(&child.path, format, read_only, policy, how);
    if opened.is_err() {
        child.take_back(policy);
    }
    opened
}

/// `host_device` wants a device, as in QEMU; `file` takes both, since a device behind a link is no mistake.
fn check_kind(driver: Driver, path: &Path) -> Result<(), QmpError> {
    if driver != Driver::HostDevice {
        return Ok(());
    }
    // What is not there is reported by opening it.
    match std::fs::metadata(path) {
        Ok(metadata) if !metadata.file_type().is_block_device() && !metadata.file_type().is_char_device() => {
            Err(QmpError::generic(format!(
                "'host_device' driver requires '{}' to be either a character or block device",
                path.display()
            )))
        }
        _ => Ok(()),
    }
}

// ---- blockdev-del

pub(super) fn delete(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let name = arguments.string("node-name")?;
    arguments.finish()?;
    let mut targets = control.targets();
    let Some(position) = targets.iter().position(|node| node.name == name) else {
        return Err(match control.disk(&name) {
            Some(_) => QmpError::generic(format!("Node {name} is in use")),
            None if control.points.has(&name) => {
                QmpError::generic(format!("Node '{name}' is a point in time: point-remove drops it"))
            }
            None => QmpError::generic(format!("Failed to find node with node-name='{name}'")),
        });
    };
    let node = &targets[position];
    if node.inner {
        return Err(QmpError::generic(format!("Node {name} is not owned by the monitor")));
    }
    match node.claims.current() {
        Some(user @ (Use::Job | Use::Populate)) => return Err(busy(&name, &user)),
        Some(Use::FileOf(_)) => return Err(QmpError::generic(format!("Block device {name} is in use"))),
        None => {}
    }
    let node = targets.remove(position);
    if let Some((below, _)) = &node.file
        && below.inner
    {
        targets.retain(|node| !Arc::ptr_eq(node, below));
    }
    drop(targets);
    close(node, &control.policy());
    done()
}

/// Closes the file, and gives it back to a node beneath that stays.
fn close(node: Arc<TargetNode>, policy: &Policy) {
    *node.opened() = Opened::Lent;
    if let Some((below, _)) = &node.file
        && !below.inner
    {
        below.take_back(policy);
    }
}
