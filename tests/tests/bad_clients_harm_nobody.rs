//! The promise: clients that die in the middle of a command, send garbage, or come and go a thousand times harm no other client, no
//! job and no guest; and a transaction that cannot be done as a whole changes nothing, wherever in it the reason stands.
//!
//! All of it while a guest writes over vhost-user and a job runs, which then completes and is of its instant.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::{images, tools};
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;

#[test]
fn a_job_a_guest_and_other_clients_go_on() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let control = daemon.control().to_owned();
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let instant = lab.write("instant.raw", disk.content()?)?;
    let image = lab.path("image.qcow2");
    let start = json!({
        "job-id": "j", "device": "drive0", "sync": "full", "target": image, "format": "qcow2", "speed": 65536,
    });
    let add = json!({ "type": "block-dirty-bitmap-add", "data": { "node": "drive0", "name": "b" } });
    let backup = json!({ "type": "drive-backup", "data": start });
    qmp.run("transaction", json!({ "actions": [add, backup] }))?;
    let mut written = disk.content()?;
    let write = |stop: &Stop| {
        for n in 0u64.. {
            if stop.is_due() {
                break;
            }
            let at = n.wrapping_mul(0x9e37_79b9) % (SIZE / 4096) * 4096;
            guest.write_at(&[n as u8; 4096], at)?;
            written[at as usize..][..4096].fill(n as u8);
        }
        Ok(())
    };
    beside(vec![Box::new(write)], || {
        torment(&control)?;
        let jobs = qmp.run("query-jobs", json!({}))?;
        ensure!(jobs[0]["status"] == "running", "the job did not outlast the torment: {jobs}");
        qmp.run("block-job-set-speed", json!({ "device": "j", "speed": 0 }))?;
        qmp.job_completed("j")
    })?;
    daemon.assert_running()?;
    drop(guest);
    images::assert_equal(&image, &instant)?;
    ensure!(disk.content()? == written, "the guest's writes are not as it wrote them");
    let top = lab.path("top.qcow2");
    images::create_on_top(&image, "qcow2", &top)?;
    let arguments = json!({
        "job-id": "inc", "device": "drive0", "sync": "incremental", "bitmap": "b", "target": top, "format": "qcow2",
        "mode": "existing",
    });
    qmp.run("drive-backup", arguments)?;
    qmp.job_completed("inc")?;
    images::assert_equal(&top, &disk.path)?;
    daemon.stop()?;
    Ok(())
}

fn torment(control: &Path) -> Result<()> {
    // They come and go, at every point of a conversation.
    let said: &[&[u8]] = &[
        b"",
        b"{",
        b"{\"execute\": \"qmp_capabilities\"}",
        b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"query-block\"}",
        b"{\"execute\": \"qmp_capabilities\"}{\"execute\": \"transaction\", \"arguments\": {\"actions\": [{\"type\": \"block-",
        b"\xff\xff\xff",
    ];
    for n in 0..1000 {
        let mut client = UnixStream::connect(control)?;
        // The daemon may have hung up on a crowd: that is its right.
        let _ = client.write_all(said[n % said.len()]);
    }
    // Garbage, and a client that reads nothing of what it is answered.
    let garbage: Vec<u8> = (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    for _ in 0..4 {
        let mut client = UnixStream::connect(control)?;
        client.set_write_timeout(Some(std::time::Duration::from_secs(1)))?;
        let _ = client.write_all(&garbage);
    }
    let mut deep = UnixStream::connect(control)?;
    let _ = deep.write_all(&vec![b'['; 1 << 20]);
    // And one that is well again after nonsense.
    let mut client = UnixStream::connect(control)?;
    client.write_all(b"nonsense \xff {\"execute\": \"qmp_capabilities\", \"id\": 1}")?;
    client.shutdown(std::net::Shutdown::Write)?;
    let mut answers = String::new();
    client.read_to_string(&mut answers).context("answers in text")?;
    ensure!(answers.contains("{\"return\": {}, \"id\": 1}"), "{answers}");
    Ok(())
}

/// What a refused order may not change.
fn state(qmp: &mut Qmp, folder: &Path) -> Result<Value> {
    let mut bitmaps = Vec::new();
    for (node, name) in [("drive0", "b"), ("drive0", "off"), ("drive1", "b")] {
        bitmaps.push(json!([qmp.bitmap(node, name)?, qmp.bitmap_hash(node, name)?]));
    }
    let mut files: Vec<String> = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        files.push(entry?.file_name().to_string_lossy().into_owned());
    }
    files.sort();
    Ok(json!([bitmaps, qmp.run("query-jobs", json!({}))?, files]))
}

