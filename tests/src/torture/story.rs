//! The story of a run: events by the schedule, a backup every second, and at the end the proof.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::bounds::Bounds;
use super::schedule::{Step, numbers};
use super::world::Torture;

/// So often a backup is due.
const EVERY: Duration = Duration::from_secs(1);
/// Orders for a chain that are tried at the end.
const TRIES: u32 = 30;

impl Torture {
    /// Tortures until it is enough.
    pub fn story(&mut self) -> Result<()> {
        self.start_daemon()?;
        for disk in self.all() {
            self.start_guest(disk)?;
        }
        let end = Duration::from_secs(self.options.seconds).as_secs_f64();
        let mut due = Instant::now();
        let mut backups = 0;
        for number in 0.. {
            if self.log.seconds() >= end && self.log.total("kills") >= self.options.kills {
                break;
            }
            if due <= Instant::now() {
                due = Instant::now() + EVERY;
                backups += 1;
                let mut random = numbers(self.seed, 1 << 49 | backups);
                let one = vec![random.below(self.served.len() as u64) as usize];
                let disks = if random.below(2) == 0 { self.all() } else { one };
                let speed = [0, 0, 0, 16 << 20, 4 << 20][random.below(5) as usize];
                self.back_up(&disks, &mut random, &json!({ "speed": speed }), false)?;
            }
            let mut step = Step::draw(self.seed, number, self.options.disks);
            self.log.say(format_args!("event {number}: {:?} after {:?}", step.event, step.pause));
            self.listen(step.pause)?;
            self.happen(step.event, &mut step.random)?;
        }
        self.ending()
    }

    /// The end: the chain and a last increment are the disk, byte for byte; so is the mirror.
    fn ending(&mut self) -> Result<()> {
        self.log.say("the end");
        self.wait_for_jobs()?;
        let mut random = numbers(self.seed, 1 << 50);
        let begun =
            |torture: &Torture| torture.served.iter().all(|s| s.chain.tip().is_some() && s.mirror.bitmap.is_some());
        for tried in 0..TRIES {
            if begun(self) {
                break;
            }
            for disk in self.all() {
                let lacks = (self.served[disk].chain.tip().is_none(), self.served[disk].mirror.bitmap.is_none());
                // Where the machine lets the guest outrun its little scratch all the time, the guest makes room.
                if tried >= TRIES / 2 && lacks != (false, false) {
                    self.end_guest(disk)?;
                }
                if lacks.0 {
                    self.back_up(&[disk], &mut random, &json!({}), false)?;
                }
                if lacks.1 {
                    self.mirror(disk, &json!({}), false)?;
                }
            }
            self.wait_for_jobs()?;
        }
        ensure!(begun(self), "no chain or no mirror came to be");
        for disk in self.all() {
            for name in self.served[disk].marks.0.keys().cloned().collect::<Vec<_>>() {
                self.look_at(disk, &name)?;
            }
            self.end_guest(disk)?;
            let now = Bounds::begin(disk as u8, &self.served[disk].model);
            if let Err(error) = now.check(&self.served[disk].disk.path) {
                bail!("LOSS: {error:#}");
            }
            self.served[disk].chain.goes_on();
        }
        self.back_up(&self.all(), &mut random, &json!({}), false)?;
        for disk in self.all() {
            self.mirror(disk, &json!({}), false)?;
        }
        self.wait_for_jobs()?;
        for served in &self.served {
            let Some(tip) = served.chain.tip() else { bail!("the last increment did not come to be") };
            ensure!(served.chain.images.len() > 1, "there is no last increment");
            let restored = tip.restore()?;
            same(&restored, &served.disk.path)?;
            same(&served.mirror.file, &served.disk.path)?;
        }
        self.log.count("verified", "chains and mirrors equal to their disks", 2 * self.served.len() as u64);
        self.terminate_daemon()
    }
}

/// Fails unless two files are the same.
fn same(one: &Path, other: &Path) -> Result<()> {
    let (mut files, mut at) = ((File::open(one)?, File::open(other)?), 0u64);
    let (mut first, mut second) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let length = files.0.metadata()?.len();
    ensure!(length == files.1.metadata()?.len(), "{} and {} differ in length", one.display(), other.display());
    while at < length {
        let part = (length - at).min(1 << 20) as usize;
        files.0.read_exact(&mut first[..part])?;
        files.1.read_exact(&mut second[..part])?;
        if let Some(differs) = (0..part).find(|byte| first[*byte] != second[*byte]) {
            bail!("LOSS: {} and {} differ at byte {}", one.display(), other.display(), at + differs as u64);
        }
        at += part as u64;
    }
    Ok(())
}
