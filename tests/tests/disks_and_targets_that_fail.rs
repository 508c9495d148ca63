//! The promise: an error that comes and goes is met as the job's policy says, and costs no byte: a target that refuses some writes,
//! and a disk with a block that cannot be read. The guest goes on, and so do its marks.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_fs::{Kind, LoopFileSystem};
use blkmark_tests::process::{GIVE_UP, Process};
use blkmark_tests::qmp::{JobEnd, Qmp};
use blkmark_tests::tools::command;
use serde_json::{Value, json};

const SIZE: u64 = 32 * MIB;

/// An NBD server that refuses a part of all writes while a file is there.
struct Fickle {
    _server: Process,
    file: PathBuf,
    socket: PathBuf,
    trigger: PathBuf,
}

impl Fickle {
    /// `rate`: one in so many.
    fn serve(lab: &Lab, rate: u32) -> Result<Self> {
        let [file, socket, trigger] = ["nbd.raw", "nbd.sock", "nbd.trigger"].map(|name| lab.path(name));
        File::create_new(&file)?.set_len(SIZE)?;
        File::create_new(&trigger)?;
        let mut nbdkit = command("nbdkit")?;
        nbdkit.args(["--foreground", "--exit-with-parent", "--filter=error", "--unix"]).arg(&socket).arg("file");
        nbdkit.arg(&file).args(["error-pwrite=EIO", &format!("error-pwrite-rate={}%", 100.0 / f64::from(rate))]);
        nbdkit.arg(format!("error-pwrite-file={}", trigger.display()));
        let server = lab.start("nbdkit", &mut nbdkit)?;
        let began = std::time::Instant::now();
        while !socket.exists() && began.elapsed() < GIVE_UP {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(Self { _server: server, file, socket, trigger })
    }

    fn recovers(&self) -> Result<()> {
        Ok(fs::remove_file(&self.trigger)?)
    }
}

struct Scene {
    target: Fickle,
    guest: Attached,
    qmp: Qmp,
    /// The disk as of the backup's instant.
    instant: Vec<u8>,
    _daemon: Daemon,
    _lab: Lab,
}

impl Scene {
    /// A disk that changed in scattered blocks of 4 KiB since bitmap b began, so that there are many writes; its backup before
    /// is in the target.
    fn new(rate: u32) -> Result<Self> {
        let lab = Lab::new()?;
        let target = Fickle::serve(&lab, rate)?;
        let disk = lab.filled_disk("drive0", SIZE)?;
        fs::copy(&disk.path, &target.file)?;
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b", "granularity": 65536 }))?;
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        for block in (0..SIZE / 65536).step_by(2) {
            guest.write_at(&[block as u8 | 1; 4096], block * 65536)?;
        }
        let instant = disk.content()?;
        let server = json!({ "type": "unix", "path": target.socket });
        qmp.run("blockdev-add", json!({ "driver": "nbd", "node-name": "t", "server": server }))?;
        Ok(Self { target, guest, qmp, instant, _daemon: daemon, _lab: lab })
    }

    fn start(&mut self, more: Value) -> Result<()> {
        let mut arguments =
            json!({ "job-id": "j", "device": "drive0", "target": "t", "sync": "incremental", "bitmap": "b" });
        for (name, value) in more.as_object().context("members")? {
            arguments[name] = value.clone();
        }
        self.qmp.run("blockdev-backup", arguments)?;
        // It is of the instant: nothing of this may be in it.
        for block in (0..SIZE / 65536).step_by(3) {
            self.guest.write_at(&[0; 4096], block * 65536)?;
        }
        Ok(())
    }

