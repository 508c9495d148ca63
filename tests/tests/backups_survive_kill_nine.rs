//! The promise: a backup that is under way when blkmark is killed goes on when it is started again, and gives the very image that was
//! begun: the disk as of the instant of the command, although the guest wrote all the while, before, across and after the kill.
//!
//! The guest numbers the versions of its blocks (`versions`), so that every image is held against the instant that it is of.
//! Points in time and what copies them are in `points`. What cannot be gone on with is the matter of `what_cannot_go_on_says_so`.

#[path = "backups_survive_kill_nine/points.rs"]
mod points;
#[path = "backups_survive_kill_nine/searches.rs"]
mod searches;
#[path = "backups_survive_kill_nine/server.rs"]
mod server;
#[path = "backups_survive_kill_nine/stage.rs"]
mod stage;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use blkmark_tests::images;
use blkmark_tests::lab::MIB;
use blkmark_tests::small_fs::SmallFileSystem;
use blkmark_tests::tools;
use rustix::process::Signal;
use serde_json::json;
use server::Server;
use stage::{SIZE, SLOW, Stage, add_bitmap, full, kills};

#[test]
fn a_full_backup_and_its_increments_go_on_after_several_kills() -> Result<()> {
    let stage = Stage::new(1)?;
    let image = stage.lab.path("full.raw");
    stage.tell(|scene| {
        let data = json!({"actions": [
            {"type": "block-dirty-bitmap-add", "data": {"node": "drive0", "name": "b"}},
            {"type": "drive-backup", "data": full(&image, "raw")},
        ]});
        let moment = scene.order("transaction", data)?;
        for _ in 0..3 {
            scene.load()?;
            scene.kill()?;
            let job = scene.job("full")?;
            ensure!(job["status"] == "running" && job["speed"] == SLOW, "{job}");
        }
        scene.complete("full", &["full"])?;
        scene.check(0, &image, &moment)?;
        scene.load()?;
        let first = scene.increment(&image, "first.raw", 2)?;
        scene.load()?;
        // Its bitmap was advanced by the one that was killed, no more and no less.
        scene.increment(&first, "second.raw", 0).map(drop)
    })
}

#[test]
fn qcow2_images_go_on_and_are_sound() -> Result<()> {
    for compress in [false, true] {
        let stage = Stage::new(1)?;
        let (base, top) = (stage.lab.path("full.qcow2"), stage.lab.path("top.qcow2"));
        stage.tell(|scene| {
            add_bitmap(scene, "drive0")?;
            let mut order = full(&base, "qcow2");
            order["compress"] = compress.into();
            order["bitmap"] = "b".into();
            order["bitmap-mode"] = "on-success".into();
            let first = scene.order("drive-backup", order)?;
            for _ in 0..3 {
                scene.load()?;
                scene.kill()?;
                ensure!(scene.job("full")?["status"] == "running");
            }
            scene.complete("full", &["full"])?;
            images::assert_sound(&base)?;
            images::create_on_top(&base, "qcow2", &top)?;
            let order = json!({"job-id": "inc", "device": "drive0", "target": top, "format": "qcow2", "mode": "existing",
                "sync": "incremental", "bitmap": "b", "speed": SLOW, "compress": compress});
            let second = scene.order("drive-backup", order)?;
            for _ in 0..2 {
                scene.load()?;
                scene.kill()?;
                ensure!(scene.job("inc")?["status"] == "running");
            }
            scene.complete("inc", &["inc"])?;
            images::assert_sound(&top)?;
            scene.check(0, &images::restore(&base)?, &first)?;
            scene.check(0, &images::restore(&top)?, &second)
        })?;
    }
    Ok(())
}

