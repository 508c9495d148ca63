//! A daemon that was started again must have what it had: the bitmaps that outlive it, each with what it must contain, and
//! of the jobs those that go on, which then have to give the images that were begun.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::backups::Purpose;
use super::marks::Op;
use super::orders::Answer;
use super::world::Torture;

/// A bitmap as the daemon shows it.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Bytes of a bit.
    pub granularity: u64,
    /// Whether it records.
    pub recording: bool,
    /// Whether a job uses it.
    pub busy: bool,
    /// Whether it cannot be used any more.
    pub inconsistent: bool,
}

impl Torture {
    /// The bitmaps of all disks.
    pub fn shown(&mut self) -> Result<Vec<BTreeMap<String, Shown>>> {
        let nodes = self.must("query-named-block-nodes", json!({}))?.context("the daemon died")?;
        let of = |id: &str| {
            let node = nodes.as_array()?.iter().find(|node| node["node-name"] == id)?;
            let bitmaps = node["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
            let shown = bitmaps.iter().map(|bitmap| {
                let is = |name: &str| bitmap[name].as_bool().unwrap_or_default();
                let shown = Shown {
                    granularity: bitmap["granularity"].as_u64().unwrap_or(1),
                    recording: is("recording"),
                    busy: is("busy"),
                    inconsistent: is("inconsistent"),
                };
                (bitmap["name"].as_str().unwrap_or_default().to_owned(), shown)
            });
            Some(shown.collect())
        };
        let all = self.served.iter().map(|served| of(&served.disk.id).context("a disk is not shown"));
        all.collect()
    }

    /// Looks whether a new daemon has all that it must have, and puts away what nobody needs.
    pub fn recognise(&mut self) -> Result<()> {
        let jobs = self.must("query-jobs", json!({}))?.context("the daemon died")?;
        let (ended, alive): (Vec<_>, Vec<_>) =
            jobs.as_array().into_iter().flatten().partition(|job| job["status"] == "concluded");
        let id_of = |job: &serde_json::Value| job["id"].as_str().unwrap_or_default().to_owned();
        let ids: Vec<String> = alive.into_iter().map(id_of).collect();
        self.log.count("backups", "gone on with after a kill", ids.len() as u64);
        // Before they are dismissed, which is told.
        self.jobs_of_the_dead(&ids)?;
        for job in ended {
            self.log.say(format_args!("ended with the daemon: {job}"));
            self.log.count("backups", "shown as ended by a kill", 1);
            self.order("job-dismiss", json!({ "id": id_of(job) }))?;
        }
        let now = self.now()?;
        let shown = self.shown()?;
        for order in std::mem::take(&mut self.unsettled) {
            self.all_or_nothing(&order, &shown)?;
            self.settle(&order, &shown, now)?;
        }
        for (disk, shown) in shown.iter().enumerate() {
            self.recognise_bitmaps(disk, shown)?;
        }
        for disk in 0..self.served.len() {
            self.compare_hashes(disk)?;
        }
        self.log.count("verified", "restarts", 1);
        Ok(())
    }

    /// The changes of one order were all made, or none was, on all disks together.
    fn all_or_nothing(&mut self, order: &[(usize, Vec<Op>)], shown: &[BTreeMap<String, Shown>]) -> Result<()> {
        if self.store_was_full {
            return Ok(());
        }
        let (mut before, mut after) = (true, true);
        for (disk, ops) in order {
            let marks = &self.served[*disk].marks;
            let mut changed = marks.clone();
            changed.done(ops, 0);
            for name in ops.iter().map(Op::name) {
                let there = shown[*disk].get(name).map(|bitmap| bitmap.recording);
                before &= marks.outlives(name) == there;
                after &= changed.outlives(name) == there;
            }
        }
        ensure!(before || after, "LOSS: {order:?} was done in part: {shown:?}");
        self.log.count("verified", "orders cut off", 1);
        Ok(())
    }

    /// What orders that were never answered have come to.
    pub fn settle(&mut self, order: &[(usize, Vec<Op>)], shown: &[BTreeMap<String, Shown>], now: u64) -> Result<()> {
        for (disk, ops) in order {
            let disk = *disk;
            if let Some(name) = self.served[disk].marks.settle(ops, &shown[disk], now)
                && !self.store_was_full
            {
                bail!("LOSS: bitmap {name} of disk {disk} is not as any outcome of {ops:?} leaves it");
            }
        }
        Ok(())
    }

    fn recognise_bitmaps(&mut self, disk: usize, shown: &BTreeMap<String, Shown>) -> Result<()> {
        let tolerant = self.store_was_full;
        let served = &mut self.served[disk];
        let mut known = Vec::new();
        let usable = |name: &String| shown.get(name).is_some_and(|bitmap| !bitmap.inconsistent);
        for name in served.marks.0.keys().cloned().collect::<Vec<_>>() {
            let mark = &served.marks.0[&name];
            let (persistent, recording) = (mark.persistent, mark.recording);
            match shown.get(&name) {
                Some(bitmap) if persistent && !bitmap.inconsistent => {
                    ensure!(
                        tolerant || bitmap.recording == recording,
                        "LOSS: bitmap {name} of disk {disk}: recording is {} after a restart",
                        bitmap.recording
                    );
                    known.push(name);
                    continue;
                }
                Some(_) if !persistent => bail!("bitmap {name} of disk {disk} was to end with the daemon"),
                None if !persistent => {}
                at_fault => {
                    ensure!(tolerant, "LOSS: bitmap {name} of disk {disk} did not outlive the daemon: {at_fault:?}");
                    self.log.count("store", "bitmaps lost to a full store", 1);
                }
            }
            served.marks.0.remove(&name);
        }
        let chain = served.chain.bitmap.clone().map(|bitmap| (bitmap, true));
        let mirror = served.mirror.bitmap.clone().map(|bitmap| (bitmap, false));
        for (name, of_chain) in chain.into_iter().chain(mirror) {
            if usable(&name) {
                known.push(name);
                continue;
            }
            ensure!(
                tolerant || self.options.volatile,
                "LOSS: bitmap {name} of disk {disk} did not outlive the daemon: {:?}",
                shown.get(&name)
            );
            match of_chain {
                true => served.chain.forget(),
                false => served.mirror.bitmap = None,
            }
        }
        // Jobs that go on need theirs.
        known.extend(self.active.iter().filter(|job| job.disk == disk).filter_map(|job| match &job.purpose {
            Purpose::Full(bitmap, _) | Purpose::MirrorFull(bitmap) => Some(bitmap.clone()),
            Purpose::Increment(_) | Purpose::Mirror => None,
        }));
        let busy = |bitmap: &Shown| bitmap.busy;
        for (name, bitmap) in shown.iter().filter(|(name, bitmap)| !known.contains(name) && !busy(bitmap)) {
            self.log.say(format_args!("disk {disk} has {name}, which nobody needs: {bitmap:?}"));
            self.remove_bitmap(disk, name)?;
        }
        Ok(())
    }

    /// Disabled bitmaps are what they were.
    pub fn compare_hashes(&mut self, disk: usize) -> Result<()> {
        let node = self.served[disk].disk.id.clone();
        let still =
            |(name, mark): (&String, &super::marks::Mark)| (!mark.recording).then(|| (name.clone(), mark.hash.clone()));
        for (name, before) in self.served[disk].marks.0.iter().filter_map(still).collect::<Vec<_>>() {
            let arguments = json!({ "node": node, "name": name });
            let answer = match self.order("x-debug-block-dirty-bitmap-sha256", arguments)? {
                Answer::Done(answer) => answer,
                Answer::Lost => return Ok(()),
                Answer::Refused(_) if self.store_was_full => continue,
                Answer::Refused(error) => bail!("bitmap {name} of disk {disk}: {}", error.desc),
            };
            let hash = answer["sha256"].as_str().map(str::to_owned);
            if before.is_some() {
                ensure!(hash == before, "LOSS: the disabled bitmap {name} of disk {disk} is not what it was");
                self.log.count("verified", "disabled bitmaps", 1);
            }
            if let Some(mark) = self.served[disk].marks.0.get_mut(&name) {
                mark.hash = hash;
            }
        }
        Ok(())
    }
}
