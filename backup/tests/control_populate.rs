//! The promise: `block-dirty-bitmap-populate` is a job like the others, and after it the bitmap holds every block in which the
//! disk differs from the older image, at its end and later; one that fails, or is refused, leaves no trace.

mod control_common;

use blkmark_backup::control::{Control, Settings};
use blkmark_backup::qmp::{Commands, Events};
use control_common::*;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

const LIFE: [&str; 7] =
    ["j:created", "j:running", "j:waiting", "j:pending", "BLOCK_JOB_COMPLETED j", "j:concluded", "j:null"];

/// A disk full of ones of which an old copy lies at `old.raw`, with bitmap b, in which clusters 1 and 2 are dirty; clusters 2,
/// 9 and 40 differ from the copy.
fn lab() -> Lab {
    let lab = Lab::new(1);
    let disk = &lab.disks[0];
    disk.dirty(0..64, 1);
    std::fs::copy(&disk.path, lab.path("old.raw")).unwrap();
    disk.dirty([9, 40], 2);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    // Written, but with what was there.
    disk.dirty([1], 1);
    disk.dirty([2], 2);
    lab
}

fn arguments(lab: &Lab, more: Value) -> Value {
    let mut arguments = json!({
        "job-id": "j", "node": "d0", "name": "b", "pattern": "diff", "image": lab.path("old.raw"), "format": "raw",
    });
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
        if value.is_null() {
            arguments.as_object_mut().unwrap().remove(name);
        }
    }
    arguments
}

fn start(lab: &Lab, more: Value) {
    lab.ok("block-dirty-bitmap-populate", arguments(lab, more));
}

/// Clusters in which the disk differs from its old copy.
fn differing(lab: &Lab) -> BTreeSet<u64> {
    let (old, now) = (std::fs::read(lab.path("old.raw")).unwrap(), lab.disks[0].image());
    let cluster = |image: &[u8], at: u64| image[(at * CLUSTER) as usize..((at + 1) * CLUSTER) as usize].to_vec();
    (0..64).filter(|at| cluster(&old, *at) != cluster(&now, *at)).collect()
}

fn dirty(lab: &Lab) -> BTreeSet<u64> {
    lab.disks[0].dirty_clusters("b").into_iter().collect()
}

/// Rate-limited so that it is in its middle; it has read the first cluster and not the last.
fn start_slowly(lab: &Lab, more: Value) {
    let mut with = json!({ "speed": 2 * MIB });
    for (name, value) in more.as_object().unwrap() {
        with[name] = value.clone();
    }
    start(lab, with);
    let begun = std::time::Instant::now();
    while lab.jobs()[0]["current-progress"].as_u64().unwrap() == 0 {
        assert!(begun.elapsed() < GIVE_UP);
        std::thread::yield_now();
    }
}

fn finish(lab: &Lab) {
    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    lab.state("j", "null");
}

#[test]
fn each_mode_leaves_what_it_says() {
    for (mode, want) in [
        (json!("overwrite"), vec![2, 9, 40]),
        (json!("union"), vec![1, 2, 9, 40]),
        (Value::Null, vec![1, 2, 9, 40]),
        (json!("difference"), vec![1]),
    ] {
        let lab = lab();
        start(&lab, json!({ "mode": mode }));
        assert_eq!(lab.told_until("j:null"), LIFE);
        assert_eq!(lab.disks[0].dirty_clusters("b"), want, "{mode}");
        let (_, _, _, recording, busy) = lab.disks[0].bitmaps().remove(0);
        assert!(recording && !busy);
    }
}

#[test]
fn the_pattern_all_marks_all() {
    for (mode, want) in [("overwrite", 64), ("union", 64), ("difference", 0)] {
        let lab = lab();
        start(&lab, json!({ "pattern": "all", "mode": mode, "image": null, "format": null }));
        assert_eq!(lab.told_until("j:null"), LIFE);
        assert_eq!(dirty(&lab).len(), want, "{mode}");
    }
}

