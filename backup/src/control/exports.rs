//! Served disks and points in time exported over NBD, for backup software that pulls: the server and its exports, by
//! QEMU's commands.
//!
//! There is at most one server. An export is read-only and shows the disk as it is at each read, or as it was at the point in
//! time; each of its bitmaps shows the bits that it had when the export was added, so the bitmap itself stays free: it may
//! be changed, removed, used by a job, and exported again.
//!
//! Invariants: an export's disk keeps its size; ids and names of exports are unique, also of those that are on their way
//! out; nobody waits for clients with the list locked, so that commands that only look always answer; after
//! [`Exports::shut_down`] there is no server, and none comes.

use super::points::PointUse;
use super::{Control, done, standing};
use crate::job::well_formed;
use crate::nbd::protocol::STRING_MAX;
use crate::nbd::{Address, ExportError, NbdServer, Removal, ServerError, ServerSettings, SourceExport};
use crate::node::Node;
use crate::point::PointSource;
use crate::qmp::{Arguments, BindError, Events, QmpError};
use crate::source::Source;
use crate::target::{self, Policy, os_text};
use serde_json::{Value, json};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// For QEMU's "no limit": 0.
const FOR_EVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// The server, and what it exports.
#[derive(Default)]
pub(super) struct Exports(Mutex<State>);

#[derive(Default)]
struct State {
    server: Option<Running>,
    /// Newest first, as QEMU lists them.
    exports: Vec<Exported>,
    closing: bool,
}

#[derive(Clone)]
struct Running {
    server: Arc<NbdServer>,
    /// The directory of its socket, by which it was found beneath the roots and by which it is removed.
    _directory: Option<Arc<OwnedFd>>,
}

struct Exported {
    id: String,
    node: String,
    /// What NBD's clients call it.
    name: String,
    shutting_down: bool,
    /// Of a point in time: the right to read it.
    _point: Option<PointUse>,
}

/// What an export reads.
struct Readable {
    disk: Arc<Node>,
    source: Arc<dyn Source>,
    point: Option<PointUse>,
}

impl Exports {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of an export of this disk, if there is one.
    pub(super) fn of(&self, node: &str) -> Option<String> {
        self.state().exports.iter().find(|export| export.node == node).map(|export| export.id.clone())
    }

    /// Ends the server and all exports, and hangs up on their clients; none comes afterwards.
    pub(super) fn shut_down(&self, events: &Events) {
        self.state().closing = true;
        self.stop(events);
    }

    /// Whether there was a server.
    fn stop(&self, events: &Events) -> bool {
        let (running, leaving) = {
            let mut state = self.state();
            let Some(running) = state.server.take() else { return false };
            let mut leaving = Vec::new();
            for export in state.exports.iter_mut().filter(|export| !export.shutting_down) {
                export.shutting_down = true;
                leaving.push(export.id.clone());
            }
            (running, leaving)
        };
        running.server.stop();
        for id in leaving {
            self.forget(&id, events);
        }
        true
    }

    /// Nobody uses it any more.
    fn forget(&self, id: &str, events: &Events) {
        let mut state = self.state();
        state.exports.retain(|export| export.id != id);
        // Told under the lock: an export that takes the id anew is heard of later.
        events.emit("BLOCK_EXPORT_DELETED", json!({ "id": id }));
    }
}

// ---- the server

pub(super) fn start(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let handshake = arguments.opt_u32("handshake-max-seconds")?;
    let credentials = arguments.opt_string("tls-creds")?;
    let connections = arguments.opt_u32("max-connections")?;
    let address = address(&mut arguments)?;
    arguments.finish()?;
    let default = ServerSettings::default();
    let mut settings = ServerSettings {
        max_connections: match connections {
            None => default.max_connections,
            Some(0) => usize::MAX,
            Some(most) => most as usize,
        },
        handshake: match handshake {
            None => default.handshake,
            Some(0) => FOR_EVER,
            Some(seconds) => Duration::from_secs(seconds.into()),
        },
        tls: None,
    };
    // Bound under the lock, so that of two servers that are started at once the second finds the first.
    let mut state = control.exports.state();
    if state.closing {
        return Err(QmpError::generic("The daemon is shutting down"));
    }
    if state.server.is_some() {
        return Err(QmpError::generic("NBD server already running"));
    }
    if let Some(id) = credentials {
        settings.tls = Some(control.objects.credentials(&id)?);
    }
    state.server = Some(listen(&address, settings, &control.policy())?);
    done()
}

