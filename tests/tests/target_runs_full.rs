//! The promise: a target whose file system is full costs the guest nothing and loses no mark. What the job does is what its
//! policy says: it ends and the bitmap is as before, or it rests until there is space and then finishes the very image that
//! it had begun.
//!
//! The file system is a real one of a few mebibytes. The guest writes before, while the job is stuck, and afterwards.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::qmp::{JobEnd, Qmp};
use blkmark_tests::tools;
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;

/// A mounted tmpfs of `mib` MiB, most of it taken by a file that can be removed to make space.
struct SmallFileSystem {
    folder: PathBuf,
}

impl SmallFileSystem {
    fn new(lab: &Lab, mib: u64) -> Result<Self> {
        let folder = lab.path("small");
        fs::create_dir(&folder)?;
        let options = format!("size={mib}m");
        tools::run(tools::command("mount")?.args(["-t", "tmpfs", "-o", &options, "none"]).arg(&folder))?;
        let small = Self { folder };
        fs::write(small.path("ballast"), vec![1; ((mib - 4) * MIB) as usize])?;
        Ok(small)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn make_space(&self) -> Result<()> {
        Ok(fs::remove_file(self.path("ballast"))?)
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Lazily: a failing test may still have files open there.
        let _ = std::process::Command::new("umount").arg("-l").arg(&self.folder).status();
    }
}

struct Scene {
    disk: Disk,
    guest: Attached,
    qmp: Qmp,
    small: SmallFileSystem,
    /// The disk as of the job's instant.
    instant: Vec<u8>,
    _daemon: Daemon,
    lab: Lab,
}

impl Scene {
    /// Starts a backup of 16 MiB, all marked, to where 4 MiB are left.
    fn begin(format: &str, more: Value) -> Result<Self> {
        let lab = Lab::new()?;
        let small = SmallFileSystem::new(&lab, 32)?;
        let disk = lab.disk("drive0", SIZE)?;
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        let instant: Vec<u8> = (0..SIZE).map(|at| (at / 4096 % 251 + 1) as u8).collect();
        guest.write_at(&instant, 0)?;
        let mut arguments = json!({
            "job-id": "j", "device": "drive0", "sync": "incremental", "bitmap": "b", "format": format,
            "target": small.path("target"),
        });
        for (name, value) in more.as_object().context("members")? {
            arguments[name] = value.clone();
        }
        qmp.run("drive-backup", arguments)?;
        Ok(Self { disk, guest, qmp, small, instant, _daemon: daemon, lab })
    }

    fn error_event(&mut self, action: &str) -> Result<()> {
        let event = self.qmp.event(|event| event.name == "BLOCK_JOB_ERROR")?;
        ensure!(event.data == json!({ "device": "j", "operation": "write", "action": action }), "{}", event.data);
        Ok(())
    }

    /// Once the job rests: the guest writes on, and the job says why it rests.
    fn at_rest(&mut self) -> Result<()> {
        self.error_event("stop")?;
        self.qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused")?;
        let jobs = self.qmp.run("query-block-jobs", json!({}))?;
        ensure!(jobs[0]["io-status"] == "nospace" && jobs[0]["status"] == "paused", "{jobs}");
        self.guest.write_at(&vec![0xee; 65536], 15 * MIB)?;
        self.guest.write_at(&vec![0xee; 65536], 0)?;
        ensure!(self.qmp.bitmap("drive0", "b")?["busy"] == true);
        Ok(())
    }

    /// The image is of the job's instant, and an incremental on top of it is the disk.
    fn proves_itself(mut self, format: &str) -> Result<()> {
        let image = self.small.path("target");
        let wanted = self.lab.write("instant.raw", &self.instant)?;
        compare(&image, format, &wanted)?;
        let top = self.lab.path("top.qcow2");
        images::create_on_top(&image, format, &top)?;
        let arguments = json!({
            "job-id": "inc", "device": "drive0", "sync": "incremental", "bitmap": "b", "target": top, "format": "qcow2",
            "mode": "existing",
        });
        self.qmp.run("drive-backup", arguments)?;
        self.qmp.job_completed("inc")?;
        images::assert_equal(&top, &self.disk.path)
    }