#[test]
fn what_is_written_meanwhile_is_in_the_bitmap_before_and_after_it_was_compared() {
    for disabled in [false, true] {
        for mode in ["overwrite", "union", "difference"] {
            let lab = lab();
            if disabled {
                lab.ok("block-dirty-bitmap-disable", json!({ "node": "d0", "name": "b" }));
            }
            start_slowly(&lab, json!({ "mode": mode, "auto-finalize": false }));
            lab.disks[0].dirty([0, 63], 7);
            lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
            lab.state("j", "pending");
            // Compared long ago, and equal then.
            lab.disks[0].dirty([5], 7);
            assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2], "meanwhile it shows what it held");
            lab.ok("job-finalize", json!({ "id": "j" }));
            lab.state("j", "null");
            let want = match mode {
                "overwrite" => vec![0, 2, 5, 9, 40, 63],
                "union" => vec![0, 1, 2, 5, 9, 40, 63],
                _ => vec![0, 1, 5, 63],
            };
            assert_eq!(lab.disks[0].dirty_clusters("b"), want, "{mode} disabled={disabled}");
            lab.disks[0].dirty([6], 7);
            assert_eq!(dirty(&lab).contains(&6), !disabled, "and it records as before");
        }
    }
}

/// Admitted before the job, on the disk only after the comparison: nothing but the mark at the flip tells of it.
#[test]
fn a_write_that_is_in_flight_throughout_is_in_the_bitmap() {
    let lab = lab();
    let (disk, (begun, wait)) = (&lab.disks[0], mpsc::channel());
    let (go, gone) = mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            disk.write_slowly(20 * CLUSTER, &[9; 4096], || {
                begun.send(()).unwrap();
                gone.recv_timeout(GIVE_UP).unwrap();
            });
        });
        wait.recv_timeout(GIVE_UP).unwrap();
        start(&lab, json!({ "mode": "overwrite" }));
        assert_eq!(lab.told_until("j:null"), LIFE);
        go.send(()).unwrap();
    });
    assert_eq!(lab.disks[0].dirty_clusters("b"), [2, 9, 20, 40]);
    assert!(differing(&lab).contains(&20));
}