/// Reads QEMU's SocketAddressLegacy.
fn address(arguments: &mut Arguments) -> Result<Address, QmpError> {
    let mut address = arguments.object("addr")?;
    let unix = address.choice("type", &[("unix", true), ("inet", false)])?;
    let mut data = address.object("data")?;
    let found = if unix {
        Address::Unix(data.string("path")?.into())
    } else {
        data.opt_bool("keep-alive")?;
        Address::Tcp { host: data.string("host")?, port: data.string("port")? }
    };
    data.finish()?;
    address.finish()?;
    Ok(found)
}

fn listen(address: &Address, settings: ServerSettings, policy: &Policy) -> Result<Running, QmpError> {
    let Address::Unix(path) = address else {
        let server = NbdServer::bind(address, settings).map_err(|error| QmpError::generic(error.to_string()))?;
        return Ok(Running { server: Arc::new(server), _directory: None });
    };
    let refused = |reason: String| QmpError::generic(format!("Failed to bind socket to {}: {reason}", path.display()));
    let (way, directory) = allowed(path, policy).map_err(|error| refused(os_text(&error)))?;
    match NbdServer::bind(&Address::Unix(way), settings) {
        Ok(server) => Ok(Running { server: Arc::new(server), _directory: directory.map(Arc::new) }),
        Err(ServerError::Unix(error)) => Err(refused(match error {
            BindError::Path { error, .. } | BindError::Directory { error, .. } | BindError::Listen { error, .. } => {
                os_text(&error)
            }
            BindError::UnsafeDirectory { .. } => "everybody may write to its directory".to_owned(),
            BindError::InUse { .. } => "it is in use by a running process".to_owned(),
            BindError::NotASocket { .. } => "it exists and is not a socket".to_owned(),
        })),
        Err(error @ ServerError::Listen { .. }) => Err(QmpError::generic(error.to_string())),
    }
}

fn allowed(path: &Path, policy: &Policy) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if policy.roots.is_empty() {
        return Ok((path.to_owned(), None));
    }
    let (way, directory) = beneath(parent, policy)?;
    Ok((way.join(name), directory))
}

/// The directory, if it lies beneath the roots; then by way of its descriptor, so that what was checked is what is used.
pub(super) fn beneath(directory: &Path, policy: &Policy) -> io::Result<(PathBuf, Option<OwnedFd>)> {
    if policy.roots.is_empty() {
        return Ok((directory.to_owned(), None));
    }
    let found = target::locate(directory, policy)?;
    Ok((Path::new("/proc/self/fd").join(found.as_raw_fd().to_string()), Some(found)))
}

pub(super) fn stop(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    if control.exports.stop(&control.events) { done() } else { Err(not_running()) }
}

fn not_running() -> QmpError {
    QmpError::generic("NBD server not running")
}

// ---- exports

