//! Jobs: begun, heard of, ended; and what becomes of their images and bitmaps then.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use blkmark_backup::qmp::Event;
use serde_json::{Value, json};

use super::bounds::{self, Bounds, Found};
use super::chain::Image;
use super::orders::Answer;
use super::world::Torture;
use crate::process::GIVE_UP;
use crate::qmp::JobEnd;
use crate::random::Random;

/// What a job is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To begin a chain, with the bitmap that records from its instant on.
    Full(String, Image),
    /// To continue it.
    Increment(Image),
    /// To make a mirror, likewise.
    MirrorFull(String),
    /// To bring it up to date.
    Mirror,
}

/// A job that runs, as far as is known.
#[derive(Debug)]
pub struct Active {
    /// The job's id.
    pub id: String,
    /// The number of the disk.
    pub disk: usize,
    /// The number of the order it began with.
    pub order: u64,
    /// How many jobs that order began.
    pub of_order: usize,
    /// What it is for.
    pub purpose: Purpose,
    /// What its image must hold, if that is known.
    pub bounds: Option<Bounds>,
    /// Something was done to it that it need not outlive.
    pub may_fail: bool,
    /// When it began.
    pub began: Instant,
    /// How it ended, once that was told.
    pub end: Option<JobEnd>,
}

/// Images of one order, until all are there.
#[derive(Debug, Default)]
pub struct Instants(Vec<(u64, Vec<(Bounds, Found)>)>);

impl Instants {
    /// An image of one order of `of` images: fails unless they can be of one instant.
    fn add(&mut self, order: u64, of: usize, bounds: Bounds, found: Found) -> Result<bool> {
        let at = self.0.iter().position(|(other, _)| *other == order).unwrap_or_else(|| {
            self.0.push((order, Vec::new()));
            self.0.len() - 1
        });
        self.0[at].1.push((bounds, found));
        if self.0[at].1.len() < of {
            // Of orders that failed in part nothing more comes.
            self.0.retain(|(other, _)| other + 64 > order);
            return Ok(false);
        }
        let (_, images) = self.0.swap_remove(at);
        let images: Vec<_> = images.iter().map(|(bounds, found)| (bounds, found)).collect();
        bounds::one_instant(&images)?;
        Ok(of > 1)
    }
}

impl Torture {
    /// Begins a backup of each of these disks, at one instant: increments where a chain can be continued. `what` is more
    /// arguments for the jobs.
    pub fn back_up(&mut self, disks: &[usize], random: &mut Random, what: &Value, may_fail: bool) -> Result<()> {
        let free = |disk: &usize| !self.active.iter().any(|job| job.disk == *disk && job.is_of_chain());
        let disks: Vec<usize> = disks.iter().copied().filter(free).collect();
        if disks.is_empty() || self.qmp.is_none() {
            return Ok(());
        }
        let order = self.name();
        let (mut actions, mut jobs, mut full) = (Vec::new(), Vec::new(), false);
        for disk in disks {
            let (action, job) = self.plan(disk, order, random, what, &mut actions)?;
            full |= matches!(job.purpose, Purpose::Full(..));
            actions.push(action);
            jobs.push(job);
        }
        let touched: Vec<usize> = jobs.iter().map(|job| job.disk).collect();
        let properties = match full {
            // Bitmaps cannot be added in a group.
            false if random.below(2) == 0 => json!({ "completion-mode": "grouped" }),
            _ => json!({}),
        };
        let arguments = json!({ "actions": actions, "properties": properties });
        let (answer, bounds) = self.order_at_an_instant("transaction", arguments, &touched)?;
        self.begun(answer, bounds, jobs, may_fail)
    }

    /// Jobs were ordered.
    pub fn begun(
        &mut self,
        answer: Answer,
        bounds: Vec<(usize, Bounds)>,
        jobs: Vec<Active>,
        may_fail: bool,
    ) -> Result<()> {
        let of_order = jobs.len();
        if let Answer::Refused(error) = answer {
            for job in &jobs {
                job.remove_image();
            }
            // Somewhere without space nothing begins.
            ensure!(may_fail || self.store_was_full, "a backup was refused: {}", error.desc);
            return Ok(());
        }
        for ((_, bounds), job) in bounds.into_iter().zip(jobs) {
            self.log.count("backups", "begun", 1);
            self.active.push(Active { bounds: Some(bounds), may_fail, of_order, ..job });
        }
        Ok(())
    }

