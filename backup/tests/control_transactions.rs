//! The promise: a transaction happens at one instant on all disks, or not at all; the jobs of a grouped one succeed or fail
//! together.

mod control_common;

use control_common::*;
use serde_json::{Value, json};
use std::sync::atomic::Ordering;

fn action(kind: &str, data: Value) -> Value {
    json!({ "type": kind, "data": data })
}

fn bitmap(verb: &str, node: &str, name: &str) -> Value {
    action(&format!("block-dirty-bitmap-{verb}"), json!({ "node": node, "name": name }))
}

fn backup(id: &str, device: &str, target: &str, more: Value) -> Value {
    let mut data = json!({ "job-id": id, "device": device, "target": target, "sync": "full" });
    for (name, value) in more.as_object().unwrap() {
        data[name] = value.clone();
    }
    action("blockdev-backup", data)
}

/// Two disks with bitmaps `b`, some of it dirty, and targets t0, t1.
fn lab() -> Lab {
    let lab = Lab::new(2);
    for (i, disk) in lab.disks.iter().enumerate() {
        disk.dirty(0..64, 1);
        lab.ok("block-dirty-bitmap-add", json!({ "node": format!("d{i}"), "name": "b" }));
        disk.dirty([1, 2, 3], 2);
        lab.raw_target(&format!("t{i}"), 4 * MIB);
    }
    lab
}

#[test]
fn an_abort_in_any_place_undoes_everything() {
    let lab = lab();
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "off", "disabled": true }));
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d1", "name": "off", "granularity": 512, "disabled": true }));
    let all = [
        bitmap("add", "d0", "new"),
        action("block-dirty-bitmap-merge", json!({ "node": "d0", "target": "new", "bitmaps": ["b"] })),
        bitmap("clear", "d0", "b"),
        bitmap("enable", "d0", "off"),
        bitmap("disable", "d1", "b"),
        bitmap("remove", "d1", "off"),
        backup("j0", "d0", "t0", json!({ "bitmap": "b", "bitmap-mode": "always" })),
        action(
            "drive-backup",
            json!({ "job-id": "j1", "device": "d1", "target": lab.path("x.qcow2"), "format": "qcow2", "sync": "full" }),
        ),
        bitmap("add", "d1", "new"),
    ];
    let before: Vec<_> = lab.disks.iter().map(Disk::bitmaps).collect();
    for place in 0..=all.len() {
        let mut actions = all.to_vec();
        actions.insert(place, action("abort", json!({})));
        let text = lab.err("transaction", json!({ "actions": actions }));
        assert_eq!(text, "Transaction aborted using Abort action");
        assert_eq!(lab.disks.iter().map(Disk::bitmaps).collect::<Vec<_>>(), before, "abort in place {place}");
        assert_eq!(lab.jobs(), json!([]));
        assert_eq!(lab.told(), [""; 0]);
        assert!(!lab.dir.path().join("x.qcow2").exists());
    }
    // The very same without the abort is fine, and each action saw what those before it did.
    lab.ok("transaction", json!({ "actions": all }));
    lab.state("j0", "null");
    assert_eq!(lab.disks[0].dirty_clusters("new"), [1, 2, 3]);
    lab.disks[0].dirty([7], 3);
    assert_eq!(lab.disks[0].dirty_clusters("off"), [7]);
    assert_eq!(lab.disks[0].dirty_clusters("b"), [7]);
    lab.disks[1].dirty([7], 3);
    assert_eq!(lab.disks[1].dirty_clusters("b"), [1, 2, 3]);
}

