//! A populate goes on after a kill: it searches anew, and in the end its bitmap holds every block in which the disk differs from the
//! older image, what the guest wrote before the kill included.
//!
//! The proof is the next increment: onto the older image, it has to make the disk of its instant.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark_tests::blkio_client::BlkioClient;
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::tools;
use serde_json::{Value, json};

use crate::server::Server;
use crate::stage::{SIZE, SLOW, Scene, Stage, add_bitmap, kills};

const UNIT: u64 = 64 << 10;

/// A populate of bitmap b of drive0, slow enough to be killed where it reads anything.
fn search(more: Value) -> Value {
    let mut data = json!({"job-id": "search", "node": "drive0", "name": "b", "speed": SLOW});
    for (member, value) in more.as_object().into_iter().flatten() {
        data[member] = value.clone();
    }
    data
}

fn differing(image: &Path, format: &str) -> Value {
    search(json!({"pattern": "diff", "image": image, "format": format}))
}

/// The bitmap, and what is to fill it.
fn made_for(search: &Value) -> Value {
    json!({"actions": [
        {"type": "block-dirty-bitmap-add", "data": {"node": "drive0", "name": "b"}},
        {"type": "block-dirty-bitmap-populate", "data": search},
    ]})
}

impl Scene<'_> {
    /// A copy of drive0 beside its guest's writes, then more of those.
    fn older(&self, name: &str) -> Result<PathBuf> {
        let image = self.stage.lab.path(name);
        fs::copy(&self.stage.disks[0].path, &image)?;
        self.load()?;
        Ok(image)
    }

    /// Kills it some times in the middle.
    fn kill_searching(&mut self, status: &str) -> Result<()> {
        for _ in 0..kills(3) {
            self.load()?;
            self.reaches(status)?;
            self.kill()?;
            let job = self.job("search")?;
            ensure!(job["type"] == "bitmap-populate" && job["speed"] == SLOW, "{job}");
            let bitmap = self.qmp()?.bitmap("drive0", "b")?;
            ensure!(bitmap["busy"] == true && bitmap.get("inconsistent").is_none(), "{bitmap}");
        }
        self.load()?;
        self.reaches(status)
    }

    /// Waits until it stands so.
    fn reaches(&self, status: &str) -> Result<()> {
        while self.job("search")?["status"] != status {
            self.load()?;
        }
        Ok(())
    }

    /// The chain from the older image on: its first increment, and one that has nothing but what came since.
    fn chain(&mut self, older: &Path) -> Result<()> {
        let first = self.increment(older, "first.raw", 0)?;
        self.load()?;
        self.increment(&first, "second.raw", 0).map(drop)
    }
}

#[test]
fn a_comparison_goes_on_after_several_kills() -> Result<()> {
    for mode in ["overwrite", "union"] {
        let stage = Stage::new(1)?;
        stage.tell(|scene| {
            add_bitmap(scene, "drive0")?;
            let older = scene.older("older.raw")?;
            let mut order = differing(&older, "raw");
            order["mode"] = mode.into();
            scene.qmp()?.run("block-dirty-bitmap-populate", order)?;
            scene.kill_searching("running")?;
            scene.complete("search", &["search"])?;
            scene.chain(&older)
        })?;
    }
    Ok(())
}

/// Left behind without the job, such a bitmap would say that nothing differs.
#[test]
fn a_bitmap_that_is_made_for_a_comparison_is_filled_after_kills() -> Result<()> {
    let stage = Stage::new(1)?;
    stage.tell(|scene| {
        let older = scene.older("older.raw")?;
        let image = scene.stage.lab.path("older.qcow2");
        let args = ["convert", "-f", "raw", "-O", "qcow2"];
        tools::run(tools::command("qemu-img")?.args(args).arg(&older).arg(&image))?;
        scene.load()?;
        scene.qmp()?.run("transaction", made_for(&differing(&image, "qcow2")))?;
        scene.kill_searching("running")?;
        scene.complete("search", &["search"])?;
        scene.chain(&older)
    })
}

/// These look at nothing that could be slow, so they are killed while they wait to be finalized.
#[test]
fn other_patterns_go_on_and_wait_to_be_finalized_as_before() -> Result<()> {
    for (pattern, made) in [("all", false), ("allocation-top", false), ("all", true), ("allocation-top", true)] {
        let stage = Stage::new(1)?;
        stage.tell(|scene| {
            let order = search(json!({"pattern": pattern, "auto-finalize": false}));
            if made {
                scene.qmp()?.run("transaction", made_for(&order))?;
            } else {
                add_bitmap(scene, "drive0")?;
                scene.qmp()?.run("block-dirty-bitmap-populate", order)?;
            }
            scene.kill_searching("pending")?;
            let mut qmp = scene.qmp()?;
            qmp.run("job-finalize", json!({"id": "search"}))?;
            qmp.job_completed("search")?;
            let bitmap = qmp.bitmap("drive0", "b")?;
            ensure!(bitmap["count"] == SIZE && bitmap["busy"] == false && bitmap["recording"] == true, "{bitmap}");
            let empty = scene.stage.lab.path("empty.raw");
            fs::File::create(&empty)?.set_len(SIZE)?;
            scene.chain(&empty)
        })?;
    }
    Ok(())
}

