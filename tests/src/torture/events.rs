//! The events of the schedule, each with what has to be done after it.

use std::fs;
use std::io::Write;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::backups::{Active, Purpose};
use super::bounds::Bounds;
use super::geometry::{MIB_SECTORS, SECTORS};
use super::orders::Answer;
use super::schedule::{Again, Event};
use super::world::Torture;
use crate::process::GIVE_UP;
use crate::random::Random;

impl Torture {
    /// Makes an event happen.
    pub fn happen(&mut self, event: Event, random: &mut Random) -> Result<()> {
        match event {
            Event::KillDaemon(again) => self.kill_and_start(again),
            Event::KillInCommand(after) => self.kill_in_command(random, after),
            Event::Terminate => {
                self.back_up(&self.all(), random, &json!({ "speed": 1 << 20 }), true)?;
                self.listen(Duration::from_millis(random.below(60)))?;
                self.active.iter_mut().for_each(|job| job.may_fail = true);
                self.terminate_daemon()?;
                self.start_daemon()
            }
            Event::KillGuest { disk, daemon } => {
                let disk = usize::from(disk);
                if daemon == Some(true) {
                    self.kill_daemon("daemon, then its guest")?;
                }
                self.kill_guest(disk, "guest")?;
                if daemon == Some(false) {
                    self.kill_daemon("daemon after its guest")?;
                }
                if daemon.is_some() {
                    self.start_daemon()?;
                }
                self.start_guest(disk)
            }
            Event::KillBackupClient(after) => self.kill_backup_client(random, after),
            Event::KillBitmapClient(after) => self.kill_bitmap_client(random, after),
            Event::Reboot => {
                self.log.say("reboot");
                self.kill_daemon("daemon in a reboot")?;
                for disk in self.all() {
                    self.kill_guest(disk, "guest in a reboot")?;
                }
                self.place.forget_runtime()?;
                self.start_daemon()?;
                self.all().into_iter().try_for_each(|disk| self.start_guest(disk))
            }
            Event::TargetGone => {
                let disk = random.below(self.served.len() as u64) as usize;
                self.mirror(disk, &json!({ "speed": 4 << 20 }), true)?;
                self.listen(Duration::from_millis(random.below(50)))?;
                self.log.say(format_args!("the mirror of disk {disk} is gone"));
                self.log.count("faults", "target gone", 1);
                self.mirror_may_fail(disk);
                self.served[disk].mirror.kill();
                Ok(())
            }
            Event::TargetFails => {
                let policy = ["report", "ignore"][random.below(2) as usize];
                let disk = random.below(self.served.len() as u64) as usize;
                self.mirror_may_fail(disk);
                self.served[disk].mirror.fail(true)?;
                self.log.count("faults", "target failing", 1);
                let failing = self.mirror(disk, &json!({ "on-target-error": policy }), true);
                let ended = failing.and_then(|()| self.listen(Duration::from_millis(60)));
                self.served[disk].mirror.fail(false)?;
                ended
            }
            Event::TargetFull { retry } => self.target_full(random, retry),
            Event::StoreFull { kill } => self.store_full(random, kill),
            Event::Resize(disk) => self.resize(disk.into()),
            Event::Bitmaps => self.change_bitmaps(random),
            Event::Job => self.disturb_a_job(random),
            Event::LookAtBitmap(disk) => self.look_at_bitmap(disk.into(), random),
            Event::Mirror(disk) => self.mirror(disk.into(), &json!({}), false),
        }
    }

    /// The numbers of all disks.
    pub fn all(&self) -> Vec<usize> {
        (0..self.served.len()).collect()
    }

    fn kill_and_start(&mut self, again: Again) -> Result<()> {
        self.kill_daemon("daemon")?;
        match again {
            Again::AtOnce => {}
            Again::After(pause) => sleep(pause),
            Again::Twice(times) => {
                for _ in 0..times {
                    self.spawn_daemon()?;
                    self.daemon_ready()?;
                    self.kill_daemon("daemon once more")?;
                }
            }
            Again::DuringStart(after) => {
                self.spawn_daemon()?;
                sleep(after);
                self.kill_daemon("daemon during its start")?;
            }
        }
        self.start_daemon()
    }

    fn kill_in_command(&mut self, random: &mut Random, after: Duration) -> Result<()> {
        let killer = self.kill_daemon_later(after)?;
        let deadline = Instant::now() + GIVE_UP;
        while self.qmp.is_some() {
            ensure!(Instant::now() < deadline, "the daemon cannot be killed");
            match random.below(3) {
                0 => self.back_up(&self.all(), random, &json!({}), false)?,
                _ => self.change_bitmaps(random)?,
            }
        }
        killer.join().ok().context("the killer panicked")?;
        self.log.say("kill -9 of the daemon in a command");
        self.log.count("kills", "daemon in a command", 1);
        self.daemon_is_gone()?;
        self.start_daemon()
    }

