//! The options of one disk.

use std::path::PathBuf;
use std::time::Duration;

use super::error::{ConfigError, unknown};
use super::{pairs, value};

/// The keys of a disk, in the order the help shows them.
pub const DISK_KEYS: &[&str] = &[
    "id",
    "path",
    "socket",
    "readonly",
    "direct",
    "queues",
    "queue-size",
    "serial",
    "bitmaps",
    "scratch",
    "scratch-size",
    "cpus",
    "poll",
    "null",
];

/// What a front end may set up unless told otherwise.
const DEFAULT_QUEUE_SIZE: u16 = 1024;
/// How long a queue thread looks around unless told otherwise.
const DEFAULT_POLL: Duration = Duration::from_micros(100);

/// What a disk of `null=SIZE` is called where others have a path; QEMU's name for the like.
const NULL: &str = "null-co://";

/// Where the front end of a disk comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketSpec {
    /// A path to bind.
    Path(PathBuf),
    /// A descriptor that the process was started with.
    Fd(i32),
}

/// Where the bitmaps of a disk are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Bitmaps {
    /// Beside the disk, in `DISK.blkmark/`.
    #[default]
    Beside,
    /// At this path.
    At(PathBuf),
    /// Nowhere: they live as long as the process.
    Off,
}

/// One disk to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// Node name and device name in the control socket.
    pub id: String,
    /// The raw file or block device.
    pub path: PathBuf,
    /// Instead of a file: so many bytes that nothing keeps, for benchmarks.
    pub null: Option<u64>,
    /// Where its front end comes to.
    pub socket: SocketSpec,
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the page cache (O_DIRECT). `None`: as the disk room sees fit.
    pub direct: Option<bool>,
    /// Queues offered.
    pub queues: u16,
    /// The largest ring a front end may set up. It is the front end that chooses the size.
    pub queue_size: u16,
    /// What GET_ID answers.
    pub serial: Option<String>,
    /// Where bitmaps are kept.
    pub bitmaps: Bitmaps,
    /// The directory for scratch files.
    pub scratch: Option<PathBuf>,
    /// Bytes that scratch may take.
    pub scratch_size: Option<u64>,
    /// Processors that its queue threads are tied to, one each, in turn; none: wherever the system puts them.
    pub cpus: Vec<usize>,
    /// How long a queue thread looks around before it sleeps, where that pays.
    pub poll: Duration,
}

impl DiskOptions {
    /// A disk with nothing but what it cannot do without.
    pub fn new(id: impl Into<String>, path: impl Into<PathBuf>, socket: SocketSpec) -> Self {
        Self {
            id: id.into(),
            path: path.into(),
            null: None,
            socket,
            read_only: false,
            direct: None,
            queues: 1,
            queue_size: DEFAULT_QUEUE_SIZE,
            serial: None,
            bitmaps: Bitmaps::Beside,
            scratch: None,
            scratch_size: None,
            cpus: Vec::new(),
            poll: DEFAULT_POLL,
        }
    }

    /// Parses the argument of `--disk`.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::from_pairs(&pairs::parse(text)?)
    }

    /// Makes a disk of keys and values; each key comes once.
    pub(super) fn from_pairs(pairs: &[(String, String)]) -> Result<Self, ConfigError> {
        if let Some((key, _)) = pairs.iter().find(|(k, _)| !DISK_KEYS.contains(&k.as_str())) {
            return Err(unknown(key, DISK_KEYS));
        }
        let get = |key: &'static str| {
            let pair = pairs.iter().find(|(k, _)| k == key);
            pair.map(|(_, value)| (key, value.as_str()))
        };
        let need = |key| get(key).ok_or(ConfigError::MissingKey { key, known: DISK_KEYS });
        let (key, text) = need("id")?;
        let id = value::id(key, text)?;
        let null = get("null").map(|(key, text)| value::parse_size(key, text)).transpose()?;
        let path = match (null, get("path")) {
            (Some(_), Some(_)) => return Err(ConfigError::OneMedium),
            (Some(_), None) => PathBuf::from(NULL),
            (None, _) => {
                let (key, text) = need("path")?;
                value::path(key, text)?
            }
        };
        let (key, text) = need("socket")?;
        let socket = SocketSpec::Path(value::path(key, text)?);

        let mut disk = Self::new(id, path, socket);
        if let Some(size) = null {
            (disk.null, disk.bitmaps) = (Some(size), Bitmaps::Off);
        }
        if let Some((key, text)) = get("readonly") {
            disk.read_only = value::parse_switch(key, text)?;
        }
        if let Some((key, text)) = get("direct") {
            disk.direct = Some(value::parse_switch(key, text)?);
        }
        if let Some((key, text)) = get("queues") {
            disk.queues = value::queues(key, text)?;
        }
        if let Some((key, text)) = get("queue-size") {
            disk.queue_size = value::queue_size(key, text)?;
        }
        if let Some((key, text)) = get("serial") {
            disk.serial = Some(value::serial(key, text)?);
        }
        if let Some((key, text)) = get("bitmaps") {
            disk.bitmaps = match text {
                "off" => Bitmaps::Off,
                _ => Bitmaps::At(value::path(key, text)?),
            };
        }
        if let Some((key, text)) = get("scratch") {
            disk.scratch = Some(value::path(key, text)?);
        }
        if let Some((key, text)) = get("scratch-size") {
            disk.scratch_size = Some(value::parse_size(key, text)?);
        }
        if let Some((key, text)) = get("cpus") {
            disk.cpus = value::cpus(key, text)?;
        }
        if let Some((key, text)) = get("poll") {
            disk.poll = value::poll(key, text)?;
        }
        Ok(disk)
    }
}