#[test]
fn a_paused_comparison_stays_paused() -> Result<()> {
    let stage = Stage::new(1)?;
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        let older = scene.older("older.raw")?;
        let mut qmp = scene.qmp()?;
        qmp.run("block-dirty-bitmap-populate", differing(&older, "raw"))?;
        qmp.run("job-pause", json!({"id": "search"}))?;
        qmp.run("block-job-set-speed", json!({"device": "search", "speed": 2 * SLOW}))?;
        drop(qmp);
        for _ in 0..2 {
            scene.load()?;
            scene.kill()?;
            scene.load()?;
            let job = scene.job("search")?;
            ensure!(job["status"] == "paused" && job["speed"] == 2 * SLOW, "{job}");
        }
        scene.qmp()?.run("job-resume", json!({"id": "search"}))?;
        scene.complete("search", &["search"])?;
        scene.chain(&older)
    })
}

#[test]
fn a_comparison_with_a_node_goes_on_and_the_node_is_there_again() -> Result<()> {
    let stage = Stage::new(1)?;
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        let older = scene.older("older.raw")?;
        let mut qmp = scene.qmp()?;
        let below = json!({"driver": "file", "filename": older, "node-name": "below", "read-only": true});
        qmp.run("blockdev-add", below)?;
        let node = json!({"driver": "raw", "node-name": "old", "file": "below", "read-only": true});
        qmp.run("blockdev-add", node)?;
        qmp.run("block-dirty-bitmap-populate", search(json!({"pattern": "diff", "image-node": "old"})))?;
        drop(qmp);
        scene.kill_searching("running")?;
        let busy = scene.qmp()?.refused("blockdev-del", json!({"node-name": "old"}))?;
        ensure!(busy.to_string().contains("in use by block job: bitmap-populate"), "{busy}");
        scene.complete("search", &["search"])?;
        let mut qmp = scene.qmp()?;
        qmp.run("blockdev-del", json!({"node-name": "old"}))?;
        qmp.run("blockdev-del", json!({"node-name": "below"}))?;
        scene.chain(&older)
    })
}

/// Guests are served first, and the server may come back later.
#[test]
fn a_comparison_with_an_nbd_export_goes_on_although_the_server_is_late() -> Result<()> {
    let stage = Stage::new(1)?;
    let mut server = Server::start(&stage.lab)?;
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        let older = scene.older("older.raw")?;
        fs::copy(&older, &server.file)?;
        let address = json!({"type": "unix", "path": server.socket});
        let node = json!({"driver": "nbd", "node-name": "old", "server": address, "export": "", "read-only": true});
        let mut qmp = scene.qmp()?;
        qmp.run("blockdev-add", node)?;
        qmp.run("block-dirty-bitmap-populate", search(json!({"pattern": "diff", "image-node": "old"})))?;
        drop(qmp);
        for _ in 0..kills(2) {
            scene.load()?;
            scene.daemon.as_mut().context("a daemon")?.process().kill()?;
            server.process.kill()?;
            scene.kill()?;
            scene.load()?;
            server.process = Server::process(&scene.stage.lab, &server.socket, &server.file)?;
            ensure!(scene.job("search")?["status"] == "running", "{}", scene.job("search")?);
        }
        scene.complete("search", &["search"])?;
        scene.qmp()?.run("blockdev-del", json!({"node-name": "old"}))?;
        scene.chain(&older)
    })
}

#[test]
fn a_comparison_with_a_point_in_time_goes_on_behind_it() -> Result<()> {
    let stage = Stage::new(1)?;
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        scene.load()?;
        let mut qmp = scene.qmp()?;
        qmp.run("point-add", json!({"node": "drive0", "name": "p"}))?;
        scene.load()?;
        qmp.run(
            "block-dirty-bitmap-populate",
            search(json!({"pattern": "diff", "image-node": "p", "mode": "overwrite"})),
        )?;
        drop(qmp);
        scene.kill_searching("running")?;
        let busy = scene.qmp()?.refused("point-remove", json!({"name": "p"}))?;
        ensure!(busy.to_string().contains("in use by block job: bitmap-populate"), "{busy}");
        scene.complete("search", &["search"])?;
        let image = scene.stage.lab.path("p.raw");
        let mut qmp = scene.qmp()?;
        qmp.run(
            "drive-backup",
            json!({"job-id": "copy", "device": "p", "target": image, "format": "raw", "sync": "full"}),
        )?;
        qmp.job_completed("copy")?;
        qmp.run("point-remove", json!({"name": "p"}))?;
        scene.chain(&image)
    })
}

