//! Points in time with names go on after a kill, and so do the backups of them: each image is that of `point-add`, whenever it was
//! ordered, and however often blkmark was killed since.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark_tests::blkio_client::BlkioClient;
use blkmark_tests::daemon::Daemon;
use blkmark_tests::images;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::small_fs::SmallFileSystem;
use serde_json::{Value, json};

use crate::server::Server;
use crate::stage::{Moment, SIZE, SLOW, Scene, Stage, add_bitmap, kills};

const UNIT: u64 = 64 << 10;

/// A backup of point `p`, slow enough to be killed.
fn copy(job: &str, target: &Path, format: &str) -> Value {
    json!({"job-id": job, "device": "p", "target": target, "format": format, "sync": "full", "speed": SLOW})
}

impl Scene<'_> {
    /// A point of drive0, among writes.
    fn point(&mut self) -> Result<Moment> {
        add_bitmap(self, "drive0")?;
        self.load()?;
        let moment = self.order("point-add", json!({"node": "drive0", "name": "p"}))?;
        self.load()?;
        Ok(moment)
    }

    /// Waits until a job has brought so much to its target, among writes.
    fn wait_for(&self, job: &str, bytes: u64) -> Result<u64> {
        loop {
            self.load()?;
            let offset = self.job(job)?["offset"].as_u64().context("an offset")?;
            if offset >= bytes {
                return Ok(offset);
            }
        }
    }

    /// Nobody reads it any more.
    fn remove_point(&self) -> Result<()> {
        self.qmp()?.run("point-remove", json!({"name": "p"})).map(drop)
    }

    fn is_read(&self) -> Result<()> {
        let error = self.qmp()?.refused("point-remove", json!({"name": "p"}))?;
        ensure!(error.to_string().contains("in use by block job: backup"), "{error}");
        Ok(())
    }
}

#[test]
fn a_point_in_time_and_what_reads_it_are_of_the_same_instant_after_a_kill() -> Result<()> {
    let stage = Stage::new(1)?;
    let image = stage.lab.path("point.raw");
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        scene.load()?;
        let moment = scene.order("point-add", json!({"node": "drive0", "name": "p"}))?;
        for _ in 0..2 {
            scene.load()?;
            scene.kill()?;
        }
        scene.load()?;
        let order = json!({"job-id": "copy", "device": "p", "target": image, "format": "raw", "sync": "full"});
        let mut qmp = scene.qmp()?;
        qmp.run("drive-backup", order)?;
        qmp.job_completed("copy")?;
        scene.check(0, &image, &moment)?;
        qmp.run("point-remove", json!({"name": "p"})).map(drop)
    })
}

#[test]
fn copies_of_a_point_go_on_after_several_kills() -> Result<()> {
    let stage = Stage::new(1)?;
    let (raw, qcow2) = (stage.lab.path("point.raw"), stage.lab.path("point.qcow2"));
    stage.tell(|scene| {
        let moment = scene.point()?;
        let mut qmp = scene.qmp()?;
        qmp.run("drive-backup", copy("raw", &raw, "raw"))?;
        let mut order = copy("qcow2", &qcow2, "qcow2");
        order["compress"] = true.into();
        qmp.run("drive-backup", order)?;
        let mut missing = SIZE;
        for _ in 0..3 {
            let brought = scene.wait_for("raw", 2 * MIB)?;
            scene.wait_for("qcow2", MIB)?;
            scene.kill()?;
            for job in ["raw", "qcow2"] {
                let job = scene.job(job)?;
                ensure!(job["status"] == "running" && job["speed"] == SLOW, "{job}");
            }
            scene.is_read()?;
            // What was in the target is not copied again, but for the last tenth of a second of it, and a step.
            scene.wait_for("raw", 1)?;
            scene.wait_for("qcow2", 1)?;
            let left = scene.job("raw")?["len"].as_u64().context("a length")?;
            ensure!(left <= missing - brought + SLOW / 5, "{left} bytes are to be copied, {brought} of {missing} were");
            missing = left;
            ensure!(scene.job("qcow2")?["len"].as_u64() < Some(SIZE), "{}", scene.job("qcow2")?);
        }
        scene.complete("raw", &["raw"])?;
        scene.is_read()?;
        scene.complete("qcow2", &["qcow2"])?;
        scene.check(0, &raw, &moment)?;
        images::assert_sound(&qcow2)?;
        let restored = images::restore(&qcow2)?;
        scene.check(0, &restored, &moment)?;
        // Of one point, not only of one moment.
        ensure!(fs::read(&restored)? == fs::read(&raw)?);
        scene.remove_point()
    })
}

