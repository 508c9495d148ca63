//! The promise: a full backup and incrementals on it restore the disk as of the instant of each, while the guest goes on.

mod control_common;

use control_common::*;
use serde_json::json;

#[test]
fn a_chain_of_incrementals_restores_each_instant() {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    disk.dirty([0, 5, 9], 1);
    lab.ok(
        "transaction",
        json!({ "actions": [
            { "type": "block-dirty-bitmap-add", "data": { "node": "d0", "name": "b" } },
            { "type": "drive-backup", "data": {
                "job-id": "full", "device": "d0", "target": lab.path("full.qcow2"), "format": "qcow2", "sync": "full",
            } },
        ] }),
    );
    let mut instants = vec![disk.image()];
    disk.dirty([5, 6], 2);
    lab.state("full", "null");
    let mut below = lab.path("full.qcow2");
    let mut images = vec![below.clone()];
    for round in 0..3_u8 {
        let image = lab.path(&format!("inc{round}.qcow2"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &image]);
        disk.dirty([u64::from(round), 20 + u64::from(round)], 10 + round);
        let before = disk.image();
        lab.ok(
            "drive-backup",
            json!({
                "job-id": "inc", "device": "d0", "target": image, "format": "qcow2", "mode": "existing",
                "sync": "incremental", "bitmap": "b",
            }),
        );
        instants.push(before);
        // After the instant: in the next increment, not in this one.
        disk.dirty([1, 20, 30 + u64::from(round)], 100 + round);
        let end = lab.event("BLOCK_JOB_COMPLETED");
        assert_eq!(end["error"], json!(null), "{end}");
        lab.state("inc", "null");
        assert_eq!(disk.dirty_clusters("b"), [1, 20, 30 + u64::from(round)]);
        images.push(image.clone());
        below = image;
    }
    for (image, instant) in images.iter().zip(&instants) {
        qemu_img(&["check", "-q", image]);
        assert_same(&contents(lab.dir.path(), image, "qcow2"), instant);
    }
}

#[test]
fn an_incremental_copies_only_what_changed() {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    disk.dirty(0..64, 1);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    disk.dirty([3, 40], 2);
    let path = lab.raw_target("t", 4 * MIB);
    lab.ok(
        "blockdev-backup",
        json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "incremental", "bitmap": "b" }),
    );
    let end = lab.event("BLOCK_JOB_COMPLETED");
    assert_eq!(end, json!({ "device": "j", "len": 2 * CLUSTER, "offset": 2 * CLUSTER, "speed": 0, "type": "backup" }));
    lab.state("j", "null");
    let mut expected = vec![0; 4 * MIB as usize];
    for cluster in [3, 40] {
        expected[(cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize].fill(2);
    }
    assert_same(&std::fs::read(path).unwrap(), &expected);
    assert_eq!(disk.dirty_clusters("b"), [0_u64; 0]);
}
