//! The promise: a target that cannot be written harms nobody: the policy decides, the bitmap keeps what is not in the backup,
//! and the guest writes on.
//!
//! The kernel refuses writes past a limit that is set for this process, so there is one test here, and scenes in it.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

fn start(lab: &Lab, more: Value) {
    let mut arguments = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "incremental", "bitmap": "b" });
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    lab.ok("blockdev-backup", arguments);
}

fn error(action: &str) -> Value {
    json!({ "device": "j", "operation": "write", "action": action })
}

fn reported_errors_end_the_job() {
    for policy in ["report", "enospc", "auto"] {
        let lab = dirty_lab();
        set_limit(Some(LIMIT));
        start(&lab, json!({ "on-target-error": policy }));
        assert_eq!(lab.event("BLOCK_JOB_ERROR"), error("report"));
        let end = lab.event("BLOCK_JOB_COMPLETED");
        assert_eq!(end["error"], "File too large");
        lab.disks[0].dirty([9], 3);
        lab.state("j", "null");
        set_limit(None);
        assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2, 9, 40], "{policy}");
        // Nothing is in the way of another try.
        start(&lab, json!({}));
        assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
        lab.state("j", "null");
        assert_eq!(lab.disks[0].dirty_clusters("b"), [0_u64; 0]);
    }
}

fn a_stopped_job_goes_on_when_there_is_room() {
    let lab = dirty_lab();
    let instant = lab.disks[0].image();
    set_limit(Some(LIMIT));
    start(&lab, json!({ "sync": "full", "bitmap-mode": "on-success", "on-target-error": "stop" }));
    assert_eq!(lab.event("BLOCK_JOB_ERROR"), error("stop"));
    lab.state("j", "paused");
    assert_eq!(lab.ok("query-block-jobs", json!({}))[0]["io-status"], "failed");
    // Still too small: the same again.
    lab.ok("job-resume", json!({ "id": "j" }));
    assert_eq!(lab.event("BLOCK_JOB_ERROR"), error("stop"));
    lab.state("j", "paused");
    lab.disks[0].dirty([3, 20], 7);
    set_limit(None);
    lab.ok("job-resume", json!({ "id": "j" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    lab.state("j", "null");
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &instant);
    assert_eq!(lab.disks[0].dirty_clusters("b"), [3, 20]);
}

fn an_ignored_error_is_tried_again() {
    let lab = dirty_lab();
    set_limit(Some(LIMIT));
    start(&lab, json!({ "on-target-error": "ignore" }));
    for _ in 0..3 {
        assert_eq!(lab.event("BLOCK_JOB_ERROR"), error("ignore"));
    }
    set_limit(None);
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
}

fn a_job_without_end_waits_for_its_target_too() {
    let lab = dirty_lab();
    set_limit(Some(LIMIT));
    lab.ok(
        "blockdev-backup",
        json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "none", "on-target-error": "ignore" }),
    );
    // Scratch has room below the limit, the target's cluster 60 lies beyond it.
    // The guest's own write would be beyond it as well: it is let go, and never done.
    lab.disks[0].ask(60 * CLUSTER, CLUSTER);
    for _ in 0..3 {
        assert_eq!(lab.event("BLOCK_JOB_ERROR"), error("ignore"));
    }
    set_limit(None);
    lab.ok("job-cancel", json!({ "id": "j" }));
    lab.event("BLOCK_JOB_CANCELLED");
    let copy = std::fs::read(lab.path("t.raw")).unwrap();
    assert!(copy[(60 * CLUSTER) as usize..][..CLUSTER as usize].iter().all(|byte| *byte == 1));
}

fn what_was_copied_counts_with_always() {
    let lab = dirty_lab();
    let instant = lab.disks[0].image();
    set_limit(Some(LIMIT));
    start(&lab, json!({ "sync": "full", "bitmap-mode": "always" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], "File too large");
    lab.state("j", "null");
    set_limit(None);
    let copy = std::fs::read(lab.path("t.raw")).unwrap();
    let left = lab.disks[0].dirty_clusters("b");
    assert!((32..64).all(|cluster| left.contains(&cluster)), "{left:?}");
    for cluster in (0..64).filter(|cluster| !left.contains(cluster)) {
        let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
        assert_same(&copy[range.clone()], &instant[range]);
    }
    start(&lab, json!({}));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &lab.disks[0].image());
}

fn a_qcow2_that_was_not_finished_is_taken_by_nobody() {
    let lab = dirty_lab();
    let path = lab.path("x.qcow2");
    set_limit(Some(LIMIT));
    lab.ok("drive-backup", json!({ "job-id": "j", "device": "d0", "target": path, "format": "qcow2", "sync": "full" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], "File too large");
    lab.state("j", "null");
    set_limit(None);
    let taken = lab.run(
        "drive-backup",
        json!({ "job-id": "j", "device": "d0", "target": path, "format": "qcow2", "mode": "existing", "sync": "full" }),
    );
    assert!(taken.is_err());
    // It can be replaced.
    lab.ok("drive-backup", json!({ "job-id": "j", "device": "d0", "target": path, "format": "qcow2", "sync": "full" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    lab.state("j", "null");
    qemu_img(&["check", "-q", &path]);
    assert_same(&contents(lab.dir.path(), &path, "qcow2"), &lab.disks[0].image());
}

#[test]
fn a_target_that_fails_harms_nobody() {
    reported_errors_end_the_job();
    a_stopped_job_goes_on_when_there_is_room();
    an_ignored_error_is_tried_again();
    a_job_without_end_waits_for_its_target_too();
    what_was_copied_counts_with_always();
    a_qcow2_that_was_not_finished_is_taken_by_nobody();
}
