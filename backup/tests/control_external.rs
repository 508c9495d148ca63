//! The promise: software outside can freeze a bitmap, read its bits in pieces, and end the freeze, whoever of it is still alive; and
//! it can name points in time and ask what was written between them. What is wrong with an order changes nothing.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

fn b() -> Value {
    json!({ "node": "d0", "name": "b" })
}

fn transaction(actions: &[(&str, Value)]) -> Value {
    let actions = actions.iter().map(|(kind, data)| json!({ "type": kind, "data": data }));
    json!({ "actions": actions.collect::<Vec<_>>() })
}

fn with(mut base: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        base[name] = value.clone();
    }
    base
}

/// All pages of a query, as clusters.
fn clusters(lab: &Lab, command: &str, arguments: Value, limit: u64) -> Vec<u64> {
    let (mut clusters, mut offset) = (Vec::new(), json!(0));
    loop {
        let page = lab.ok(command, with(arguments.clone(), json!({ "offset": offset, "limit": limit })));
        let regions = page["dirty-regions"].as_array().unwrap();
        assert!(regions.len() as u64 <= limit);
        for region in regions {
            let (start, count) = (region["start"].as_u64().unwrap(), region["count"].as_u64().unwrap());
            clusters.extend(start / CLUSTER..(start + count).div_ceil(CLUSTER));
        }
        match page.get("next-offset") {
            Some(next) => offset = next.clone(),
            None => return clusters,
        }
    }
}

#[test]
fn a_client_freezes_reads_and_ends_and_another_may_go_on() {
    let lab = Lab::new(1);
    lab.ok("block-dirty-bitmap-add", b());
    lab.disks[0].dirty([1, 2, 40], 2);
    lab.ok("block-dirty-bitmap-create-successor", b());
    lab.disks[0].dirty([7], 3);
    let shown = lab.ok("query-named-block-nodes", json!({}))[0]["dirty-bitmaps"][0].clone();
    assert_eq!((&shown["frozen"], &shown["frozen-by"], &shown["busy"]), (&json!(true), &json!("client"), &json!(true)));
    assert_eq!(shown["count"], 3 * CLUSTER);
    for limit in [1, 2, 3, 100] {
        assert_eq!(clusters(&lab, "query-block-dirty-bitmap", b(), limit), [1, 2, 40]);
    }
    let page = lab.ok("query-block-dirty-bitmap", with(b(), json!({ "offset": CLUSTER + 512, "limit": 1 })));
    let told = json!({
        "node": "d0", "name": "b", "recording": true, "busy": true, "freeze-id": shown["freeze-id"],
        "size": 4 * MIB, "granularity": CLUSTER, "count": 3 * CLUSTER,
        "dirty-regions": [{ "start": CLUSTER + 512, "count": 2 * CLUSTER - 512 }], "next-offset": 40 * CLUSTER,
    });
    assert_eq!(page, told);
    // Whoever comes to the socket may end it; twice is once too often.
    let stranger = "00000000-0000-4000-8000-000000000000";
    let freeze = shown["freeze-id"].as_str().unwrap();
    for command in ["block-dirty-bitmap-abdicate", "block-dirty-bitmap-reclaim"] {
        assert_eq!(
            lab.err(command, with(b(), json!({ "freeze-id": stranger }))),
            format!("Bitmap 'b' is in another freeze: {freeze}")
        );
        assert_eq!(
            lab.err(command, with(b(), json!({ "freeze-id": "nonsense" }))),
            "Parameter 'freeze-id' expects a UUID, not 'nonsense'"
        );
    }
    lab.ok("block-dirty-bitmap-abdicate", with(b(), json!({ "freeze-id": freeze })));
    let text = "Cannot relinquish control if there's no successor present";
    assert_eq!(lab.err("block-dirty-bitmap-abdicate", with(b(), json!({ "freeze-id": freeze }))), text);
    assert_eq!(lab.err("block-dirty-bitmap-reclaim", b()), "Cannot reclaim a successor when none is present");
    assert_eq!(lab.disks[0].dirty_clusters("b"), [7]);
    // The other end.
    lab.ok("block-dirty-bitmap-create-successor", b());
    lab.disks[0].dirty([9], 3);
    lab.ok("block-dirty-bitmap-reclaim", b());
    assert_eq!(lab.disks[0].dirty_clusters("b"), [7, 9]);
    // A bitmap that records is read as it stands.
    assert_eq!(clusters(&lab, "query-block-dirty-bitmap", b(), 1), [7, 9]);
    for (more, text) in [
        (json!({ "limit": 0 }), "Parameter 'limit' expects 1 to 16384 regions"),
        (json!({ "limit": 16385 }), "Parameter 'limit' expects 1 to 16384 regions"),
        (json!({ "offset": 4 * MIB + 1 }), "Parameter 'offset' is beyond the end of the disk, which has 4194304 bytes"),
        (json!({ "name": "z" }), "Dirty bitmap 'z' not found"),
        (json!({ "node": "z" }), "Node 'z' not found"),
    ] {
        assert_eq!(lab.err("query-block-dirty-bitmap", with(b(), more)), text);
    }
    assert_eq!(lab.ok("query-block-dirty-bitmap", with(b(), json!({ "offset": 4 * MIB })))["dirty-regions"], json!([]));
}

