//! The promise: a job is where QEMU's tables say, takes the commands that they say, and tells of it in QEMU's order.

mod control_common;

use control_common::*;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A lab with disk d0, full of ones, and target nodes t and u.
fn lab() -> Lab {
    let lab = Lab::new(1);
    lab.disks[0].dirty(0..64, 1);
    lab.raw_target("t", 4 * MIB);
    lab.raw_target("u", 4 * MIB);
    lab
}

fn start(lab: &Lab, id: &str, target: &str, more: Value) {
    let mut arguments = json!({ "job-id": id, "device": "d0", "target": target, "sync": "full" });
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    lab.ok("blockdev-backup", arguments);
}

const LIFE: [&str; 7] =
    ["j:created", "j:running", "j:waiting", "j:pending", "BLOCK_JOB_COMPLETED j", "j:concluded", "j:null"];

#[test]
fn a_successful_job_tells_its_life_in_qemus_order() {
    let lab = lab();
    start(&lab, "j", "t", json!({}));
    assert_eq!(lab.told_until("j:null"), LIFE);
    assert_eq!(lab.jobs(), json!([]));
    assert_eq!(lab.ok("query-block-jobs", json!({})), json!([]));
}

#[test]
fn the_device_names_a_job_that_has_no_id() {
    let lab = lab();
    lab.ok("blockdev-backup", json!({ "device": "d0", "target": "t", "sync": "full" }));
    lab.state("d0", "null");
}

#[test]
fn queries_show_a_job_as_qemu_does() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "auto-finalize": false, "auto-dismiss": false }));
    lab.state("j", "pending");
    assert_eq!(
        lab.event("BLOCK_JOB_PENDING"),
        json!({ "type": "backup", "id": "j" }),
        "told after the change of state"
    );
    let size = 4 * MIB;
    assert_eq!(
        lab.jobs(),
        json!([{
            "id": "j", "type": "backup", "status": "pending", "current-progress": size, "total-progress": size,
        }])
    );
    let block = json!({
        "type": "backup", "device": "j", "len": size, "offset": size, "busy": false, "paused": false, "speed": 0,
        "max-guest-latency": 1000, "io-status": "ok", "ready": false, "status": "pending", "auto-finalize": false, "auto-dismiss": false,
    });
    assert_eq!(lab.ok("query-block-jobs", json!({})), json!([block]));
    lab.ok("job-finalize", json!({ "id": "j" }));
    assert_eq!(lab.told(), ["BLOCK_JOB_COMPLETED j", "j:concluded"]);
    assert_eq!(lab.jobs()[0]["status"], "concluded");
    lab.ok("job-dismiss", json!({ "id": "j" }));
    assert_eq!(lab.told(), ["j:null"]);
    assert_eq!(lab.jobs(), json!([]));
}

#[test]
fn what_the_guest_may_feel_can_be_changed_while_a_job_runs() {
    let lab = lab();
    let change = |id: &str, more: Value| {
        let mut arguments = json!({ "id": id, "type": "backup", "max-guest-latency": 5 });
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        arguments
    };
    assert_eq!(lab.err("block-job-change", change("j", json!({}))), "Block job 'j' not found");
    start(&lab, "j", "t", json!({ "speed": 1, "max-guest-latency": 70 }));
    let shown = || lab.ok("query-block-jobs", json!({}))[0]["max-guest-latency"].clone();
    assert_eq!(shown(), 70);
    for (more, error) in [
        (json!({ "max-guest-latency": -1 }), "Parameter 'max-guest-latency' expects uint64"),
        (json!({ "max-guest-latency": 3_600_000_001_u64 }), "max-guest-latency may be at most 3600000000 microseconds"),
        (json!({ "type": "mirror" }), "Parameter 'type' does not accept value 'mirror'"),
        (json!({ "speed": 1 }), "Parameter 'speed' is unexpected"),
    ] {
        assert_eq!(lab.err("block-job-change", change("j", more)), error);
    }
    assert_eq!(
        lab.err("block-job-change", json!({ "id": "j", "type": "backup" })),
        "Parameter 'max-guest-latency' is missing"
    );
    assert_eq!(shown(), 70);
    for limit in [0, 3_600_000_000_u64, 250] {
        lab.ok("block-job-change", change("j", json!({ "max-guest-latency": limit })));
        assert_eq!(shown(), limit);
    }
    lab.ok("block-job-cancel", json!({ "device": "j" }));
    lab.state("j", "null");
}

