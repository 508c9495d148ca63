//! Shuttle model of a point in time (I3), on the real gate, saver and reader: whatever the schedule, an image is whole, is
//! of the instant of the cut, and a point that could not keep old data says so instead of giving newer data.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --release -p blkmark-backup --test model_point`
#![cfg(shuttle)]

use blkmark_backup::node::Node;
use blkmark_backup::point::{Point, PointError, PointOptions, Wanted};
use blkmark_backup::scratch::ScratchSettings;
use blkmark_backup::source::{BlockStatus, FileId, Source};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Granularity, Tracker, commit};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::io;
use std::sync::Arc;
use std::time::Instant;

const SECTOR: u64 = 512;
const CLUSTER: u64 = 1024;
const SECTORS: usize = 4;
const SIZE: u64 = SECTOR * SECTORS as u64;
const ROUNDS: usize = 10_000;

/// What a sector holds after each step of its writer: something, then nothing (a discard), then something else.
const STEPS: [u8; 3] = [5, 0, 7];

/// Each sector is two halves, which land and are read one after the other.
struct Disk {
    halves: [[AtomicU64; 2]; SECTORS],
    /// Whether the guest's thread may save at once.
    memory: bool,
}

impl Disk {
    fn land(&self, sector: usize, value: u8) {
        for half in &self.halves[sector] {
            half.store(u64::from(value), Ordering::SeqCst);
        }
    }
}

impl Source for Disk {
    fn size(&self) -> u64 {
        SIZE
    }
    fn alignment(&self) -> u32 {
        512
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for (i, part) in buf.chunks_mut(256).enumerate() {
            let at = (offset / 256) as usize + i;
            part.fill(self.halves[at / 2][at % 2].load(Ordering::SeqCst) as u8);
        }
        Ok(())
    }
    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        let first = (offset / SECTOR) as usize;
        let hole = self.halves[first..first + 2].iter().flatten().all(|half| half.load(Ordering::SeqCst) == 0);
        Ok((if hole { BlockStatus::Hole } else { BlockStatus::Data }, limit.min(CLUSTER)))
    }
    fn is_memory(&self) -> bool {
        self.memory
    }
    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// Steps that each sector's writer was told to do, or has been told is done.
type Steps = [AtomicU64; SECTORS];

struct Scene {
    disk: Arc<Disk>,
    node: Arc<Node>,
    acked: Steps,
    issued: Steps,
}

impl Scene {
    fn new(scratch: u64, memory: bool) -> Arc<Self> {
        let full = || AtomicU64::new(u64::from(STEPS[0]));
        let disk = Arc::new(Disk { halves: std::array::from_fn(|_| [full(), full()]), memory });
        let scratch = ScratchSettings { directory: std::env::temp_dir(), cap: scratch, memory: 1 << 20 };
        let tracker = Tracker::new(SIZE, 2, 1);
        let source = Arc::clone(&disk) as Arc<dyn Source>;
        let node = Arc::new(Node::new("disk", "disk", false, tracker, source, scratch));
        Arc::new(Self { disk, node, acked: Default::default(), issued: Default::default() })
    }

    /// As the write path does it: admit, wait if held, submit, land, finish, acknowledge.
    fn write(&self, lane: usize, sector: usize, step: usize) {
        let range = ByteRange::new(sector as u64 * SECTOR, SECTOR);
        let mut lane = self.node.tracker.lane(lane).unwrap();
        self.issued[sector].store(step as u64, Ordering::SeqCst);
        loop {
            let admitted = lane.enter().admit(0, range);
            let gate = match admitted {
                Admitted::Go => break,
                Admitted::Held(gate) => gate,
                Admitted::Beyond => unreachable!("nobody resizes"),
            };
            let bell = Arc::new((Mutex::new(false), Condvar::new()));
            let there = Arc::clone(&bell);
            let resume = move |_| {
                *there.0.lock().unwrap() = true;
                there.1.notify_all();
            };
            gate.hold(range, Instant::now(), Box::new(resume));
            let mut resumed = bell.0.lock().unwrap();
            while !*resumed {
                resumed = bell.1.wait(resumed).unwrap();
            }
        }
        self.disk.land(sector, STEPS[step]);
        lane.finish(0);
        self.acked[sector].store(step as u64, Ordering::SeqCst);
    }
}

