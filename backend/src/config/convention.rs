//! The command line that QEMU's vhost-user back ends share (QEMU `docs/interop/vhost-user.rst`,
//! "Backend program conventions", and `vhost-user.json`).

use std::path::PathBuf;

use super::disk::{DiskOptions, SocketSpec};
use super::error::ConfigError;
use super::value;

/// What `--print-capabilities` prints: a `BackendCapabilitiesBlock` of `vhost-user.json`.
pub const CAPABILITIES: &str = r#"{"type": "block", "features": ["read-only", "blk-file"]}"#;

/// The descriptor by which management layers find the back end, to be installed in
/// `/usr/share/qemu/vhost-user/`.
pub const BACKEND_DESCRIPTOR: &str = include_str!("50-blkmark.json");

/// The id of the one disk that this command line serves.
const ID: &str = "drive0";

/// The disk of `--blk-file F (--socket-path S | --fd N) [--read-only]`.
///
/// # Errors
/// [`ConfigError::OneSocket`] unless exactly one of path and descriptor is given, and
/// [`ConfigError::BadValue`] for an empty path or a negative descriptor.
pub fn from_convention(
    blk_file: &str,
    socket_path: Option<&str>,
    fd: Option<i32>,
    read_only: bool,
) -> Result<DiskOptions, ConfigError> {
    let path: PathBuf = value::path("--blk-file", blk_file)?;
    let socket = match (socket_path, fd) {
        (Some(path), None) => SocketSpec::Path(value::path("--socket-path", path)?),
        (None, Some(fd)) if fd >= 0 => SocketSpec::Fd(fd),
        (None, Some(fd)) => {
            return Err(ConfigError::BadValue {
                key: "--fd".into(),
                value: fd.to_string(),
                expected: "the number of an open descriptor",
            });
        }
        _ => return Err(ConfigError::OneSocket),
    };
    let mut disk = DiskOptions::new(ID, path, socket);
    disk.read_only = read_only;
    Ok(disk)
}
