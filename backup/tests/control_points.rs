//! The promise: what is wrong with an order about points in time is refused in clear words and changes nothing; a point is there
//! for as long as somebody reads it; and whatever ends in between, nothing is left over.

mod control_common;

use blkmark_backup::qmp::Commands;
use control_common::*;
use serde_json::{Value, json};

fn add(node: &str, name: &str) -> Value {
    json!({ "node": node, "name": name })
}

fn names(lab: &Lab) -> Vec<String> {
    let nodes = lab.ok("query-named-block-nodes", json!({}));
    let names = nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned());
    names.collect()
}

fn transaction(actions: &[(&str, Value)]) -> Value {
    let actions = actions.iter().map(|(kind, data)| json!({ "type": kind, "data": data }));
    json!({ "actions": actions.collect::<Vec<_>>() })
}

#[test]
fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let lab = Lab::new(2);
    lab.raw_target("t", 4 * MIB);
    lab.ok("point-add", add("d0", "p"));
    let serve = json!({ "type": "unix", "data": { "path": lab.path("nbd") } });
    lab.ok("nbd-server-start", json!({ "addr": serve }));
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "on" }));
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "off", "disabled": true }));
    let before = names(&lab);
    let backup = |more: Value| {
        let mut arguments = json!({ "device": "p", "target": "t", "sync": "full" });
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        arguments
    };
    let as_bitmap =
        |sync: &str, name: &str, mode: &str| backup(json!({ "sync": sync, "bitmap": name, "bitmap-mode": mode }));
    let point = "'p' is a point in time: of it, all is copied (sync 'full'), or what a bitmap holds that stands still \
                 (sync 'bitmap' with bitmap-mode 'never')";
    for (command, arguments, text) in [
        ("point-add", add("nope", "q"), "Cannot find device='nope' nor node-name='nope'"),
        ("point-add", add("t", "q"), "Node 't' is a target: bitmaps and backups are of served disks"),
        ("point-add", add("p", "q"), "Node 'p' is a point in time: bitmaps and points are of served disks"),
        ("point-add", add("d0", "p"), "Duplicate nodes with node-name='p'"),
        ("point-add", add("d0", "d1"), "Duplicate nodes with node-name='d1'"),
        ("point-add", add("d0", "t"), "Duplicate nodes with node-name='t'"),
        ("point-add", add("d0", ""), "Invalid node-name: ''"),
        ("point-add", add("d0", "9"), "Invalid node-name: '9'"),
        ("point-add", add("d0", &"x".repeat(32)), "Node name too long"),
        ("point-remove", json!({ "name": "nope" }), "Failed to find node with node-name='nope'"),
        ("point-remove", json!({ "name": "d0" }), "Node 'd0' is no point in time"),
        ("point-remove", json!({ "name": "t" }), "Node 't' is no point in time"),
        ("blockdev-del", json!({ "node-name": "p" }), "Node 'p' is a point in time: point-remove drops it"),
        (
            "block-dirty-bitmap-add",
            add("p", "b"),
            "Node 'p' is a point in time: bitmaps and points are of served disks",
        ),
        ("block-dirty-bitmap-clear", add("p", "on"), "Node 'p' is a point in time: bitmaps are of served disks"),
        (
            "block_resize",
            json!({ "node-name": "d0", "size": 8 * MIB }),
            "Node 'd0' is busy: 'p' is a point in time of it",
        ),
        (
            "blockdev-add",
            json!({ "driver": "raw", "node-name": "q", "file": "p" }),
            "Node 'p' is a point in time: nothing stands on it",
        ),
        (
            "blockdev-add",
            json!({ "driver": "file", "node-name": "p", "filename": lab.path("t.raw") }),
            "Duplicate nodes with node-name='p'",
        ),
        (
            "blockdev-backup",
            json!({ "device": "d0", "target": "p", "sync": "full" }),
            "Node 'p' is a point in time: nothing is written to it",
        ),
        (
            "blockdev-backup",
            backup(json!({ "sync": "none" })),
            "sync mode 'none' is of no use: a point in time does not change",
        ),
        ("blockdev-backup", as_bitmap("incremental", "off", "on-success"), point),
        ("blockdev-backup", as_bitmap("bitmap", "off", "always"), point),
        ("blockdev-backup", as_bitmap("full", "off", "always"), point),
        (
            "blockdev-backup",
            as_bitmap("bitmap", "on", "never"),
            "Bitmap 'on' changes with every write: freeze it, or take a copy that is disabled",
        ),
        ("blockdev-backup", as_bitmap("bitmap", "z", "never"), "Dirty bitmap 'z' not found"),
        (
            "block-export-add",
            json!({ "type": "nbd", "id": "e", "node-name": "p", "writable": true }),
            "Cannot export read-only node as writable",
        ),
        (
            "block-export-add",
            json!({ "type": "nbd", "id": "e", "node-name": "p", "bitmaps": ["on"] }),
            "Enabled bitmap 'on' incompatible with readonly export",
        ),
        (
            "block-export-add",
            json!({ "type": "nbd", "id": "e", "node-name": "p", "bitmaps": ["z"] }),
            "Bitmap 'z' is not found",
        ),
    ] {
        assert_eq!(lab.err(command, arguments), text);
    }
    assert_eq!(names(&lab), before);
    assert_eq!(lab.jobs(), json!([]));
    // Nobody reads it, whatever was refused.
    lab.ok("point-remove", json!({ "name": "p" }));
    let resize = lab.err("block_resize", json!({ "node-name": "d0", "size": 4 * MIB }));
    assert_eq!(resize, "Failed to resize 'd0': unsupported", "only this test's disk is in the way");
}

