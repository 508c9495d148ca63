//! The promise: who pulls a disk with its bitmap over NBD while the guest writes gets the ranges that were dirty when the bitmap
//! was disabled or frozen, and those ranges as they stand.

mod control_common;

use blkmark_backup::nbd::{Address, BitmapExportError, NbdServer, Removal, ServerSettings, SourceExport};
use control_common::*;
use serde_json::{Value, json};
use std::process::Command;
use std::sync::Arc;

fn tool(arguments: &[&str]) -> String {
    let output = Command::new("timeout").arg("120").args(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Dirty clusters as nbdinfo sees them.
fn dirty(uri: &str, bitmap: &str) -> Vec<u64> {
    let map: Value =
        serde_json::from_str(&tool(&["nbdinfo", "--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), uri])).unwrap();
    let number = |extent: &Value, name: &str| extent[name].as_u64().unwrap() / CLUSTER;
    let extents = map.as_array().unwrap().iter().filter(|extent| extent["type"] == 1);
    extents.flat_map(|e| number(e, "offset")..number(e, "offset") + number(e, "length")).collect()
}

#[test]
fn a_disk_is_pulled_with_bitmaps_that_stand_still() {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    let (server, socket) = (lab.path("nbd"), lab.path("nbd"));
    let server = NbdServer::bind(&Address::Unix(server.into()), ServerSettings::default()).unwrap();
    for name in ["b", "still", "frozen"] {
        lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": name }));
    }
    disk.dirty([1, 2, 40], 3);
    let error = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        SourceExport::of_node(&disk.node, &names).map(drop).unwrap_err()
    };
    assert_eq!(error(&["nope"]), BitmapExportError::NotFound("nope".into()));
    assert_eq!(error(&["nope"]).to_string(), "Bitmap 'nope' is not found");
    assert_eq!(error(&["b"]).to_string(), "Enabled bitmap 'b' incompatible with readonly export");
    lab.ok("block-dirty-bitmap-disable", json!({ "node": "d0", "name": "still" }));
    // A job that waits to be finalized has frozen the other.
    lab.raw_target("t", 4 * MIB);
    lab.ok(
        "blockdev-backup",
        json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "incremental", "bitmap": "frozen", "auto-finalize": false }),
    );
    lab.state("j", "pending");
    disk.dirty([9], 4);
    let names = ["still".to_owned(), "frozen".to_owned()];
    // One bitmap may be in several exports.
    for export in ["one", "two"] {
        let of_node = SourceExport::of_node(&disk.node, &names).unwrap();
        server.add(export, Arc::new(of_node), "").unwrap();
    }
    disk.dirty([10], 5);
    for export in ["one", "two"] {
        let uri = format!("nbd+unix:///{export}?socket={socket}");
        assert_eq!(dirty(&uri, "still"), [1, 2, 40]);
        assert_eq!(dirty(&uri, "frozen"), [1, 2, 40]);
        let out = lab.path("out");
        tool(&["nbdcopy", &uri, &out]);
        assert_same(&std::fs::read(&out).unwrap(), &disk.image());
    }
    server.remove("one", Removal::Safe).unwrap();
    drop(server);
    lab.ok("job-finalize", json!({ "id": "j" }));
    lab.state("j", "null");
    assert_eq!(disk.dirty_clusters("frozen"), [9, 10]);
}
