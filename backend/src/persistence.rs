//! Where a disk's bitmaps are kept, and how the disk is known again.
//!
//! The daemon's: it puts the store of `bitmap`, which knows directories and stamps, together with a disk's options.

use crate::config::{Bitmaps, DiskOptions};
use crate::disk::DiskFile;
use anyhow::{Context, Result};
use blkmark_backup::resume::Haven;
use blkmark_backup::source::Source;
use blkmark_bitmap::Tracker;
use blkmark_bitmap::store::{Directory, Maps, NoMaps, Place, Shm};
use rustix::fs::FileType;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

/// What a store beside a disk is called, behind the disk's name.
const SUFFIX: &str = ".blkmark";

/// Where the stores of devices are: nothing can be put beside a device.
const DEVICES: &str = "/var/lib/blkmark";

/// Where live maps outlive the process, unless the operator's runtime directory is such a place too.
const SHM: &str = "/dev/shm";

/// The store of `disk`, there or not; `None`: it is to have none.
/// `resume`: freezes of jobs that can be gone on with.
pub(crate) fn place(
    disk: &DiskOptions,
    file: &DiskFile,
    runtime: Option<&Path>,
    resume: Vec<Uuid>,
) -> Result<Option<Place>> {
    let path = match &disk.bitmaps {
        Bitmaps::Off => return Ok(None),
        Bitmaps::At(path) => path.clone(),
        // A null disk is nowhere that something could be beside.
        Bitmaps::Beside if disk.null.is_some() => return Ok(None),
        Bitmaps::Beside => default_path(&disk.path)?,
    };
    let medium = match Directory::open(&path) {
        Ok(medium) => medium,
        // What the operator named has to be right; and nobody may have two disks, or two daemons, in one store.
        Err(error) if disk.bitmaps != Bitmaps::Beside || error.kind() == io::ErrorKind::ResourceBusy => {
            return Err(error).with_context(|| format!("the bitmap store '{}'", path.display()));
        }
        Err(error) => {
            tracing::error!(disk = disk.id, store = %path.display(), %error, "no persistent bitmaps");
            Directory::refused(&path, error.to_string())
        }
    };
    let medium = Arc::new(medium);
    let shm = runtime.and_then(Shm::new).or_else(|| Shm::new(Path::new(SHM)));
    let maps: Box<dyn Maps> = match shm {
        Some(shm) => Box::new(shm),
        None => {
            tracing::warn!(
                disk = disk.id,
                "no tmpfs for live maps: kill -9 will widen bitmaps as a power cut does; see runtime-dir"
            );
            Box::new(NoMaps)
        }
    };
    Ok(Some(Place { medium, maps, disk: file.stamp(boot())?, flush: file.flusher()?, resume }))
}

/// Where the points in time of `disk` outlive the process; only where there may be a store, which tells whether somebody else
/// served the disk meanwhile.
pub(crate) fn haven(disk: &DiskOptions, file: &DiskFile, runtime: Option<&Path>, scratch: &Path) -> Option<Haven> {
    if disk.bitmaps == Bitmaps::Off || disk.null.is_some() {
        return None;
    }
    let memory: Vec<&Path> = runtime.into_iter().chain([Path::new(SHM)]).collect();
    Haven::new(&memory, scratch, &disk.path, file.file_id()?, boot())
}

/// The directory that the store of `disk` is made in. That of devices is made if it is missing.
pub(crate) fn directory(disk: &DiskOptions) -> Option<PathBuf> {
    let path = match &disk.bitmaps {
        Bitmaps::Off => return None,
        Bitmaps::At(path) => path.clone(),
        Bitmaps::Beside if disk.null.is_some() => return None,
        Bitmaps::Beside => default_path(&disk.path).ok()?,
    };
    let parent = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
    if parent == Path::new(DEVICES) {
        // Opening the store tells what is wrong with it.
        let _ = std::fs::create_dir_all(parent);
    }
    Some(parent.to_owned())
}

/// Where the store of the disk at `path` is unless the operator names another place.
pub fn default_path(path: &Path) -> Result<PathBuf> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        return Ok(Path::new(DEVICES).join(format!("{}{SUFFIX}", escaped(path))));
    }
    // Beside the file itself, whatever links lead to it.
    let mut name = std::fs::canonicalize(path)?.into_os_string();
    name.push(SUFFIX);
    Ok(PathBuf::from(name))
}

/// A path as the name of a file, as systemd makes it: `/dev/vg/a-b` is `dev-vg-a\x2db`.
fn escaped(path: &Path) -> String {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let text = absolute.to_string_lossy();
    let mut name = String::new();
    for part in text.trim_matches('/').chars() {
        match part {
            '/' => name.push('-'),
            c if c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | ':') => name.push(c),
            c => c.to_string().bytes().for_each(|byte| name.push_str(&format!("\\x{byte:02x}"))),
        }
    }
    name
}

/// Which boot of the machine this is.
fn boot() -> Uuid {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    text.ok().and_then(|text| Uuid::try_parse(text.trim()).ok()).unwrap_or_default()
}

/// The disk's last byte is durable: the store is closed. What went wrong is told.
pub(crate) fn close(tracker: &Tracker, file: &DiskFile) -> Option<String> {
    let stamp = match file.stamp(boot()) {
        Ok(stamp) => stamp,
        Err(error) => return Some(format!("'{}': {error}", file.path().display())),
    };
    tracker.close(stamp).err().map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names_of_their_own() {
        assert_eq!(escaped(Path::new("/dev/vg/a-b")), "dev-vg-a\\x2db");
        assert_ne!(escaped(Path::new("/dev/a/b")), escaped(Path::new("/dev/a-b")));
    }
}