#[test]
fn backups_into_nodes_go_on() -> Result<()> {
    for qcow2 in [false, true] {
        let stage = Stage::new(1)?;
        let image = stage.lab.path("node.img");
        stage.tell(|scene| {
            add_bitmap(scene, "drive0")?;
            let mut qmp = scene.qmp()?;
            match qcow2 {
                // In one description, and in two.
                false => {
                    fs::File::create(&image)?.set_len(SIZE)?;
                    let file = json!({"driver": "file", "filename": image, "node-name": "below"});
                    qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "t", "file": file}))?;
                }
                true => {
                    tools::run(
                        tools::command("qemu-img")?
                            .args(["create", "-q", "-f", "qcow2"])
                            .arg(&image)
                            .arg(SIZE.to_string()),
                    )?;
                    qmp.run("blockdev-add", json!({"driver": "file", "filename": image, "node-name": "below"}))?;
                    qmp.run("blockdev-add", json!({"driver": "qcow2", "node-name": "t", "file": "below"}))?;
                }
            }
            let order = json!({"job-id": "full", "device": "drive0", "target": "t", "sync": "full", "bitmap": "b",
                "bitmap-mode": "on-success", "speed": SLOW});
            let moment = scene.order("blockdev-backup", order)?;
            for _ in 0..kills(3) {
                scene.load()?;
                scene.kill()?;
                ensure!(scene.job("full")?["status"] == "running");
                scene.qmp()?.refused("blockdev-del", json!({"node-name": "t"}))?;
            }
            scene.complete("full", &["full"])?;
            let mut qmp = scene.qmp()?;
            qmp.run("blockdev-del", json!({"node-name": "t"}))?;
            if qcow2 {
                qmp.run("blockdev-del", json!({"node-name": "below"}))?;
                images::assert_sound(&image)?;
                return scene.check(0, &images::restore(&image)?, &moment);
            }
            scene.check(0, &image, &moment)
        })?;
    }
    Ok(())
}

#[test]
fn a_backup_into_an_nbd_export_goes_on_although_the_server_forgets_hangs_or_is_late() -> Result<()> {
    let stage = Stage::new(1)?;
    let mut server = Server::start(&stage.lab)?;
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        for (job, sync) in [("full", "full"), ("inc", "incremental")] {
            let server_at = json!({"type": "unix", "path": server.socket});
            let node = json!({"driver": "nbd", "node-name": "t", "server": server_at, "export": ""});
            scene.qmp()?.run("blockdev-add", node)?;
            let mut order = json!({"job-id": job, "device": "drive0", "target": "t", "sync": sync, "bitmap": "b",
                "speed": SLOW});
            if sync == "full" {
                order["bitmap-mode"] = "on-success".into();
            }
            let moment = scene.order("blockdev-backup", order)?;
            for round in 0..kills(3) {
                scene.load()?;
                match round % 3 {
                    // It forgets what it was not told to flush, and comes back when the guests have long been served again.
                    0 => {
                        scene.daemon.as_mut().context("a daemon")?.process().kill()?;
                        server.process.kill()?;
                        scene.kill()?;
                        scene.load()?;
                        server.process = Server::process(&scene.stage.lab, &server.socket, &server.file)?;
                    }
                    // It accepts connections and says nothing.
                    1 => {
                        server.process.signal(Signal::STOP)?;
                        scene.kill()?;
                        scene.load()?;
                        server.process.signal(Signal::CONT)?;
                    }
                    _ => scene.kill()?,
                }
                ensure!(scene.job(job)?["status"] == "running", "{}", scene.job(job)?);
            }
            scene.complete(job, &[job])?;
            scene.check(0, &server.file, &moment)?;
            scene.qmp()?.run("blockdev-del", json!({"node-name": "t"}))?;
        }
        Ok(())
    })
}

#[test]
fn a_server_that_stays_away_is_the_policys_affair() -> Result<()> {
    for policy in ["report", "stop"] {
        let stage = Stage::new(1)?;
        let mut server = Server::start(&stage.lab)?;
        stage.tell(|scene| {
            add_bitmap(scene, "drive0")?;
            let server_at = json!({"type": "unix", "path": server.socket});
            let node = json!({"driver": "nbd", "node-name": "t", "server": server_at, "export": ""});
            scene.qmp()?.run("blockdev-add", node)?;
            let order = json!({"job-id": "full", "device": "drive0", "target": "t", "sync": "full", "bitmap": "b",
                "bitmap-mode": "on-success", "speed": SLOW, "on-target-error": policy});
            let moment = scene.order("blockdev-backup", order)?;
            scene.load()?;
            scene.daemon.as_mut().context("a daemon")?.process().kill()?;
            server.process.kill()?;
            scene.kill()?;
            let mut qmp = scene.qmp()?;
            if policy == "report" {
                let error = qmp.job_failed("full")?;
                ensure!(error.contains("Failed to connect"), "{error}");
                ensure!(qmp.bitmap("drive0", "b")?["busy"] == false);
                qmp.run("blockdev-del", json!({"node-name": "t"}))?;
                return Ok(());
            }
            while scene.job("full")?["status"] != "paused" {
                scene.load()?;
            }
            server.process = Server::process(&scene.stage.lab, &server.socket, &server.file)?;
            qmp.run("job-resume", json!({"id": "full"}))?;
            scene.complete("full", &["full"])?;
            scene.check(0, &server.file, &moment)
        })?;
    }
    Ok(())
}

