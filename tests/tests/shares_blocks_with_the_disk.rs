//! The promise: with `x-perf` `use-copy-range` a raw image beside its disk shares the disk's blocks where the file system can, and
//! is of its instant all the same, however much the guest writes meanwhile. Where blocks cannot be shared, they are copied.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use blkmark::frontend::{Guest, Options};
use blkmark_tests::beside::{Stop, Worker, beside};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_fs::{Kind, LoopFileSystem};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::random::Random;
use blkmark_tests::tools::{command, run};
use serde_json::{Value, json};

const SIZE: u64 = 96 * MIB;
const BLOCK: u64 = 4096;

/// The blocks that the guest does not write: the disk's first half.
const QUIET: u64 = SIZE / 2;

struct Scene {
    disk: Disk,
    instant: Vec<u8>,
    qmp: Qmp,
    _daemon: Daemon,
    lab: Lab,
}

impl Scene {
    /// A disk of random bytes in `folder`, served.
    fn new(folder: &Path) -> Result<Self> {
        let lab = Lab::new()?;
        let filled = lab.filled_disk("drive0", SIZE)?;
        let path = folder.join("drive0.raw");
        fs::copy(&filled.path, &path)?;
        fs::remove_file(&filled.path)?;
        File::open(&path)?.sync_all()?;
        let disk = Disk { path, ..filled };
        let instant = disk.content()?;
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let qmp = daemon.qmp()?;
        Ok(Self { disk, instant, qmp, _daemon: daemon, lab })
    }

    fn start(&mut self, target: &Path, more: Value) -> Result<()> {
        let mut arguments =
            json!({ "job-id": "j", "device": "drive0", "sync": "full", "format": "raw", "target": target });
        for (name, value) in more.as_object().context("members")? {
            arguments[name] = value.clone();
        }
        self.qmp.run("drive-backup", arguments)?;
        Ok(())
    }

    /// Whether the image is the disk as of the beginning.
    fn is_of_the_instant(&self, image: &Path) -> Result<()> {
        let (image, instant) = (fs::read(image)?, &self.instant);
        ensure!(image.len() == instant.len(), "{} bytes", image.len());
        let differs = image.chunks(BLOCK as usize).zip(instant.chunks(BLOCK as usize)).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "block {differs:?} is not of the instant");
        Ok(())
    }
}

/// How many blocks of the image's first half stand where another file has them too.
fn blocks_shared(image: &Path) -> Result<u64> {
    File::open(image)?.sync_all()?;
    let text = run(command("filefrag")?.arg(format!("-b{BLOCK}")).arg("-v").arg(image))?;
    let mut shared = 0;
    for line in text.lines().filter(|line| line.contains("shared")) {
        // ` 0:        0..   12287:      34816..     47103:  12288:             shared`
        let mut numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse::<u64>().ok());
        let (Some(_), Some(first), Some(last)) = (numbers.next(), numbers.next(), numbers.next()) else {
            bail!("{line}");
        };
        shared += (last + 1).min(QUIET / BLOCK).saturating_sub(first);
    }
    Ok(shared)
}

fn shared(kind: Kind) -> Result<()> {
    let file_system = LoopFileSystem::mount(kind, 512 * MIB)?;
    let mut scene = Scene::new(&file_system.folder())?;
    let (copied, shared) = (file_system.path("copied.raw"), file_system.path("image.raw"));

    scene.start(&copied, json!({}))?;
    scene.qmp.job_completed("j")?;
    ensure!(blocks_shared(&copied)? == 0, "unless asked for, nothing is shared");
    scene.is_of_the_instant(&copied)?;
    fs::remove_file(&copied)?;

    // Slowly at first, so that the guest has written all over its half before most of it is taken.
    let mut written = Vec::new();
    scene.start(&shared, json!({ "x-perf": { "use-copy-range": true }, "speed": 16 * MIB }))?;
    let Scene { disk, qmp, .. } = &mut scene;
    let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let writer: Worker<'_> = Box::new(|stop: &Stop| {
        let mut random = Random(11);
        while !stop.is_due() && written.len() < 2000 {
            let block = QUIET / BLOCK + random.below((SIZE - QUIET) / BLOCK);
            guest.write_at(&[0xee; BLOCK as usize], block * BLOCK)?;
            written.push(block);
        }
        Ok(())
    });
    beside(vec![writer], || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        qmp.run("block-job-set-speed", json!({ "device": "j", "speed": 0 }))?;
        qmp.job_completed("j")
    })?;
    scene.is_of_the_instant(&shared)?;
    ensure!(!written.is_empty(), "the guest has written");
    // But for a few at the edges of what the guest wrote.
    let count = blocks_shared(&shared)?;
    ensure!(count > QUIET / BLOCK * 9 / 10, "{count} of {} blocks that nobody wrote are shared", QUIET / BLOCK);
    // What the guest writes now is its own.
    guest.write_at(&vec![0xdd; MIB as usize], 0)?;
    guest.flush()?;
    scene.is_of_the_instant(&shared)
}

#[test]
fn on_xfs() -> Result<()> {
    shared(Kind::Xfs)
}

#[test]
fn on_btrfs() -> Result<()> {
    shared(Kind::Btrfs)
}

#[test]
fn where_blocks_cannot_be_shared_they_are_copied() -> Result<()> {
    let file_system = LoopFileSystem::mount(Kind::Ext4, 512 * MIB)?;
    let mut scene = Scene::new(&file_system.folder())?;
    // The same file system, and another.
    for target in [file_system.path("image.raw"), scene.lab.path("elsewhere.raw")] {
        scene.start(&target, json!({ "x-perf": { "use-copy-range": true } }))?;
        scene.qmp.job_completed("j")?;
        scene.is_of_the_instant(&target)?;
    }
    Ok(())
}