#[test]
fn speed_bounds_what_comes_out_of_scratch_as_what_comes_from_the_disk() {
    let lab = lab();
    let instant = lab.disks[0].image();
    start(&lab, "j", "t", json!({ "speed": 1 }));
    let offset = || lab.ok("query-block-jobs", json!({}))[0]["offset"].as_u64().unwrap();
    let until = |bytes: u64| {
        let began = Instant::now();
        while offset() < bytes && began.elapsed() < GIVE_UP {
            std::thread::sleep(Duration::from_millis(1));
        }
        // The next one is due in half a day.
        assert_eq!(offset(), bytes);
    };
    until(CLUSTER);
    // All that is left comes out of scratch from here on.
    lab.disks[0].dirty(0..64, 2);
    for more in 1..4 {
        lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 1 }));
        until((more + 1) * CLUSTER);
    }
    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    lab.state("j", "null");
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &instant);
}

#[test]
fn a_pending_job_can_be_cancelled_and_shows_why_it_failed() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "auto-finalize": false, "auto-dismiss": false }));
    lab.told_until("BLOCK_JOB_PENDING j");
    lab.ok("job-cancel", json!({ "id": "j" }));
    assert_eq!(lab.told(), ["j:aborting", "BLOCK_JOB_CANCELLED j", "j:concluded"]);
    assert_eq!(lab.jobs()[0]["error"], "Operation canceled");
    for verb in ["cancel", "finalize", "pause", "complete"] {
        assert_eq!(
            lab.err(&format!("job-{verb}"), json!({ "id": "j" })),
            format!("Job 'j' in state 'concluded' cannot accept command verb '{verb}'")
        );
    }
    lab.ok("block-job-dismiss", json!({ "id": "j" }));
}

#[test]
fn verbs_are_refused_in_qemus_words() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "speed": 1 }));
    let state = |verb: &str| format!("Job 'j' in state 'running' cannot accept command verb '{verb}'");
    assert_eq!(lab.err("job-complete", json!({ "id": "j" })), state("complete"));
    assert_eq!(lab.err("job-finalize", json!({ "id": "j" })), state("finalize"));
    assert_eq!(lab.err("job-dismiss", json!({ "id": "j" })), state("dismiss"));
    assert_eq!(lab.err("block-job-complete", json!({ "device": "j" })), state("complete"));
    assert_eq!(lab.err("block-job-finalize", json!({ "id": "j" })), state("finalize"));
    assert_eq!(lab.err("block-job-dismiss", json!({ "id": "j" })), state("dismiss"));
    let not_paused = "Can't resume a job that was not paused";
    assert_eq!(lab.err("job-resume", json!({ "id": "j" })), not_paused);
    lab.ok("job-pause", json!({ "id": "j" }));
    assert_eq!(lab.err("job-pause", json!({ "id": "j" })), "Job is already paused");
    assert_eq!(lab.err("block-job-pause", json!({ "device": "j" })), "Job is already paused");
    assert_eq!(lab.ok("query-block-jobs", json!({}))[0]["paused"], true);
    assert_eq!(
        lab.err("block-job-cancel", json!({ "device": "j" })),
        "The block job for device 'j' is currently paused"
    );
    let negative = "Parameter 'speed' expects a non-negative value";
    assert_eq!(lab.err("block-job-set-speed", json!({ "device": "j", "speed": -1 })), negative);
    lab.ok("block-job-resume", json!({ "device": "j" }));
    assert_eq!(lab.err("block-job-resume", json!({ "device": "j" })), not_paused);
    for verb in ["cancel", "complete", "dismiss", "finalize", "pause", "resume"] {
        assert_eq!(lab.err(&format!("job-{verb}"), json!({ "id": "zz" })), "Job not found");
    }
    for (verb, member) in
        [("cancel", "device"), ("complete", "device"), ("dismiss", "id"), ("finalize", "id"), ("pause", "device")]
    {
        let arguments = json!({ member: "zz" });
        assert_eq!(lab.err(&format!("block-job-{verb}"), arguments), "Block job 'zz' not found");
    }
    assert_eq!(lab.err("block-job-set-speed", json!({ "device": "zz", "speed": -1 })), "Block job 'zz' not found");
    lab.told();
    lab.ok("block-job-cancel", json!({ "device": "j", "force": true }));
    assert_eq!(lab.told_until("j:null"), ["j:aborting", "BLOCK_JOB_CANCELLED j", "j:concluded", "j:null"]);
}