#[test]
fn a_busy_guest_never_makes_the_bitmap_miss_a_block() {
    for round in 0..8 {
        let lab = lab();
        let over = Over::default();
        std::thread::scope(|scope| {
            let _at_last = over.at_last();
            scope.spawn(|| {
                let mut x = 12345_u64 + round;
                while !over.yet() {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    // Half of the writes bring back what the old copy has.
                    let (at, byte) =
                        ((x >> 33) % (4 * MIB / 512) * 512, if x >> 63 == 0 { 1 } else { (x >> 20) as u8 });
                    lab.disks[0].write(at, 512, byte);
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
            });
            // Long enough for much to be written behind its back, and few enough writes for a block to be missed.
            let mode = if round % 4 == 3 { "union" } else { "overwrite" };
            start(&lab, json!({ "mode": mode, "speed": 32 * MIB, "max-guest-latency": 0 }));
            assert_eq!(lab.told_until("j:null"), LIFE);
        });
        let missed: Vec<u64> = differing(&lab).difference(&dirty(&lab)).copied().collect();
        assert!(missed.is_empty(), "{missed:?}");
    }
}

#[test]
fn one_that_is_cancelled_or_fails_leaves_what_was_there_and_what_the_guest_wrote() {
    for end in ["cancel", "block-cancel", "force", "error"] {
        for disabled in [false, true] {
            let lab = lab();
            if disabled {
                lab.ok("block-dirty-bitmap-disable", json!({ "node": "d0", "name": "b" }));
            }
            start_slowly(&lab, json!({ "mode": "overwrite" }));
            lab.disks[0].dirty([33], 7);
            match end {
                "cancel" => drop(lab.ok("job-cancel", json!({ "id": "j" }))),
                "block-cancel" => drop(lab.ok("block-job-cancel", json!({ "device": "j" }))),
                "force" => {
                    lab.ok("job-pause", json!({ "id": "j" }));
                    let paused = lab.err("block-job-cancel", json!({ "device": "j" }));
                    assert_eq!(paused, "The block job for device 'j' is currently paused");
                    lab.ok("block-job-cancel", json!({ "device": "j", "force": true }));
                }
                _ => {
                    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
                    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
                }
            }
            if end == "error" {
                assert_eq!(
                    lab.event("BLOCK_JOB_ERROR"),
                    json!({ "device": "j", "operation": "read", "action": "report" })
                );
                let error = lab.event("BLOCK_JOB_COMPLETED")["error"].as_str().unwrap().to_owned();
                assert!(error.starts_with("could not read the disk at 0x"), "{error}");
                assert!(error.ends_with("Input/output error"), "{error}");
            } else {
                lab.event("BLOCK_JOB_CANCELLED");
            }
            lab.state("j", "null");
            assert_eq!(lab.jobs(), json!([]));
            let want: &[u64] = if disabled { &[1, 2] } else { &[1, 2, 33] };
            assert_eq!(lab.disks[0].dirty_clusters("b"), want, "{end}");
            let (_, _, _, recording, busy) = lab.disks[0].bitmaps().remove(0);
            assert_eq!((recording, busy), (!disabled, false));
        }
    }
}

#[test]
fn a_bitmap_of_the_same_transaction_is_there_whole_or_not_at_all() {
    for success in [true, false] {
        let lab = lab();
        lab.disks[0].source.broken.store(!success, Ordering::SeqCst);
        let mut populate = arguments(&lab, json!({ "name": "new" }));
        populate["mode"] = json!("union");
        lab.ok(
            "transaction",
            json!({ "actions": [
                { "type": "block-dirty-bitmap-add", "data": { "node": "d0", "name": "new", "granularity": 4096 } },
                { "type": "block-dirty-bitmap-populate", "data": populate },
            ] }),
        );
        let error = &lab.event("BLOCK_JOB_COMPLETED")["error"];
        assert_eq!(error.is_null(), success, "{error}");
        lab.state("j", "null");
        let names: Vec<String> = lab.disks[0].bitmaps().into_iter().map(|shown| shown.0).collect();
        if success {
            assert_eq!(names, ["b", "new"]);
            assert_eq!(lab.disks[0].dirty_clusters("new"), [2, 9, 40]);
        } else {
            assert_eq!(names, ["b"], "one that holds nothing must not look as if nothing differed");
        }
    }
}

#[test]
fn a_group_stands_or_falls_together() {
    let lab = Lab::new(2);
    for (at, disk) in lab.disks.iter().enumerate() {
        disk.dirty(0..64, 1);
        std::fs::copy(&disk.path, lab.path(&format!("old{at}.raw"))).unwrap();
        lab.ok("block-dirty-bitmap-add", json!({ "node": format!("d{at}"), "name": "b" }));
        disk.dirty([at as u64], 2);
    }
    let populate = |at: usize| {
        let image = lab.path(&format!("old{at}.raw"));
        let data = json!({ "job-id": format!("j{at}"), "node": format!("d{at}"), "name": "b", "pattern": "diff",
            "image": image, "format": "raw", "mode": "difference" });
        json!({ "type": "block-dirty-bitmap-populate", "data": data })
    };
    let both = json!({ "actions": [populate(0), populate(1)], "properties": { "completion-mode": "grouped" } });
    lab.disks[1].source.broken.store(true, Ordering::SeqCst);
    lab.ok("transaction", both.clone());
    lab.event("BLOCK_JOB_CANCELLED");
    lab.state("j0", "null");
    assert_eq!((lab.disks[0].dirty_clusters("b"), lab.disks[1].dirty_clusters("b")), (vec![0], vec![1]));
    lab.disks[1].source.broken.store(false, Ordering::SeqCst);
    lab.ok("transaction", both);
    lab.state("j0", "null");
    assert_eq!(lab.jobs(), json!([]));
    assert_eq!((lab.disks[0].dirty_clusters("b"), lab.disks[1].dirty_clusters("b")), (vec![], vec![]));
}

#[test]
fn queries_and_pauses_and_policies_are_those_of_every_job() {
    let lab = lab();
    start_slowly(&lab, json!({ "on-error": "stop", "auto-dismiss": false, "mode": "overwrite" }));
    lab.ok("job-pause", json!({ "id": "j" }));
    let size = 4 * MIB;
    let shown = lab.ok("query-block-jobs", json!({}));
    assert_eq!(shown[0]["type"], "bitmap-populate");
    assert_eq!(
        (&shown[0]["paused"], &shown[0]["len"], &shown[0]["speed"]),
        (&json!(true), &json!(size), &json!(2 * MIB))
    );
    let change = |kind: &str| json!({ "id": "j", "type": kind, "max-guest-latency": 500 });
    lab.ok("block-job-change", change("bitmap-populate"));
    assert_eq!(lab.ok("query-block-jobs", json!({}))[0]["max-guest-latency"], 500);
    assert_eq!(lab.err("block-job-change", change("backup")), "Job 'j' is of another type");
    lab.ok("job-resume", json!({ "id": "j" }));
    lab.disks[0].source.broken.store(true, Ordering::SeqCst);
    lab.ok("block-job-set-speed", json!({ "device": "j", "speed": 0 }));
    assert_eq!(lab.event("BLOCK_JOB_ERROR")["action"], "stop");
    assert_eq!(lab.ok("query-block-jobs", json!({}))[0]["io-status"], "failed");
    lab.disks[0].source.broken.store(false, Ordering::SeqCst);
    lab.ok("block-job-resume", json!({ "device": "j" }));
    assert_eq!(
        lab.event("BLOCK_JOB_COMPLETED"),
        json!({ "type": "bitmap-populate", "device": "j", "len": size, "offset": size, "speed": 0 })
    );
    lab.state("j", "concluded");
    assert_eq!(lab.jobs()[0]["type"], "bitmap-populate");
    assert_eq!(lab.err("job-retry", json!({ "id": "j" })), "Job 'j' keeps no point in time to try again");
    lab.ok("job-dismiss", json!({ "id": "j" }));
    assert_eq!(lab.disks[0].dirty_clusters("b"), [2, 9, 40]);
}

#[test]
fn meanwhile_the_bitmap_is_busy_and_the_image_node_too() {
    let lab = lab();
    let file = json!({ "driver": "file", "filename": lab.path("old.raw"), "read-only": true });
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "old", "file": file, "read-only": true }));
    let node = json!({ "image": null, "format": null, "image-node": "old" });
    start_slowly(&lab, node.clone());
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    let of_b = json!({ "node": "d0", "name": "b" });
    for verb in ["remove", "clear", "enable", "disable"] {
        assert_eq!(lab.err(&format!("block-dirty-bitmap-{verb}"), of_b.clone()), busy);
    }
    assert_eq!(lab.err("block-dirty-bitmap-populate", arguments(&lab, json!({ "job-id": "k" }))), busy);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "c" }));
    let mut again = arguments(&lab, node);
    again["name"] = json!("c");
    again["job-id"] = json!("k");
    let in_use = "Node 'old' is busy: block device is in use by block job: bitmap-populate";
    assert_eq!(lab.err("block-dirty-bitmap-populate", again), in_use);
    assert_eq!(lab.err("blockdev-del", json!({ "node-name": "old" })), in_use);
    let of_c = json!({ "name": "c" });
    assert_eq!(lab.err("block-dirty-bitmap-populate", arguments(&lab, of_c)), "Job ID 'j' already in use");
    assert_eq!(
        lab.err("block_resize", json!({ "node-name": "d0", "size": 8 * MIB })),
        busy,
        "both sides keep their size"
    );
    finish(&lab);
    lab.ok("blockdev-del", json!({ "node-name": "old" }));
    assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2, 9, 40]);
}

