//! Members of QEMU's option structures that several commands share, or that are checked and then need nothing done.
//!
//! An option is accepted if leaving it out of account keeps its promise; one whose promise could not be kept is refused by
//! name.

use crate::cbw;
use crate::copy::GUEST_LATENCY;
use crate::job::{OnError, OnFailure, Settings};
use crate::nbd::{Address, Client, ClientSettings, LateReader, LateTarget, NbdReader, NbdTarget};
use crate::point::PointOptions;
use crate::qmp::{Arguments, QmpError};
use crate::source::Source;
use crate::target::{Policy, Target};
use blkmark_bitmap::Granularity;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;

/// What every node description may have.
pub(super) struct NodeOptions {
    /// `node-name`.
    pub(super) name: Option<String>,
    /// `read-only`.
    pub(super) read_only: bool,
}

/// Reads the members common to all drivers. How a target is cached and what it does with discards is its own affair.
pub(super) fn node_options(arguments: &mut Arguments) -> Result<NodeOptions, QmpError> {
    let name = arguments.opt_string("node-name")?;
    arguments.opt_choice("discard", &[("ignore", ()), ("unmap", ())])?;
    if let Some(mut cache) = arguments.opt_object("cache")? {
        cache.opt_bool("direct")?;
        if cache.opt_bool("no-flush")? == Some(true) {
            return Err(QmpError::generic("cache.no-flush is not supported: a backup that is over is durable"));
        }
        cache.finish()?;
    }
    let read_only = arguments.opt_bool("read-only")?.unwrap_or(false);
    arguments.opt_bool("auto-read-only")?;
    if arguments.opt_bool("force-share")? == Some(true) {
        return Err(QmpError::generic("force-share is not supported: a target is written by one process"));
    }
    arguments.opt_choice("detect-zeroes", &[("off", ()), ("on", ()), ("unmap", ())])?;
    Ok(NodeOptions { name, read_only })
}

/// Reads the members of `file` and `host_device` besides `filename`.
pub(super) fn file_options(arguments: &mut Arguments) -> Result<(), QmpError> {
    arguments.opt_choice("locking", &[("auto", ()), ("on", ()), ("off", ())])?;
    arguments.opt_choice("aio", &[("threads", ()), ("native", ()), ("io_uring", ())])?;
    arguments.opt_i64("aio-max-batch")?;
    arguments.opt_bool("drop-cache")?;
    Ok(())
}

/// Reads the members of `qcow2` besides `file`. The backing chain is the one that the image's header names.
pub(super) fn qcow2_options(arguments: &mut Arguments) -> Result<(), QmpError> {
    for name in ["lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other"] {
        arguments.opt_bool(name)?;
    }
    for name in ["l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-size", "cache-clean-interval"] {
        arguments.opt_u64(name)?;
    }
    for name in ["backing", "data-file", "encrypt"] {
        if arguments.has(name) {
            return Err(QmpError::generic(format!(
                "Parameter '{}' is not supported: the image's own header says what it stands on",
                arguments.path_of(name)
            )));
        }
    }
    Ok(())
}

/// An export as `blockdev-add` describes it.
#[derive(Clone)]
pub(super) struct NbdServer {
    address: Address,
    export: String,
    settings: ClientSettings,
}

/// Reads the members of `nbd`.
pub(super) fn nbd_options(arguments: &mut Arguments) -> Result<NbdServer, QmpError> {
    #[derive(Clone)]
    enum Kind {
        Unix,
        Inet,
    }
    let mut server = arguments.object("server")?;
    let address = match server.choice("type", &[("unix", Kind::Unix), ("inet", Kind::Inet)])? {
        Kind::Unix => Address::Unix(server.string("path")?.into()),
        Kind::Inet => {
            server.opt_bool("keep-alive")?;
            Address::Tcp { host: server.string("host")?, port: server.string("port")? }
        }
    };
    server.finish()?;
    let export = arguments.opt_string("export")?.unwrap_or_default();
    for name in ["tls-creds", "tls-hostname", "x-dirty-bitmap"] {
        if arguments.has(name) {
            return Err(QmpError::generic(format!("Parameter '{}' is not supported", arguments.path_of(name))));
        }
    }
    if arguments.opt_u32("reconnect-delay")?.unwrap_or(0) != 0 {
        return Err(QmpError::generic(
            "reconnect-delay is not supported: a server that was lost may have lost what it had answered for",
        ));
    }
    let open = Duration::from_secs(arguments.opt_u32("open-timeout")?.unwrap_or(0).into());
    Ok(NbdServer { address, export, settings: ClientSettings { open, ..ClientSettings::default() } })
}

impl NbdServer {
    /// QEMU's way to write it.
    pub(super) fn name(&self) -> String {
        self.address.url(&self.export)
    }

