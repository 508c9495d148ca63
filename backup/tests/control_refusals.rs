//! The promise: a command that is refused says why in QEMU's words, and leaves nothing behind: no job, no file, and every
//! bitmap with the count and the hash that it had.

mod control_common;

use control_common::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// Everything that a refused command could have touched.
#[derive(Debug, PartialEq)]
struct World {
    bitmaps: Vec<Vec<Shown>>,
    jobs: Vec<String>,
    nodes: Vec<String>,
    files: BTreeSet<String>,
    events: Vec<String>,
}

impl World {
    fn of(lab: &Lab) -> Self {
        let names = |value: Value, key: &str| {
            value.as_array().unwrap().iter().map(|v| v[key].as_str().unwrap().to_owned()).collect()
        };
        World {
            bitmaps: lab.disks.iter().map(Disk::bitmaps).collect(),
            jobs: names(lab.jobs(), "id"),
            nodes: names(lab.ok("query-named-block-nodes", json!({})), "node-name"),
            files: std::fs::read_dir(lab.dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect(),
            events: lab.told(),
        }
    }
}

/// Two disks: d0 with the bitmaps `b` (free) and `busy` (frozen by job `slow`, which writes to node `used`), d1 with `o`,
/// of another size; target nodes `t` (good), `small`, `ro`, `used`.
fn lab() -> Lab {
    let lab = Lab::sized(&[4 * MIB, 2 * MIB]);
    for (node, name, size) in [("d0", "b", 65536), ("d0", "busy", 32768), ("d1", "o", 65536)] {
        lab.ok("block-dirty-bitmap-add", json!({ "node": node, "name": name, "granularity": size }));
    }
    lab.disks[0].dirty([1, 2, 40], 7);
    lab.disks[1].dirty([3], 7);
    for (name, size) in [("t", 4 * MIB), ("small", 2 * MIB), ("used", 4 * MIB)] {
        lab.raw_target(name, size);
    }
    let path = lab.path("ro.raw");
    std::fs::File::create(&path).unwrap().set_len(4 * MIB).unwrap();
    let file = json!({ "driver": "file", "filename": path });
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "ro", "read-only": true, "file": file }));
    lab.ok(
        "blockdev-backup",
        json!({
            "job-id": "slow", "device": "d0", "target": "used", "sync": "full", "speed": 1,
            "bitmap": "busy", "bitmap-mode": "on-success",
        }),
    );
    lab.state("slow", "running");
    lab
}

/// Refuses each of `cases` (arguments and text) of `command`, changing nothing, alone and as the last of a transaction.
#[track_caller]
fn refuses(lab: &Lab, command: &str, cases: &[(Value, &str)]) {
    let before = World::of(lab);
    let before = World { events: Vec::new(), ..before };
    for (arguments, text) in cases {
        assert_eq!(&lab.err(command, arguments.clone()), text, "{command} {arguments}");
        assert_eq!(World::of(lab), before, "{command} {arguments}");
    }
}

#[track_caller]
fn refuses_in_a_transaction(lab: &Lab, action: &str, cases: &[(Value, &str)]) {
    let before = World { events: Vec::new(), ..World::of(lab) };
    for (arguments, text) in cases {
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": { "node": "d1", "name": "new" } },
            { "type": "block-dirty-bitmap-clear", "data": { "node": "d0", "name": "b" } },
            { "type": action, "data": arguments },
        ]);
        assert_eq!(&lab.err("transaction", json!({ "actions": actions })), text, "{action} {arguments}");
        assert_eq!(World::of(lab), before, "{action} {arguments}");
    }
}

