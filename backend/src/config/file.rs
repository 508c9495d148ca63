//! The TOML file, and the sum of file and command line.
//!
//! ```toml
//! control = "/run/blkmark/control.sock"
//! runtime-dir = "/run/blkmark"
//! log-format = "json"
//! allow-path = ["/var/lib/images", "/backup"]
//! sandbox = "on"
//!
//! [[disk]]
//! id = "drive0"
//! path = "/var/lib/images/a.raw"
//! socket = "/run/blkmark/drive0.sock"
//! readonly = false
//! queues = 4
//! scratch-size = "10G"
//! ```
//!
//! A `[[disk]]` table has the keys of `--disk`; a switch may be a boolean, a number a number.

use std::path::PathBuf;

use toml::{Table, Value};

use super::disk::{DiskOptions, SocketSpec};
use super::error::{ConfigError, unknown};
use super::value;

const KEYS: &[&str] = &["control", "runtime-dir", "log-format", "allow-path", "sandbox", "disk"];

/// How the log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

impl LogFormat {
    /// `text` or `json`.
    ///
    /// # Errors
    /// [`ConfigError::BadValue`] for anything else.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(bad("log-format", text, "text or json")),
        }
    }
}

/// Which parts of the sandbox are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SandboxWish {
    /// Both.
    #[default]
    On,
    /// None.
    Off,
    /// Only the limit on system calls.
    Seccomp,
    /// Only the limit on files and ports.
    Landlock,
}

impl SandboxWish {
    /// `on`, `off`, `seccomp` or `landlock`.
    ///
    /// # Errors
    /// [`ConfigError::BadValue`] for anything else.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            "seccomp" => Ok(Self::Seccomp),
            "landlock" => Ok(Self::Landlock),
            _ => Err(bad("sandbox", text, "on, off, seccomp or landlock")),
        }
    }

    /// Whether system calls are to be limited.
    pub fn seccomp(self) -> bool {
        matches!(self, Self::On | Self::Seccomp)
    }

    /// Whether files and ports are.
    pub fn landlock(self) -> bool {
        matches!(self, Self::On | Self::Landlock)
    }
}

/// What `blkmark serve` is asked for, by the file, the command line or both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServeOptions {
    /// The disks, in the order they were named.
    pub disks: Vec<DiskOptions>,
    /// The control socket.
    pub control: Option<PathBuf>,
    /// Where what is to survive a restart, but not a reboot, lies.
    pub runtime_dir: Option<PathBuf>,
    /// How the log is written.
    pub log_format: Option<LogFormat>,
    /// Below which directories clients may name files; empty: anywhere.
    pub allow_paths: Vec<PathBuf>,
    /// Which parts of the sandbox are wanted; both unless told otherwise.
    pub sandbox: Option<SandboxWish>,
}

impl ServeOptions {
    /// Reads the text of a TOML file.
    ///
    /// # Errors
    /// [`ConfigError`], naming the key, and the disk it belongs to.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let table: Table = text.parse().map_err(|e: toml::de::Error| ConfigError::Toml(one_line(&e)))?;
        let mut options = Self::default();
        for (key, entry) in &table {
            match key.as_str() {
                "control" => options.control = Some(path(key, entry)?),
                "runtime-dir" => options.runtime_dir = Some(path(key, entry)?),
                "log-format" => {
                    options.log_format = Some(LogFormat::parse(&scalar(key, entry)?)?);
                }
                "allow-path" => {
                    options.allow_paths = match entry {
                        Value::Array(all) => all.iter().map(|p| path(key, p)).collect::<Result<_, _>>()?,
                        one => vec![path(key, one)?],
                    };
                }
                "sandbox" => options.sandbox = Some(SandboxWish::parse(&scalar(key, entry)?)?),
                "disk" => options.disks = disks(entry)?,
                _ => return Err(unknown(key, KEYS)),
            }
        }
        Ok(options)
    }

    /// The sum of a file and a command line: the disks of both, and what the command line says
    /// wins.
    pub fn overlaid_with(self, command_line: Self) -> Self {
        let mut disks = self.disks;
        disks.extend(command_line.disks);
        let allow_paths = match command_line.allow_paths.is_empty() {
            true => self.allow_paths,
            false => command_line.allow_paths,
        };
        Self {
            disks,
            control: command_line.control.or(self.control),
            runtime_dir: command_line.runtime_dir.or(self.runtime_dir),
            log_format: command_line.log_format.or(self.log_format),
            sandbox: command_line.sandbox.or(self.sandbox),
            allow_paths,
        }
    }

    /// Checks what no disk can check alone.
    ///
    /// # Errors
    /// [`ConfigError::NoDisk`], [`ConfigError::DuplicateId`], [`ConfigError::DuplicateSocket`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.disks.is_empty() {
            return Err(ConfigError::NoDisk);
        }
        for (i, disk) in self.disks.iter().enumerate() {
            let earlier = &self.disks[..i];
            if earlier.iter().any(|d| d.id == disk.id) {
                return Err(ConfigError::DuplicateId(disk.id.clone()));
            }
            if let SocketSpec::Path(path) = &disk.socket
                && (earlier.iter().any(|d| d.socket == disk.socket) || self.control.as_ref() == Some(path))
            {
                return Err(ConfigError::DuplicateSocket(path.clone()));
            }
        }
        Ok(())
    }
}

/// The `[[disk]]` tables.
fn disks(entry: &Value) -> Result<Vec<DiskOptions>, ConfigError> {
    let tables = entry.as_array().ok_or_else(|| bad("disk", entry.type_str(), "[[disk]] tables"))?;
    let mut disks = Vec::with_capacity(tables.len());
    for (i, entry) in tables.iter().enumerate() {
        let id = entry.get("id").and_then(Value::as_str).unwrap_or("no id");
        let disk = disk(entry).map_err(|source| ConfigError::Disk {
            number: i + 1,
            id: id.to_owned(),
            source: Box::new(source),
        })?;
        disks.push(disk);
    }
    Ok(disks)
}

fn disk(entry: &Value) -> Result<DiskOptions, ConfigError> {
    let table = entry.as_table().ok_or_else(|| bad("disk", entry.type_str(), "a [[disk]] table"))?;
    let pairs = table
        .iter()
        .map(|(key, entry)| Ok((key.clone(), scalar(key, entry)?)))
        .collect::<Result<Vec<_>, ConfigError>>()?;
    DiskOptions::from_pairs(&pairs)
}

/// A value as it would stand on the command line.
fn scalar(key: &str, entry: &Value) -> Result<String, ConfigError> {
    match entry {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        Value::Boolean(true) => Ok("on".into()),
        Value::Boolean(false) => Ok("off".into()),
        other => Err(bad(key, other.type_str(), "a string, a number or a boolean")),
    }
}

fn path(key: &str, entry: &Value) -> Result<PathBuf, ConfigError> {
    match entry {
        Value::String(text) => value::path(key, text),
        other => Err(bad(key, other.type_str(), "a path")),
    }
}

fn bad(key: &str, value: &str, expected: &'static str) -> ConfigError {
    ConfigError::BadValue { key: key.to_owned(), value: value.to_owned(), expected }
}

/// The parser draws the place over several lines; standard error gets one.
fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    match (lines.first(), lines.last()) {
        (Some(first), Some(last)) if lines.len() > 1 => format!("{first}: {last}"),
        _ => text,
    }
}
