//! The story: make a disk, serve it, let a guest write, back up beside it, restore, prove.
//!
//! Everything in it is the real thing: the daemon with its two sockets, a guest at the one, an administrator at the other,
//! images that any QEMU opens. Invariant: an image that is counted as proved was restored from files alone and compared
//! with what the guest knows, never with what the daemon says.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use blkmark_backup::target::image::flatten;
use blkmark_backup::target::{Format, Policy};
use blkmark_bitmap::Tracker;

use super::disproof::Disproof;
use super::error::DemoError;
use super::map;
use super::model::{BLOCK, Snapshot, Table};
use super::orders::{BITMAP, DISK, Orders, stand_on};
use super::place::{Place, make_disk};
use super::prove::{Around, Restored, between, equal};
use super::report::{Backup, Proof, Report, time};
use super::show::{Show, rate};
use super::signals::Signals;
use super::workload::{Plan, STRIPE};
use super::writers::{DEPTH, Meter, QUEUES, Writers};
use crate::cli::DemoArgs;
use crate::cli::size::human;
use crate::config::{DiskOptions, ServeOptions, SocketSpec};
use crate::daemon::{Daemon, End};

/// A look at the guest's health while time passes.
const LOOK: Duration = Duration::from_millis(100);

/// Whether the guest is held for the moment of an order, so that the disk of that instant is known exactly.
enum Order {
    Hold,
    DoNotHold,
}

/// What is known of the disk at the instant of a backup.
enum Evidence {
    /// All, since the guest was held.
    Exact { snapshot: Snapshot, pause: Duration },
    /// What was written before and after.
    Bounds { around: Around, answer: Duration },
    /// All, and the disk is still like that.
    Final { snapshot: Snapshot },
}

/// A backup that is done and not yet proved.
struct Taken {
    name: &'static str,
    image: PathBuf,
    dirty: Option<u64>,
    took: Duration,
    copied: u64,
    guest: Option<Meter>,
    evidence: Evidence,
}

/// A daemon that is ended whatever happens.
struct Running(Option<Daemon>);

impl Running {
    fn end(&mut self) -> Result<(), DemoError> {
        self.0.take().map_or(Ok(()), |daemon| daemon.stop(End::Signal).map_err(DemoError::Daemon))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // On the way out of another error, which is the one to tell.
        let _ = self.end();
    }
}

struct Story<'a> {
    show: &'a Show<'a>,
    signals: &'a Signals,
    place: &'a Place,
    size: u64,
    keep: bool,
    tracker: Arc<Tracker>,
    orders: Orders,
    /// The image that the next one stands on.
    top: Option<PathBuf>,
}

/// Tells it, from the first file to the last proof.
pub fn tell(args: &DemoArgs, show: &Show<'_>, signals: &Signals) -> Result<Report, DemoError> {
    let began = Instant::now();
    let place = Place::make(args.dir.as_deref(), args.size, args.keep)?;
    let disk = place.path("disk.raw");
    let plan = make_disk(&disk, args.size, || signals.check())?;
    let filled = plan.filled_and_used().0 * STRIPE * BLOCK as u64;
    show.line(format_args!(
        "A disk of {}, {} of it filled, in {}",
        human(args.size),
        human(filled),
        place.directory().display()
    ));

    let (socket, control) = (place.path("disk.sock"), place.path("control.sock"));
    let mut running = Running(Some(serve(&disk, &socket, &control)?));
    let tracker = running.0.as_ref().and_then(|daemon| daemon.tracker(DISK)).cloned();
    let tracker = tracker.ok_or_else(|| DemoError::Daemon(anyhow::anyhow!("it does not know its own disk")))?;
    let mut story = Story {
        show,
        signals,
        place: &place,
        size: args.size,
        keep: args.keep,
        tracker,
        orders: Orders::connect(&control)?,
        top: None,
    };
    let table = Table::new(args.size / BLOCK as u64, |block| plan.is_filled(block / STRIPE));
    let mut writers = Writers::start(&socket, plan, table)?;
    story.introduce(plan);

    // The guest writes for this long before each backup.
    let span = Duration::from_secs(args.seconds) / 4;
    let alone = story.watch_guest(&mut writers, span)?;
    show.line(format_args!("\nNo backup\n  guest: {}", alone.sentence()));
    let mut backups = Vec::new();
    let mut free_since = Instant::now();
    for (name, order) in [("full", Order::Hold), ("inc1", Order::Hold), ("inc2", Order::DoNotHold)] {
        if story.top.is_some() {
            story.let_time_pass(&writers, span.saturating_sub(free_since.elapsed()))?;
        }
        let taken = story.back_up(&mut writers, name, order)?;
        // What is to be dirty next lies somewhere else, and is made while the restored image is looked at.
        writers.next_epoch();
        free_since = Instant::now();
        backups.push(story.prove(taken)?);
        writers.check()?;
    }
    story.let_time_pass(&writers, span.saturating_sub(free_since.elapsed()))?;
    let taken = story.back_up_the_rest(writers, "last")?;
    running.end()?;
    backups.push(story.prove(taken)?);

    let kept = args.keep.then(|| place.directory().display().to_string());
    Ok(Report { size: args.size, filled, alone, backups, took: began.elapsed(), kept })
}