#[test]
fn a_group_of_a_comparison_and_a_backup_goes_on_as_a_group() -> Result<()> {
    let stage = Stage::new(2)?;
    let full = stage.lab.path("full.raw");
    stage.tell(|scene| {
        add_bitmap(scene, "drive0")?;
        add_bitmap(scene, "drive1")?;
        let older = scene.older("older.raw")?;
        let backup = json!({"job-id": "backup", "device": "drive1", "target": full, "format": "raw", "sync": "full",
            "bitmap": "b", "bitmap-mode": "on-success", "speed": SLOW});
        let actions = json!([
            {"type": "block-dirty-bitmap-populate", "data": differing(&older, "raw")},
            {"type": "drive-backup", "data": backup},
        ]);
        let data = json!({"actions": actions, "properties": {"completion-mode": "grouped"}});
        let moment = scene.order("transaction", data)?;
        scene.load()?;
        scene.kill()?;
        // One waits for the other, and still does after another kill.
        scene.wait_for_its_group("search")?;
        scene.kill()?;
        scene.reaches("waiting")?;
        ensure!(scene.job("backup")?["status"] == "running");
        scene.complete("backup", &["search", "backup"])?;
        scene.check(1, &full, &moment)?;
        scene.chain(&older)
    })
}

/// What a disabled bitmap is written meanwhile is recorded for the job alone, and has to outlive the kill all the same.
#[test]
fn a_disabled_bitmap_holds_what_was_written_until_the_end_and_nothing_later() -> Result<()> {
    for made in [false, true] {
        let lab = Lab::new()?;
        let disk = lab.filled_disk("drive0", 8 * MIB)?;
        let start = || Daemon::blkmark(&lab, std::slice::from_ref(&disk));
        let write = |units: &[u64], byte: u8| -> Result<()> {
            let mut client = BlkioClient::connect(&disk.socket, 1)?;
            units.iter().try_for_each(|unit| client.write(unit * UNIT, &[byte; UNIT as usize]))
        };
        let older = lab.path("older.raw");
        fs::copy(&disk.path, &older)?;
        let mut daemon = start()?;
        let mut qmp = daemon.qmp()?;
        let add = json!({"node": "drive0", "name": "b", "disabled": true});
        write(&[3], 0xa0)?;
        let mut order = differing(&older, "raw");
        order["speed"] = UNIT.into();
        if made {
            let actions = json!([{"type": "block-dirty-bitmap-add", "data": add},
                {"type": "block-dirty-bitmap-populate", "data": order}]);
            qmp.run("transaction", json!({"actions": actions}))?;
        } else {
            qmp.run("block-dirty-bitmap-add", add)?;
            qmp.run("block-dirty-bitmap-populate", order)?;
        }
        drop(qmp);
        let image = fs::read(&older)?;
        let same = |unit: u64| image[(unit * UNIT) as usize..((unit + 1) * UNIT) as usize].to_vec();
        for round in 0..2u8 {
            // The second time, what is at 7 is as in the image again: only what was recorded tells of it.
            write(&[0, 64, 127, 20 + u64::from(round)], 0xb0 + round)?;
            BlkioClient::connect(&disk.socket, 1)?.write(7 * UNIT, &same(7))?;
            daemon.process().kill()?;
            daemon = start()?;
        }
        let mut qmp = daemon.qmp()?;
        qmp.run("block-job-set-speed", json!({"device": "search", "speed": 0}))?;
        qmp.job_completed("search").with_context(|| daemon.process().log_tail())?;
        write(&[100], 0xcc)?;
        let bitmap = qmp.bitmap("drive0", "b")?;
        ensure!(bitmap["count"] == 7 * UNIT && bitmap["recording"] == false && bitmap["busy"] == false, "{bitmap}");
        // And those that it should be.
        let target = lab.path("target.raw");
        fs::copy(&older, &target)?;
        let backup = json!({"job-id": "inc", "device": "drive0", "target": target, "format": "raw", "mode": "existing",
            "sync": "bitmap", "bitmap": "b", "bitmap-mode": "never"});
        qmp.run("drive-backup", backup)?;
        qmp.job_completed("inc")?;
        let mut content = disk.content()?;
        content[(100 * UNIT) as usize..(101 * UNIT) as usize].copy_from_slice(&same(100));
        ensure!(fs::read(&target)? == content, "the image is not the disk");
        drop(qmp);
        daemon.stop()?;
    }
    Ok(())
}