#[test]
fn a_point_in_time_is_an_older_image_too() {
    let lab = lab();
    lab.ok("point-add", json!({ "node": "d0", "name": "p" }));
    lab.disks[0].dirty([7, 63], 3);
    start_slowly(&lab, json!({ "image": null, "format": null, "image-node": "p", "mode": "overwrite" }));
    // Kept by the point on its first overwrite, and compared after or before that.
    lab.disks[0].dirty([62], 3);
    let busy = "Node 'p' is busy: block device is in use by block job: bitmap-populate";
    assert_eq!(lab.err("point-remove", json!({ "name": "p" })), busy);
    finish(&lab);
    assert_eq!(lab.disks[0].dirty_clusters("b"), [7, 62, 63]);
    lab.ok("point-remove", json!({ "name": "p" }));
}

/// A refused command changes nothing, starts nothing, and says why.
#[test]
fn what_makes_no_sense_is_refused() {
    let lab = lab();
    let path = |name: &str| lab.path(name);
    File::create(path("small.raw")).unwrap().set_len(MIB).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("gone.qcow2"), "4M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &path("gone.qcow2"), "-F", "qcow2", &path("broken.qcow2")]);
    std::fs::remove_file(path("gone.qcow2")).unwrap();
    std::os::unix::fs::symlink("/dev/null", path("null")).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", &path("d0.disk"), "-F", "raw", &path("circle.qcow2")]);
    File::create(path("junk.qcow2")).unwrap().write_all_at(&[7; 4096], 0).unwrap();
    lab.raw_target("writable", 4 * MIB);
    let (before, nothing) = (lab.disks[0].bitmaps(), json!({}));
    let long = "x".repeat(5000);
    let no_image = json!({ "image": null, "format": null });
    let with = |image: &str, format: &str| json!({ "image": lab.path(image), "format": format });
    for (more, want) in [
        (json!({ "node": "zz" }), "Node 'zz' not found".to_owned()),
        (json!({ "node": "writable" }), "Node 'writable' is a target: bitmaps and backups are of served disks".into()),
        (json!({ "name": "zz" }), "Dirty bitmap 'zz' not found".into()),
        (json!({ "name": "" }), "Dirty bitmap '' not found".into()),
        (json!({ "job-id": "" }), "Invalid job ID ''".into()),
        (json!({ "job-id": "7" }), "Invalid job ID '7'".into()),
        (json!({ "speed": -1 }), "Parameter 'speed' expects a non-negative value".into()),
        (no_image, "pattern 'diff' needs an older image: 'image' or 'image-node'".into()),
        (json!({ "image-node": "writable" }), "Only one of 'image' and 'image-node' may be given".into()),
        (json!({ "image": null }), "Parameter 'image' is missing".into()),
        (json!({ "pattern": "all" }), "An older image has a meaning with pattern 'diff' only".into()),
        (json!({ "pattern": "none" }), "Parameter 'pattern' does not accept value 'none'".into()),
        (json!({ "pattern": null }), "Parameter 'pattern' is missing".into()),
        (json!({ "mode": "xor" }), "Parameter 'mode' does not accept value 'xor'".into()),
        (json!({ "format": null }), "Parameter 'format' is missing: an existing image is never probed".into()),
        (json!({ "format": "vmdk" }), "Unknown file format 'vmdk'".into()),
        (with("nowhere", "raw"), format!("Could not open '{}': No such file or directory", path("nowhere"))),
        (json!({ "image": long }), format!("Could not open '{long}': File name too long")),
        (with("null", "raw"), format!("Could not open '{}': neither a regular file nor a block device", path("null"))),
        (with("junk.qcow2", "qcow2"), format!("Could not open '{}': Image is not in qcow2 format", path("junk.qcow2"))),
        (with("broken.qcow2", "qcow2"), format!("Could not open '{}': No such file or directory", path("gone.qcow2"))),
        (with("d0.disk", "raw"), "Source and target cannot be the same".into()),
        (with("circle.qcow2", "qcow2"), "Source and target cannot be the same".into()),
        (
            with("small.raw", "raw"),
            format!(
                "Source and target image have different sizes: 'd0' has {} bytes, '{}' has {MIB}",
                4 * MIB,
                path("small.raw")
            ),
        ),
        (
            json!({ "image": null, "format": null, "image-node": "nope" }),
            "Cannot find device='nope' nor node-name='nope'".into(),
        ),
        (json!({ "image": null, "format": null, "image-node": "d0" }), "Source and target cannot be the same".into()),
        (
            json!({ "image": null, "format": null, "image-node": "writable" }),
            "Node 'writable' is open for writing: add it with 'read-only' to read it".into(),
        ),
    ] {
        let error = lab.err("block-dirty-bitmap-populate", arguments(&lab, more.clone()));
        assert_eq!(error, want, "{more}");
        assert_eq!(lab.disks[0].bitmaps(), before, "{more}");
        assert_eq!(lab.jobs(), json!([]));
    }
    assert_eq!(lab.told(), [] as [String; 0]);
    // And what was claimed for it is free.
    lab.ok("blockdev-del", json!({ "node-name": "writable" }));
    lab.ok("query-block-jobs", nothing);
}