#[test]
fn what_a_job_froze_is_not_a_clients_and_the_reverse() {
    let lab = dirty_lab();
    let backup = |id: &str, more: Value| {
        with(json!({ "job-id": id, "device": "d0", "target": "t", "sync": "incremental", "bitmap": "b" }), more)
    };
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    lab.ok("blockdev-backup", backup("j", json!({ "auto-finalize": false })));
    lab.state("j", "pending");
    let before = lab.disks[0].bitmaps();
    for command in ["create-successor", "abdicate", "reclaim", "clear", "remove", "disable"] {
        assert_eq!(lab.err(&format!("block-dirty-bitmap-{command}"), b()), busy, "{command}");
    }
    let freeze = lab.ok("query-block-dirty-bitmap", b())["freeze-id"].clone();
    assert_eq!(lab.err("block-dirty-bitmap-reclaim", with(b(), json!({ "freeze-id": freeze }))), busy);
    assert_eq!(lab.disks[0].bitmaps(), before);
    lab.ok("job-cancel", json!({ "id": "j" }));
    lab.state("j", "null");
    lab.ok("block-dirty-bitmap-create-successor", b());
    let before = lab.disks[0].bitmaps();
    assert_eq!(lab.err("blockdev-backup", backup("j", json!({}))), busy);
    for command in ["create-successor", "clear", "remove", "enable", "disable"] {
        assert_eq!(lab.err(&format!("block-dirty-bitmap-{command}"), b()), busy, "{command}");
    }
    // In a transaction the whole of it fails, and the freeze stands.
    let actions = [("block-dirty-bitmap-abdicate", b()), ("abort", json!({}))];
    assert_eq!(lab.err("transaction", transaction(&actions)), "Transaction aborted using Abort action");
    let actions = [("block-dirty-bitmap-abdicate", b()), ("block-dirty-bitmap-abdicate", b())];
    assert!(lab.err("transaction", transaction(&actions)).starts_with("Cannot relinquish control"));
    assert_eq!(lab.disks[0].bitmaps(), before);
    // The frozen bits are exported, and copied from a point.
    lab.ok("point-add", json!({ "node": "d0", "name": "p" }));
    let copy = json!({ "device": "p", "sync": "bitmap", "bitmap-mode": "never" });
    lab.ok("blockdev-backup", backup("k", copy));
    lab.state("k", "null");
    let image = std::fs::read(lab.path("t.raw")).unwrap();
    let copied = (0..64).filter(|cluster| image[(cluster * CLUSTER) as usize] != 0).collect::<Vec<_>>();
    assert_eq!(copied, [1, 2, 40]);
    lab.ok("block-dirty-bitmap-abdicate", b());
    assert_eq!(lab.disks[0].dirty_clusters("b"), [0; 0]);
}