#[test]
fn a_paused_copy_of_a_point_stays_paused() -> Result<()> {
    let stage = Stage::new(1)?;
    let image = stage.lab.path("point.raw");
    stage.tell(|scene| {
        let moment = scene.point()?;
        let mut qmp = scene.qmp()?;
        qmp.run("drive-backup", copy("copy", &image, "raw"))?;
        scene.wait_for("copy", MIB)?;
        qmp.run("job-pause", json!({"id": "copy"}))?;
        drop(qmp);
        for _ in 0..2 {
            scene.load()?;
            scene.kill()?;
            scene.load()?;
            ensure!(scene.job("copy")?["status"] == "paused", "{}", scene.job("copy")?);
            scene.is_read()?;
        }
        scene.qmp()?.run("job-resume", json!({"id": "copy"}))?;
        scene.complete("copy", &["copy"])?;
        scene.check(0, &image, &moment)?;
        scene.remove_point()
    })
}

#[test]
fn copies_of_a_point_into_nodes_go_on() -> Result<()> {
    let stage = Stage::new(1)?;
    let image = stage.lab.path("node.img");
    let mut server = Server::start(&stage.lab)?;
    stage.tell(|scene| {
        let moment = scene.point()?;
        let mut qmp = scene.qmp()?;
        fs::File::create(&image)?.set_len(SIZE)?;
        let file = json!({"driver": "file", "filename": image, "node-name": "below"});
        qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "file", "file": file}))?;
        let server_at = json!({"type": "unix", "path": server.socket});
        qmp.run("blockdev-add", json!({"driver": "nbd", "node-name": "nbd", "server": server_at, "export": ""}))?;
        for target in ["file", "nbd"] {
            let order = json!({"job-id": format!("to-{target}"), "device": "p", "target": target, "sync": "full",
                "speed": SLOW});
            qmp.run("blockdev-backup", order)?;
        }
        drop(qmp);
        for round in 0..kills(3) {
            scene.load()?;
            if round % 2 == 0 {
                // It forgets what it was not told to flush.
                scene.daemon.as_mut().context("a daemon")?.process().kill()?;
                server.process.kill()?;
                scene.kill()?;
                scene.load()?;
                server.process = Server::process(&scene.stage.lab, &server.socket, &server.file)?;
            } else {
                scene.kill()?;
            }
            for target in ["file", "nbd"] {
                ensure!(scene.job(&format!("to-{target}"))?["status"] == "running");
                scene.qmp()?.refused("blockdev-del", json!({"node-name": target}))?;
            }
        }
        scene.complete("to-file", &["to-file"])?;
        scene.complete("to-nbd", &["to-nbd"])?;
        scene.check(0, &image, &moment)?;
        scene.check(0, &server.file, &moment)?;
        let mut qmp = scene.qmp()?;
        qmp.run("blockdev-del", json!({"node-name": "file"}))?;
        qmp.run("blockdev-del", json!({"node-name": "nbd"}))?;
        scene.remove_point()
    })
}

#[test]
fn a_group_of_a_copy_of_a_point_and_a_backup_goes_on_as_a_group() -> Result<()> {
    let stage = Stage::new(2)?;
    let images: Vec<PathBuf> = (0..2).map(|n| stage.lab.path(&format!("full{n}.raw"))).collect();
    stage.tell(|scene| {
        add_bitmap(scene, "drive1")?;
        let point = scene.point()?;
        let backup = json!({"job-id": "backup", "device": "drive1", "target": images[1], "format": "raw", "sync": "full",
            "bitmap": "b", "bitmap-mode": "on-success", "speed": SLOW});
        let actions = json!([
            {"type": "drive-backup", "data": copy("copy", &images[0], "raw")},
            {"type": "drive-backup", "data": backup},
        ]);
        let data = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
        let moment = scene.order("transaction", data)?;
        scene.load()?;
        scene.kill()?;
        // One waits for the other, and still does after another kill.
        scene.wait_for_its_group("copy")?;
        scene.kill()?;
        scene.complete("backup", &["copy", "backup"])?;
        scene.check(0, &images[0], &point)?;
        scene.check(1, &images[1], &moment)?;
        scene.remove_point()
    })
}