    fn kill_backup_client(&mut self, random: &mut Random, after: Duration) -> Result<()> {
        let disk = random.below(self.served.len() as u64) as usize;
        let busy = self.active.iter().any(|job| job.disk == disk && job.is_of_chain());
        let chain = self.served[disk].chain.clone();
        let (false, Some(tip), Some(bitmap)) = (busy, chain.tip(), &chain.bitmap) else { return Ok(()) };
        let (order, id) = (self.name(), self.served[disk].disk.id.clone());
        let image = self.image(disk, order, "qcow2");
        self.catch_up()?;
        let mut bounds = [(disk, Bounds::begin(disk as u8, &self.served[disk].model))];
        let (target, backing) = (image.path.display().to_string(), tip.path.display().to_string());
        let words = ["backup", "incremental", "--disk", &id, "--bitmap", bitmap, "--target", &target, "--backing"];
        let words = [&words[..], &[&backing, "--backing-format", tip.format]].concat();
        let mut client = self.client(&words, std::process::Stdio::null())?;
        sleep(after);
        self.kill_client(&mut client, "client with a backup")?;
        self.take(&mut bounds)?;
        let [(_, bounds)] = bounds;
        let mut job = Active::new(id.clone(), disk, order, Purpose::Increment(image.clone()));
        job.bounds = Some(bounds);
        self.active.push(job);
        self.listen(Duration::from_millis(10))?;
        let jobs = self.must("query-jobs", json!({}))?.context("the daemon died")?;
        self.listen(Duration::from_millis(10))?;
        let runs = jobs.as_array().is_some_and(|jobs| jobs.iter().any(|job| job["id"] == id.as_str()));
        if let Some(at) = self.active.iter().position(|job| job.id == id)
            && !runs
        {
            self.log.say("it never began");
            self.active.remove(at);
            image.remove();
        }
        Ok(())
    }

    /// Begins a backup to the mirror.
    pub fn mirror(&mut self, disk: usize, what: &Value, may_fail: bool) -> Result<()> {
        if self.active.iter().any(|job| job.disk == disk && !job.is_of_chain()) {
            return Ok(());
        }
        let order = self.name();
        let (job, node) = (format!("m{order}"), format!("target{order}"));
        let bytes = self.served[disk].bytes();
        let served = &mut self.served[disk];
        served.mirror.serve(bytes)?;
        let (id, target) = (served.disk.id.clone(), served.mirror.node(&node));
        let mut data = json!({ "job-id": job, "device": id, "target": node });
        let mut actions = Vec::new();
        let purpose = match &served.mirror.bitmap {
            Some(bitmap) => {
                data["sync"] = "incremental".into();
                data["bitmap"] = bitmap.clone().into();
                Purpose::Mirror
            }
            None => {
                let name = format!("m{order}");
                let persistent = !self.options.volatile;
                let data = json!({ "node": id, "name": name, "persistent": persistent });
                actions.push(json!({ "type": "block-dirty-bitmap-add", "data": data }));
                Purpose::MirrorFull(name)
            }
        };
        if actions.len() == 1 {
            data["sync"] = "full".into();
        }
        for (name, value) in what.as_object().into_iter().flatten() {
            data[name] = value.clone();
        }
        if let Answer::Refused(error) = self.order("blockdev-add", target)? {
            ensure!(may_fail, "the mirror was refused: {}", error.desc);
            return Ok(());
        }
        actions.push(json!({ "type": "blockdev-backup", "data": data }));
        let (answer, bounds) = self.order_at_an_instant("transaction", json!({ "actions": actions }), &[disk])?;
        self.begun(answer, bounds, vec![Active::new(job, disk, order, purpose)], may_fail)
    }

    fn mirror_may_fail(&mut self, disk: usize) {
        for job in self.active.iter_mut().filter(|job| job.disk == disk && !job.is_of_chain()) {
            job.may_fail = true;
        }
    }

    /// A backup that is cancelled, and the next one, which has to have what that one was to copy: nobody is killed in between.
    fn cancel_and_back_up(&mut self, random: &mut Random) -> Result<()> {
        let disk = random.below(self.served.len() as u64) as usize;
        self.wait_for_jobs()?;
        self.back_up(&[disk], random, &json!({ "speed": 1 << 20 }), true)?;
        let Some(job) = self.active.iter().find(|job| job.disk == disk) else { return Ok(()) };
        let id = job.id.clone();
        self.listen(Duration::from_millis(random.below(50)))?;
        self.order("job-cancel", json!({ "id": id }))?;
        self.wait_for_jobs()?;
        self.back_up(&[disk], random, &json!({}), false)?;
        self.wait_for_jobs()
    }

    fn disturb_a_job(&mut self, random: &mut Random) -> Result<()> {
        if random.below(2) == 0 || self.active.is_empty() {
            return self.cancel_and_back_up(random);
        }
        let at = random.below(self.active.len() as u64) as usize;
        let id = self.active[at].id.clone();
        match random.below(4) {
            0 => {
                let order = self.active[at].order;
                self.active.iter_mut().filter(|job| job.order == order).for_each(|job| job.may_fail = true);
                self.order("job-cancel", json!({ "id": id }))?;
            }
            1 => drop(self.order("block-job-set-speed", json!({ "device": id, "speed": 8 << 20 }))?),
            _ => {
                self.order("job-pause", json!({ "id": id }))?;
                self.listen(Duration::from_millis(random.below(20)))?;
                self.order("job-resume", json!({ "id": id }))?;
            }
        }
        Ok(())
    }

