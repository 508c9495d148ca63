//! The promise: when old data cannot be kept, or not in time, the operator's policy decides between the backup and the guest's
//! write, and nothing else is lost: a backup that goes on is of its instant, a guest that goes on has all its writes.

mod control_common;

use blkmark_backup::point::{Point, PointOptions, Wanted};
use blkmark_bitmap::{ByteRange, Granularity, Verdict, commit};
use control_common::*;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// A disk full of ones with bitmap b, all of it dirty, scratch for two clusters, and target t.
fn lab() -> Lab {
    let lab = Lab::with_scratch(&[4 * MIB], 2 * CLUSTER);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    lab.disks[0].dirty(0..64, 1);
    lab.raw_target("t", 4 * MIB);
    lab
}

/// A backup that copies nothing yet: it is paused before its speed lets it begin.
fn start_paused(lab: &Lab, more: Value) {
    let mut arguments = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "bitmap", "bitmap": "b",
                                "bitmap-mode": "on-success", "speed": 1 });
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    lab.ok("blockdev-backup", arguments);
    lab.ok("job-pause", json!({ "id": "j" }));
    lab.state("j", "paused");
}

fn finish(lab: &Lab) -> Value {
    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    lab.ok("job-resume", json!({ "id": "j" }));
    let end = lab.event("BLOCK_JOB_COMPLETED");
    lab.state("j", "null");
    end["error"].clone()
}

#[test]
fn break_guest_write_refuses_what_cannot_be_kept_and_the_backup_stays_whole() {
    let lab = lab();
    let instant = lab.disks[0].image();
    start_paused(&lab, json!({ "on-cbw-error": "break-guest-write" }));
    // From the end of the disk, where the copy has not been.
    let through: Vec<u64> =
        (0..64).rev().filter(|n| lab.disks[0].try_write(n * CLUSTER, &[2; CLUSTER as usize])).collect();
    assert!(through.len() >= 2 && through.len() < 64, "{} of 64 writes fitted into scratch", through.len());
    assert_eq!(finish(&lab), Value::Null);
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &instant);
    // Exactly what was let through is on the disk, and is what changed since.
    let image = lab.disks[0].image();
    for n in 0..64 {
        let expect = if through.contains(&n) { 2 } else { 1 };
        assert!(image[(n * CLUSTER) as usize..][..CLUSTER as usize].iter().all(|byte| *byte == expect), "cluster {n}");
    }
    let mut dirty = through;
    dirty.sort_unstable();
    assert_eq!(lab.disks[0].dirty_clusters("b"), dirty);
}

#[test]
fn a_write_that_is_held_too_long_breaks_the_backup_and_goes_on() {
    let lab = lab();
    start_paused(&lab, json!({ "cbw-timeout": 1 }));
    let hung = lab.disks[0].source.hung.lock().unwrap();
    // The disk gives nothing back, so the old data cannot be kept; the write has to go on all the same.
    lab.disks[0].write(63 * CLUSTER, CLUSTER, 2);
    drop(hung);
    assert_eq!(finish(&lab), "the point in time is broken: a guest write was held for 1 seconds");
    assert_eq!(lab.disks[0].dirty_clusters("b"), (0..64).collect::<Vec<u64>>(), "the bitmap was reclaimed");
}

#[test]
fn a_write_that_is_held_too_long_is_refused_if_the_backup_comes_first() {
    let lab = lab();
    let instant = lab.disks[0].image();
    start_paused(&lab, json!({ "cbw-timeout": 1, "on-cbw-error": "break-guest-write" }));
    let hung = lab.disks[0].source.hung.lock().unwrap();
    assert!(!lab.disks[0].try_write(63 * CLUSTER, &[2; CLUSTER as usize]));
    drop(hung);
    assert_eq!(finish(&lab), Value::Null);
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &instant);
    assert_eq!(lab.disks[0].dirty_clusters("b"), [0_u64; 0]);
}

