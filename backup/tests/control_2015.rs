//! The promise: the commands of the first documentation of incremental backups (2015) work as they are written there, but
//! for their trailing commas.

mod control_common;

use control_common::*;
use serde_json::{Value, json};

/// The jobs of that time had no id: the device's name serves.
fn finished(lab: &Lab) {
    let end = lab.event("BLOCK_JOB_COMPLETED");
    assert_eq!((&end["device"], &end["error"]), (&json!("d0"), &Value::Null), "{end}");
    lab.state("d0", "null");
}

#[test]
fn the_walk_through_of_2015_works() {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    disk.dirty(0..20, 1);
    let (full, newer) = (lab.path("full_backup.img"), lab.path("new_full_backup.img"));
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "bitmap0", "granularity": "32768" }));
    for verb in ["disable", "enable", "clear", "remove"] {
        lab.ok(&format!("block-dirty-bitmap-{verb}"), json!({ "node": "d0", "name": "bitmap0" }));
    }
    let begin = |verb: &str, target: &str| {
        json!({ "actions": [
            { "type": format!("block-dirty-bitmap-{verb}"), "data": { "node": "d0", "name": "bitmap0" } },
            { "type": "drive-backup", "data": { "device": "d0", "target": target, "sync": "full", "format": "qcow2" } },
        ] })
    };
    lab.ok("transaction", begin("add", &full));
    finished(&lab);
    disk.dirty([30], 2);
    lab.ok("transaction", begin("clear", &newer));
    assert_eq!(disk.dirty_clusters("bitmap0"), [0_u64; 0]);
    finished(&lab);
    let mut below = newer.clone();
    for n in 0..2 {
        let image = lab.path(&format!("incremental.{n}.img"));
        qemu_img(&["create", "-q", "-f", "qcow2", &image, "-b", &below, "-F", "qcow2"]);
        disk.dirty([n, 40 + n], 5);
        lab.ok(
            "drive-backup",
            json!({
                "device": "d0", "bitmap": "bitmap0", "target": image, "format": "qcow2", "sync": "dirty-bitmap",
                "mode": "existing",
            }),
        );
        finished(&lab);
        qemu_img(&["check", "-q", &image]);
        assert_same(&contents(lab.dir.path(), &image, "qcow2"), &disk.image());
        below = image;
    }
    assert_eq!(
        lab.err("drive-backup", json!({ "device": "d0", "target": full, "sync": "dirty-bitmap", "format": "qcow2" })),
        "must provide a valid bitmap name for 'incremental' sync mode"
    );
}
