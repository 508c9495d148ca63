//! Shuttle model of marking and flipping, on the real code: queue threads write through their lanes while a control thread
//! freezes, abdicates, reclaims and reads images of one instant.
//!
//! Checked in every schedule: no write is missed (I1: what is not in the image is in the next increment), no cluster of
//! an image is torn or changes under the reader's eyes before its pre-cut writes are over (the bitmap's half of I3), and
//! the cut is one instant over two disks. The disk is two halves of a block that land one after the other.
//!
//! `RUSTFLAGS="--cfg shuttle" cargo test --release -p blkmark-bitmap --test model_flip`
#![cfg(shuttle)]

use blkmark_bitmap::named::Draft;
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Gate, Granularity, Resume, Tracker, Verdict, commit};
use shuttle::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;
use std::sync::Arc;
use std::time::Instant;

const BLOCK: ByteRange = ByteRange::new(0, 512);
const ROUNDS: usize = 20_000;

/// One block in two halves.
#[derive(Default)]
struct Disk {
    halves: [AtomicU64; 2],
}

impl Disk {
    fn land(&self, value: u64) {
        self.halves[0].store(value, Ordering::SeqCst);
        self.halves[1].store(value, Ordering::SeqCst);
    }

    fn read(&self) -> (u64, u64) {
        (self.halves[0].load(Ordering::SeqCst), self.halves[1].load(Ordering::SeqCst))
    }
}

struct Scene {
    tracker: Arc<Tracker>,
    disk: Disk,
    acked: AtomicU64,
    issued: AtomicU64,
}

impl Scene {
    fn new(lanes: usize) -> Arc<Self> {
        let tracker = Tracker::new(512, lanes, 1);
        let scene = Self { tracker, disk: Disk::default(), acked: AtomicU64::new(0), issued: AtomicU64::new(0) };
        scene.edit(|draft| draft.add("b", Granularity::MIN, false).unwrap());
        Arc::new(scene)
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Draft) -> T) -> T {
        let mut begun = self.tracker.begin();
        let answer = change(&mut begun.draft);
        commit(vec![begun]).unwrap();
        answer
    }

    /// As the write path does it: admit, wait if held, submit, land, finish, acknowledge.
    fn write(&self, lane: usize, value: u64) {
        let mut lane = self.tracker.lane(lane).unwrap();
        self.issued.fetch_max(value, Ordering::SeqCst);
        loop {
            let admitted = lane.enter().admit(0, BLOCK);
            match admitted {
                Admitted::Go => break,
                Admitted::Beyond => unreachable!("nobody resizes"),
                Admitted::Held(gate) => {
                    let bell = Arc::new((Mutex::new(false), Condvar::new()));
                    let there = Arc::clone(&bell);
                    gate.hold(
                        BLOCK,
                        Instant::now(),
                        Box::new(move |_| {
                            *there.0.lock().unwrap() = true;
                            there.1.notify_all();
                        }),
                    );
                    let mut resumed = bell.0.lock().unwrap();
                    while !*resumed {
                        resumed = bell.1.wait(resumed).unwrap();
                    }
                }
            }
        }
        self.disk.land(value);
        lane.finish(0);
        self.acked.fetch_max(value, Ordering::SeqCst);
    }
}

/// The simplest right gate: it holds every write until the image has been read.
#[derive(Default)]
struct Closed {
    open: AtomicBool,
    held: Mutex<Vec<Resume>>,
}

impl Closed {
    fn release(&self) {
        let mut held = self.held.lock().unwrap();
        self.open.store(true, Ordering::SeqCst);
        let held = std::mem::take(&mut *held);
        held.into_iter().for_each(|resume| resume(Verdict::Again));
    }
}

impl Gate for Closed {
    fn admits(&self, _: ByteRange) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    fn hold(&self, _: ByteRange, _: Instant, resume: Resume) {
        let mut held = self.held.lock().unwrap();
        if self.open.load(Ordering::SeqCst) {
            drop(held);
            return resume(Verdict::Again);
        }
        held.push(resume);
    }
}