#[test]
fn a_transaction_makes_all_its_points_or_none() {
    let lab = Lab::new(2);
    let two = [("point-add", add("d0", "p")), ("point-add", add("d1", "q"))];
    let abort = [two[0].clone(), two[1].clone(), ("abort", json!({}))];
    assert_eq!(lab.err("transaction", transaction(&abort)), "Transaction aborted using Abort action");
    let twice = [two[0].clone(), ("point-add", add("d1", "p"))];
    assert_eq!(lab.err("transaction", transaction(&twice)), "Duplicate nodes with node-name='p'");
    assert_eq!(names(&lab), ["d0", "d1"]);
    lab.ok("transaction", transaction(&two));
    assert_eq!(names(&lab), ["d0", "d1", "p", "q"]);
    // Others' failures spare what was to be removed.
    let remove = |name: &str| ("point-remove", json!({ "name": name }));
    assert_eq!(lab.err("transaction", transaction(&[remove("p"), remove("p")])), "Node 'p' is being removed");
    assert!(lab.err("transaction", transaction(&[remove("p"), remove("nope")])).starts_with("Failed to find"));
    // One gives way to another of the same name at the same instant; with a file that is made in between.
    lab.disks[0].dirty([0], 1);
    let target = lab.path("full.raw");
    let backup = json!({ "device": "d1", "job-id": "j", "target": target, "sync": "full" });
    let again = [remove("p"), ("point-add", add("d0", "p")), ("drive-backup", backup), remove("q")];
    lab.ok("transaction", transaction(&again));
    lab.state("j", "null");
    assert_eq!(names(&lab), ["d0", "d1", "p"]);
    lab.disks[0].dirty([0], 2);
    lab.raw_target("t", 4 * MIB);
    lab.ok("blockdev-backup", json!({ "device": "p", "job-id": "k", "target": "t", "sync": "full" }));
    lab.state("k", "null");
    assert!(std::fs::read(lab.path("t.raw")).unwrap()[..CLUSTER as usize].iter().all(|byte| *byte == 1));
    let grouped = json!({ "completion-mode": "grouped" });
    let mut with_point = transaction(&[("point-add", add("d1", "q"))]);
    with_point["properties"] = grouped;
    assert_eq!(
        lab.err("transaction", with_point),
        "Action 'point-add' does not support transaction property completion-mode = grouped"
    );
}