#[test]
fn a_misuse_of_bitmaps_changes_nothing() {
    let lab = lab();
    let long = "x".repeat(1024);
    let too_long = format!("Bitmap name too long: {long}");
    let no_power = "Granularity must be power of 2 and at least 512";
    let add = [
        (json!({ "node": "nope", "name": "x" }), "Cannot find device='nope' nor node-name='nope'"),
        (json!({ "node": "t", "name": "x" }), "Node 't' is a target: bitmaps and backups are of served disks"),
        (json!({ "node": "d0", "name": "" }), "Bitmap name cannot be empty"),
        (json!({ "node": "d0", "name": "x", "granularity": 1000 }), no_power),
        (json!({ "node": "d0", "name": "x", "granularity": 256 }), no_power),
        (json!({ "node": "d0", "name": "x", "granularity": 0 }), no_power),
        (json!({ "node": "d0", "name": "b", "granularity": 3 }), no_power),
        (json!({ "node": "d0", "name": "b" }), "Bitmap already exists: b"),
        (json!({ "node": "d0", "name": "busy" }), "Bitmap already exists: busy"),
        (json!({ "node": "d0", "name": long }), &too_long),
        (
            json!({ "node": "d0", "name": "p", "persistent": true }),
            "This disk has no bitmap store (bitmaps=off): only bitmaps with 'persistent': false",
        ),
    ];
    refuses(&lab, "block-dirty-bitmap-add", &add);
    refuses_in_a_transaction(&lab, "block-dirty-bitmap-add", &add);
    for verb in ["remove", "clear", "enable", "disable"] {
        let command = format!("block-dirty-bitmap-{verb}");
        let cases = [
            (json!({ "node": "x", "name": "b" }), "Node 'x' not found"),
            (json!({ "node": "d0", "name": "x" }), "Dirty bitmap 'x' not found"),
            (json!({ "node": "d0", "name": "" }), "Dirty bitmap '' not found"),
            (
                json!({ "node": "d0", "name": "busy" }),
                "Bitmap 'busy' is currently in use by another operation and cannot be used",
            ),
        ];
        refuses(&lab, &command, &cases);
        refuses_in_a_transaction(&lab, &command, &cases);
    }
    let busy = "Bitmap 'busy' is currently in use by another operation and cannot be used";
    let merge = [
        (json!({ "node": "x", "target": "b", "bitmaps": [] }), "Node 'x' not found"),
        (json!({ "node": "d0", "target": "x", "bitmaps": ["b"] }), "Dirty bitmap 'x' not found"),
        (json!({ "node": "d0", "target": "x", "bitmaps": [] }), "Dirty bitmap 'x' not found"),
        (json!({ "node": "d0", "target": "b", "bitmaps": ["x"] }), "Dirty bitmap 'x' not found"),
        (json!({ "node": "d0", "target": "b", "bitmaps": ["b", "x"] }), "Dirty bitmap 'x' not found"),
        (json!({ "node": "d0", "target": "b", "bitmaps": [{ "node": "x", "name": "b" }] }), "Node 'x' not found"),
        (json!({ "node": "d0", "target": "busy", "bitmaps": ["b"] }), busy),
        (json!({ "node": "d0", "target": "b", "bitmaps": ["busy"] }), busy),
        (
            json!({ "node": "d0", "target": "b", "bitmaps": [{ "node": "d1", "name": "o" }] }),
            "Bitmaps are of different sizes (destination size is 4194304, source size is 2097152) and can't be merged",
        ),
    ];
    refuses(&lab, "block-dirty-bitmap-merge", &merge);
    refuses_in_a_transaction(&lab, "block-dirty-bitmap-merge", &merge);
    let misread = [
        (json!({ "name": "x" }), "Parameter 'node' is missing"),
        (json!({ "node": "d0" }), "Parameter 'name' is missing"),
        (json!({ "node": "d0", "name": "x", "bogus": 1 }), "Parameter 'bogus' is unexpected"),
        (json!({ "node": "d0", "name": 3 }), "Invalid parameter type for 'name', expected: string"),
        (
            json!({ "node": "d0", "name": "x", "granularity": 4294967296_u64 }),
            "Parameter 'granularity' expects uint32_t",
        ),
        (json!({ "node": "d0", "name": "x", "granularity": -1 }), "Parameter 'granularity' expects uint32_t"),
    ];
    refuses(&lab, "block-dirty-bitmap-add", &misread);
}

fn backup(change: Value) -> Value {
    let mut arguments = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full" });
    for (name, value) in change.as_object().unwrap() {
        match value {
            Value::Null => drop(arguments.as_object_mut().unwrap().remove(name)),
            value => arguments[name] = value.clone(),
        }
    }
    arguments
}