/// Freezes with a gate, reads the image, ends the freeze. Answers the image and whether the block was in the frozen set.
fn backup(scene: &Scene, success: bool) -> (u64, bool) {
    let gate = Arc::new(Closed::default());
    let mut begun = scene.tracker.begin();
    let frozen = begun.draft.freeze("b").unwrap();
    let frozen = begun.closing(frozen);
    begun.arm(Arc::clone(&gate) as Arc<dyn Gate>);
    let acked = scene.acked.load(Ordering::SeqCst);
    let cut = commit(vec![begun]).unwrap().remove(0);
    let issued = scene.issued.load(Ordering::SeqCst);
    cut.pre_cut.wait(BLOCK);
    let (first, second) = scene.disk.read();
    assert_eq!(first, second, "torn image");
    assert!(first >= acked, "acknowledged before the cut, not in the image");
    assert!(first <= issued, "issued after the cut, in the image");
    gate.release();
    let mut begun = scene.tracker.begin();
    if success {
        begun.draft.abdicate("b", frozen.id()).unwrap();
    } else {
        begun.draft.reclaim("b", frozen.id()).unwrap();
    }
    begun.disarm(gate);
    commit(vec![begun]).unwrap();
    (first, frozen.any(BLOCK))
}

fn dirty(scene: &Scene) -> bool {
    !scene.tracker.bits("b").unwrap().is_empty()
}

#[test]
fn no_write_is_missed_between_increments() {
    shuttle::check_pct(
        || {
            let scene = Scene::new(1);
            let there = Arc::clone(&scene);
            let writer = thread::spawn(move || (1..=3).for_each(|value| there.write(0, value)));
            let mut chain = 0;
            for success in [true, false, true] {
                let (image, in_set) = backup(&scene, success);
                assert!(in_set || image == chain, "the increment leaves out a changed block: {chain} -> {image}");
                if success {
                    chain = image;
                }
            }
            writer.join().unwrap();
            assert!(chain == 3 || dirty(&scene), "the last write is in no backup and in no bitmap");
        },
        ROUNDS,
        3,
    );
}

#[test]
fn two_queues_and_a_bitmap_that_comes_and_goes() {
    shuttle::check_random(
        || {
            let scene = Scene::new(2);
            let threads: Vec<_> = (0..2)
                .map(|lane| {
                    let scene = Arc::clone(&scene);
                    thread::spawn(move || scene.write(lane, 1))
                })
                .collect();
            let (image, in_set) = backup(&scene, true);
            assert!(in_set || image == 0, "changed, but not in the increment");
            scene.edit(|draft| draft.add("other", Granularity::DEFAULT, false).unwrap());
            scene.edit(|draft| draft.remove("other").unwrap());
            threads.into_iter().for_each(|thread| thread.join().unwrap());
            assert!(image == 1 || dirty(&scene), "a write in neither image nor bitmap");
        },
        ROUNDS,
    );
}

#[test]
fn the_cut_is_one_instant_over_two_disks() {
    shuttle::check_pct(
        || {
            let disks = [Scene::new(1), Scene::new(1)];
            let [a, b] = disks.clone();
            // One client: n to A, waits, n to B, waits.
            let client = thread::spawn(move || {
                for n in 1..=2 {
                    a.write(0, n);
                    b.write(0, n);
                }
            });
            let gates = [Arc::new(Closed::default()), Arc::new(Closed::default())];
            let mut begun: Vec<_> = disks.iter().map(|disk| disk.tracker.begin()).collect();
            for (begun, gate) in begun.iter_mut().zip(&gates) {
                begun.arm(Arc::clone(gate) as Arc<dyn Gate>);
            }
            let cuts = commit(begun).unwrap();
            let mut image = [0; 2];
            for i in 0..2 {
                cuts[i].pre_cut.wait(BLOCK);
                let (first, second) = disks[i].disk.read();
                assert_eq!(first, second, "torn image");
                image[i] = first;
            }
            assert!(image[0] == image[1] || image[0] == image[1] + 1, "not one instant: {image:?}");
            gates.iter().for_each(|gate| gate.release());
            client.join().unwrap();
        },
        ROUNDS,
        3,
    );
}

#[test]
fn a_bitmap_knows_of_writes_that_were_in_flight_when_it_was_added() {
    shuttle::check_pct(
        || {
            let scene = Scene::new(1);
            let there = Arc::clone(&scene);
            let writer = thread::spawn(move || (1..=2).for_each(|value| there.write(0, value)));
            scene.edit(|draft| draft.add("new", Granularity::MIN, false).unwrap());
            // Somebody else's full backup, begun once the bitmap is there: it waits for nobody.
            let image = scene.disk.read();
            writer.join().unwrap();
            let same = image == scene.disk.read();
            assert!(same || !scene.tracker.bits("new").unwrap().is_empty(), "a write that landed later is not marked");
        },
        ROUNDS,
        3,
    );
}