    /// Connects, to write to it.
    pub(super) fn open(&self, policy: &Policy) -> Result<Arc<dyn Target>, QmpError> {
        match NbdTarget::open(&self.address, &self.export, self.settings, policy) {
            Ok(target) => Ok(Arc::new(target)),
            Err(error) => Err(QmpError::generic(error.to_string())),
        }
    }

    /// What a killed process was writing to, with a connection to come.
    pub(super) fn open_late(&self, policy: &Policy, size: u64, cluster: u64) -> Arc<dyn Target> {
        let (address, export) = (self.address.clone(), self.export.clone());
        Arc::new(LateTarget::new(address, export, self.settings, policy.clone(), size, cluster))
    }

    /// Connects, to read it.
    pub(super) fn open_to_read(&self, policy: &Policy) -> Result<Arc<dyn Source>, QmpError> {
        match NbdReader::open(&self.address, &self.export, self.settings, policy) {
            Ok(source) => Ok(Arc::new(source)),
            Err(error) => Err(QmpError::generic(error.to_string())),
        }
    }

    /// What a killed process was reading, with a connection to come.
    pub(super) fn open_late_to_read(&self, policy: &Policy, size: u64) -> Arc<dyn Source> {
        let (address, export) = (self.address.clone(), self.export.clone());
        Arc::new(LateReader::new(address, export, self.settings, policy.clone(), size))
    }

    /// Looks how many bytes it has.
    pub(super) fn size(&self, policy: &Policy) -> Result<u64, QmpError> {
        match Client::connect(&self.address, &self.export, self.settings, policy) {
            Ok(client) => Ok(client.export().size),
            Err(error) => Err(QmpError::generic(error.to_string())),
        }
    }
}

/// No description is deeper; what is, is refused as it stands.
const DEEPEST: usize = 8;

/// Brings `"file.filename": …` into the form `"file": {"filename": …}`: both are in use.
pub(super) fn nested(arguments: Arguments) -> Result<Arguments, QmpError> {
    let mut members = Map::new();
    for (name, value) in arguments.into_members() {
        if name.matches('.').count() > DEEPEST {
            return Err(QmpError::generic(format!("Parameter '{name}' is unexpected")));
        }
        insert(&mut members, &name, &name, value)?;
    }
    Ok(Arguments::new(members))
}

fn insert(members: &mut Map<String, Value>, path: &str, whole: &str, value: Value) -> Result<(), QmpError> {
    let twice = || QmpError::generic(format!("Parameter '{whole}' is given in two ways"));
    match path.split_once('.') {
        None if members.contains_key(path) => Err(twice()),
        None => {
            members.insert(path.to_owned(), value);
            Ok(())
        }
        Some((head, rest)) => {
            let inner = members.entry(head).or_insert_with(|| Value::Object(Map::new()));
            let inner = inner.as_object_mut().ok_or_else(twice)?;
            insert(inner, rest, whole, value)
        }
    }
}

// ---- jobs

const ON_ERRORS: &[(&str, OnError)] = &[
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospc", OnError::Enospc),
    ("stop", OnError::Stop),
    ("auto", OnError::Auto),
];

/// Reads how a job is to behave, but for its speed, which is checked later.
pub(super) fn job_settings(arguments: &mut Arguments) -> Result<Settings, QmpError> {
    Ok(Settings {
        speed: 0,
        on_source_error: arguments.opt_choice("on-source-error", ON_ERRORS)?.unwrap_or_default(),
        on_target_error: arguments.opt_choice("on-target-error", ON_ERRORS)?.unwrap_or_default(),
        auto_finalize: arguments.opt_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: arguments.opt_bool("auto-dismiss")?.unwrap_or(true),
        guest_latency: guest_latency(arguments)?.unwrap_or(GUEST_LATENCY),
        sharing: false,
        on_failure: arguments
            .opt_choice("on-failure", &[("reclaim", OnFailure::Reclaim), ("keep", OnFailure::Keep)])?
            .unwrap_or_default(),
    })
}

/// The same of a populate, whose two sides are both read; `on-error` is what the proposal had, for either.
pub(super) fn populate_settings(arguments: &mut Arguments) -> Result<Settings, QmpError> {
    let either = arguments.opt_choice("on-error", ON_ERRORS)?.unwrap_or_default();
    Ok(Settings {
        on_source_error: arguments.opt_choice("on-source-error", ON_ERRORS)?.unwrap_or(either),
        on_target_error: arguments.opt_choice("on-target-error", ON_ERRORS)?.unwrap_or(either),
        auto_finalize: arguments.opt_bool("auto-finalize")?.unwrap_or(true),
        auto_dismiss: arguments.opt_bool("auto-dismiss")?.unwrap_or(true),
        guest_latency: guest_latency(arguments)?.unwrap_or(GUEST_LATENCY),
        ..Settings::default()
    })
}