#[test]
fn changes_between_checkpoints_are_asked_in_pieces_and_survive_deletions() {
    let lab = Lab::new(2);
    let create = |name: &str| ("checkpoint-create", json!({ "name": name }));
    lab.ok("checkpoint-create", json!({ "name": "c1" }));
    lab.disks[0].dirty([1, 5], 1);
    lab.disks[1].dirty([60], 1);
    lab.ok("transaction", transaction(&[create("c2"), ("point-add", json!({ "node": "d0", "name": "p" }))]));
    lab.disks[0].dirty([5, 6, 9], 2);
    lab.ok("checkpoint-create", json!({ "name": "c3", "nodes": ["d0"], "granularity": 4096 }));
    lab.disks[0].dirty([20], 2);
    let changes = |from: &str, to: Option<&str>| {
        let mut arguments = json!({ "node": "d0", "from": from });
        if let Some(to) = to {
            arguments["to"] = to.into();
        }
        [1, 1000].map(|limit| clusters(&lab, "query-changes", arguments.clone(), limit))
    };
    let same = |clusters: &[u64]| [clusters.to_vec(), clusters.to_vec()];
    assert_eq!(changes("c1", Some("c2")), same(&[1, 5]));
    assert_eq!(changes("c1", Some("c3")), same(&[1, 5, 6, 9]));
    assert_eq!(changes("c2", Some("c3")), same(&[5, 6, 9]));
    assert_eq!(changes("c3", None), same(&[20]));
    assert_eq!(changes("c1", None), same(&[1, 5, 6, 9, 20]));
    let shown = lab.ok("query-checkpoints", json!({}));
    let names: Vec<_> = shown.as_array().unwrap().iter().map(|c| c["name"].clone()).collect();
    assert_eq!(names, ["c1", "c2", "c3"]);
    let node = |name: &str, granularity: u64| json!({ "node": name, "size": 4 * MIB, "granularity": granularity });
    assert_eq!(shown[0]["nodes"], json!([node("d0", CLUSTER), node("d1", CLUSTER)]));
    assert_eq!(shown[2]["nodes"], json!([node("d0", 4096)]));
    for (command, arguments, text) in [
        ("checkpoint-create", json!({ "name": "c1" }), "Checkpoint already exists: c1"),
        // Also of a disk that does not have it.
        ("checkpoint-create", json!({ "name": "c3", "nodes": ["d1"] }), "Checkpoint already exists: c3"),
        ("checkpoint-create", json!({ "name": "" }), "Checkpoint name cannot be empty"),
        ("checkpoint-create", json!({ "name": "x", "nodes": [] }), "Parameter 'nodes' expects at least one node"),
        ("checkpoint-create", json!({ "name": "x", "nodes": ["d0", "z"] }), "Node 'z' not found"),
        (
            "checkpoint-create",
            json!({ "name": "x", "nodes": ["p"] }),
            "Node 'p' is a point in time: bitmaps are of served disks",
        ),
        ("checkpoint-create", json!({ "name": "x", "nodes": ["d1", "d1"] }), "Checkpoint already exists: x"),
        (
            "checkpoint-create",
            json!({ "name": "x", "granularity": 1000 }),
            "Granularity must be power of 2 and at least 512",
        ),
        ("checkpoint-delete", json!({ "name": "x" }), "Checkpoint 'x' not found"),
        ("query-changes", json!({ "node": "d0", "from": "c2", "to": "c1" }), "Checkpoint 'c1' is not later than 'c2'"),
        ("query-changes", json!({ "node": "d1", "from": "c3" }), "Checkpoint 'c3' not found"),
        ("query-changes", json!({ "node": "z", "from": "c3" }), "Node 'z' not found"),
        ("transaction", transaction(&[create("x"), create("x")]), "Checkpoint already exists: x"),
        ("transaction", transaction(&[create("x"), ("abort", json!({}))]), "Transaction aborted using Abort action"),
    ] {
        assert_eq!(lab.err(command, arguments), text);
    }
    assert_eq!(lab.ok("query-checkpoints", json!({})), shown);
    // One in the middle, then the last, then the first.
    lab.ok("checkpoint-delete", json!({ "name": "c2" }));
    assert_eq!(changes("c1", Some("c3")), same(&[1, 5, 6, 9]));
    assert_eq!(clusters(&lab, "query-changes", json!({ "node": "d1", "from": "c1" }), 5), [60]);
    lab.ok("checkpoint-delete", json!({ "name": "c3" }));
    lab.disks[0].dirty([21], 2);
    assert_eq!(changes("c1", None), same(&[1, 5, 6, 9, 20, 21]));
    lab.ok("transaction", transaction(&[("checkpoint-delete", json!({ "name": "c1" })), create("c1")]));
    assert_eq!(changes("c1", None), same(&[]));
}