    /// A chain's next image has no room; the job's point is kept, and it is tried again where there is, or is not.
    fn target_full(&mut self, random: &mut Random, retry: bool) -> Result<()> {
        let disk = random.below(self.served.len() as u64) as usize;
        let busy = self.active.iter().any(|job| job.disk == disk && job.is_of_chain());
        let chain = self.served[disk].chain.clone();
        let (false, Some(tip), Some(bitmap)) = (busy, chain.tip(), &chain.bitmap) else { return Ok(()) };
        let order = self.name();
        let (id, mut image) = (format!("f{order}"), self.image(disk, order, "qcow2"));
        let roomy = image.path.clone();
        image.path = self.place.narrow.folder().join("image.qcow2");
        tip.put_on_top(&image.path, self.served[disk].bytes())?;
        let mut data = json!({
            "job-id": id, "device": self.served[disk].disk.id, "sync": "incremental", "bitmap": bitmap,
            "target": image.path, "format": "qcow2", "mode": "existing",
        });
        if retry {
            data["on-failure"] = "keep".into();
        }
        let (answer, bounds) = self.order_at_an_instant("drive-backup", data, &[disk])?;
        self.log.count("faults", "target full", 1);
        let job = Active::new(id.clone(), disk, order, Purpose::Increment(image.clone()));
        self.begun(answer, bounds, vec![job], true)?;
        self.until_told(&id)?;
        if let Some(at) = self.active.iter().position(|job| job.id == id) {
            // It is kept.
            self.log.say("tried again where there is room");
            let _ = fs::remove_file(&image.path);
            tip.put_on_top(&roomy, self.served[disk].bytes())?;
            let again = json!({ "id": id, "target": roomy, "format": "qcow2", "mode": "existing" });
            let image = self.image(disk, order, "qcow2");
            let job = &mut self.active[at];
            job.end = None;
            job.purpose = Purpose::Increment(image);
            self.must("job-retry", again)?;
            self.log.count("backups", "tried again", 1);
            return Ok(());
        }
        // There was room.
        if let Some(last) = self.served[disk].chain.images.last_mut()
            && last.path == image.path
        {
            fs::copy(&image.path, &roomy)?;
            last.path = roomy;
        }
        let _ = fs::remove_file(&image.path);
        Ok(())
    }

    /// Waits until a job has told its end.
    fn until_told(&mut self, id: &str) -> Result<()> {
        let deadline = Instant::now() + GIVE_UP;
        while self.active.iter().any(|job| job.id == id && job.end.is_none()) {
            ensure!(Instant::now() < deadline, "job {id} does not end");
            self.listen(Duration::from_millis(5))?;
        }
        // One that is not kept goes by itself.
        self.listen(Duration::from_millis(20))
    }

    fn store_full(&mut self, random: &mut Random, kill: bool) -> Result<()> {
        if self.options.volatile {
            return Ok(());
        }
        self.log.say("the store's file system is full");
        self.log.count("faults", "store full", 1);
        self.store_was_full = true;
        self.active.iter_mut().for_each(|job| job.may_fail = true);
        let ballast = self.place.store.folder().join("ballast");
        let mut file = fs::File::create(&ballast)?;
        while file.write_all(&[1; 65536]).is_ok() {}
        while file.write_all(&[1; 512]).is_ok() {}
        for _ in 0..3 {
            self.change_bitmaps(random)?;
        }
        self.back_up(&self.all(), random, &json!({}), true)?;
        self.listen(Duration::from_millis(random.below(50)))?;
        if kill {
            self.kill_daemon("daemon with a full store")?;
            self.start_daemon()?;
        }
        self.listen(Duration::from_millis(random.below(50)))?;
        drop(file);
        fs::remove_file(&ballast)?;
        self.log.say("the store's file system has room again");
        // What it lost is known after the next start, and from then on nothing is.
        self.terminate_daemon()?;
        self.start_daemon()?;
        self.store_was_full = false;
        Ok(())
    }

    fn resize(&mut self, disk: usize) -> Result<()> {
        self.wait_for_jobs()?;
        let grown = SECTORS + 8 * MIB_SECTORS + 24;
        let larger = self.served[disk].model.sectors() == SECTORS;
        let sectors = if larger { grown } else { SECTORS };
        if !larger {
            self.kill_guest(disk, "guest before its disk shrinks")?;
        }
        let node = self.served[disk].disk.id.clone();
        self.must("block_resize", json!({ "node-name": node, "size": u64::from(sectors) * 512 }))?;
        self.log.count("bitmaps", "resizes", 1);
        self.served[disk].model.resize(sectors);
        self.served[disk].marks.resized(sectors);
        if self.served[disk].guest.is_none() {
            self.start_guest(disk)?;
        }
        self.compare_hashes(disk)
    }
}