    fn is_of_the_instant(&self) -> Result<()> {
        ensure!(fs::read(&self.target.file)? == self.instant, "the target is not the disk of that instant");
        Ok(())
    }
}

/// Ten in a hundred of 256 writes: that none fails is no more likely than that the machine breaks.
const OFTEN: u32 = 10;

#[test]
fn a_target_that_fails_now_and_then_gets_every_byte_if_told_to_ignore_it() -> Result<()> {
    let mut scene = Scene::new(OFTEN)?;
    scene.start(json!({ "on-target-error": "ignore" }))?;
    let event = scene.qmp.event(|event| event.name == "BLOCK_JOB_ERROR")?;
    ensure!(event.data == json!({ "device": "j", "operation": "write", "action": "ignore" }), "{}", event.data);
    scene.qmp.job_completed("j")?;
    scene.is_of_the_instant()
}

#[test]
fn a_target_that_fails_once_in_a_thousand_writes_is_no_hindrance() -> Result<()> {
    let mut scene = Scene::new(1000)?;
    scene.start(json!({ "on-target-error": "ignore" }))?;
    scene.qmp.job_completed("j")?;
    scene.is_of_the_instant()
}

#[test]
fn a_stopped_job_goes_on_when_its_target_does() -> Result<()> {
    let mut scene = Scene::new(OFTEN)?;
    scene.start(json!({ "on-target-error": "stop" }))?;
    let event = scene.qmp.event(|event| event.name == "BLOCK_JOB_ERROR")?;
    ensure!(event.data == json!({ "device": "j", "operation": "write", "action": "stop" }), "{}", event.data);
    scene.qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused")?;
    scene.target.recovers()?;
    scene.qmp.run("job-resume", json!({ "id": "j" }))?;
    scene.qmp.job_completed("j")?;
    scene.is_of_the_instant()
}

#[test]
fn a_reported_error_loses_no_mark_and_the_same_image_can_be_had_again() -> Result<()> {
    let mut scene = Scene::new(OFTEN)?;
    scene.start(json!({ "on-failure": "keep" }))?;
    scene.qmp.event(|event| event.name == "BLOCK_JOB_COMPLETED" && event.data["error"] == "Input/output error")?;
    ensure!(scene.qmp.bitmap("drive0", "b")?["busy"] == true, "its set is kept");
    scene.guest.write_at(&vec![9; MIB as usize], 0)?;
    scene.target.recovers()?;
    scene.qmp.run("job-retry", json!({ "id": "j" }))?;
    scene.qmp.job_completed("j")?;
    scene.is_of_the_instant()?;
    // What came since is left.
    ensure!(scene.qmp.bitmap("drive0", "b")?["count"].as_u64() >= Some(MIB));
    Ok(())
}

// ---- a disk that cannot be read in one place

/// A block that was written and whose checksum on the medium is wrong: it cannot be read any more.
struct Unreadable {
    disk: Disk,
    at: u64,
    file_system: LoopFileSystem,
    lab: Lab,
}

const MAGIC: [u8; 4096] = [0xb7; 4096];

impl Unreadable {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let mut file_system = LoopFileSystem::mount(Kind::Btrfs, 256 * MIB)?;
        let filled = lab.filled_disk("drive0", SIZE)?;
        let disk = Disk { path: file_system.path("drive0.raw"), ..filled.clone() };
        fs::rename(&filled.path, lab.path("source.raw"))?;
        fs::copy(lab.path("source.raw"), &disk.path)?;
        let at = 20 * MIB + 8192;
        File::options().write(true).open(&disk.path)?.write_all_at(&MAGIC, at)?;
        file_system.offline(spoil)?;
        ensure!(read_block(&disk.path, at).is_err(), "the block can still be read: the test would show nothing");
        Ok(Self { disk, at, file_system, lab })
    }
}

/// Flips a byte wherever the medium holds the block.
fn spoil(image: &Path) -> Result<()> {
    let file = File::options().read(true).write(true).open(image)?;
    let (mut chunk, mut spoilt) = (vec![0; MIB as usize], 0);
    for at in (0..file.metadata()?.len()).step_by(MIB as usize) {
        let len = (&file).take(MIB).read(&mut chunk)?;
        for block in (0..len).step_by(4096).filter(|block| chunk[*block..].starts_with(&MAGIC)) {
            file.write_all_at(&[0], at + block as u64 + 100)?;
            spoilt += 1;
        }
    }
    file.sync_all()?;
    ensure!(spoilt > 0, "the block is not to be found");
    Ok(())
}

fn read_block(path: &Path, at: u64) -> Result<()> {
    File::open(path)?.read_exact_at(&mut [0; 4096], at).context("unreadable")
}

#[test]
fn a_disk_with_an_unreadable_block_ends_or_stops_its_backup_and_not_its_guest() -> Result<()> {
    let scene = Unreadable::new()?;
    let daemon = Daemon::blkmark(&scene.lab, std::slice::from_ref(&scene.disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::connect(&scene.disk.socket, Options::default())?.into_disk()?;
    let target = scene.lab.path("backup.raw");
    let backup = |more: Value| {
        let mut arguments =
            json!({ "job-id": "j", "device": "drive0", "sync": "full", "format": "raw", "target": target });
        for (name, value) in more.as_object().into_iter().flatten() {
            arguments[name] = value.clone();
        }
        arguments
    };
    qmp.run("drive-backup", backup(json!({})))?;
    let event = qmp.event(|event| event.name == "BLOCK_JOB_ERROR")?;
    ensure!(event.data == json!({ "device": "j", "operation": "read", "action": "report" }), "{}", event.data);
    ensure!(qmp.job_end("j")? == JobEnd::Failed("Input/output error".to_owned()));

    // Stopped there, until the guest writes it anew, as a guest's file system does. Its old value is lost, so the point is.
    qmp.run("drive-backup", backup(json!({ "on-source-error": "stop" })))?;
    qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused")?;
    guest.write_at(&[1; 4096], 0)?;
    guest.write_at(&[1; 4096], scene.at)?;
    qmp.run("job-resume", json!({ "id": "j" }))?;
    let JobEnd::Failed(error) = qmp.job_end("j")? else { anyhow::bail!("what cannot be read cannot be in a backup") };
    ensure!(error.contains("the point in time is broken"), "{error}");

    // Now it can be read.
    qmp.run("drive-backup", backup(json!({})))?;
    qmp.job_completed("j")?;
    ensure!(fs::read(&target)? == scene.disk.content()?, "the backup is not the disk");
    drop(guest);
    daemon.stop()?;
    drop(scene.file_system);
    Ok(())
}
