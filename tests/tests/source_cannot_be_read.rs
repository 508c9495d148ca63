//! The promise: a disk that cannot be read in places is never backed up as if it held zeroes there. What the job does is what
//! `on-source-error` says: it ends with the error and the bitmap holds all that it held; or it rests, with the reason on
//! show, and when the disk is mended finishes the image; or it tries until that is so. The guest goes on.
//!
//! The disk is a loop device whose file is cut short, which makes its reads fail with EIO. It is mended by making the file as
//! long again.

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_device::Loop;
use blkmark_tests::qmp::Qmp;
use serde_json::{Value, json};
use std::fs;

const SIZE: u64 = 8 * MIB;
const CUT: u64 = 5 * MIB;

struct Scene {
    disk: Disk,
    guest: Attached,
    qmp: Qmp,
    device: Loop,
    before: Value,
    _daemon: Daemon,
    lab: Lab,
}

impl Scene {
    /// All of the disk is marked, and its end cannot be read.
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let file = lab.disk("drive0", SIZE)?;
        let device = Loop::over(&file.path, 512)?;
        let disk = Disk { path: device.path().to_owned(), ..file.with_direct(true) };
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        guest.write_at(&vec![5; SIZE as usize], 0)?;
        guest.flush()?;
        device.lengthen(CUT)?;
        let before = qmp.bitmap("drive0", "b")?;
        ensure!(before["count"] == SIZE, "{before}");
        Ok(Self { disk, guest, qmp, device, before, _daemon: daemon, lab })
    }

    fn begin(&mut self, policy: Option<&str>, image: &str) -> Result<()> {
        let mut arguments = json!({
            "job-id": "j", "device": "drive0", "sync": "incremental", "bitmap": "b", "format": "qcow2",
            "target": self.lab.path(image),
        });
        if let Some(policy) = policy {
            arguments["on-source-error"] = json!(policy);
        }
        self.qmp.run("drive-backup", arguments)?;
        Ok(())
    }

    fn hears_of(&mut self, action: &str) -> Result<()> {
        let event = self.qmp.event(|event| event.name == "BLOCK_JOB_ERROR")?;
        ensure!(event.data == json!({ "device": "j", "operation": "read", "action": action }), "{}", event.data);
        Ok(())
    }

    /// Mended: what was cut off is zeroes now, and the disk is what it is.
    fn mend(&mut self) -> Result<()> {
        self.device.lengthen(SIZE)
    }

    fn is_the_disk(&mut self, image: &str) -> Result<()> {
        self.guest.flush()?;
        let image = self.lab.path(image);
        images::assert_sound(&image)?;
        images::assert_equal(&image, &self.disk.path)
    }
}

#[test]
fn a_reported_error_ends_the_job_and_loses_no_mark() -> Result<()> {
    // An error that is no lack of space is reported under `enospc` and `auto` too.
    for policy in [None, Some("report"), Some("enospc"), Some("auto")] {
        let mut scene = Scene::new()?;
        scene.begin(policy, "failed.qcow2")?;
        scene.hears_of("report")?;
        let error = scene.qmp.job_failed("j").with_context(|| format!("{policy:?}"))?;
        ensure!(error == "Input/output error", "{error}");
        ensure!(scene.qmp.bitmap("drive0", "b")? == scene.before, "{policy:?}: the bitmap is not what it was");
        scene.guest.write_at(&[9; 4096], MIB)?;
        scene.mend()?;
        scene.begin(policy, "good.qcow2")?;
        scene.qmp.job_completed("j")?;
        scene.is_the_disk("good.qcow2")?;
    }
    Ok(())
}

#[test]
fn a_stopped_job_rests_until_the_disk_is_mended() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.begin(Some("stop"), "image.qcow2")?;
    for _ in 0..2 {
        scene.hears_of("stop")?;
        scene.qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused")?;
        let jobs = scene.qmp.run("query-block-jobs", json!({}))?;
        ensure!(jobs[0]["io-status"] == "failed" && jobs[0]["status"] == "paused", "{jobs}");
        ensure!(scene.qmp.bitmap("drive0", "b")?["busy"] == true);
        // Too early: it rests again.
        scene.qmp.run("block-job-resume", json!({ "device": "j" }))?;
    }
    scene.hears_of("stop")?;
    scene.qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused")?;
    scene.mend()?;
    scene.qmp.run("block-job-resume", json!({ "device": "j" }))?;
    let jobs = scene.qmp.run("query-block-jobs", json!({}))?;
    ensure!(jobs == json!([]) || jobs[0]["io-status"] == "ok", "{jobs}");
    scene.qmp.job_completed("j")?;
    scene.is_the_disk("image.qcow2")?;
    ensure!(scene.qmp.bitmap("drive0", "b")?["count"] == 0);
    Ok(())
}

#[test]
fn an_ignored_error_is_tried_again_until_the_disk_is_mended() -> Result<()> {
    let mut scene = Scene::new()?;
    scene.begin(Some("ignore"), "image.qcow2")?;
    scene.hears_of("ignore")?;
    scene.hears_of("ignore")?;
    scene.mend()?;
    scene.qmp.job_completed("j")?;
    scene.is_the_disk("image.qcow2")
}

/// A file says where its holes are, and behind its end there is nothing but a hole.
#[test]
fn what_was_cut_off_a_file_is_not_backed_up_as_zeroes() -> Result<()> {
    for direct in [true, false] {
        let lab = Lab::new()?;
        let disk = lab.filled_disk("drive0", SIZE)?.with_direct(direct);
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        let file = fs::OpenOptions::new().write(true).open(&disk.path)?;
        for cut in [CUT, 0] {
            file.set_len(cut)?;
            let image = lab.path("image.qcow2");
            let arguments =
                json!({ "job-id": "j", "device": "drive0", "sync": "full", "format": "qcow2", "target": image });
            qmp.run("drive-backup", arguments)?;
            let error = qmp.job_failed("j").with_context(|| format!("cut at {cut}, direct {direct}"))?;
            ensure!(!error.is_empty());
        }
    }
    Ok(())
}