#[test]
fn a_backing_file_outside_of_the_allowed_roots_is_not_read() {
    let lab = lab();
    std::fs::create_dir(lab.path("in")).unwrap();
    for (name, below) in [("in/leads-out.qcow2", "old.raw"), ("outside.qcow2", "old.raw")] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", &lab.path(below), "-F", "raw", &lab.path(name)]);
    }
    let nodes = lab.disks.iter().map(|disk| Arc::clone(&disk.node)).collect();
    let settings =
        Settings { roots: vec![lab.path("in").into()], sandbox: Default::default(), on_quit: Box::new(|| ()) };
    let control = Control::new(nodes, Events::new(), settings);
    let before = lab.disks[0].bitmaps();
    for (image, at_fault) in [("in/leads-out.qcow2", "old.raw"), ("outside.qcow2", "outside.qcow2")] {
        let arguments = arguments(&lab, json!({ "image": lab.path(image), "format": "qcow2" }));
        let Value::Object(arguments) = arguments else { unreachable!() };
        let error = control.execute("block-dirty-bitmap-populate", arguments).unwrap().unwrap_err();
        let want = format!("Could not open '{}': not below an allowed directory", lab.path(at_fault));
        assert_eq!(error.desc, want);
        assert_eq!(lab.disks[0].bitmaps(), before);
    }
    assert_eq!(control.execute("query-jobs", serde_json::Map::new()).unwrap().unwrap(), json!([]));
}