fn now(steps: &Steps) -> [u64; SECTORS] {
    std::array::from_fn(|i| steps[i].load(Ordering::SeqCst))
}

/// The step that a sector of an image shows; it must be whole.
fn step(data: &[u8]) -> u64 {
    assert!(data.iter().all(|byte| *byte == data[0]), "torn sector");
    STEPS.iter().position(|value| *value == data[0]).unwrap() as u64
}

/// Savers as the daemon has them, until `done`.
fn savers(point: &Arc<Point>, count: usize) -> (Vec<thread::JoinHandle<()>>, Arc<AtomicBool>) {
    let done = Arc::new(AtomicBool::new(false));
    let saver = || {
        let (cbw, done) = (Arc::clone(point.copy_before_write()), Arc::clone(&done));
        thread::spawn(move || {
            let mut buffer = [0; CLUSTER as usize];
            while !done.load(Ordering::SeqCst) {
                cbw.save_one(&mut buffer);
                thread::yield_now();
            }
        })
    };
    ((0..count).map(|_| saver()).collect(), done)
}

/// A point in force, and what had been acknowledged before and issued after its instant.
struct Cut {
    point: Arc<Point>,
    acked: [u64; SECTORS],
    issued: [u64; SECTORS],
}

impl Cut {
    fn make(scene: &Scene, keep: bool) -> Self {
        let cluster = Granularity::new(CLUSTER).unwrap();
        let options = PointOptions { keep, timeout: None, ..PointOptions::default() };
        let point = Point::prepare(&scene.node, Wanted::All, cluster, options).unwrap();
        let mut begun = scene.node.tracker.begin();
        begun.arm(point.gate());
        let acked = now(&scene.acked);
        let cut = commit(vec![begun]).unwrap().remove(0);
        let issued = now(&scene.issued);
        point.begin(cut.pre_cut);
        Self { point, acked, issued }
    }

    fn end(&self, scene: &Scene) {
        let mut begun = scene.node.tracker.begin();
        begun.disarm(self.point.gate());
        commit(vec![begun]).unwrap();
        self.point.end();
    }

    /// What an image of it shows, checked; `None` if the point is broken.
    fn image(&self, read: impl Fn(&Point, &mut [u8]) -> Result<(), PointError>) -> Option<[u64; SECTORS]> {
        let mut data = [0; SIZE as usize];
        match read(&self.point, &mut data) {
            Err(PointError::Broken(_)) => return None,
            Err(error) => panic!("{error}"),
            Ok(()) => {}
        }
        let steps: [u64; SECTORS] = std::array::from_fn(|i| step(&data[i * 512..(i + 1) * 512]));
        for i in 0..SECTORS {
            assert!(steps[i] >= self.acked[i], "acknowledged before the cut, not in the image");
            assert!(steps[i] <= self.issued[i], "issued after the cut, in the image");
        }
        for (a, b) in [(steps[0], steps[2]), (steps[1], steps[3])] {
            assert!(a == b || a == b + 1, "not one instant: {a}, {b}");
        }
        Some(steps)
    }
}

fn take_each(point: &Point, data: &mut [u8]) -> Result<(), PointError> {
    for (i, part) in data.chunks_mut(CLUSTER as usize).enumerate() {
        point.take(ByteRange::new(i as u64 * CLUSTER, CLUSTER), part)?;
    }
    Ok(())
}

fn take_all(point: &Point, data: &mut [u8]) -> Result<(), PointError> {
    point.take(ByteRange::new(0, SIZE), data)
}

fn take_holes_first(point: &Point, data: &mut [u8]) -> Result<(), PointError> {
    for (i, part) in data.chunks_mut(CLUSTER as usize).enumerate() {
        let range = ByteRange::new(i as u64 * CLUSTER, CLUSTER);
        if point.take_hole(range)? == 0 {
            point.take(range, part)?;
        }
    }
    Ok(())
}