    fn plan(
        &mut self,
        disk: usize,
        order: u64,
        random: &mut Random,
        what: &Value,
        actions: &mut Vec<Value>,
    ) -> Result<(Value, Active)> {
        let number = self.name();
        let id = format!("j{number}");
        let node = self.served[disk].disk.id.clone();
        let mut data = json!({ "job-id": id, "device": node, "auto-dismiss": true });
        let chain = &self.served[disk].chain;
        let purpose = match chain.tip() {
            Some(tip) if !chain.is_long() => {
                let image = self.image(disk, number, "qcow2");
                tip.put_on_top(&image.path, self.served[disk].bytes())?;
                data["sync"] = "incremental".into();
                data["bitmap"] = chain.bitmap.clone().into();
                data["mode"] = "existing".into();
                Purpose::Increment(image)
            }
            _ => {
                let bitmap = format!("c{number}");
                let granularity = 4096u64 << random.below(6);
                actions.push(json!({
                    "type": "block-dirty-bitmap-add",
                    "data": {
                        "node": node, "name": bitmap, "granularity": granularity, "persistent": !self.options.volatile,
                    },
                }));
                data["sync"] = "full".into();
                Purpose::Full(bitmap, self.image(disk, number, ["raw", "qcow2"][random.below(2) as usize]))
            }
        };
        if let Purpose::Full(_, image) | Purpose::Increment(image) = &purpose {
            data["target"] = json!(image.path);
            data["format"] = image.format.into();
        }
        for (name, value) in what.as_object().into_iter().flatten() {
            data[name] = value.clone();
        }
        Ok((json!({ "type": "drive-backup", "data": data }), Active::new(id, disk, order, purpose)))
    }

    /// A new image of a disk.
    pub fn image(&self, disk: usize, number: u64, format: &'static str) -> Image {
        Image { path: self.place.path(&format!("disk{disk}-{number}.{format}")), format }
    }