/// What is wrong with a backup whatever its target.
fn senseless() -> Vec<(Value, &'static str)> {
    let different = "Bitmap sync mode must be given when providing a bitmap";
    vec![
        (json!({ "device": "nope" }), "Cannot find device='nope' nor node-name='nope'"),
        (json!({ "device": "t" }), "Node 't' is a target: bitmaps and backups are of served disks"),
        (json!({ "sync": "incremental" }), "must provide a valid bitmap name for 'incremental' sync mode"),
        (json!({ "sync": "bitmap" }), "must provide a valid bitmap name for 'bitmap' sync mode"),
        (
            json!({ "sync": "incremental", "bitmap": "b", "bitmap-mode": "never" }),
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        ),
        (json!({ "sync": "bitmap", "bitmap": "b" }), different),
        (json!({ "bitmap": "b" }), different),
        (json!({ "bitmap-mode": "always" }), "Cannot specify bitmap sync mode without a bitmap"),
        (
            json!({ "bitmap": "b", "bitmap-mode": "never" }),
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
        ),
        (
            json!({ "sync": "top", "bitmap": "b", "bitmap-mode": "never" }),
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'top'",
        ),
        (
            json!({ "sync": "none", "bitmap": "b", "bitmap-mode": "always" }),
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ),
        (json!({ "bitmap": "x", "bitmap-mode": "always" }), "Bitmap 'x' could not be found"),
        (
            json!({ "sync": "incremental", "bitmap": "busy" }),
            "Bitmap 'busy' is currently in use by another operation and cannot be used",
        ),
        (json!({ "job-id": "" }), "Invalid job ID ''"),
        (json!({ "job-id": "1j" }), "Invalid job ID '1j'"),
        (json!({ "job-id": "slow" }), "Job ID 'slow' already in use"),
        (json!({ "speed": -1 }), "Parameter 'speed' expects a non-negative value"),
        (json!({ "sync": "zzz" }), "Parameter 'sync' does not accept value 'zzz'"),
        (json!({ "sync": null }), "Parameter 'sync' is missing"),
        (json!({ "target": null }), "Parameter 'target' is missing"),
        (json!({ "bitmap-mode": "zz" }), "Parameter 'bitmap-mode' does not accept value 'zz'"),
        (json!({ "on-source-error": "zz" }), "Parameter 'on-source-error' does not accept value 'zz'"),
        (json!({ "on-cbw-eror": "break-snapshot" }), "Parameter 'on-cbw-eror' is unexpected"),
        (json!({ "speed": "1" }), "Invalid parameter type for 'speed', expected: integer"),
        (json!({ "x-perf": { "max-workers": 0 } }), "max-workers must be between 1 and 2147483647"),
        (json!({ "x-perf": { "max-chunk": -1 } }), "max-chunk must be zero (which means no limit) or positive"),
        (json!({ "x-perf": { "max-chunk": 1 } }), "Required max-chunk (1) is less than backup cluster size (65536)"),
        (json!({ "x-perf": { "bogus": 1 } }), "Parameter 'x-perf.bogus' is unexpected"),
        (json!({ "filter-node-name": "9s" }), "Could not create node: Invalid node-name: '9s'"),
        (json!({ "filter-node-name": "d1" }), "Could not create node: Duplicate nodes with node-name='d1'"),
    ]
}

#[test]
fn a_misuse_of_blockdev_backup_changes_nothing() {
    let lab = lab();
    let mut cases = senseless();
    cases.extend([
        (json!({ "target": "nope" }), "Cannot find device='nope' nor node-name='nope'"),
        (json!({ "target": "d0" }), "Source and target cannot be the same"),
        (json!({ "target": "d1" }), "Node 'd1' is busy: it is served to a guest"),
        (json!({ "target": "small" }), "Source and target image have different sizes"),
        (json!({ "target": "ro" }), "Could not create node: Block node is read-only"),
        (json!({ "target": "used" }), "Node 'used' is busy: block device is in use by block job: backup"),
        (
            json!({ "target": "small", "bitmap": "b", "bitmap-mode": "always" }),
            "Source and target image have different sizes",
        ),
    ]);
    let cases: Vec<_> = cases.into_iter().map(|(change, text)| (backup(change), text)).collect();
    refuses(&lab, "blockdev-backup", &cases);
    // What is misread is named by its path in a transaction; the rest is the same.
    let sensible: Vec<_> =
        cases.into_iter().filter(|(_, text)| !text.contains("Parameter") && !text.contains("parameter")).collect();
    refuses_in_a_transaction(&lab, "blockdev-backup", &sensible);
}

