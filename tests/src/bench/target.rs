//! What is measured: files made for the run, of random bytes or sparse, or a file or device that the operator gives up; and
//! beside them the stores of blkmark's bitmaps, which each run begins without.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, SeekFrom, fcntl_lock, flock, seek};

use super::options::Options;

/// Where to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Make a file in this folder.
    Dir(PathBuf),
    /// Use this file or block device.
    File(PathBuf),
    /// No medium: either server's null disk.
    Null,
}

/// Disks ready to be served.
pub struct Target {
    name: String,
    disks: Vec<(PathBuf, File)>,
    size: u64,
    block_device: bool,
    null: bool,
    sparse: bool,
    /// With a folder for each disk's store; the disks that were made are in it too. Goes with the target.
    folder: tempfile::TempDir,
}

impl Target {
    /// Makes or opens the disks.
    pub fn prepare(place: &Place, options: &Options) -> Result<Self> {
        match place {
            Place::Dir(dir) => Self::make(dir, options),
            Place::File(path) => Self::open(path, options),
            Place::Null => {
                let open = || File::open("/dev/null").map(|file| (PathBuf::from("/dev/null"), file));
                let disks = (0..options.disks()).map(|_| open()).collect::<io::Result<_>>();
                Ok(Target {
                    name: "a null disk".into(),
                    disks: disks.context("cannot open /dev/null")?,
                    size: options.size,
                    block_device: false,
                    null: true,
                    sparse: false,
                    folder: folder(&std::env::temp_dir())?,
                })
            }
        }
    }

    fn make(dir: &Path, options: &Options) -> Result<Self> {
        let (size, count) = (options.size, options.disks());
        if !options.sparse {
            check_room(dir, size.saturating_mul(count as u64))?;
        }
        let folder = folder(dir)?;
        let mut disks = Vec::new();
        for disk in 0..count {
            let path = folder.path().join(format!("disk{disk}.raw"));
            let mut file = File::create_new(&path).with_context(|| format!("cannot make {}", path.display()))?;
            if !options.sparse {
                eprintln!("filling {} with {} MiB", path.display(), size >> 20);
                fill_file(&mut file, size).with_context(|| format!("cannot fill {}", path.display()))?;
            }
            disks.push((path, file));
        }
        let name = dir.display().to_string();
        Ok(Target { name, disks, size, block_device: false, null: false, sparse: options.sparse, folder })
    }

    fn open(path: &Path, options: &Options) -> Result<Self> {
        let path = path.canonicalize().with_context(|| format!("cannot use {}", path.display()))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {} for writing", path.display()))?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            bail!("{} is neither a file nor a block device", path.display());
        }
        let whole = seek(&file, SeekFrom::End(0)).with_context(|| format!("cannot size {}", path.display()))?;
        if whole > 0 && !options.overwrite {
            bail!("{} has {whole} bytes, which the benchmark would overwrite: say --overwrite", path.display());
        }
        let size = if whole == 0 { 0 } else { whole.min(options.size) };
        if fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
            || flock(&file, FlockOperation::NonBlockingLockExclusive).is_err()
        {
            bail!("{} is in use by another process", path.display());
        }
        unlock(&file)?;
        if size < options.least_size() {
            bail!("{} has {whole} bytes: too few to measure on", path.display());
        }
        let beside = path.parent().filter(|_| kind.is_file()).map_or_else(std::env::temp_dir, Path::to_owned);
        Ok(Target {
            name: path.display().to_string(),
            disks: vec![(path, file)],
            size,
            block_device: kind.is_block_device(),
            null: false,
            sparse: false,
            folder: folder(&beside)?,
        })
    }

    /// What reports call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many disks.
    pub fn disks(&self) -> usize {
        self.disks.len()
    }

    /// A disk.
    pub fn path(&self, disk: usize) -> &Path {
        &self.disks[disk].0
    }

    /// Where blkmark keeps a disk's bitmaps.
    pub fn store(&self, disk: usize) -> PathBuf {
        self.folder.path().join(format!("disk{disk}.store"))
    }

    /// Bytes of each that are measured, from the beginning.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it has no medium.
    pub fn is_null(&self) -> bool {
        self.null
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// Waits until no server holds a disk any more (its last requests may outlive it for a moment, and its locks with
    /// them), takes the last one's stores away, and writes back what is dirty. A sparse disk is empty again.
    pub fn settle(&self) -> Result<()> {
        for (index, (path, file)) in self.disks.iter().enumerate() {
            let store = self.store(index);
            if store.exists() {
                std::fs::remove_dir_all(&store).with_context(|| format!("cannot remove {}", store.display()))?;
            }
            if self.null {
                continue;
            }
            fcntl_lock(file, FlockOperation::LockExclusive).context("waiting for the last server's lock")?;
            flock(file, FlockOperation::LockExclusive).context("waiting for the last server's lock")?;
            unlock(file)?;
            if self.sparse {
                let emptied = file.set_len(0).and_then(|()| file.set_len(self.size));
                emptied.with_context(|| format!("cannot empty {}", path.display()))?;
            }
            file.sync_data().with_context(|| format!("cannot sync {}", path.display()))?;
        }
        Ok(())
    }
}