pub(super) fn add(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    arguments.choice("type", &[("nbd", ())])?;
    let id = arguments.string("id")?;
    // What it says is so in any case: there are no I/O threads to choose from, and no writes to put through.
    arguments.opt_bool("fixed-iothread")?;
    let thread = arguments.opt_string("iothread")?;
    let node = arguments.string("node-name")?;
    let writable = arguments.opt_bool("writable")?.unwrap_or(false);
    arguments.opt_bool("writethrough")?;
    arguments.opt_bool("allow-inactive")?;
    let name = arguments.opt_string("name")?.unwrap_or_else(|| node.clone());
    let description = arguments.opt_string("description")?.unwrap_or_default();
    let bitmaps = standing::read(&mut arguments)?;
    let depth = arguments.opt_bool("allocation-depth")?.unwrap_or(false);
    arguments.finish()?;

    if !well_formed(&id) {
        return Err(QmpError::generic("Invalid block export id"));
    }
    check_id(&control.exports.state(), &id)?;
    let Readable { disk, source, point } = control.exported(&node, &id)?;
    if writable && (disk.read_only || point.is_some()) {
        return Err(QmpError::generic("Cannot export read-only node as writable"));
    }
    if writable {
        return Err(QmpError::generic(format!(
            "Node '{node}' is served to a guest: it can only be exported read-only"
        )));
    }
    if let Some(thread) = thread {
        return Err(QmpError::generic(format!("iothread \"{thread}\" not found")));
    }
    if depth {
        return Err(QmpError::generic("allocation-depth is not supported: a served disk stands on nothing"));
    }
    // Its size stands while its export is made, and afterwards because there is an export.
    let _same_size = disk.resizing.lock().unwrap_or_else(PoisonError::into_inner);
    check_server(&control.exports.state(), &name)?;
    for (what, text) in [("export name", &name), ("description", &description)] {
        if text.len() > STRING_MAX {
            return Err(QmpError::generic(format!("{what} '{text}' too long")));
        }
    }
    let bits = control.standing(&disk, bitmaps)?;
    let export = SourceExport::new(source, bits);
    let mut state = control.exports.state();
    check_id(&state, &id)?;
    let server = check_server(&state, &name)?;
    server.add(&name, Arc::new(export), &description).map_err(|error| QmpError::generic(error.to_string()))?;
    state.exports.insert(0, Exported { id, node, name, shutting_down: false, _point: point });
    done()
}

fn check_id(state: &State, id: &str) -> Result<(), QmpError> {
    match state.exports.iter().any(|export| export.id == id) {
        true => Err(QmpError::generic(format!("Block export id '{id}' is already in use"))),
        false => Ok(()),
    }
}

fn check_server(state: &State, name: &str) -> Result<Arc<NbdServer>, QmpError> {
    let running = state.server.as_ref().ok_or_else(not_running)?;
    if state.exports.iter().any(|export| export.name == name) {
        return Err(QmpError::generic(format!("NBD server already has export named '{name}'")));
    }
    Ok(Arc::clone(&running.server))
}

impl Control {
    /// A disk, or a point in time, which export `id` reads from now on.
    fn exported(&self, name: &str, id: &str) -> Result<Readable, QmpError> {
        if let Some(disk) = self.disk(name) {
            return Ok(Readable { disk: Arc::clone(disk), source: Arc::clone(&disk.source), point: None });
        }
        if let Some(node) = self.point(name) {
            let point = Some(node.take(format!("it is exported as '{id}'"))?);
            let source = Arc::new(PointSource::new(Arc::clone(&node.point)));
            return Ok(Readable { disk: Arc::clone(&node.disk), source, point });
        }
        Err(match self.target_node(name) {
            Some(_) => QmpError::generic(format!("Node '{name}' is a target: only served disks are exported")),
            None => QmpError::generic(format!("Cannot find device='' nor node-name='{name}'")),
        })
    }
}

pub(super) fn delete(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let id = arguments.string("id")?;
    let mode = arguments.opt_choice("mode", &[("safe", Removal::Safe), ("hard", Removal::Hard)])?;
    arguments.finish()?;
    let (server, name) = {
        let mut state = control.exports.state();
        let server = state.server.as_ref().map(|running| Arc::clone(&running.server));
        let Some(export) = state.exports.iter_mut().find(|export| export.id == id) else {
            return Err(QmpError::generic(format!("Export '{id}' is not found")));
        };
        if export.shutting_down {
            return Err(QmpError::generic(format!("Export '{id}' is already shutting down")));
        }
        // What nobody uses is gone without a wait, so this is decided while nobody can stop the server.
        let safely = server.as_ref().map(|server| server.remove(&export.name, Removal::Safe));
        if safely == Some(Err(ExportError::InUse)) && mode != Some(Removal::Hard) {
            return Err(QmpError::generic(format!("export '{id}' still in use")));
        }
        export.shutting_down = true;
        (server, export.name.clone())
    };
    if let Some(server) = server {
        // Fails if it is gone: so it was meant.
        let _ = server.remove(&name, Removal::Hard);
    }
    control.exports.forget(&id, &control.events);
    done()
}

pub(super) fn query(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    let state = control.exports.state();
    let shown = state.exports.iter().map(|export| {
        json!({
            "node-name": export.node,
            "shutting-down": export.shutting_down,
            "type": "nbd",
            "id": export.id,
        })
    });
    Ok(shown.collect())
}