fn serve(disk: &Path, socket: &Path, control: &Path) -> Result<Daemon, DemoError> {
    let disk =
        DiskOptions { queues: QUEUES as u16, ..DiskOptions::new(DISK, disk, SocketSpec::Path(socket.to_owned())) };
    let options = ServeOptions { disks: vec![disk], control: Some(control.to_owned()), ..ServeOptions::default() };
    Daemon::start(&options).map_err(DemoError::Daemon)
}

impl Story<'_> {
    fn introduce(&self, plan: Plan) {
        let discards = if plan.discards { "discards, " } else { "" };
        self.show.line(format_args!(
            "Served over vhost-user; a guest with {QUEUES} queues, {DEPTH} requests in each, sends 4 to 64 KiB random \
             writes,\n{discards}write-zeroes, at full speed, and goes on beside all that follows."
        ));
    }

    fn let_time_pass(&self, writers: &Writers, time: Duration) -> Result<(), DemoError> {
        let end = Instant::now() + time;
        loop {
            writers.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.signals.pass(left.min(LOOK))?;
        }
    }

    fn watch_guest(&self, writers: &mut Writers, time: Duration) -> Result<Meter, DemoError> {
        writers.take_meter();
        self.let_time_pass(writers, time)?;
        Ok(writers.take_meter())
    }

    /// Gives the order for a backup and waits for it, while the guest writes.
    fn back_up(&mut self, writers: &mut Writers, name: &'static str, order: Order) -> Result<Taken, DemoError> {
        let (image, dirty) = self.announce(name)?;
        writers.take_meter();
        let begun = Instant::now();
        let evidence = match order {
            Order::Hold => {
                let held = writers.hold()?;
                let snapshot = held.snapshot()?;
                self.order(name, &image)?;
                drop(held);
                Evidence::Exact { snapshot, pause: begun.elapsed() }
            }
            Order::DoNotHold => {
                writers.record(true);
                let acknowledged_before = writers.table().acknowledged();
                let ordered = Instant::now();
                self.order(name, &image)?;
                let answer = ordered.elapsed();
                let issued_after = writers.table().issued();
                Evidence::Bounds { around: Around { acknowledged_before, issued_after, recorded: Vec::new() }, answer }
            }
        };
        let copied = self.orders.wait(name, self.show, self.signals, || writers.check())?;
        let took = begun.elapsed();
        let guest = writers.take_meter();
        let evidence = match evidence {
            Evidence::Bounds { around, answer } => {
                Evidence::Bounds { around: Around { recorded: writers.record(false), ..around }, answer }
            }
            evidence => evidence,
        };
        self.taken(Taken { name, image, dirty, took, copied, guest: Some(guest), evidence })
    }

    /// The guest stops, and what it has written since the last backup is the last one.
    fn back_up_the_rest(&mut self, writers: Writers, name: &'static str) -> Result<Taken, DemoError> {
        let snapshot = writers.stop()?;
        let (image, dirty) = self.announce(name)?;
        let begun = Instant::now();
        self.order(name, &image)?;
        let copied = self.orders.wait(name, self.show, self.signals, || Ok(()))?;
        let took = begun.elapsed();
        let left = self.orders.dirty_bytes()?;
        if left != 0 {
            let reason = format!("nobody writes any more, and yet the bitmap calls {left} bytes dirty");
            return Err(DemoError::Backup { job: name.to_owned(), reason });
        }
        self.taken(Taken { name, image, dirty, took, copied, guest: None, evidence: Evidence::Final { snapshot } })
    }

    /// Says what comes, and shows what is dirty.
    fn announce(&mut self, name: &str) -> Result<(PathBuf, Option<u64>), DemoError> {
        let image = self.place.path(&format!("{name}.qcow2"));
        let Some(top) = &self.top else {
            self.show
                .line(format_args!("\n{name}: everything, and from the same instant on bitmap '{BITMAP}' records"));
            return Ok((image, None));
        };
        stand_on(top, &image, self.size)?;
        let dirty = self.orders.dirty_bytes()?;
        self.show.line(format_args!("\n{name}: what changed since. Bitmap '{BITMAP}' calls {} dirty:", human(dirty)));
        let bits = self.tracker.bits(BITMAP).map_err(|error| DemoError::Daemon(error.into()))?;
        for line in map::render(bits.runs().map(|run| (run.start(), run.len())), self.size) {
            self.show.line(line);
        }
        self.show.line(format_args!("            {}", map::LEGEND));
        Ok((image, Some(dirty)))
    }

    fn order(&mut self, name: &str, image: &Path) -> Result<(), DemoError> {
        match self.top {
            None => self.orders.full(name, image),
            Some(_) => self.orders.incremental(name, image),
        }
    }

    fn taken(&mut self, taken: Taken) -> Result<Taken, DemoError> {
        self.show.line(format_args!(
            "  copied {} in {} ({}), image {}",
            human(taken.copied),
            time(taken.took),
            rate(taken.copied, taken.took),
            human(taken.image.metadata()?.len())
        ));
        if let Some(guest) = &taken.guest {
            self.show.line(format_args!("  guest meanwhile: {}", guest.sentence()));
        }
        self.top = Some(taken.image.clone());
        Ok(taken)
    }

    /// Restores the chain up to this backup and compares.
    fn prove(&self, taken: Taken) -> Result<Backup, DemoError> {
        let name = format!("{}.raw", taken.name);
        let path = self.place.path(&name);
        let begun = Instant::now();
        let bar = self.show.bar("restore", begun);
        let progress = |done, total| {
            if let Some(bar) = &bar {
                bar.set(done, total);
            }
        };
        flatten(&taken.image, Format::Qcow2, &path, &Policy::default(), progress)?;
        let restored = begun.elapsed();
        if let Some(bar) = bar {
            bar.finish(self.size, restored);
        }
        let go_on = || self.signals.check();
        go_on()?;
        let image =
            Restored { name: &format!("the image restored from {}.qcow2", taken.name), path: &path, go_on: &go_on };
        let proof = match &taken.evidence {
            Evidence::Exact { snapshot, pause } => Proof::Held { pause: *pause, sha256: equal(&image, snapshot)? },
            Evidence::Bounds { around, answer } => {
                Proof::Between { answer: *answer, narrowed: between(&image, around)? }
            }
            Evidence::Final { snapshot } => {
                let found = equal(&image, snapshot)?;
                let disk = self.place.path("disk.raw");
                let disk = Restored { name: "the disk's file", path: &disk, go_on: &go_on };
                let expected = disk.checksum(self.size)?;
                if found != expected {
                    // It is the file that differs: this tells where.
                    equal(&disk, snapshot)?;
                    return Err(Disproof::Checksum { image: image.name.to_owned(), expected, found }.into());
                }
                Proof::Stopped { sha256: found }
            }
        };
        self.show.line(format_args!("  restored in {}", time(restored)));
        for line in proof.lines() {
            self.show.line(format_args!("  {line}"));
        }
        let size = taken.image.metadata()?.len();
        if !self.keep {
            std::fs::remove_file(&path)?;
        }
        let Taken { name, dirty, took, guest, .. } = taken;
        Ok(Backup { name: name.to_owned(), dirty, image: size, took, guest, restored, proof })
    }
}