/// A target that takes each cluster from the disk by itself, and is told afterwards what came too late.
fn carry_each(point: &Point, data: &mut [u8]) -> Result<(), PointError> {
    for (i, part) in data.chunks_mut(CLUSTER as usize).enumerate() {
        let range = ByteRange::new(i as u64 * CLUSTER, CLUSTER);
        let carried = point.carry(range, |source| source.read_at(part, range.start()).is_ok())?;
        for unit in carried.unwrap_or_else(|| vec![range]) {
            let at = (unit.start() - range.start()) as usize;
            point.take(unit, &mut part[at..at + unit.len() as usize])?;
        }
    }
    Ok(())
}

/// Two clients, each with a sector in either cluster: a step in the first, waits, the same step in the second, waits.
fn clients(scene: &Arc<Scene>) -> Vec<thread::JoinHandle<()>> {
    let client = |lane: usize| {
        let scene = Arc::clone(scene);
        thread::spawn(move || {
            for step in 1..STEPS.len() {
                scene.write(lane, lane, step);
                scene.write(lane, lane + 2, step);
            }
        })
    };
    vec![client(0), client(1)]
}

/// On a disk that savers alone read, and on one that is memory.
fn on_both(model: impl Fn(bool) + Send + Sync + Copy + 'static) {
    for memory in [false, true] {
        shuttle::check_pct(move || model(memory), ROUNDS, 4);
    }
}

fn check(scratch: u64, read: fn(&Point, &mut [u8]) -> Result<(), PointError>, may_break: bool) {
    on_both(move |memory| {
        let scene = Scene::new(scratch, memory);
        let clients = clients(&scene);
        let cut = Cut::make(&scene, false);
        let (savers, done) = savers(&cut.point, 2);
        let image = cut.image(read);
        assert!(image.is_some() || may_break, "scratch had room");
        cut.end(&scene);
        clients.into_iter().for_each(|client| client.join().unwrap());
        assert_eq!(now(&scene.acked), [2; SECTORS], "a write was lost or is still held");
        done.store(true, Ordering::SeqCst);
        savers.into_iter().for_each(|saver| saver.join().unwrap());
    });
}

#[test]
fn an_image_read_cluster_by_cluster_is_of_one_instant() {
    check(1 << 20, take_each, false);
}

#[test]
fn an_image_read_at_once_is_of_one_instant() {
    check(1 << 20, take_all, false);
}

#[test]
fn holes_are_holes_of_that_instant() {
    check(1 << 20, take_holes_first, false);
}

#[test]
fn an_image_that_the_target_takes_by_itself_is_of_one_instant() {
    check(1 << 20, carry_each, false);
}

#[test]
fn a_target_that_takes_from_a_broken_point_is_told() {
    check(0, carry_each, true);
}

#[test]
fn a_point_whose_scratch_is_full_says_so_and_the_guest_goes_on() {
    check(0, take_each, true);
}

#[test]
fn a_kept_point_gives_the_same_image_again() {
    on_both(|memory| {
        let scene = Scene::new(1 << 20, memory);
        let clients = clients(&scene);
        let cut = Cut::make(&scene, true);
        let (savers, done) = savers(&cut.point, 2);
        let first = cut.image(take_holes_first).unwrap();
        assert_eq!(cut.image(carry_each).unwrap(), first, "the point changed");
        clients.into_iter().for_each(|client| client.join().unwrap());
        assert_eq!(cut.image(take_all).unwrap(), first, "the point changed");
        cut.end(&scene);
        done.store(true, Ordering::SeqCst);
        savers.into_iter().for_each(|saver| saver.join().unwrap());
    });
}

#[test]
fn two_points_share_what_is_saved_and_keep_apart_what_differs() {
    on_both(|memory| {
        let scene = Scene::new(1 << 20, memory);
        let clients = clients(&scene);
        let older = Cut::make(&scene, true);
        let (savers, done) = savers(&older.point, 2);
        let newer = Cut::make(&scene, false);
        let (a, b) = (newer.image(take_each).unwrap(), older.image(take_each).unwrap());
        assert!(a.iter().zip(&b).all(|(newer, older)| newer >= older), "the newer point is older: {a:?} {b:?}");
        newer.end(&scene);
        assert_eq!(older.image(take_all).unwrap(), b, "the older point changed");
        older.end(&scene);
        clients.into_iter().for_each(|client| client.join().unwrap());
        done.store(true, Ordering::SeqCst);
        savers.into_iter().for_each(|saver| saver.join().unwrap());
    });
}