#[test]
fn a_misuse_of_drive_backup_leaves_no_file_and_changes_nothing() {
    let lab = lab();
    let new = lab.path("new.img");
    for format in ["raw", "qcow2"] {
        let cases: Vec<_> = senseless()
            .into_iter()
            .map(|(mut change, text)| {
                let target = match change.get("target") {
                    Some(Value::Null) => Value::Null,
                    _ => json!(new),
                };
                change["target"] = target;
                change["format"] = json!(format);
                (backup(change), text)
            })
            .collect();
        refuses(&lab, "drive-backup", &cases);
    }
    let (nowhere, missing) = (lab.path("no/such/dir.raw"), lab.path("missing.raw"));
    let texts = [
        format!("Could not create '{nowhere}': No such file or directory"),
        format!("Could not open '{missing}': No such file or directory"),
        format!("Could not create '{}': Is a directory", lab.dir.path().display()),
    ];
    let d0 = lab.disks[0].path.clone();
    let d1 = lab.disks[1].path.clone();
    let other = lab.path("other.raw");
    std::fs::File::create(&other).unwrap().set_len(4 * MIB + 512).unwrap();
    let cases = [
        (json!({ "target": nowhere, "format": "raw" }), texts[0].as_str()),
        (json!({ "target": missing, "format": "raw", "mode": "existing" }), &texts[1]),
        (json!({ "target": lab.dir.path(), "format": "raw" }), &texts[2]),
        (json!({ "target": new, "format": "spaghetti" }), "Unknown file format 'spaghetti'"),
        (json!({ "target": new, "mode": "zz" }), "Parameter 'mode' does not accept value 'zz'"),
        (json!({ "target": new, "node-name": "n" }), "Parameter 'node-name' is unexpected"),
        (json!({ "target": new, "compress": 1 }), "Invalid parameter type for 'compress', expected: boolean"),
        (
            json!({ "target": other, "mode": "existing" }),
            "Parameter 'format' is missing: an existing image is never probed",
        ),
        (
            json!({ "target": other, "mode": "existing", "format": "raw" }),
            "Source and target image have different sizes",
        ),
        (json!({ "target": d0, "format": "raw" }), "Source and target cannot be the same"),
        (json!({ "target": d0, "format": "raw", "mode": "existing" }), "Source and target cannot be the same"),
        (json!({ "target": d1, "format": "raw" }), "Source and target cannot be the same"),
        (
            json!({ "target": lab.path("used.raw"), "format": "raw", "mode": "existing" }),
            "Failed to get \"write\" lock",
        ),
    ];
    let cases: Vec<_> = cases.into_iter().map(|(change, text)| (backup(change), text)).collect();
    refuses(&lab, "drive-backup", &cases);
    let bytes = [std::fs::read(&d0).unwrap(), std::fs::read(&d1).unwrap()];
    assert!(bytes.iter().all(|disk| disk.contains(&7)), "a served disk is no target, and keeps its bytes");
}

#[test]
fn a_file_made_for_one_job_goes_when_another_of_the_transaction_is_refused() {
    let lab = lab();
    let (good, bad) = (lab.path("good.qcow2"), lab.path("no/such/dir.raw"));
    let action = |id: &str, device: &str, target: &str, format: &str| {
        json!({ "type": "drive-backup", "data": {
            "job-id": id, "device": device, "target": target, "format": format, "sync": "full",
        } })
    };
    let actions = json!([action("one", "d0", &good, "qcow2"), action("two", "d1", &bad, "raw")]);
    let text = format!("Could not create '{bad}': No such file or directory");
    refuses(&lab, "transaction", &[(json!({ "actions": actions }), &text)]);
    // What a file held that would have been replaced is still in it.
    let precious = lab.path("precious.img");
    std::fs::write(&precious, "last week's backup").unwrap();
    let actions = json!([action("one", "d0", &precious, "raw"), action("two", "d1", &bad, "raw")]);
    refuses(&lab, "transaction", &[(json!({ "actions": actions }), &text)]);
    assert_eq!(std::fs::read(&precious).unwrap(), b"last week's backup");
}

#[test]
fn an_id_or_a_target_is_free_again_after_a_refusal() {
    let lab = lab();
    lab.err("blockdev-backup", backup(json!({ "speed": -1 })));
    let actions = json!([
        { "type": "blockdev-backup", "data": backup(json!({})) },
        { "type": "abort", "data": {} },
    ]);
    assert_eq!(lab.err("transaction", json!({ "actions": actions })), "Transaction aborted using Abort action");
    lab.ok("blockdev-backup", backup(json!({})));
    lab.state("j", "null");
}