fn folder(dir: &Path) -> Result<tempfile::TempDir> {
    let made = tempfile::Builder::new().prefix("blkmark-bench-").tempdir_in(dir);
    made.with_context(|| format!("cannot make a folder in {}", dir.display()))
}

/// Random bytes all over: holes and zeroes would be read without a disk.
fn fill_file(file: &mut File, size: u64) -> io::Result<()> {
    let mut noise = vec![0; 4 << 20];
    fill(&mut noise, 1);
    let mut left = size;
    while left > 0 {
        let part = left.min(noise.len() as u64) as usize;
        file.write_all(&noise[..part])?;
        left -= part as u64;
    }
    file.sync_all()
}

fn unlock(file: &File) -> Result<()> {
    fcntl_lock(file, FlockOperation::Unlock).context("unlocking the disk")?;
    flock(file, FlockOperation::Unlock).context("unlocking the disk")
}

/// The kernel's number for tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Refuses to fill a file system, and above all the machine's memory, to the brim: whatever else runs here would be
/// hit by it.
pub fn check_room(dir: &Path, size: u64) -> Result<()> {
    let stat = rustix::fs::statfs(dir).with_context(|| format!("cannot use {}", dir.display()))?;
    let mut free = stat.f_bavail.saturating_mul(u64::try_from(stat.f_bsize)?);
    let mut what = "free space";
    if u64::try_from(stat.f_type)? == TMPFS_MAGIC {
        let memory = available_memory()?;
        if memory < free {
            (free, what) = (memory, "free memory");
        }
    }
    // A tenth is left to others.
    if size > free / 10 * 9 {
        bail!("{} has {} MiB of {what}: too little for a disk of {} MiB", dir.display(), free >> 20, size >> 20);
    }
    Ok(())
}

fn available_memory() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok())
        .context("/proc/meminfo does not tell MemAvailable")?;
    Ok(kib << 10)
}

/// Fills `bytes` reproducibly with what no zero detection or compression takes for anything else than data.
pub fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&next_random(&mut state).to_le_bytes()[..chunk.len()]);
    }
}

/// A step of xorshift64: quick, and random enough to pick blocks.
pub fn next_random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neither_disk_nor_memory_is_filled_to_the_brim() {
        for dir in ["/dev/shm", "/"] {
            let error = check_room(Path::new(dir), 1 << 60).unwrap_err().to_string();
            assert!(error.contains("too little for a disk of"), "{error}");
            check_room(Path::new(dir), 1 << 20).unwrap();
        }
        // As much memory as there is would fit by the file system's own account, which counts what it may use.
        let memory = available_memory().unwrap();
        assert!(check_room(Path::new("/dev/shm"), memory).is_err());
    }

    #[test]
    fn random_numbers_do_not_repeat_soon() {
        let mut state = 1;
        let mut seen: Vec<u64> = (0..10_000).map(|_| next_random(&mut state)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 10_000);
    }
}