#[test]
fn an_image_that_somebody_writes_is_refused_and_nobody_writes_it_meanwhile() {
    let lab = lab();
    let path = lab.path("old.raw");
    let file = json!({ "driver": "file", "filename": path });
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "w", "file": file }));
    let error = lab.err("block-dirty-bitmap-populate", arguments(&lab, json!({})));
    assert!(error.contains("lock"), "{error}");
    lab.ok("blockdev-del", json!({ "node-name": "w" }));
    start_slowly(&lab, json!({}));
    let error = lab.err("blockdev-add", json!({ "driver": "raw", "node-name": "w", "file": file }));
    assert!(error.contains("lock"), "{error}");
    finish(&lab);
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "w", "file": file }));
}

#[test]
fn an_image_that_cannot_be_read_on_fails_the_job_and_says_where() {
    let lab = lab();
    let qcow2 = lab.path("old.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &lab.path("old.raw"), &qcow2]);
    let start_it = || start(&lab, json!({ "image": qcow2, "format": "qcow2", "mode": "overwrite" }));
    start_it();
    assert_eq!(lab.told_until("j:null"), LIFE);
    assert_eq!(lab.disks[0].dirty_clusters("b"), [2, 9, 40]);
    let before = lab.disks[0].bitmaps();
    // A mapping that leads nowhere: all entries of the second level point beyond the end of the file, and not to clusters.
    let file = File::options().read(true).write(true).open(&qcow2).unwrap();
    let mut entry = [0; 8];
    file.read_exact_at(&mut entry, 40).unwrap();
    let first = u64::from_be_bytes(entry);
    file.read_exact_at(&mut entry, first).unwrap();
    let second = u64::from_be_bytes(entry) & 0x00ff_ffff_ffff_fe00;
    file.write_all_at(&0x8000_0000_0000_1200_u64.to_be_bytes().repeat(64), second).unwrap();
    start_it();
    let error = lab.event("BLOCK_JOB_COMPLETED")["error"].as_str().unwrap().to_owned();
    assert!(error.starts_with("could not read the older image at 0x"), "{error}");
    lab.state("j", "null");
    assert_eq!(lab.disks[0].bitmaps(), before);
    assert_eq!(lab.jobs(), json!([]));
}