    /// Something was heard of jobs.
    pub fn heard(&mut self, event: &Event) -> Result<()> {
        let of = |name: &str| event.data[name].as_str().unwrap_or_default().to_owned();
        match event.name.as_str() {
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => {
                let end = match event.data["error"].as_str() {
                    Some(error) => JobEnd::Failed(error.to_owned()),
                    None if event.name == "BLOCK_JOB_CANCELLED" => JobEnd::Cancelled,
                    None => JobEnd::Completed,
                };
                self.log.say(format_args!("job {}: {end:?}", of("device")));
                if matches!(&end, JobEnd::Failed(error) if error.starts_with("The job ended with the daemon")) {
                    // Told to whoever connects; `recognise` looks at those.
                    return Ok(());
                }
                if let Some(job) = self.active.iter_mut().find(|job| job.id == of("device")) {
                    job.end = Some(end);
                }
            }
            "JOB_STATUS_CHANGE" if event.data["status"] == "null" => {
                if let Some(at) = self.active.iter().position(|job| job.id == of("id")) {
                    let job = self.active.swap_remove(at);
                    self.ended(job)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// A job has ended, and it was told how.
    fn ended(&mut self, mut job: Active) -> Result<()> {
        let end = job.end.take().with_context(|| format!("job {} is gone without an end", job.id))?;
        if end != JobEnd::Completed {
            let scratch = matches!(&end, JobEnd::Failed(error) if error.to_lowercase().contains("scratch"));
            // Of a group the one that broke may be told of after the one that was cancelled for it; it is looked at then.
            let for_another = end == JobEnd::Cancelled
                && self.active.iter().any(|other| {
                    other.order == job.order && other.disk % 2 == 1 && other.end != Some(JobEnd::Completed)
                });
            let has_cause = job.may_fail || for_another || scratch && job.disk % 2 == 1;
            ensure!(has_cause, "job {} ended without a cause: {end:?}", job.id);
            self.log.count("backups", "failed", 1);
            // With it ends its group.
            for other in self.active.iter_mut().filter(|other| other.order == job.order) {
                other.may_fail = true;
            }
            return self.without(job);
        }
        self.log.count("backups", "completed", 1);
        let bounds = job.bounds.take();
        let disk = job.disk;
        let found = match (&job.purpose, &bounds) {
            (_, None) => None,
            (Purpose::Full(_, image) | Purpose::Increment(image), Some(bounds)) => Some(image.verify(bounds)),
            (Purpose::MirrorFull(_) | Purpose::Mirror, Some(bounds)) => {
                Some(bounds.check(&self.served[disk].mirror.file))
            }
        };
        if let (Some(found), Some(bounds)) = (found, bounds) {
            let found = found.with_context(|| format!("LOSS: the backup of job {}", job.id))?;
            self.log.count("verified", "backups", 1);
            self.log.count("verified", "bytes", bounds.bytes());
            let several = self.instants.add(job.order, job.of_order, bounds, found);
            if several.with_context(|| format!("LOSS: the backups of job {} and others", job.id))? {
                self.log.count("verified", "orders over several disks", 1);
            }
        }
        self.adopt(disk, job.purpose)
    }

    /// A backup that came to its end takes its place.
    fn adopt(&mut self, disk: usize, purpose: Purpose) -> Result<()> {
        let served = &mut self.served[disk];
        let old = match purpose {
            Purpose::Increment(image) => {
                served.chain.images.push(image);
                None
            }
            Purpose::Full(bitmap, image) => {
                let old = served.chain.bitmap.take();
                served.chain.begin(bitmap, image);
                old
            }
            Purpose::MirrorFull(bitmap) => served.mirror.bitmap.replace(bitmap),
            Purpose::Mirror => None,
        };
        match old {
            Some(old) => self.remove_bitmap(disk, &old),
            None => Ok(()),
        }
    }

    /// A backup came to nothing.
    fn without(&mut self, job: Active) -> Result<()> {
        job.remove_image();
        match job.purpose {
            Purpose::Full(bitmap, _) | Purpose::MirrorFull(bitmap) => self.remove_bitmap(job.disk, &bitmap),
            _ => Ok(()),
        }
    }

    /// Removes a bitmap that nobody needs any more. What a dead daemon leaves of it goes at the next start.
    pub fn remove_bitmap(&mut self, disk: usize, name: &str) -> Result<()> {
        let node = self.served[disk].disk.id.clone();
        match self.order("block-dirty-bitmap-remove", json!({ "node": node, "name": name }))? {
            Answer::Refused(error) if !self.store_was_full => bail!("{name} cannot be removed: {}", error.desc),
            _ => Ok(()),
        }
    }

    /// The daemon is another one: jobs that it does not know are over, and nobody saw how.
    pub fn jobs_of_the_dead(&mut self, alive: &[String]) -> Result<()> {
        let (alive, dead): (Vec<Active>, Vec<Active>) =
            std::mem::take(&mut self.active).into_iter().partition(|job| alive.contains(&job.id));
        self.active = alive;
        let (told, untold): (Vec<Active>, Vec<Active>) = dead.into_iter().partition(|job| job.end.is_some());
        for job in told {
            self.ended(job)?;
        }
        for job in untold {
            self.log.count("backups", "cut off", 1);
            let increment = match &job.purpose {
                Purpose::Increment(image) if image.path.exists() && image.is_finished()? => Some(image.clone()),
                _ => None,
            };
            match increment {
                // It may have been the job's last act to say so; and if it never began, nothing is in it.
                Some(image) => {
                    self.log.say(format_args!("job {} left a finished image", job.id));
                    self.served[job.disk].chain.images.push(image);
                }
                None => job.remove_image(),
            }
        }
        Ok(())
    }

    /// Waits until no job is left that was not told to rest.
    pub fn wait_for_jobs(&mut self) -> Result<()> {
        let deadline = Instant::now() + GIVE_UP;
        while let Some(job) = self.active.first() {
            ensure!(Instant::now() < deadline, "job {} does not end", job.id);
            self.listen(std::time::Duration::from_millis(20))?;
        }
        Ok(())
    }
}

impl Active {
    /// A job that is about to be ordered.
    pub fn new(id: String, disk: usize, order: u64, purpose: Purpose) -> Active {
        let began = Instant::now();
        Active { id, disk, order, of_order: 1, purpose, bounds: None, may_fail: false, began, end: None }
    }

    /// Whether it belongs to the chain, not to the mirror.
    pub fn is_of_chain(&self) -> bool {
        matches!(self.purpose, Purpose::Full(..) | Purpose::Increment(_))
    }

    fn remove_image(&self) {
        if let Purpose::Full(_, image) | Purpose::Increment(image) = &self.purpose {
            image.remove();
        }
    }
}
