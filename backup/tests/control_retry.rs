//! The promise: a backup that failed can be tried again, and gives the very image that it was begun for, however much the
//! guest wrote meanwhile; and whoever gives it up gets back the bitmap with all that changed.
//!
//! The kernel refuses writes past a limit that is set for this process, so there is one test here, and scenes in it.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

/// A full backup of that instant that fails halfway, with its point kept; answers the image that it was begun for.
fn fail(lab: &Lab) -> Vec<u8> {
    let instant = lab.disks[0].image();
    set_limit(Some(LIMIT));
    lab.ok(
        "blockdev-backup",
        json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full", "bitmap": "b",
                "bitmap-mode": "on-success", "on-failure": "keep" }),
    );
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], "File too large");
    lab.state("j", "concluded");
    set_limit(None);
    assert_eq!(lab.ok("query-jobs", json!({}))[0]["kept"], true);
    // Far more than what the failed try had left to read.
    lab.disks[0].dirty(0..64, 3);
    lab.disks[0].dirty([5, 50], 4);
    instant
}

fn succeed(lab: &Lab) {
    let end = lab.event("BLOCK_JOB_COMPLETED");
    assert_eq!((&end["error"], &end["device"]), (&Value::Null, &json!("j")));
    lab.state("j", "null");
}

fn again_into_the_same_target() {
    let lab = dirty_lab();
    let instant = fail(&lab);
    lab.ok("job-retry", json!({ "id": "j" }));
    succeed(&lab);
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &instant);
    // Success: what was written since the instant is left, which is everything.
    assert_eq!(lab.disks[0].dirty_clusters("b"), (0..64).collect::<Vec<u64>>());
}

fn again_into_another_file_after_a_second_failure() {
    let lab = dirty_lab();
    let instant = fail(&lab);
    set_limit(Some(LIMIT));
    lab.ok("job-retry", json!({ "id": "j" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], "File too large");
    lab.state("j", "concluded");
    set_limit(None);
    lab.disks[0].dirty([1, 33], 5);
    lab.ok("job-retry", json!({ "id": "j", "target": lab.path("other.raw"), "format": "raw" }));
    succeed(&lab);
    assert_same(&std::fs::read(lab.path("other.raw")).unwrap(), &instant);
}

fn given_up_it_is_reclaimed() {
    let lab = dirty_lab();
    fail(&lab);
    let busy = lab.err("block-dirty-bitmap-clear", json!({ "node": "d0", "name": "b" }));
    assert_eq!(busy, "Bitmap 'b' is currently in use by another operation and cannot be used");
    lab.ok("job-dismiss", json!({ "id": "j" }));
    lab.state("j", "null");
    // All that was dirty before, and all that was written since.
    assert_eq!(lab.disks[0].dirty_clusters("b"), (0..64).collect::<Vec<u64>>());
    let scratch = lab.ok("query-named-block-nodes", json!({}))[0]["scratch"].clone();
    for what in ["memory", "file", "held-writes", "longest-hold", "longest-save"] {
        assert_eq!(scratch[what], 0, "{what}");
    }
    assert_eq!(lab.err("job-retry", json!({ "id": "j" })), "Job not found");
}

fn what_makes_no_sense_is_refused_and_loses_nothing() {
    let lab = dirty_lab();
    let instant = fail(&lab);
    for (arguments, text) in [
        (json!({ "id": "k" }), "Job not found"),
        (json!({ "id": "j", "target-node": "no" }), "Cannot find device='no' nor node-name='no'"),
        (json!({ "id": "j", "target-node": "d0" }), "Source and target cannot be the same"),
        (
            json!({ "id": "j", "target-node": "t", "target": "x" }),
            "Only one of 'target' and 'target-node' may be given",
        ),
        (json!({ "id": "j", "target": "x", "format": "spaghetti" }), "Unknown file format 'spaghetti'"),
    ] {
        assert_eq!(lab.err("job-retry", arguments), text);
    }
    lab.raw_target("small", MIB);
    let sizes = lab.err("job-retry", json!({ "id": "j", "target-node": "small" }));
    assert_eq!(sizes, "Source and target image have different sizes");
    let made = lab.err("job-retry", json!({ "id": "j", "target": lab.path("no/such/place"), "format": "raw" }));
    assert!(made.contains("No such file or directory"), "{made}");
    let meaning = lab.err(
        "blockdev-backup",
        json!({ "job-id": "n", "device": "d0", "target": "small", "sync": "none", "on-failure": "keep" }),
    );
    assert_eq!(meaning, "on-failure 'keep' has no meaning with sync mode 'none'");
    lab.ok("job-retry", json!({ "id": "j" }));
    succeed(&lab);
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &instant);
}

fn a_job_that_keeps_nothing_or_runs_cannot_be_tried_again() {
    let lab = dirty_lab();
    set_limit(Some(LIMIT));
    let start = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full", "auto-dismiss": false });
    lab.ok("blockdev-backup", start);
    lab.state("j", "concluded");
    set_limit(None);
    let refused = lab.err("job-retry", json!({ "id": "j" }));
    assert_eq!(refused, "Job 'j' keeps no point in time to try again");
    lab.ok("job-dismiss", json!({ "id": "j" }));
    let slow =
        json!({ "job-id": "k", "device": "d0", "target": "t", "sync": "full", "speed": 1, "on-failure": "keep" });
    lab.ok("blockdev-backup", slow);
    let refused = lab.err("job-retry", json!({ "id": "k" }));
    assert_eq!(refused, "Job 'k' in state 'running' cannot accept command verb 'retry'");
    lab.ok("job-cancel", json!({ "id": "k" }));
    lab.state("k", "concluded");
    lab.ok("job-dismiss", json!({ "id": "k" }));
}

#[test]
fn a_failed_backup_can_be_had_again_byte_for_byte() {
    again_into_the_same_target();
    again_into_another_file_after_a_second_failure();
    given_up_it_is_reclaimed();
    what_makes_no_sense_is_refused_and_loses_nothing();
    a_job_that_keeps_nothing_or_runs_cannot_be_tried_again();
}
