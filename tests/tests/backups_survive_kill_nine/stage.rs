//! Disks with guests that number the versions of their blocks (`versions`), and a daemon that is killed now and then.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::Guest;
use blkmark_tests::beside::{Stop, Worker, beside};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::versions::Record;
use serde_json::{Value, json};

pub(crate) const SIZE: u64 = 48 * MIB;
/// Slow enough that a job is not done before it is told to hurry.
pub(crate) const SLOW: u64 = 2 * MIB;

/// Disks with their guests, and a daemon that is killed now and then.
pub(crate) struct Stage {
    pub(crate) lab: Lab,
    pub(crate) disks: Vec<Disk>,
    pub(crate) records: Vec<Record>,
}

/// What the story works with while the guests write.
pub(crate) struct Scene<'a> {
    pub(crate) stage: &'a Stage,
    pub(crate) guests: Vec<Guest>,
    pub(crate) daemon: Option<Daemon>,
}

/// The two looks at the records of all disks, before and after an instant.
pub(crate) type Moment = (Vec<Vec<u64>>, Vec<Vec<u64>>);

impl Stage {
    pub(crate) fn new(disks: usize) -> Result<Stage> {
        let lab = Lab::new()?;
        let made: Result<Vec<_>> = (0..disks).map(|n| Record::of_new_disk(&lab, &format!("drive{n}"), SIZE)).collect();
        let (disks, records) = made?.into_iter().unzip();
        Ok(Stage { lab, disks, records })
    }

    /// Tells a story beside guests that write all the while; at the end the disks hold what was acknowledged.
    pub(crate) fn tell(&self, story: impl FnOnce(&mut Scene<'_>) -> Result<()>) -> Result<()> {
        let daemon = Daemon::blkmark(&self.lab, &self.disks)?;
        let mut guests = Vec::new();
        let mut workers = Vec::new();
        for (n, (disk, record)) in self.disks.iter().zip(&self.records).enumerate() {
            let mut guest = Guest::connect(&disk.socket, Record::options())?;
            let queue = guest.take_queues().pop().context("a queue")?;
            guests.push(guest);
            let work = move |stop: &Stop| record.keep_writing(queue, stop, 0x9e37_79b9 + 77 * n as u64);
            workers.push(Box::new(work) as Worker<'_>);
        }
        let mut scene = Scene { stage: self, guests, daemon: Some(daemon) };
        beside(workers, || {
            let told = story(&mut scene);
            told.map_err(|error| match &mut scene.daemon {
                Some(daemon) => error.context(daemon.process().log_tail()),
                None => error,
            })
        })?;
        drop(scene.guests);
        scene.daemon.context("a daemon")?.stop()?;
        for (disk, record) in self.disks.iter().zip(&self.records) {
            let last = record.acknowledged();
            record.check(&disk.path, &last, &record.issued())?;
        }
        ensure!(left_behind(&self.lab)?.is_empty(), "{:?}", left_behind(&self.lab)?);
        Ok(())
    }
}

/// Files of points in time where scratch is.
pub(crate) fn left_behind(lab: &Lab) -> Result<Vec<PathBuf>> {
    let mut left = Vec::new();
    for entry in fs::read_dir(lab.folder())? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(".blkmark-point-") {
            left.push(entry.path());
        }
    }
    Ok(left)
}

impl Scene<'_> {
    pub(crate) fn qmp(&self) -> Result<Qmp> {
        self.daemon.as_ref().context("a daemon")?.qmp()
    }

    /// An order whose instant is somewhere between two looks at the records.
    pub(crate) fn order(&self, command: &str, arguments: Value) -> Result<Moment> {
        let mut qmp = self.qmp()?;
        let before = self.stage.records.iter().map(Record::acknowledged).collect();
        qmp.run(command, arguments)?;
        Ok((before, self.stage.records.iter().map(Record::issued).collect()))
    }

    /// Kills the daemon, starts another, and lets the guests go on.
    pub(crate) fn kill(&mut self) -> Result<()> {
        let mut killed = self.daemon.take().context("a daemon")?;
        if killed.process().is_running() {
            killed.process().kill()?;
        }
        let daemon = Daemon::blkmark(&self.stage.lab, &self.stage.disks)?;
        self.daemon = Some(daemon);
        for ((guest, disk), record) in self.guests.iter_mut().zip(&self.stage.disks).zip(&self.stage.records) {
            record.reconnect(guest, disk)?;
        }
        Ok(())
    }

    /// Lets all guests write for a while.
    pub(crate) fn load(&self) -> Result<()> {
        self.stage.records.iter().try_for_each(|record| record.wait_for(600))
    }

    pub(crate) fn job(&self, id: &str) -> Result<Value> {
        let jobs = self.qmp()?.run("query-block-jobs", json!({}))?;
        let found = jobs.as_array().into_iter().flatten().find(|job| job["device"] == id).cloned();
        found.with_context(|| format!("no job {id} in {jobs}"))
    }

    /// Lets a job of a group go as fast as it can, until it waits for the others.
    pub(crate) fn wait_for_its_group(&mut self, job: &str) -> Result<()> {
        self.qmp()?.run("block-job-set-speed", json!({"device": job, "speed": 0}))?;
        while self.job(job)?["status"] == "running" {
            self.load()?;
        }
        ensure!(self.job(job)?["status"] == "waiting", "{}", self.job(job)?);
        Ok(())
    }

    /// Lets a job run as fast as it can, and waits for the success of all.
    pub(crate) fn complete(&self, slow: &str, ids: &[&str]) -> Result<()> {
        let mut qmp = self.qmp()?;
        qmp.run("block-job-set-speed", json!({"device": slow, "speed": 0}))?;
        ids.iter().try_for_each(|id| qmp.job_completed(id))
    }

    pub(crate) fn check(&self, disk: usize, image: &std::path::Path, moment: &Moment) -> Result<()> {
        self.stage.records[disk].check(image, &moment.0[disk], &moment.1[disk])
    }

    /// An increment into a copy of the image before it, which has to make that the disk of this instant.
    pub(crate) fn increment(&mut self, base: &std::path::Path, name: &str, kills: usize) -> Result<PathBuf> {
        let image = self.stage.lab.path(name);
        fs::copy(base, &image)?;
        let order = json!({"job-id": "inc", "device": "drive0", "target": image, "format": "raw", "mode": "existing",
            "sync": "incremental", "bitmap": "b", "speed": SLOW});
        let moment = self.order("drive-backup", order)?;
        for _ in 0..kills {
            self.load()?;
            self.kill()?;
            ensure!(self.job("inc")?["status"] == "running");
        }
        self.complete("inc", &["inc"])?;
        self.check(0, &image, &moment)?;
        Ok(image)
    }
}

/// How often a job is to be killed: `BLKMARK_KILLS`, or as given.
pub(crate) fn kills(usual: usize) -> usize {
    std::env::var("BLKMARK_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(usual)
}

pub(crate) fn full(target: &std::path::Path, format: &str) -> Value {
    json!({"job-id": "full", "device": "drive0", "target": target, "format": format, "sync": "full", "speed": SLOW})
}

pub(crate) fn add_bitmap(scene: &Scene<'_>, disk: &str) -> Result<()> {
    let data = json!({"node": disk, "name": "b"});
    scene.qmp()?.run("block-dirty-bitmap-add", data).map(drop)
}