#[test]
fn empty_and_misread_transactions() {
    let lab = lab();
    lab.ok("transaction", json!({ "actions": [] }));
    lab.ok("transaction", json!({ "actions": [], "properties": { "completion-mode": "grouped" } }));
    let cases = [
        (json!({}), "Parameter 'actions' is missing"),
        (json!({ "actions": [{ "type": "zz", "data": {} }] }), "Parameter 'type' does not accept value 'zz'"),
        (json!({ "actions": [{ "type": "abort" }] }), "Parameter 'actions[0].data' is missing"),
        (json!({ "actions": [{ "data": {} }] }), "Parameter 'actions[0].type' is missing"),
        (json!({ "actions": [action("abort", json!({ "x": 1 }))] }), "Parameter 'actions[0].data.x' is unexpected"),
        (json!({ "actions": [{ "type": "abort", "data": {}, "y": 1 }] }), "Parameter 'actions[0].y' is unexpected"),
        (
            json!({ "actions": [bitmap("clear", "d0", "b"), action("block-dirty-bitmap-add", json!({ "node": "d0" }))] }),
            "Parameter 'actions[1].data.name' is missing",
        ),
        (
            json!({ "actions": [], "properties": { "completion-mode": "zz" } }),
            "Parameter 'completion-mode' does not accept value 'zz'",
        ),
        (json!({ "actions": [], "properties": { "zz": 1 } }), "Parameter 'properties.zz' is unexpected"),
        (
            json!({ "actions": [bitmap("add", "d0", "x")], "properties": { "completion-mode": "grouped" } }),
            "Action 'block-dirty-bitmap-add' does not support transaction property completion-mode = grouped",
        ),
        (
            json!({ "actions": [action("abort", json!({}))], "properties": { "completion-mode": "grouped" } }),
            "Action 'abort' does not support transaction property completion-mode = grouped",
        ),
    ];
    let before: Vec<_> = lab.disks.iter().map(Disk::bitmaps).collect();
    for (arguments, text) in cases {
        assert_eq!(lab.err("transaction", arguments), text);
        assert_eq!(lab.disks.iter().map(Disk::bitmaps).collect::<Vec<_>>(), before);
    }
}

#[test]
fn one_target_or_one_bitmap_cannot_serve_two_jobs_of_a_transaction() {
    let lab = lab();
    let cases = [
        (
            [backup("a", "d0", "t0", json!({})), backup("b", "d1", "t0", json!({}))],
            "Node 't0' is busy: block device is in use by block job: backup",
        ),
        (
            [
                backup("a", "d0", "t0", json!({ "sync": "incremental", "bitmap": "b" })),
                backup("b", "d0", "t1", json!({ "sync": "incremental", "bitmap": "b" })),
            ],
            "Bitmap 'b' is currently in use by another operation and cannot be used",
        ),
        ([backup("a", "d0", "t0", json!({})), backup("a", "d1", "t1", json!({}))], "Job ID 'a' already in use"),
        (
            [backup("a", "d0", "t0", json!({ "bitmap": "b", "bitmap-mode": "always" })), bitmap("remove", "d0", "b")],
            "Bitmap 'b' is currently in use by another operation and cannot be used",
        ),
    ];
    let before: Vec<_> = lab.disks.iter().map(Disk::bitmaps).collect();
    for (actions, text) in cases {
        assert_eq!(lab.err("transaction", json!({ "actions": actions })), text);
        assert_eq!(lab.disks.iter().map(Disk::bitmaps).collect::<Vec<_>>(), before);
        assert_eq!(lab.jobs(), json!([]));
    }
}

/// A group of two backups, `j0` of d0 and `j1` of d1, both with their bitmaps.
fn group(lab: &Lab, more: [Value; 2]) {
    let [mut more0, mut more1] = more;
    for more in [&mut more0, &mut more1] {
        more["sync"] = json!("incremental");
        more["bitmap"] = json!("b");
    }
    let actions = [backup("j0", "d0", "t0", more0), backup("j1", "d1", "t1", more1)];
    lab.ok("transaction", json!({ "actions": actions, "properties": { "completion-mode": "grouped" } }));
}

#[test]
fn a_group_succeeds_together() {
    let lab = lab();
    group(&lab, [json!({}), json!({})]);
    let told = lab.told_until("j0:null");
    assert_eq!(told[..4], ["j0:created", "j1:created", "j1:running", "j0:running"]);
    let mut waiting = told[4..6].to_vec();
    waiting.sort();
    assert_eq!(waiting, ["j0:waiting", "j1:waiting"]);
    assert_eq!(
        told[6..],
        [
            "j1:pending",
            "j0:pending",
            "BLOCK_JOB_COMPLETED j1",
            "j1:concluded",
            "j1:null",
            "BLOCK_JOB_COMPLETED j0",
            "j0:concluded",
            "j0:null",
        ]
    );
    for disk in &lab.disks {
        assert_eq!(disk.dirty_clusters("b"), [0_u64; 0]);
    }
}

#[test]
fn a_failure_takes_the_group_along_and_restores_every_bitmap() {
    let lab = lab();
    // The first run of clusters goes at once, the second has to wait for the speed.
    lab.disks[0].dirty([30], 2);
    group(&lab, [json!({ "speed": 1 }), json!({})]);
    lab.told_until("j1:waiting");
    lab.disks[0].dirty([9], 5);
    lab.disks[1].dirty([9], 5);
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    lab.ok("block-job-set-speed", json!({ "device": "j0", "speed": 0 }));
    let told = lab.told_until("j0:null");
    assert_eq!(
        told,
        [
            "BLOCK_JOB_ERROR j0",
            "j0:aborting",
            "j1:aborting",
            "BLOCK_JOB_CANCELLED j1",
            "j1:concluded",
            "j1:null",
            "BLOCK_JOB_COMPLETED j0",
            "j0:concluded",
            "j0:null",
        ]
    );
    assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2, 3, 9, 30]);
    assert_eq!(lab.disks[1].dirty_clusters("b"), [1, 2, 3, 9]);
}