#[test]
fn a_paused_job_rests_and_goes_on_where_it_was() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "speed": 1 }));
    lab.ok("job-pause", json!({ "id": "j" }));
    // The speed alone would let it run now.
    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    assert_eq!(lab.jobs()[0]["status"], "paused");
    lab.disks[0].dirty([63], 9);
    lab.ok("job-resume", json!({ "id": "j" }));
    let told = lab.told_until("j:null");
    assert_eq!(told[..4], ["j:created", "j:running", "j:paused", "j:running"]);
    assert_eq!(told[4..], LIFE[2..]);
    assert!(std::fs::read(lab.path("t.raw")).unwrap().iter().all(|byte| *byte == 1));
}

#[test]
fn a_paused_job_is_cancelled_by_force_from_running() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "speed": 1 }));
    lab.ok("job-pause", json!({ "id": "j" }));
    lab.ok("job-cancel", json!({ "id": "j" }));
    let told = lab.told_until("j:null");
    assert_eq!(
        told,
        [
            "j:created",
            "j:running",
            "j:paused",
            "j:running",
            "j:aborting",
            "BLOCK_JOB_CANCELLED j",
            "j:concluded",
            "j:null",
        ]
    );
}

#[test]
fn a_reported_error_ends_the_job_with_its_text() {
    let lab = lab();
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    start(&lab, "j", "t", json!({ "auto-dismiss": false }));
    assert_eq!(lab.event("BLOCK_JOB_ERROR"), json!({ "device": "j", "operation": "read", "action": "report" }));
    let end = lab.event("BLOCK_JOB_COMPLETED");
    assert_eq!((&end["error"], &end["len"]), (&json!("Input/output error"), &json!(4 * MIB)));
    lab.state("j", "concluded");
    assert_eq!(lab.jobs()[0]["error"], "Input/output error");
    assert_eq!(lab.ok("query-block-jobs", json!({}))[0]["error"], "Input/output error");
}