#[test]
fn a_transaction_is_done_as_a_whole_or_not_at_all() -> Result<()> {
    let lab = Lab::new()?;
    let disks = [lab.filled_disk("drive0", SIZE)?, lab.filled_disk("drive1", SIZE)?];
    let daemon = Daemon::blkmark(&lab, &disks)?;
    let mut qmp = daemon.qmp()?;
    let add = |node: &str, name: &str, off: bool| json!({ "node": node, "name": name, "disabled": off });
    for (node, name, off) in [("drive0", "b", false), ("drive0", "off", true), ("drive1", "b", false)] {
        qmp.run("block-dirty-bitmap-add", add(node, name, off))?;
    }
    for disk in &disks {
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        guest.write_at(&vec![5; 65536], 3 * MIB)?;
    }
    // Exists, and would be replaced.
    let existing = lab.write("existing.qcow2", "precious")?;
    let backup = |job: &str, device: &str, target: &Path| json!({ "job-id": job, "device": device, "sync": "full", "target": target, "format": "qcow2" });
    let good: Vec<(&str, Value)> = vec![
        ("block-dirty-bitmap-add", add("drive0", "new", false)),
        ("block-dirty-bitmap-clear", json!({ "node": "drive1", "name": "b" })),
        ("block-dirty-bitmap-enable", json!({ "node": "drive0", "name": "off" })),
        ("block-dirty-bitmap-disable", json!({ "node": "drive0", "name": "b" })),
        ("block-dirty-bitmap-merge", json!({ "node": "drive0", "target": "off", "bitmaps": ["b"] })),
        ("drive-backup", backup("fresh", "drive0", &lab.path("fresh.qcow2"))),
        ("drive-backup", backup("over", "drive1", &existing)),
        ("block-dirty-bitmap-remove", json!({ "node": "drive0", "name": "b" })),
    ];
    let bad: Vec<(&str, Value, &str)> = vec![
        ("abort", json!({}), "Transaction aborted using Abort action"),
        (
            "block-dirty-bitmap-enable",
            json!({ "node": "drive1", "name": "missing" }),
            "Dirty bitmap 'missing' not found",
        ),
        ("block-dirty-bitmap-add", add("drive1", "b", false), "Bitmap already exists: b"),
        (
            "drive-backup",
            json!({ "job-id": "x", "device": "drive0", "sync": "full", "target": "/nowhere/x", "format": "qcow2" }),
            "Could not create '/nowhere/x': No such file or directory",
        ),
    ];
    let before = state(&mut qmp, lab.folder())?;
    for position in 0..=good.len() {
        for (kind, data, text) in &bad {
            let mut actions: Vec<Value> =
                good.iter().map(|(kind, data)| json!({ "type": kind, "data": data })).collect();
            actions.insert(position, json!({ "type": kind, "data": data }));
            let error = qmp.refused("transaction", json!({ "actions": actions }))?;
            ensure!(error.desc == *text, "{kind} at {position}: {}", error.desc);
            let after = state(&mut qmp, lab.folder())?;
            ensure!(after == before, "{kind} at {position} changed\n{before}\nto\n{after}");
            ensure!(std::fs::read(&existing)? == b"precious", "{kind} at {position} touched a file");
        }
    }
    // And without the bad one, all of it.
    let actions: Vec<Value> = good.iter().map(|(kind, data)| json!({ "type": kind, "data": data })).collect();
    qmp.run("transaction", json!({ "actions": actions }))?;
    qmp.job_completed("fresh")?;
    qmp.job_completed("over")?;
    for (image, disk) in [(lab.path("fresh.qcow2"), &disks[0]), (existing, &disks[1])] {
        images::assert_equal(&image, &disk.path)?;
        tools::run(tools::command("qemu-img")?.args(["check", "-q", "-f", "qcow2"]).arg(&image))?;
    }
    ensure!(qmp.bitmap("drive0", "off")?["count"] == 65536 && qmp.bitmap("drive1", "b")?["count"] == 0);
    daemon.stop()?;
    Ok(())
}