#[test]
fn who_reads_a_point_keeps_it_and_its_scratch_goes_with_it() {
    let lab = Lab::new(1);
    lab.disks[0].dirty(0..64, 1);
    lab.ok("point-add", add("d0", "p"));
    let serve = json!({ "type": "unix", "data": { "path": lab.path("nbd") } });
    lab.ok("nbd-server-start", json!({ "addr": serve }));
    lab.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "p" }));
    assert_eq!(lab.ok("query-block-exports", json!({}))[0]["node-name"], "p");
    lab.disks[0].dirty([1, 2, 3], 2);
    let shown = lab.ok("query-named-block-nodes", json!({}))[1]["point"].clone();
    let told = json!({
        "node": "d0", "state": "whole", "overwritten": 3 * CLUSTER, "scratch": 3 * CLUSTER, "readers": 1,
    });
    assert_eq!(shown, told);
    assert_eq!(lab.err("point-remove", json!({ "name": "p" })), "Node 'p' is busy: it is exported as 'e'");
    let both = transaction(&[("point-add", add("d0", "q")), ("point-remove", json!({ "name": "p" }))]);
    assert_eq!(lab.err("transaction", both), "Node 'p' is busy: it is exported as 'e'");
    assert_eq!(names(&lab), ["d0", "p"]);
    lab.ok("block-export-del", json!({ "id": "e" }));
    lab.ok("point-remove", json!({ "name": "p" }));
    assert_eq!(lab.disks[0].node.load(), Default::default());
    // The guest meets no gate any more.
    lab.disks[0].dirty(0..64, 3);
    assert_eq!(lab.disks[0].node.load(), Default::default());
}

/// A job that failed on a point and is kept can be tried again: the same image.
#[test]
fn a_failed_copy_of_a_point_is_tried_again() {
    let lab = Lab::new(1);
    lab.disks[0].dirty(0..64, 1);
    lab.ok("point-add", add("d0", "p"));
    lab.raw_target("t", 4 * MIB);
    lab.disks[0].source.broken.store(true, std::sync::atomic::Ordering::SeqCst);
    let job = json!({ "device": "p", "job-id": "j", "target": "t", "sync": "full", "on-failure": "keep" });
    lab.ok("blockdev-backup", job);
    lab.state("j", "concluded");
    lab.disks[0].source.broken.store(false, std::sync::atomic::Ordering::SeqCst);
    lab.disks[0].dirty(0..64, 2);
    assert!(lab.err("point-remove", json!({ "name": "p" })).contains("busy"));
    lab.ok("job-retry", json!({ "id": "j" }));
    lab.state("j", "null");
    assert!(std::fs::read(lab.path("t.raw")).unwrap().iter().all(|byte| *byte == 1));
    lab.ok("point-remove", json!({ "name": "p" }));
    assert_eq!(lab.disks[0].node.load(), Default::default());
}

#[test]
fn the_end_of_the_daemon_ends_points_and_their_readers() {
    let lab = Lab::new(2);
    lab.disks[0].dirty(0..64, 1);
    let serve = json!({ "type": "unix", "data": { "path": lab.path("nbd") } });
    lab.ok("nbd-server-start", json!({ "addr": serve }));
    for (disk, name) in [("d0", "p"), ("d0", "q"), ("d1", "r")] {
        lab.ok("point-add", add(disk, name));
    }
    lab.ok("block-export-add", json!({ "type": "nbd", "id": "e", "node-name": "p" }));
    lab.raw_target("t", 4 * MIB);
    lab.ok("blockdev-backup", json!({ "device": "q", "job-id": "j", "target": "t", "sync": "full", "speed": 1 }));
    lab.disks[0].dirty(0..8, 2);
    lab.control.shutdown();
    assert_eq!(names(&lab), ["d0", "d1", "t"]);
    assert_eq!(lab.disks[0].node.load(), Default::default());
    lab.disks[0].dirty(0..64, 3);
    assert_eq!(lab.disks[0].node.load(), Default::default());
    assert_eq!(lab.err("point-add", add("d0", "p")), "The daemon is shutting down");
    assert!(lab.control.execute("query-jobs", serde_json::Map::new()).is_some());
}
