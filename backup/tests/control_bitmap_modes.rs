//! The promise: what a bitmap holds after its job, for every sync mode, bitmap mode and end: QEMU's table in full; and a
//! recovery backup after any of it equals the disk.

mod control_common;

use control_common::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Success,
    /// The disk cannot be read any more.
    Failure,
    Cancel,
}

/// Clusters of a disk of 4 MiB.
const ALL: u64 = 64;

struct Scene {
    sync: &'static str,
    mode: Option<&'static str>,
    end: End,
}

/// Old marks in clusters 0..40, a job over them that is stopped in its middle, writes during it, and its end. Answers the
/// dirty clusters afterwards, and those of the plan that did not get to the target.
fn play(scene: &Scene) -> (BTreeSet<u64>, BTreeSet<u64>) {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    disk.dirty(0..ALL, 1);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    disk.dirty(0..40, 2);
    let target = lab.raw_target("t", 4 * MIB);
    let mut arguments = json!({
        "job-id": "j", "device": "d0", "target": "t", "sync": scene.sync, "bitmap": "b",
        // One chunk is 1 MiB: one goes at once, the next one second later.
        "speed": MIB,
    });
    if let Some(mode) = scene.mode {
        arguments["bitmap-mode"] = json!(mode);
    }
    let instant = disk.image();
    lab.ok("blockdev-backup", arguments);
    // Some of it is copied, and the rest is not.
    let begun = std::time::Instant::now();
    while progress(&lab) == 0 {
        assert!(begun.elapsed() < GIVE_UP);
        std::thread::yield_now();
    }
    // S: some clusters of the bitmap, some of the rest.
    disk.dirty([3, 39, 45, 63], 3);
    let recovered = match scene.end {
        End::Success => {
            lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
            assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
            lab.state("j", "null");
            let plan = if scene.sync == "full" || scene.sync == "top" { 0..ALL } else { 0..40 };
            let copy = std::fs::read(&target).unwrap();
            for cluster in plan {
                let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
                assert_same(&copy[range.clone()], &instant[range]);
            }
            BTreeSet::new()
        }
        End::Failure => {
            disk.source.broken.store(true, Ordering::SeqCst);
            lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
            assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], "Input/output error");
            lab.state("j", "null");
            disk.source.broken.store(false, Ordering::SeqCst);
            missing(&target, &instant, scene.sync)
        }
        End::Cancel => {
            lab.ok("job-cancel", json!({ "id": "j" }));
            lab.event("BLOCK_JOB_CANCELLED");
            lab.state("j", "null");
            missing(&target, &instant, scene.sync)
        }
    };
    let after: BTreeSet<u64> = disk.dirty_clusters("b").into_iter().collect();
    // Recovery: what the target lacks is in the bitmap, so an incremental onto the same target makes it the disk. Where
    // the job succeeded or `always` counted what was copied, that holds of the target of the job itself.
    if scene.mode == Some("always")
        || scene.end == End::Success && scene.sync != "bitmap" && scene.sync != "incremental"
    {
        lab.ok(
            "blockdev-backup",
            json!({ "job-id": "r", "device": "d0", "target": "t", "sync": "incremental", "bitmap": "b" }),
        );
        assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
        lab.state("r", "null");
        let copy = std::fs::read(&target).unwrap();
        let now = disk.image();
        // An incremental alone says nothing of what was never marked.
        let known = if scene.sync == "full" || scene.sync == "top" { 0..ALL } else { 0..40 };
        for cluster in known {
            let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
            assert_same(&copy[range.clone()], &now[range]);
        }
    }
    (after, recovered)
}

fn progress(lab: &Lab) -> u64 {
    lab.jobs()[0]["current-progress"].as_u64().unwrap()
}

/// The clusters of the plan that the target does not hold as of the instant.
fn missing(target: &std::path::Path, instant: &[u8], sync: &str) -> BTreeSet<u64> {
    let copy = std::fs::read(target).unwrap();
    let plan = if sync == "full" || sync == "top" { 0..ALL } else { 0..40 };
    plan.filter(|cluster| {
        let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
        copy[range.clone()] != instant[range]
    })
    .collect()
}

fn check(sync: &'static str, mode: Option<&'static str>) {
    for end in [End::Success, End::Failure, End::Cancel] {
        let (after, missing) = play(&Scene { sync, mode, end });
        let during = BTreeSet::from([3, 39, 45, 63]);
        let old: BTreeSet<u64> = (0..40).collect();
        let want = match (mode.unwrap_or("on-success"), end) {
            ("on-success" | "always", End::Success) => during,
            ("always", _) => {
                assert!(!missing.is_empty(), "the job was stopped before its end");
                let plan = if matches!(sync, "full" | "top") { ALL } else { 40 };
                assert!((missing.len() as u64) < plan, "the job was stopped after its beginning");
                &during | &missing
            }
            _ => &old | &during,
        };
        assert_eq!(after, want, "sync={sync} bitmap-mode={mode:?} {end:?}");
    }
}

#[test]
fn incremental() {
    check("incremental", None);
    check("incremental", Some("on-success"));
}

#[test]
fn bitmap_on_success() {
    check("bitmap", Some("on-success"));
}

#[test]
fn bitmap_never() {
    check("bitmap", Some("never"));
}

#[test]
fn bitmap_always() {
    check("bitmap", Some("always"));
}

#[test]
fn full_on_success() {
    check("full", Some("on-success"));
}

#[test]
fn full_always() {
    check("full", Some("always"));
}

#[test]
fn top_on_success() {
    check("top", Some("on-success"));
}

#[test]
fn top_always() {
    check("top", Some("always"));
}

#[test]
fn a_job_that_is_cancelled_when_all_is_copied_leaves_only_what_came_since() {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    disk.dirty([1, 2, 9], 1);
    lab.raw_target("t", 4 * MIB);
    lab.ok(
        "blockdev-backup",
        json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "bitmap", "bitmap": "b", "bitmap-mode": "always",
                "auto-finalize": false }),
    );
    disk.dirty([9], 2);
    lab.state("j", "pending");
    lab.ok("job-cancel", json!({ "id": "j" }));
    lab.state("j", "null");
    assert_eq!(disk.dirty_clusters("b"), [9]);
}

#[test]
fn a_disabled_bitmap_records_nothing_during_its_job() {
    for end in ["success", "cancel"] {
        let lab = Lab::new(1);
        let disk = &lab.disks[0];
        lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
        disk.dirty([1, 2], 1);
        lab.ok("block-dirty-bitmap-disable", json!({ "node": "d0", "name": "b" }));
        lab.raw_target("t", 4 * MIB);
        lab.ok(
            "blockdev-backup",
            json!({
                "job-id": "j", "device": "d0", "target": "t", "sync": "incremental", "bitmap": "b", "auto-finalize": false,
            }),
        );
        disk.dirty([9], 2);
        lab.state("j", "pending");
        lab.ok(if end == "success" { "job-finalize" } else { "job-cancel" }, json!({ "id": "j" }));
        lab.state("j", "null");
        disk.dirty([10], 2);
        let left: &[u64] = if end == "success" { &[] } else { &[1, 2] };
        assert_eq!(disk.dirty_clusters("b"), left);
        let (_, _, _, recording, busy) = disk.bitmaps().remove(0);
        assert!(!recording && !busy);
    }
}