/// Reads how a point in time treats the guest's writes: QEMU's options of its copy-before-write filter.
pub(super) fn point_options(arguments: &mut Arguments) -> Result<PointOptions, QmpError> {
    let policies =
        [("break-snapshot", cbw::OnError::BreakSnapshot), ("break-guest-write", cbw::OnError::BreakGuestWrite)];
    let default = PointOptions::default();
    Ok(PointOptions {
        keep: false,
        outlive: false,
        on_error: arguments.opt_choice("on-cbw-error", &policies)?.unwrap_or(default.on_error),
        timeout: match arguments.opt_u32("cbw-timeout")? {
            None => default.timeout,
            Some(0) => None,
            Some(seconds) => Some(Duration::from_secs(seconds.into())),
        },
    })
}

/// Reads `max-guest-latency`, in microseconds: what the copy leaves of the disk to the guest. 0: the copy does not look.
pub(super) fn guest_latency(arguments: &mut Arguments) -> Result<Option<Duration>, QmpError> {
    /// An hour; a longer limit is a mistake.
    const MOST: u64 = 3_600_000_000;
    match arguments.opt_u64("max-guest-latency")? {
        None => Ok(None),
        Some(micros) if micros <= MOST => Ok(Some(Duration::from_micros(micros))),
        Some(_) => Err(QmpError::generic(format!("max-guest-latency may be at most {MOST} microseconds"))),
    }
}

/// A copy of a whole disk needs no smaller clusters than these, as in QEMU.
const USUAL_CLUSTER: u64 = 64 * 1024;

/// Smaller requests than these are as slow, and many disks refuse them.
const SMALLEST_CLUSTER: u64 = 4096;

/// QEMU's tuning of a copy. The number of workers is this engine's own affair.
#[derive(Debug, Default)]
pub(super) struct Perf {
    max_workers: Option<i64>,
    max_chunk: i64,
    min_cluster: u64,
    /// Whether the target may take blocks from the disk's file.
    pub(super) copy_range: bool,
}

/// Reads `discard-source` and `x-perf`.
pub(super) fn perf(arguments: &mut Arguments) -> Result<Perf, QmpError> {
    if arguments.opt_bool("discard-source")? == Some(true) {
        return Err(QmpError::generic("discard-source is not supported: the source is a guest's disk"));
    }
    let Some(mut members) = arguments.opt_object("x-perf")? else { return Ok(Perf::default()) };
    let copy_range = members.opt_bool("use-copy-range")?.unwrap_or(false);
    let perf = Perf {
        copy_range,
        max_workers: members.opt_i64("max-workers")?,
        max_chunk: members.opt_i64("max-chunk")?.unwrap_or(0),
        min_cluster: members.opt_u64("min-cluster-size")?.unwrap_or(0),
    };
    members.finish()?;
    Ok(perf)
}

impl Perf {
    /// Checks it, and finds the unit of copying to `target` what a bitmap of this granularity holds, or all. A finer
    /// bitmap knows of smaller changes, and a target that has no larger clusters itself takes just those.
    pub(super) fn cluster(
        &self,
        target: Option<&dyn Target>,
        bitmap: Option<Granularity>,
    ) -> Result<Granularity, QmpError> {
        let refuse = |text: String| Err(QmpError::generic(text));
        if self.max_workers.is_some_and(|workers| !(1..=i64::from(i32::MAX)).contains(&workers)) {
            return refuse(format!("max-workers must be between 1 and {}", i32::MAX));
        }
        if self.max_chunk < 0 {
            return refuse("max-chunk must be zero (which means no limit) or positive".to_owned());
        }
        if self.min_cluster > 0 && !self.min_cluster.is_power_of_two() {
            return refuse("min-cluster-size needs to be a power of 2".to_owned());
        }
        let usual = bitmap.map_or(USUAL_CLUSTER, |bitmap| bitmap.bytes().clamp(SMALLEST_CLUSTER, USUAL_CLUSTER));
        let cluster = usual.max(self.min_cluster).max(target.map_or(0, Target::cluster_size));
        let max_chunk = self.max_chunk.unsigned_abs();
        if max_chunk > 0 && max_chunk < cluster {
            return refuse(format!("Required max-chunk ({max_chunk}) is less than backup cluster size ({cluster})"));
        }
        match Granularity::new(cluster).filter(|_| cluster <= LARGEST_CLUSTER) {
            Some(cluster) => Ok(cluster),
            None => refuse(format!("min-cluster-size may be at most {LARGEST_CLUSTER}")),
        }
    }
}

/// A held guest write waits for one cluster to be saved.
const LARGEST_CLUSTER: u64 = 16 << 20;