#[test]
fn a_failed_copy_of_a_point_can_be_tried_again_after_kills() -> Result<()> {
    let stage = Stage::new(1)?;
    let small = SmallFileSystem::mount(8 * MIB)?;
    let (full, elsewhere) = (small.folder().join("point.raw"), stage.lab.path("point.raw"));
    stage.tell(|scene| {
        let moment = scene.point()?;
        let mut qmp = scene.qmp()?;
        let mut order = copy("copy", &full, "raw");
        order["on-failure"] = "keep".into();
        order["speed"] = 0.into();
        qmp.run("drive-backup", order)?;
        qmp.event(|event| event.name == "BLOCK_JOB_COMPLETED" && event.data["error"].is_string())?;
        drop(qmp);
        scene.load()?;
        scene.kill()?;
        scene.load()?;
        let jobs = scene.qmp()?.run("query-jobs", json!({}))?;
        ensure!(jobs[0]["id"] == "copy" && jobs[0]["kept"] == true && jobs[0]["status"] == "concluded", "{jobs}");
        ensure!(jobs[0]["error"].as_str().is_some_and(|error| error.contains("No space left")), "{jobs}");
        scene.is_read()?;
        let mut qmp = scene.qmp()?;
        qmp.run("job-retry", json!({"id": "copy", "target": elsewhere, "format": "raw"}))?;
        qmp.run("block-job-set-speed", json!({"device": "copy", "speed": SLOW}))?;
        drop(qmp);
        scene.load()?;
        scene.kill()?;
        ensure!(scene.job("copy")?["status"] == "running", "{}", scene.job("copy")?);
        scene.complete("copy", &["copy"])?;
        scene.check(0, &elsewhere, &moment)?;
        scene.remove_point()
    })
}

/// The bitmap may change, or go, once the order is given: what the copy is of is noted.
#[test]
fn a_copy_of_what_a_bitmap_held_is_of_that_after_kills() -> Result<()> {
    for keep in [false, true] {
        let lab = Lab::new()?;
        let disk = lab.filled_disk("drive0", 8 * MIB)?;
        let start = || Daemon::blkmark(&lab, std::slice::from_ref(&disk));
        let write = |units: &[u64], byte: u8| -> Result<()> {
            let mut client = BlkioClient::connect(&disk.socket, 1)?;
            units.iter().try_for_each(|unit| client.write(unit * UNIT, &[byte; UNIT as usize]))
        };
        let held = [0, 1, 5, 63, 64, 65, 66, 67, 90, 127];
        let mut daemon = start()?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?;
        write(&held, 0xaa)?;
        let data = json!({"actions": [
            {"type": "point-add", "data": {"node": "drive0", "name": "p"}},
            {"type": "block-dirty-bitmap-disable", "data": {"node": "drive0", "name": "b"}},
        ]});
        qmp.run("transaction", data)?;
        let image = lab.write("image.raw", vec![0xee; 8 * MIB as usize])?;
        let mut order = copy("copy", &image, "raw");
        order["mode"] = "existing".into();
        order["sync"] = "bitmap".into();
        order["bitmap"] = "b".into();
        order["bitmap-mode"] = "never".into();
        order["speed"] = UNIT.into();
        if keep {
            order["on-failure"] = "keep".into();
        }
        qmp.run("drive-backup", order)?;
        qmp.run("block-dirty-bitmap-clear", json!({"node": "drive0", "name": "b"}))?;
        qmp.run("block-dirty-bitmap-enable", json!({"node": "drive0", "name": "b"}))?;
        for round in 0..2 {
            write(&[0, 2, 64, 100, 127], 0xb0 + round)?;
            // Some of it is in the target by then.
            while daemon.qmp()?.run("query-block-jobs", json!({}))?[0]["offset"].as_u64() < Some(UNIT) {
                std::thread::yield_now();
            }
            daemon.process().kill()?;
            daemon = start()?;
        }
        let mut qmp = daemon.qmp()?;
        qmp.run("block-job-set-speed", json!({"device": "copy", "speed": 0}))?;
        qmp.job_completed("copy").with_context(|| daemon.process().log_tail())?;
        qmp.run("point-remove", json!({"name": "p"}))?;
        let content = fs::read(&image)?;
        for (unit, bytes) in content.chunks(UNIT as usize).enumerate() {
            let byte = if held.contains(&(unit as u64)) { 0xaa } else { 0xee };
            ensure!(bytes.iter().all(|found| *found == byte), "unit {unit} holds {:#x}", bytes[0]);
        }
        drop(qmp);
        daemon.stop()?;
    }
    Ok(())
}