#[test]
fn a_shorter_limit_that_comes_later_is_kept_and_the_longest_hold_is_known() {
    let lab = Lab::sized(&[MIB]);
    let disk = &lab.disks[0];
    disk.write(0, MIB, 1);
    let (patient, hasty) = (begin(disk, 60), begin(disk, 1));
    let hung = disk.source.hung.lock().unwrap();
    let first = hold(&patient, 0);
    let second = hold(&hasty, CLUSTER);
    assert_eq!(second.recv_timeout(GIVE_UP), Ok(Verdict::Again));
    assert!(hasty.broken().is_some() && patient.broken().is_none());
    assert!(first.try_recv().is_err(), "let go although nothing was kept");
    drop(hung);
    assert_eq!(first.recv_timeout(GIVE_UP), Ok(Verdict::Again));
    let load = disk.node.load();
    // The save for the hasty one may have ended last, so either can be the longer.
    assert!(load.longest_hold.min(load.longest_save) >= Duration::from_millis(500), "{load:?}");
    for point in [patient, hasty] {
        end(disk, &point);
    }
}

#[test]
fn on_a_slow_disk_a_held_write_waits_for_its_own_save_and_not_for_those_before_it() {
    const WRITES: u64 = 24;
    let lab = Lab::with_scratch(&[4 * MIB], 8 * MIB);
    let disk = &lab.disks[0];
    disk.write(0, 4 * MIB, 1);
    let point = begin(disk, 60);
    let until_reads = |count: u64| {
        let began = Instant::now();
        while disk.source.reads.load(Ordering::SeqCst) as u64 != count {
            assert!(
                began.elapsed() < GIVE_UP,
                "{} reads under way, not {count}",
                disk.source.reads.load(Ordering::SeqCst)
            );
            std::thread::yield_now();
        }
    };
    // A first one, to show that this disk takes its time.
    let hung = disk.source.hung.lock().unwrap();
    let slow = hold(&point, 63 * CLUSTER);
    until_reads(1);
    std::thread::sleep(Duration::from_millis(5));
    drop(hung);
    assert_eq!(slow.recv_timeout(GIVE_UP), Ok(Verdict::Again));

    let hung = disk.source.hung.lock().unwrap();
    let held: Vec<_> = (0..WRITES).map(|n| hold(&point, n * CLUSTER)).collect();
    until_reads(WRITES);
    drop(hung);
    assert!(held.iter().all(|held| held.recv_timeout(GIVE_UP) == Ok(Verdict::Again)));
    end(disk, &point);
}

#[test]
fn where_disk_and_scratch_are_memory_a_held_write_waits_for_nobody() {
    let lab = in_memory(3 * MIB);
    let disk = &lab.disks[0];
    let point = begin(disk, 60);
    // Scratch has a MiB of memory.
    for n in 0..16 {
        assert_eq!(hold(&point, n * CLUSTER).try_recv(), Ok(Verdict::Again), "cluster {n} had to wait for somebody");
    }
    // The rest of it is a file, which may let one wait.
    for n in 16..40 {
        assert_eq!(hold(&point, n * CLUSTER).recv_timeout(GIVE_UP), Ok(Verdict::Again));
    }
    let load = disk.node.load();
    assert_eq!((load.memory, load.file, load.held), (MIB, 24 * CLUSTER, 0));
    assert!(load.longest_hold >= load.longest_save && load.longest_save > Duration::ZERO, "{load:?}");
    disk.write(0, 40 * CLUSTER, 2);
    let mut image = vec![0; 4 << 20];
    point.take(ByteRange::new(0, 4 * MIB), &mut image).unwrap();
    assert_same(&image, &[1; 4 << 20]);
    end(disk, &point);
}