#[test]
fn a_paused_backup_stays_paused() -> Result<()> {
    let stage = Stage::new(1)?;
    let image = stage.lab.path("full.raw");
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        let moment = scene.order("drive-backup", full(&image, "raw"))?;
        scene.load()?;
        scene.qmp()?.run("job-pause", json!({"id": "full"}))?;
        scene.load()?;
        scene.kill()?;
        scene.load()?;
        ensure!(scene.job("full")?["status"] == "paused");
        scene.qmp()?.run("job-resume", json!({"id": "full"}))?;
        scene.complete("full", &["full"])?;
        scene.check(0, &image, &moment)
    })
}

#[test]
fn a_group_goes_on_as_a_group() -> Result<()> {
    let stage = Stage::new(2)?;
    let images: Vec<PathBuf> = (0..2).map(|n| stage.lab.path(&format!("full{n}.raw"))).collect();
    stage.tell(|scene| {
        let bitmaps = (0..2)
            .map(|n| json!({"type": "block-dirty-bitmap-add", "data": {"node": format!("drive{n}"), "name": "b"}}));
        scene.qmp()?.run("transaction", json!({"actions": bitmaps.collect::<Vec<_>>()}))?;
        scene.load()?;
        let backups = images.iter().enumerate().map(|(n, image)| {
            json!({"type": "drive-backup", "data": {"job-id": format!("job{n}"), "device": format!("drive{n}"),
                "target": image, "format": "raw", "sync": "full", "bitmap": "b", "bitmap-mode": "on-success",
                "speed": SLOW}})
        });
        let data = json!({"actions": backups.collect::<Vec<_>>(), "properties": {"completion-mode": "grouped"}});
        let moment = scene.order("transaction", data)?;
        scene.load()?;
        scene.kill()?;
        // One waits for the other.
        scene.wait_for_its_group("job0")?;
        scene.kill()?;
        scene.complete("job1", &["job0", "job1"])?;
        scene.check(0, &images[0], &moment)?;
        scene.check(1, &images[1], &moment)
    })
}

#[test]
fn a_failed_backup_can_be_tried_again_after_a_kill() -> Result<()> {
    let stage = Stage::new(1)?;
    let small = SmallFileSystem::mount(8 * MIB)?;
    let (full, elsewhere) = (small.folder().join("full.raw"), stage.lab.path("full.raw"));
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        scene.load()?;
        let order = json!({"job-id": "full", "device": "drive0", "target": full, "format": "raw", "sync": "full",
            "bitmap": "b", "bitmap-mode": "on-success", "on-failure": "keep"});
        let mut qmp = scene.qmp()?;
        let moment = scene.order("drive-backup", order)?;
        qmp.event(|event| event.name == "BLOCK_JOB_COMPLETED" && event.data["error"].is_string())?;
        drop(qmp);
        scene.load()?;
        scene.kill()?;
        scene.load()?;
        let jobs = scene.qmp()?.run("query-jobs", json!({}))?;
        ensure!(jobs[0]["id"] == "full" && jobs[0]["kept"] == true && jobs[0]["status"] == "concluded", "{jobs}");
        ensure!(jobs[0]["error"].as_str().is_some_and(|error| error.contains("No space left")), "{jobs}");
        let mut qmp = scene.qmp()?;
        qmp.run("job-retry", json!({"id": "full", "target": elsewhere, "format": "raw"}))?;
        qmp.job_completed("full")?;
        scene.check(0, &elsewhere, &moment)?;
        scene.load()?;
        scene.increment(&elsewhere, "increment.raw", 0).map(drop)
    })
}