#[test]
fn a_job_that_an_error_stopped_copies_the_same_bytes_when_resumed() {
    let lab = lab();
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    start(&lab, "j", "t", json!({ "on-source-error": "stop" }));
    assert_eq!(lab.event("BLOCK_JOB_ERROR"), json!({ "device": "j", "operation": "read", "action": "stop" }));
    lab.state("j", "paused");
    let shown = lab.ok("query-block-jobs", json!({}));
    assert_eq!((&shown[0]["io-status"], &shown[0]["paused"]), (&json!("failed"), &json!(true)));
    lab.disks[0].source.broken.store(false, Ordering::SeqCst);
    lab.ok("block-job-resume", json!({ "device": "j" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    assert!(std::fs::read(lab.path("t.raw")).unwrap().iter().all(|byte| *byte == 1));
}

#[test]
fn an_ignored_error_is_tried_again_until_it_works() {
    let lab = lab();
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    start(&lab, "j", "t", json!({ "on-source-error": "ignore" }));
    for _ in 0..5 {
        assert_eq!(lab.event("BLOCK_JOB_ERROR"), json!({ "device": "j", "operation": "read", "action": "ignore" }));
    }
    assert_eq!(lab.jobs()[0]["status"], "running");
    lab.disks[0].source.broken.store(false, Ordering::SeqCst);
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
}

#[test]
fn two_jobs_run_beside_each_other_over_one_disk() {
    let lab = lab();
    start(&lab, "one", "t", json!({ "speed": 1 }));
    lab.disks[0].dirty([8], 2);
    start(&lab, "two", "u", json!({}));
    lab.state("two", "null");
    lab.ok("block-job-set-speed", json!({ "device": "one", "speed": 0 }));
    lab.state("one", "null");
    assert!(std::fs::read(lab.path("t.raw")).unwrap().iter().all(|byte| *byte == 1));
    assert_same(&std::fs::read(lab.path("u.raw")).unwrap(), &lab.disks[0].image());
}

#[test]
fn a_shutdown_ends_every_job_and_gives_its_bitmap_back() {
    let lab = lab();
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "a" }));
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    lab.disks[0].dirty([1], 2);
    let modes = json!({ "sync": "incremental", "bitmap": "a", "speed": 1 });
    start(&lab, "running", "t", modes);
    let modes = json!({ "sync": "incremental", "bitmap": "b", "auto-finalize": false, "auto-dismiss": false });
    start(&lab, "pending", "u", modes);
    lab.state("pending", "pending");
    lab.disks[0].dirty([2], 2);
    lab.control.shutdown();
    for bitmap in ["a", "b"] {
        assert_eq!(lab.disks[0].dirty_clusters(bitmap), [1, 2]);
    }
    assert!(lab.disks[0].bitmaps().iter().all(|(.., busy)| !busy));
    assert_eq!(lab.jobs()[0]["status"], "concluded");
    let refused = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full" });
    assert_eq!(lab.err("blockdev-backup", refused), "The daemon is shutting down");
    // The gates are gone: nobody holds a write any more.
    lab.disks[0].dirty(0..64, 3);
}

#[test]
fn a_job_without_end_brings_the_old_data_of_what_is_overwritten() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "sync": "none" }));
    lab.disks[0].dirty([3, 9], 2);
    lab.disks[0].dirty([9], 3);
    let shown = lab.ok("query-block-jobs", json!({}));
    assert_eq!((&shown[0]["status"], &shown[0]["len"]), (&json!("running"), &json!(4 * MIB)));
    lab.ok("block-job-cancel", json!({ "device": "j" }));
    assert_eq!(
        lab.told_until("j:null"),
        ["j:created", "j:running", "j:aborting", "BLOCK_JOB_CANCELLED j", "j:concluded", "j:null"]
    );
    let mut expected = vec![0; 4 * MIB as usize];
    for cluster in [3, 9] {
        expected[(cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize].fill(1);
    }
    assert_same(&std::fs::read(lab.path("t.raw")).unwrap(), &expected);
}

#[test]
fn a_job_without_end_can_be_paused_and_ended_by_force() {
    let lab = lab();
    start(&lab, "j", "t", json!({ "sync": "none" }));
    lab.ok("job-pause", json!({ "id": "j" }));
    lab.disks[0].dirty(0..8, 2);
    lab.ok("block-job-cancel", json!({ "device": "j", "force": true }));
    lab.event("BLOCK_JOB_CANCELLED");
    lab.state("j", "null");
    lab.disks[0].dirty(8..16, 2);
}

#[test]
fn a_job_whose_scratch_is_full_fails_and_the_guest_goes_on() {
    let lab = Lab::with_scratch(&[4 * MIB], 2 * CLUSTER);
    lab.disks[0].dirty(0..64, 1);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    // Three runs: one is copied at once, the others wait for the speed, and are more than scratch can take.
    lab.disks[0].dirty((0..5).chain(10..15).chain(20..25), 2);
    lab.raw_target("t", 4 * MIB);
    start(&lab, "j", "t", json!({ "sync": "incremental", "bitmap": "b", "speed": 1 }));
    lab.disks[0].dirty(0..64, 3);
    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    assert_eq!(
        lab.event("BLOCK_JOB_COMPLETED")["error"],
        format!("the point in time is broken: scratch is full: its limit of {} bytes is reached", 2 * CLUSTER)
    );
    lab.state("j", "null");
    assert_eq!(lab.disks[0].dirty_clusters("b").len(), 64);
    assert!(lab.disks[0].image().iter().all(|byte| *byte == 3), "every write of the guest got through");
}