#[test]
fn the_thread_of_a_held_write_is_not_kept_by_a_large_one_or_by_one_before_the_instant() {
    let lab = in_memory(8 * MIB);
    let disk = &lab.disks[0];
    let (under_way, begun) = mpsc::channel();
    let (land, may_land) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let slow = move || {
            disk.write_slowly(0, &[2; CLUSTER as usize], || {
                under_way.send(()).unwrap();
                may_land.recv_timeout(GIVE_UP).unwrap();
            });
        };
        scope.spawn(slow);
        begun.recv_timeout(GIVE_UP).unwrap();
        let point = begin(disk, 60);
        let behind = hold(&point, 0);
        assert_eq!(behind.try_recv(), Err(mpsc::TryRecvError::Empty), "the write before the instant has not landed");
        let hung = disk.source.hung.lock().unwrap();
        // If this thread read the disk for it, it would wait for itself.
        let large = hold_range(&point, ByteRange::new(MIB, MIB));
        drop(hung);
        assert_eq!(large.recv_timeout(GIVE_UP), Ok(Verdict::Again));
        land.send(()).unwrap();
        assert_eq!(behind.recv_timeout(GIVE_UP), Ok(Verdict::Again));
        let mut image = vec![0; CLUSTER as usize];
        point.take(ByteRange::new(0, CLUSTER), &mut image).unwrap();
        assert_same(&image, &[2; CLUSTER as usize]);
        end(disk, &point);
    });
}

/// A disk of 4 MiB that is memory, full of ones.
fn in_memory(scratch: u64) -> Lab {
    let lab = Lab::with_scratch(&[4 * MIB], scratch);
    lab.disks[0].write(0, 4 * MIB, 1);
    lab.disks[0].source.memory.store(true, Ordering::SeqCst);
    lab
}

/// A point in time of all of the disk.
fn begin(disk: &Disk, seconds: u64) -> Arc<Point> {
    let options = PointOptions { timeout: Some(Duration::from_secs(seconds)), ..PointOptions::default() };
    let point = Point::prepare(&disk.node, Wanted::All, Granularity::new(CLUSTER).unwrap(), options).unwrap();
    let mut begun = disk.node.tracker.begin();
    begun.arm(point.gate());
    point.begin(commit(vec![begun]).unwrap().remove(0).pre_cut);
    point
}

fn end(disk: &Disk, point: &Arc<Point>) {
    let mut begun = disk.node.tracker.begin();
    begun.disarm(point.gate());
    commit(vec![begun]).unwrap();
    point.end();
}

/// A write that the point's gate holds, and where it says that it may go.
fn hold(point: &Arc<Point>, at: u64) -> mpsc::Receiver<Verdict> {
    hold_range(point, ByteRange::new(at, CLUSTER))
}

fn hold_range(point: &Arc<Point>, range: ByteRange) -> mpsc::Receiver<Verdict> {
    let (tx, rx) = mpsc::channel();
    point.gate().hold(range, Instant::now(), Box::new(move |verdict| tx.send(verdict).unwrap()));
    rx
}

#[test]
fn an_unreadable_disk_breaks_the_backup_and_not_the_guest() {
    for memory in [false, true] {
        let lab = lab();
        lab.disks[0].source.memory.store(memory, Ordering::SeqCst);
        start_paused(&lab, json!({}));
        lab.disks[0].source.broken.store(true, Ordering::SeqCst);
        lab.disks[0].write(63 * CLUSTER, CLUSTER, 2);
        let error = finish(&lab);
        assert_eq!(error, "the point in time is broken: scratch: Input/output error (os error 5)");
    }
}

#[test]
fn absurd_limits_are_refused() {
    let lab = lab();
    let start = |more: Value| {
        let mut arguments = json!({ "device": "d0", "target": "t", "sync": "full" });
        let (name, value) = more.as_object().unwrap().iter().next().unwrap();
        arguments[name] = value.clone();
        lab.err("blockdev-backup", arguments)
    };
    assert_eq!(start(json!({ "cbw-timeout": -1 })), "Parameter 'cbw-timeout' expects uint32_t");
    assert_eq!(start(json!({ "on-cbw-error": "panic" })), "Parameter 'on-cbw-error' does not accept value 'panic'");
    assert_eq!(start(json!({ "on-failure": "panic" })), "Parameter 'on-failure' does not accept value 'panic'");
    assert_eq!(start(json!({ "speed": -1 })), "Parameter 'speed' expects a non-negative value");
    assert_eq!(lab.jobs(), json!([]));
}