#[test]
fn a_failure_stops_a_sibling_that_is_still_at_work() {
    let lab = lab();
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    group(&lab, [json!({}), json!({ "speed": 1 })]);
    let told = lab.told_until("j0:null");
    assert!(told.contains(&"BLOCK_JOB_CANCELLED j1".to_owned()), "{told:?}");
    assert!(told.contains(&"BLOCK_JOB_COMPLETED j0".to_owned()), "{told:?}");
    for disk in &lab.disks {
        assert_eq!(disk.dirty_clusters("b"), [1, 2, 3]);
    }
}

#[test]
fn cancelling_one_cancels_the_group_even_where_all_was_copied() {
    let lab = lab();
    group(&lab, [json!({ "auto-finalize": false }), json!({ "auto-finalize": false })]);
    lab.told_until("BLOCK_JOB_PENDING j0");
    lab.ok("job-cancel", json!({ "id": "j1" }));
    assert_eq!(
        lab.told(),
        [
            "j1:aborting",
            "BLOCK_JOB_CANCELLED j1",
            "j1:concluded",
            "j1:null",
            "j0:aborting",
            "BLOCK_JOB_CANCELLED j0",
            "j0:concluded",
            "j0:null",
        ]
    );
    for disk in &lab.disks {
        assert_eq!(disk.dirty_clusters("b"), [1, 2, 3]);
    }
}

#[test]
fn finalizing_one_finalizes_the_group() {
    let lab = lab();
    // One of them would have gone on by itself.
    group(&lab, [json!({ "auto-finalize": false }), json!({})]);
    let told = lab.told_until("BLOCK_JOB_PENDING j0");
    assert_eq!(told[6..], ["j1:pending", "j0:pending", "BLOCK_JOB_PENDING j0"]);
    lab.ok("job-finalize", json!({ "id": "j1" }));
    assert_eq!(
        lab.told(),
        ["BLOCK_JOB_COMPLETED j1", "j1:concluded", "j1:null", "BLOCK_JOB_COMPLETED j0", "j0:concluded", "j0:null",]
    );
    for disk in &lab.disks {
        assert_eq!(disk.dirty_clusters("b"), [0_u64; 0]);
    }
}

#[test]
fn individual_jobs_of_a_transaction_end_alone() {
    let lab = lab();
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    let incremental = || json!({ "sync": "incremental", "bitmap": "b" });
    let actions = [backup("j0", "d0", "t0", incremental()), backup("j1", "d1", "t1", incremental())];
    lab.ok("transaction", json!({ "actions": actions }));
    let mut ends = [lab.event("BLOCK_JOB_COMPLETED"), lab.event("BLOCK_JOB_COMPLETED")];
    ends.sort_by_key(|end| end["device"].to_string());
    assert_eq!(ends[0]["error"], "Input/output error");
    assert_eq!(ends[1]["error"], Value::Null);
    assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2, 3]);
    assert_eq!(lab.disks[1].dirty_clusters("b"), [0_u64; 0]);
}

#[test]
fn bitmaps_are_merged_across_granularities_and_disks_of_one_size() {
    let lab = lab();
    lab.disks[1].dirty([30], 2);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "fine", "granularity": "512" }));
    let sources = json!(["b", { "node": "d1", "name": "b" }, "fine"]);
    lab.ok("block-dirty-bitmap-merge", json!({ "node": "d0", "target": "fine", "bitmaps": sources }));
    assert_eq!(lab.disks[0].dirty_clusters("fine"), [1, 2, 3, 30]);
    assert_eq!(lab.disks[1].dirty_clusters("b"), [1, 2, 3, 30]);
    // The other disk's later writes are its own.
    lab.disks[1].dirty([50], 2);
    lab.disks[0].dirty([60], 2);
    assert_eq!(lab.disks[0].dirty_clusters("fine"), [1, 2, 3, 30, 60]);
    let before = lab.disks[0].bitmaps();
    lab.ok("block-dirty-bitmap-merge", json!({ "node": "d0", "target": "b", "bitmaps": [] }));
    lab.ok("block-dirty-bitmap-merge", json!({ "node": "d0", "target": "b", "bitmaps": ["b"] }));
    assert_eq!(lab.disks[0].bitmaps(), before);
}
