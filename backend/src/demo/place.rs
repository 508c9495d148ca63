//! Where the demo's files lie: a directory of its own, checked before anything is begun and removed at the end.
//!
//! Invariant: nothing outside of that directory is touched, and nothing of it is left unless the user wants it kept.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use tempfile::TempDir;

use super::error::DemoError;
use super::model::{BLOCK, Content, FIRST_STAMP, fill};
use super::workload::{Plan, STRIPE};
use crate::cli::size::human;

/// Bytes of a stripe.
const STRIPE_BYTES: u64 = STRIPE * BLOCK as u64;

/// Disks may be this small and this large: a picture needs some clusters, and every byte is read and hashed.
const SIZES: (u64, u64) = (Plan::MIN_STRIPES * STRIPE_BYTES, 64 << 30);

/// What the path of a Unix socket may have, without its closing zero.
const SOCKET_PATH_MAX: usize = 107;

/// What the names of the demo's directories begin with; six random characters follow.
const PREFIX: &str = "blkmark-demo-";

/// The longest path of a socket, as seen from the directory that the demo's own is made in.
const NAME_MAX: usize = "/blkmark-demo-XXXXXX/control.sock".len();

/// The demo's own directory.
pub struct Place {
    directory: TempDir,
}

impl Place {
    /// Makes it in `parent`, or where the system wants temporary files.
    pub fn make(parent: Option<&Path>, size: u64, keep: bool) -> Result<Self, DemoError> {
        let refuse = |text: String| Err(DemoError::Place(text));
        let (least, most) = SIZES;
        if size < least || size > most || !size.is_multiple_of(STRIPE_BYTES) {
            let (least, most) = (human(least), human(most));
            return refuse(format!("--size: {} will not do: from {least} to {most}, in whole MiB", human(size)));
        }
        let parent = std::path::absolute(parent.map_or_else(std::env::temp_dir, Path::to_owned))?;
        let bad = |error: io::Error| DemoError::Place(format!("--dir: '{}': {error}", parent.display()));
        if parent.to_str().is_none() {
            return refuse(format!("--dir: '{}' is not UTF-8, which the control socket needs", parent.display()));
        }
        let space = rustix::fs::statvfs(&parent).map_err(|errno| bad(errno.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        // Copy-before-write keeps its hands off the last tenth of a file system.
        let floor = (space.f_blocks / 10).saturating_mul(space.f_frsize);
        let need = needed(size, keep);
        if free < need.saturating_add(floor) {
            return refuse(format!(
                "'{}' has {} free, and a disk of {} needs up to {} besides the tenth of the file system ({}) that is \
                 left alone: choose another --dir or a smaller --size",
                parent.display(),
                human(free),
                human(size),
                human(need),
                human(floor)
            ));
        }
        if parent.as_os_str().len() > SOCKET_PATH_MAX - NAME_MAX {
            return refuse(format!("--dir: '{}' is too long for the path of a Unix socket in it", parent.display()));
        }
        let mut directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(&parent).map_err(bad)?;
        directory.disable_cleanup(keep);
        Ok(Place { directory })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Bytes that the demo takes at most: each of disk, scratch, the full image, three increments and a restored image can
/// hold every stripe that the guest uses; kept restored images are four.
fn needed(size: u64, keep: bool) -> u64 {
    let (_, used) = Plan { stripes: size / STRIPE_BYTES, discards: true }.filled_and_used();
    used * STRIPE_BYTES * if keep { 10 } else { 7 }
}

/// Makes the disk at `path`: sparse, with data where the plan says so. Tells how it can be used.
pub fn make_disk(path: &Path, size: u64, go_on: impl Fn() -> Result<(), DemoError>) -> Result<Plan, DemoError> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.set_len(size)?;
    // A file system without holes keeps what is discarded, and what a guest reads then is anybody's guess.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let discards = rustix::fs::fallocate(&file, hole, 0, BLOCK as u64).is_ok();
    let plan = Plan { stripes: size / STRIPE_BYTES, discards };
    let mut bytes = vec![0; STRIPE_BYTES as usize];
    for stripe in (0..plan.stripes).filter(|stripe| plan.is_filled(*stripe)) {
        go_on()?;
        for (block, bytes) in (stripe * STRIPE..).zip(bytes.chunks_exact_mut(BLOCK)) {
            fill(block, Content::Data(FIRST_STAMP), bytes);
        }
        file.write_all_at(&bytes, stripe * STRIPE_BYTES)?;
    }
    // So that nothing of this is still being written when the guest is measured.
    file.sync_data()?;
    Ok(plan)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn refusal(parent: &Path, size: u64) -> String {
        match Place::make(Some(parent), size, false) {
            Err(DemoError::Place(text)) => text,
            other => panic!("{:?}", other.map(|place| place.directory().to_owned())),
        }
    }

    #[test]
    fn what_will_not_do_is_refused_before_anything_is_made() {
        let parent = tempfile::tempdir().unwrap();
        for size in [0, 1, 63 * MIB, 64 * MIB + 512, 65 << 30, u64::MAX] {
            assert!(refusal(parent.path(), size).starts_with("--size: "), "{size}");
        }
        assert!(refusal(&parent.path().join("missing"), 64 * MIB).contains("No such file or directory"));
        let file = parent.path().join("file");
        File::create(&file).unwrap();
        assert!(refusal(&file, 64 * MIB).contains("Not a directory"));
        std::fs::remove_file(file).unwrap();
        let long = parent.path().join("d".repeat(100));
        std::fs::create_dir(&long).unwrap();
        assert!(refusal(&long, 64 * MIB).contains("too long"));
        assert!(std::fs::read_dir(long).unwrap().next().is_none(), "something was left behind");
    }

    #[test]
    fn a_file_system_that_is_too_small_is_told_so() {
        let shm = Path::new("/dev/shm");
        let Ok(space) = rustix::fs::statvfs(shm) else { return };
        let free = space.f_bavail * space.f_frsize;
        // Only where a disk within the limits is too large for it.
        let size = (free / MIB * MIB).min(SIZES.1);
        if needed(size, false) > free {
            assert!(refusal(shm, size).contains("smaller --size"));
        }
    }

    #[test]
    fn a_disk_holds_what_the_plan_says_and_its_place_goes_unless_it_is_kept() {
        let parent = tempfile::tempdir().unwrap();
        let place = Place::make(Some(parent.path()), 64 * MIB, false).unwrap();
        let path = place.path("disk.raw");
        let plan = make_disk(&path, 64 * MIB, || Ok(())).unwrap();
        let table = super::super::model::Table::new(64 * STRIPE, |block| plan.is_filled(block / STRIPE));
        let (mut expected, bytes) = (vec![0; 64 << 20], std::fs::read(&path).unwrap());
        table.issued().read_at(&mut expected, 0);
        assert!(bytes == expected);
        drop(place);
        assert!(std::fs::read_dir(parent.path()).unwrap().next().is_none());
        drop(Place::make(Some(parent.path()), 64 * MIB, true).unwrap());
        assert!(std::fs::read_dir(parent.path()).unwrap().next().is_some());
    }
}
