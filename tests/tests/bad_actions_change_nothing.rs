//! The promise: a transaction over several disks with one bad action in it, wherever it stands, is refused with the text that
//! the action has when it stands alone, and changes nothing: every bitmap of every disk has the state, count and hash that it
//! had, no job and no file was made.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::qmp::Qmp;
use serde_json::{Value, json};

const DISKS: [&str; 3] = ["drive0", "drive1", "drive2"];

/// Whatever a transaction could have touched.
#[derive(Debug, PartialEq)]
struct World {
    bitmaps: Vec<(String, Value, String)>,
    jobs: Vec<String>,
    files: BTreeSet<String>,
}

impl World {
    fn of(qmp: &mut Qmp, targets: &Path) -> Result<Self> {
        let mut bitmaps = Vec::new();
        for node in qmp.run("query-named-block-nodes", json!({}))?.as_array().context("nodes")? {
            let name = node["node-name"].as_str().context("a name")?;
            for shown in node["dirty-bitmaps"].as_array().into_iter().flatten() {
                let hash = qmp.bitmap_hash(name, shown["name"].as_str().context("a name")?)?;
                bitmaps.push((name.to_owned(), shown.clone(), hash));
            }
        }
        let jobs = qmp.run("query-jobs", json!({}))?;
        let jobs = jobs.as_array().context("jobs")?.iter().map(|job| job["id"].to_string()).collect();
        let name = |entry: std::io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
        let files = fs::read_dir(targets)?.map(name).collect::<Result<_>>()?;
        Ok(World { bitmaps, jobs, files })
    }
}

fn action(kind: &str, data: Value) -> Value {
    json!({ "type": kind, "data": data })
}

/// Good ones, on all disks: each would change something.
fn good(targets: &Path) -> Vec<Value> {
    let backup = json!({
        "job-id": "good", "device": "drive1", "sync": "incremental", "bitmap": "b", "format": "qcow2",
        "target": targets.join("good.qcow2"),
    });
    vec![
        action("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "new" })),
        action("block-dirty-bitmap-clear", json!({ "node": "drive0", "name": "b" })),
        action("block-dirty-bitmap-disable", json!({ "node": "drive1", "name": "c" })),
        action("drive-backup", backup),
        action("block-dirty-bitmap-enable", json!({ "node": "drive2", "name": "off" })),
        action("block-dirty-bitmap-merge", json!({ "node": "drive2", "target": "b", "bitmaps": ["c"] })),
        action("block-dirty-bitmap-remove", json!({ "node": "drive2", "name": "c" })),
    ]
}

/// Bad ones: a bitmap that a job holds, one that is not there, in every kind of action that names one.
fn bad(targets: &Path) -> Vec<(Value, String)> {
    let busy = "Bitmap 'busy' is currently in use by another operation and cannot be used".to_owned();
    let missing = "Dirty bitmap 'none' not found".to_owned();
    let mut all = Vec::new();
    for verb in ["remove", "clear", "enable", "disable"] {
        for disk in ["drive0", "drive2"] {
            let kind = format!("block-dirty-bitmap-{verb}");
            all.push((action(&kind, json!({ "node": disk, "name": "busy" })), busy.clone()));
            all.push((action(&kind, json!({ "node": disk, "name": "none" })), missing.clone()));
        }
    }
    for (name, text) in [("busy", &busy), ("none", &missing)] {
        for merge in [
            json!({ "node": "drive0", "target": name, "bitmaps": ["b"] }),
            json!({ "node": "drive0", "target": "c", "bitmaps": ["off", name] }),
            json!({ "node": "drive1", "target": "c", "bitmaps": [{ "node": "drive2", "name": name }] }),
        ] {
            all.push((action("block-dirty-bitmap-merge", merge), text.clone()));
        }
    }
    all.push((
        action("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "busy" })),
        "Bitmap already exists: busy".to_owned(),
    ));
    let backups = [
        ("drive-backup", json!({ "target": targets.join("bad.qcow2"), "format": "qcow2" })),
        ("blockdev-backup", json!({ "target": "t" })),
    ];
    for (command, target) in backups {
        for (name, text) in [("busy", busy.clone()), ("none", "Bitmap 'none' could not be found".to_owned())] {
            let mut data = json!({ "job-id": "bad", "device": "drive0", "sync": "incremental", "bitmap": name });
            for (name, value) in target.as_object().into_iter().flatten() {
                data[name] = value.clone();
            }
            all.push((action(command, data), text));
        }
    }
    all
}

#[test]
fn a_busy_or_missing_bitmap_in_any_position_changes_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let targets = lab.path("targets");
    fs::create_dir(&targets)?;
    let mut disks = Vec::new();
    for id in DISKS {
        disks.push(lab.disk(id, 2 * MIB)?);
    }
    let daemon = Daemon::blkmark(&lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    for (at, disk) in disks.iter().enumerate() {
        for (name, granularity) in [("b", 65536), ("c", 32768), ("busy", 65536), ("off", 4096)] {
            let disabled = name == "off";
            let arguments = json!({ "node": disk.id, "name": name, "granularity": granularity, "disabled": disabled });
            qmp.run("block-dirty-bitmap-add", arguments)?;
        }
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        for cluster in 0..5 {
            guest.write_at(&[7; 4096], (at as u64 + cluster * 5) * 65536)?;
        }
        let backup = json!({
            "job-id": format!("holds{at}"), "device": disk.id, "sync": "incremental", "bitmap": "busy", "speed": 1,
            "format": "qcow2", "target": targets.join(format!("held{at}.qcow2")),
        });
        qmp.run("drive-backup", backup)?;
    }
    let path = targets.join("t.raw");
    fs::File::create(&path)?.set_len(2 * MIB)?;
    let file = json!({ "driver": "file", "filename": path });
    qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": file }))?;

    let before = World::of(&mut qmp, &targets)?;
    ensure!(before.bitmaps.len() == 12 && before.jobs.len() == 3, "{before:?}");
    let good = good(&targets);
    for (bad, text) in bad(&targets) {
        for position in 0..=good.len() {
            let mut actions = good.clone();
            actions.insert(position, bad.clone());
            let error = qmp.refused("transaction", json!({ "actions": actions }))?;
            ensure!(error.desc == text, "{bad} in position {position}: {}", error.desc);
            let after = World::of(&mut qmp, &targets)?;
            ensure!(after == before, "{bad} in position {position} changed something:\n{before:#?}\n{after:#?}");
        }
    }
    // The good ones alone do what they say.
    qmp.run("transaction", json!({ "actions": good }))?;
    qmp.job_completed("good")?;
    ensure!(World::of(&mut qmp, &targets)? != before);
    Ok(())
}
