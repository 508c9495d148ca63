//! What the kernel says of a block device, by which it is known again: `/dev/sdb` may be another disk tomorrow, and
//! `/dev/loop0` another file in a second.
//!
//! Called by `file` for the stamp of a store. Whatever cannot be read is told as 0, which is the same as nothing.

use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};

/// Names that stay with a device, where it has one: of LVM and device mapper, of MD, of SCSI and NVMe, of virtio.
const NAMES: [&str; 6] = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "device/serial", "serial"];

/// A device as sysfs shows it.
pub(super) struct Identity {
    /// Number of this attachment of the disk: of meaning within one boot, and never used twice in it.
    pub(super) sequence: u64,
    /// Hash of the name that stays with it; 0 if it has none.
    pub(super) name: u64,
}

/// The device of this number (`st_rdev`).
pub(super) fn of(device: u64) -> Identity {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let Ok(own) = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")) else {
        return Identity { sequence: 0, name: 0 };
    };
    read(&own)
}

fn read(own: &Path) -> Identity {
    // A partition is what the whole disk is, and where it begins.
    let start = text(own.join("partition")).and_then(|_| text(own.join("start")));
    let disk = match &start {
        Some(_) => own.parent().unwrap_or(own),
        None => own,
    };
    let sequence = text(disk.join("diskseq")).and_then(|text| text.parse().ok()).unwrap_or(0);
    let name = NAMES.iter().find_map(|file| Some((file, text(disk.join(file))?)));
    let name = name.map_or(0, |(file, name)| hash(&format!("{file} {name} {}", start.unwrap_or_default())));
    Identity { sequence, name }
}

fn text(path: PathBuf) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// Never 0.
fn hash(text: &str) -> u64 {
    let hash = Sha256::digest(text.as_bytes());
    hash.iter().take(8).fold(0, |all, byte| all << 8 | u64::from(*byte)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sysfs(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn a_name_stays_and_an_attachment_does_not() {
        let before = sysfs(&[("diskseq", "7\n"), ("dm/uuid", "LVM-abc\n"), ("wwid", "naa.5\n")]);
        let after = sysfs(&[("diskseq", "9\n"), ("dm/uuid", "LVM-abc\n")]);
        let (before, after) = (read(before.path()), read(after.path()));
        assert_eq!((before.sequence, after.sequence), (7, 9));
        assert_eq!(before.name, after.name);
        assert_ne!(before.name, 0);
        let other = sysfs(&[("diskseq", "7\n"), ("dm/uuid", "LVM-abd\n")]);
        assert_ne!(read(other.path()).name, before.name);
        let none = sysfs(&[("diskseq", "7\n"), ("dm/uuid", "\n")]);
        assert_eq!(read(none.path()).name, 0);
    }

    #[test]
    fn partitions_of_a_disk_are_told_apart() {
        let disk = sysfs(&[
            ("diskseq", "3\n"),
            ("wwid", "naa.5\n"),
            ("a1/partition", "1\n"),
            ("a1/start", "2048\n"),
            ("a2/partition", "2\n"),
            ("a2/start", "4096\n"),
        ]);
        let read = |name: &str| read(&disk.path().join(name));
        let (first, second) = (read("a1"), read("a2"));
        assert_eq!((first.sequence, second.sequence), (3, 3));
        assert_ne!(first.name, second.name);
    }
}