    /// Nothing is lost after a failure: the bitmap says all that it said, and a backup with room for it is the disk.
    fn recovers(mut self) -> Result<()> {
        let shown = self.qmp.bitmap("drive0", "b")?;
        ensure!(shown["count"] == SIZE && shown["busy"] == false, "{shown}");
        let image = self.lab.path("again.qcow2");
        let arguments = json!({
            "job-id": "again", "device": "drive0", "sync": "incremental", "bitmap": "b", "target": image, "format": "qcow2",
        });
        self.qmp.run("drive-backup", arguments)?;
        self.qmp.job_completed("again")?;
        images::assert_equal(&image, &self.disk.path)
    }
}

fn compare(image: &Path, format: &str, raw: &Path) -> Result<()> {
    tools::run(tools::command("qemu-img")?.args(["compare", "-f", format, "-F", "raw"]).arg(image).arg(raw))?;
    Ok(())
}

#[test]
fn stop_and_enospc_rest_until_there_is_space() -> Result<()> {
    for (policy, format, resume) in [
        ("enospc", "qcow2", "block-job-resume"),
        ("enospc", "raw", "job-resume"),
        ("stop", "qcow2", "block-job-resume"),
        ("stop", "raw", "block-job-resume"),
        ("auto", "qcow2", "block-job-resume"),
    ] {
        let mut scene = Scene::begin(format, json!({ "on-target-error": policy }))?;
        scene.at_rest().with_context(|| format!("{policy}, {format}"))?;
        // Too early: it rests again.
        let member = if resume == "job-resume" { "id" } else { "device" };
        scene.qmp.run(resume, json!({ member: "j" }))?;
        scene.at_rest().with_context(|| format!("{policy}, {format}, resumed too early"))?;
        scene.small.make_space()?;
        scene.qmp.run(resume, json!({ member: "j" }))?;
        scene.qmp.job_completed("j").with_context(|| format!("{policy}, {format}"))?;
        scene.proves_itself(format).with_context(|| format!("{policy}, {format}"))?;
    }
    Ok(())
}

#[test]
fn report_ends_the_job_and_the_bitmap_is_as_before() -> Result<()> {
    for (policy, format) in [(Some("report"), "qcow2"), (Some("report"), "raw"), (None, "qcow2")] {
        let more = policy.map_or_else(|| json!({}), |policy| json!({ "on-target-error": policy }));
        let mut scene = Scene::begin(format, more)?;
        scene.error_event("report")?;
        let error = scene.qmp.job_failed("j")?;
        ensure!(error == "No space left on device", "{error}");
        scene.guest.write_at(&vec![0xee; 65536], 0)?;
        scene.recovers().with_context(|| format!("{policy:?}, {format}"))?;
    }
    Ok(())
}

#[test]
fn ignore_goes_on_by_itself_once_there_is_space() -> Result<()> {
    let mut scene = Scene::begin("qcow2", json!({ "on-target-error": "ignore" }))?;
    scene.error_event("ignore")?;
    scene.guest.write_at(&vec![0xee; 65536], 15 * MIB)?;
    scene.small.make_space()?;
    scene.qmp.job_completed("j")?;
    scene.proves_itself("qcow2")
}

#[test]
fn a_job_that_rests_can_be_cancelled() -> Result<()> {
    let mut scene = Scene::begin("qcow2", json!({ "on-target-error": "stop" }))?;
    scene.at_rest()?;
    let refused = scene.qmp.refused("block-job-cancel", json!({ "device": "j" }))?;
    ensure!(refused.desc == "The block job for device 'j' is currently paused", "{}", refused.desc);
    scene.qmp.run("job-cancel", json!({ "id": "j" }))?;
    ensure!(scene.qmp.job_end("j")? == JobEnd::Cancelled);
    scene.recovers()
}

/// One of two grouped jobs has no space: both are as if they had never been.
#[test]
fn a_full_target_takes_its_group_along() -> Result<()> {
    let lab = Lab::new()?;
    let small = SmallFileSystem::new(&lab, 32)?;
    let disks = [lab.disk("drive0", SIZE)?, lab.disk("drive1", SIZE)?];
    let daemon = Daemon::blkmark(&lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    let mut guests = Vec::new();
    for disk in &disks {
        qmp.run("block-dirty-bitmap-add", json!({ "node": disk.id, "name": "b" }))?;
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        guest.write_at(&vec![7; 8 * MIB as usize], MIB)?;
        guests.push(guest);
    }
    let backup = |disk: &str, target: &Path| {
        let data = json!({
            "job-id": disk, "device": disk, "sync": "incremental", "bitmap": "b", "format": "qcow2", "target": target,
        });
        json!({ "type": "drive-backup", "data": data })
    };
    let run = |qmp: &mut Qmp, first: &Path, second: &Path| {
        let actions = json!([backup("drive0", first), backup("drive1", second)]);
        qmp.run("transaction", json!({ "actions": actions, "properties": { "completion-mode": "grouped" } }))
    };
    run(&mut qmp, &lab.path("0.qcow2"), &small.path("1.qcow2"))?;
    let error = qmp.job_failed("drive1")?;
    ensure!(error == "No space left on device", "{error}");
    ensure!(qmp.job_end("drive0")? == JobEnd::Cancelled, "its sibling was not taken along");
    for disk in ["drive0", "drive1"] {
        let shown = qmp.bitmap(disk, "b")?;
        ensure!(shown["count"] == 8 * MIB && shown["busy"] == false, "{shown}");
    }
    small.make_space()?;
    run(&mut qmp, &lab.path("0.qcow2"), &small.path("1.qcow2"))?;
    qmp.job_completed("drive0")?;
    qmp.job_completed("drive1")?;
    images::assert_equal(&lab.path("0.qcow2"), &disks[0].path)?;
    images::assert_equal(&small.path("1.qcow2"), &disks[1].path)?;
    Ok(())
}
