//! The promise: targets are nodes as in QEMU: described in one command or in two, refused in QEMU's words, and never closed
//! or shared while somebody writes to them.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

fn image(lab: &Lab, name: &str, format: &str) -> String {
    let path = lab.path(name);
    qemu_img(&["create", "-q", "-f", format, &path, "4M"]);
    path
}

fn names(lab: &Lab) -> Vec<String> {
    let nodes = lab.ok("query-named-block-nodes", json!({}));
    nodes.as_array().unwrap().iter().map(|node| node["node-name"].as_str().unwrap().to_owned()).collect()
}

fn file(path: &str) -> Value {
    json!({ "driver": "file", "filename": path })
}

/// Backs d0 up to `node`, and compares.
fn back_up(lab: &Lab, node: &str, path: &str, format: &str) {
    lab.ok("blockdev-backup", json!({ "job-id": "j", "device": "d0", "target": node, "sync": "full" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    lab.state("j", "null");
    lab.ok("blockdev-del", json!({ "node-name": node }));
    assert_same(&contents(lab.dir.path(), path, format), &lab.disks[0].image());
}

#[test]
fn a_target_is_described_in_one_command_or_in_two() {
    let lab = Lab::new(1);
    lab.disks[0].dirty([1, 5, 6, 63], 4);
    let (raw, qcow2) = (image(&lab, "a.raw", "raw"), image(&lab, "a.qcow2", "qcow2"));
    for (driver, path) in [("raw", &raw), ("qcow2", &qcow2)] {
        lab.ok("blockdev-add", json!({ "driver": driver, "node-name": "t", "file": file(path) }));
        back_up(&lab, "t", path, driver);
        lab.ok("blockdev-add", json!({
            "driver": driver, "node-name": "t", "file.driver": "file", "file.filename": path, "file.aio": "io_uring",
            "discard": "unmap", "detect-zeroes": "unmap", "cache": { "direct": true, "no-flush": false },
        }));
        back_up(&lab, "t", path, driver);
        lab.ok("blockdev-add", json!({ "driver": "file", "node-name": "below", "filename": path }));
        lab.ok("blockdev-add", json!({ "driver": driver, "node-name": "t", "file": "below" }));
        assert_eq!(names(&lab), ["d0", "below", "t"]);
        assert_eq!(lab.err("blockdev-del", json!({ "node-name": "below" })), "Block device below is in use");
        back_up_over(&lab, path, driver);
    }
    lab.ok("blockdev-add", json!({ "driver": "file", "node-name": "t", "filename": raw }));
    back_up(&lab, "t", &raw, "raw");
    assert_eq!(names(&lab), ["d0"]);
}

/// As `back_up`, with a node beneath that stays, is open again, and can be used once more.
fn back_up_over(lab: &Lab, path: &str, driver: &str) {
    lab.ok("blockdev-backup", json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full" }));
    lab.state("j", "null");
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
    lab.ok("blockdev-add", json!({ "driver": driver, "node-name": "t", "file": "below" }));
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
    lab.ok("blockdev-del", json!({ "node-name": "below" }));
    assert_same(&contents(lab.dir.path(), path, driver), &lab.disks[0].image());
}

#[test]
fn a_misdescribed_node_is_refused_and_opens_nothing() {
    let lab = Lab::new(1);
    let path = image(&lab, "a.raw", "raw");
    lab.raw_target("t", 4 * MIB);
    let gone = lab.path("gone");
    let texts = [
        format!("Could not open '{gone}': No such file or directory"),
        format!("Could not open '{}': Is a directory", lab.dir.path().display()),
        format!("'host_device' driver requires '{path}' to be either a character or block device"),
        format!("Could not open '{path}': Image is not in qcow2 format"),
    ];
    let raw = |more: Value| {
        let mut node = json!({ "driver": "raw", "node-name": "n", "file": file(&path) });
        for (name, value) in more.as_object().unwrap() {
            match value {
                Value::Null => drop(node.as_object_mut().unwrap().remove(name)),
                value => node[name] = value.clone(),
            }
        }
        node
    };
    let cases = [
        (raw(json!({ "driver": "zz" })), "Parameter 'driver' does not accept value 'zz'"),
        (raw(json!({ "driver": null })), "Parameter 'driver' is missing"),
        (raw(json!({ "node-name": null })), "'node-name' must be specified for the root node"),
        (raw(json!({ "node-name": "9x" })), "Invalid node-name: '9x'"),
        (raw(json!({ "node-name": "" })), "Invalid node-name: ''"),
        (raw(json!({ "node-name": "x".repeat(32) })), "Node name too long"),
        (raw(json!({ "node-name": "d0" })), "Duplicate nodes with node-name='d0'"),
        (raw(json!({ "node-name": "t" })), "Duplicate nodes with node-name='t'"),
        (
            raw(json!({ "file": { "driver": "file", "filename": path, "node-name": "n" } })),
            "Duplicate nodes with node-name='n'",
        ),
        (raw(json!({ "file": { "driver": "file", "filename": path, "node-name": "" } })), "Invalid node-name: ''"),
        (raw(json!({ "file": null })), "Parameter 'file' is missing"),
        (raw(json!({ "file": "zz" })), "Cannot find device='zz' nor node-name='zz'"),
        (raw(json!({ "file": "d0" })), "Node 'd0' is busy: it is served to a guest"),
        (raw(json!({ "file": 3 })), "Invalid parameter type for 'file', expected: BlockdevRef"),
        (raw(json!({ "file": { "driver": "file" } })), "Parameter 'file.filename' is missing"),
        (raw(json!({ "file": { "filename": "x" } })), "Parameter 'file.driver' is missing"),
        (
            raw(json!({ "file": { "driver": "file", "filename": 3 } })),
            "Invalid parameter type for 'file.filename', expected: string",
        ),
        (raw(json!({ "cache": { "direct": 3 } })), "Invalid parameter type for 'cache.direct', expected: boolean"),
        (raw(json!({ "discard": "zz" })), "Parameter 'discard' does not accept value 'zz'"),
        (raw(json!({ "read-only": "zz" })), "Invalid parameter type for 'read-only', expected: boolean"),
        (raw(json!({ "bogus": 1 })), "Parameter 'bogus' is unexpected"),
        (raw(json!({ "file": file(&gone) })), &texts[0]),
        (raw(json!({ "file": file(lab.dir.path().to_str().unwrap()) })), &texts[1]),
        (raw(json!({ "file": { "driver": "host_device", "filename": path } })), &texts[2]),
        (raw(json!({ "driver": "qcow2" })), &texts[3]),
        (raw(json!({ "file": file(lab.disks[0].path.to_str().unwrap()) })), "Source and target cannot be the same"),
        (raw(json!({ "file": file(&lab.path("t.raw")) })), "Failed to get \"write\" lock"),
        (raw(json!({ "driver": "nbd" })), "Parameter 'server' is missing"),
        (raw(json!({ "a.b.c.d.e.f.g.h.i.j": 1 })), "Parameter 'a.b.c.d.e.f.g.h.i.j' is unexpected"),
    ];
    for (arguments, text) in cases {
        assert_eq!(lab.err("blockdev-add", arguments.clone()), text, "{arguments}");
        assert_eq!(names(&lab), ["d0", "t"], "{arguments}");
    }
    // None of them kept the file: it can be opened.
    lab.ok("blockdev-add", raw(json!({})));
}

#[test]
fn a_node_in_use_is_not_closed() {
    let lab = Lab::new(1);
    lab.disks[0].dirty(0..64, 1);
    lab.raw_target("t", 4 * MIB);
    lab.ok("blockdev-backup", json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full", "speed": 1 }));
    assert_eq!(
        lab.err("blockdev-del", json!({ "node-name": "t" })),
        "Node 't' is busy: block device is in use by block job: backup"
    );
    assert_eq!(lab.err("blockdev-del", json!({ "node-name": "d0" })), "Node d0 is in use");
    assert_eq!(lab.err("blockdev-del", json!({ "node-name": "zz" })), "Failed to find node with node-name='zz'");
    lab.ok("job-cancel", json!({ "id": "j" }));
    lab.event("BLOCK_JOB_CANCELLED");
    // Told of the end, a client may close the target at once.
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
    qemu_img(&["info", &lab.path("t.raw")]);
}

#[test]
fn an_inner_node_with_a_name_goes_with_its_format() {
    let lab = Lab::new(1);
    let path = image(&lab, "a.qcow2", "qcow2");
    let below = json!({ "driver": "file", "filename": path, "node-name": "proto" });
    lab.ok("blockdev-add", json!({ "driver": "qcow2", "node-name": "t", "file": below }));
    assert_eq!(names(&lab), ["d0", "proto", "t"]);
    assert_eq!(lab.err("blockdev-del", json!({ "node-name": "proto" })), "Node proto is not owned by the monitor");
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
    assert_eq!(names(&lab), ["d0"]);
}

#[test]
fn queries_show_disks_with_their_bitmaps_and_targets() {
    let lab = Lab::new(1);
    lab.ok("block-dirty-bitmap-add", json!({ "device": "d0", "name": "b", "granularity": "32768" }));
    lab.disks[0].dirty([1], 2);
    let shown = json!([{
        "name": "b", "count": 65536, "granularity": 32768, "recording": true, "busy": false, "persistent": false,
        "frozen": false,
    }]);
    let block = lab.ok("query-block", json!({}));
    assert_eq!(block[0]["device"], "d0");
    assert_eq!(block[0]["inserted"]["dirty-bitmaps"], shown);
    assert_eq!(block[0]["inserted"]["image"]["virtual-size"], 4 * MIB);
    lab.raw_target("t", 4 * MIB);
    let nodes = lab.ok("query-named-block-nodes", json!({ "flat": true }));
    assert_eq!(nodes[0]["dirty-bitmaps"], shown);
    assert_eq!((&nodes[1]["node-name"], &nodes[1]["drv"]), (&json!("t"), &json!("raw")));
    let sync = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "dirty-bitmap", "bitmap": "b", "auto-finalize": false });
    lab.ok("blockdev-backup", sync);
    lab.state("j", "pending");
    lab.disks[0].dirty([2], 2);
    let frozen = lab.ok("query-block", json!({}))[0]["inserted"]["dirty-bitmaps"][0].clone();
    assert_eq!((&frozen["busy"], &frozen["frozen"], &frozen["count"]), (&json!(true), &json!(true), &json!(65536)));
    assert!(frozen["freeze-id"].is_string());
    let commands = lab.ok("query-commands", json!({}));
    for command in commands.as_array().unwrap().iter().map(|c| c["name"].as_str().unwrap()) {
        // True to what is served: each is there, and reads its arguments.
        if command != "qmp_capabilities" {
            assert_eq!(lab.err(command, json!({ "bogus": 1 })).matches("Parameter").count(), 1, "{command}");
        }
    }
    let version = lab.ok("query-version", json!({}));
    assert_eq!(version["qemu"], json!({ "major": 10, "minor": 0, "micro": 2 }));
}
