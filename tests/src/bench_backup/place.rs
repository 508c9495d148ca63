//! Where a run takes place: disks and targets in a folder of their own, gone afterwards, and slow targets behind NBD.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::options::Options;
use super::warm::warm;
use crate::bench::target::{check_room, fill};
use crate::process::Process;
use crate::tools;

/// For so long a device has to do nothing, and so often that is looked for: others may be at it all the time.
const QUIET: Duration = Duration::from_millis(300);
const PATIENCE: u32 = 20;

/// A folder with a disk.
pub struct Place {
    dir: TempDir,
    disk: PathBuf,
    size: u64,
    warm: u64,
}

impl Place {
    /// A disk of `size` random bytes, with room for a copy and for old data beside it.
    pub fn filled(options: &Options, size: u64) -> Result<Self> {
        check_room(&options.dir(), size * 5 / 2)?;
        let place = Self::sparse(options, size)?;
        eprintln!("filling {} with {} MiB", place.disk.display(), size >> 20);
        let mut file = File::create(&place.disk)?;
        // Random bytes all over: holes and zeroes would be copied without a disk.
        let mut noise = vec![0; 4 << 20];
        fill(&mut noise, 1);
        let mut left = size;
        while left > 0 {
            let part = left.min(noise.len() as u64) as usize;
            file.write_all(&noise[..part]).context("filling the disk")?;
            left -= part as u64;
        }
        file.sync_all().context("filling the disk")?;
        Ok(place)
    }

    /// A disk of `size` bytes that takes no space yet.
    pub fn sparse(options: &Options, size: u64) -> Result<Self> {
        let dir = options.dir();
        let dir = tempfile::Builder::new()
            .prefix("bench-backup-")
            .tempdir_in(&dir)
            .with_context(|| format!("cannot make a folder in {}", dir.display()))?;
        let disk = dir.path().join("disk.raw");
        File::create_new(&disk)?.set_len(size)?;
        Ok(Self { dir, disk, size, warm: options.warm_memory.unwrap_or(0) })
    }

    /// The disk.
    pub fn disk(&self) -> &Path {
        &self.disk
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A name in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A fresh sparse file of the disk's size, in place of an earlier one.
    pub fn target(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        // Anew, so that nobody finds the blocks of another allocated.
        let _ = std::fs::remove_file(&path);
        File::create_new(&path)?.set_len(self.size)?;
        Ok(path)
    }

    /// Writes back what is dirty and forgets what is cached of the disk, so that nobody finds it warm; has memory at
    /// hand, if that was asked for. Waits for what earlier runs have left to do: the file system frees the blocks of files that are gone
    /// in the background, and may tell the device of each.
    pub fn settle(&self) -> Result<()> {
        let file = File::open(&self.disk)?;
        rustix::fs::syncfs(&file)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        wait_for_device(&file)?;
        warm(self.warm)
    }

    /// Whether two files hold the same bytes, looked at in `samples` places.
    pub fn assert_same(&self, other: &Path, samples: u64) -> Result<()> {
        let (disk, copy) = (File::open(&self.disk)?, File::open(other)?);
        let (mut a, mut b) = (vec![0; 4096], vec![0; 4096]);
        let pages = self.size / 4096;
        for sample in 0..samples {
            let at = (u128::from(sample) * u128::from(pages) / u128::from(samples)) as u64 * 4096;
            disk.read_exact_at(&mut a, at)?;
            copy.read_exact_at(&mut b, at)?;
            anyhow::ensure!(a == b, "{} differs from the disk at {at:#x}", other.display());
        }
        Ok(())
    }
}

/// Waits until the device under the file has had nothing to do for a while. What has none, as tmpfs, is always ready.
fn wait_for_device(file: &File) -> Result<()> {
    let device = file.metadata()?.dev();
    let counters = format!("/sys/dev/block/{}:{}/stat", rustix::fs::major(device), rustix::fs::minor(device));
    let mut last = None;
    for _ in 0..PATIENCE {
        let Ok(now) = std::fs::read_to_string(&counters) else { return Ok(()) };
        if last.as_ref() == Some(&now) {
            break;
        }
        last = Some(now);
        std::thread::sleep(QUIET);
    }
    Ok(())
}

/// An NBD server that takes only so much: `qemu-storage-daemon` with its throttle filter, the same for everybody.
pub struct SlowServer {
    process: Process,
    socket: PathBuf,
}

impl SlowServer {
    /// Serves a fresh file of the disk's size, taking `bytes_per_second`, if given.
    pub fn start(options: &Options, place: &Place, bytes_per_second: Option<u64>) -> Result<Self> {
        let file = place.target("slow.raw")?;
        let socket = place.path("slow.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = tools::command("qemu-storage-daemon")?;
        if options.qsd.components().count() > 1 {
            command = std::process::Command::new(&options.qsd);
        }
        let group = match bytes_per_second {
            Some(bytes) => format!("throttle-group,id=limit,x-bps-total={bytes}"),
            None => "throttle-group,id=limit".into(),
        };
        command
            .args(["--object", &group, "--blockdev"])
            .arg(format!("driver=file,node-name=file,filename={}", file.display()))
            .args(["--blockdev", "driver=throttle,node-name=slow,throttle-group=limit,file=file", "--nbd-server"])
            .arg(format!("addr.type=unix,addr.path={},max-connections=0", socket.display()))
            .args(["--export", "type=nbd,id=e,node-name=slow,name=slow,writable=on"])
            .args(["--chardev", "stdio,id=ready", "--monitor", "chardev=ready"])
            .stdin(Stdio::piped());
        let mut process = Process::start("slow-target", &mut command, &place.path("slow.log"))?;
        process.first_line()?;
        Ok(Self { process, socket })
    }

    /// What `blockdev-add` takes to open it.
    pub fn node(&self, name: &str) -> Value {
        let server = json!({"type": "unix", "path": self.socket});
        json!({"driver": "nbd", "node-name": name, "server": server, "export": "slow"})
    }

    /// How it is, for whoever has to explain a failure: whether it runs, and what it said last.
    pub fn state(&mut self) -> String {
        let runs = if self.process.is_running() { "still runs" } else { "has ended" };
        format!("the slow target {runs}\n{}", self.process.log_tail())
    }

    /// Lets it do nothing from now on, or go on.
    pub fn hang(&mut self, hang: bool) -> Result<()> {
        self.process.signal(if hang { Signal::STOP } else { Signal::CONT })
    }
}
