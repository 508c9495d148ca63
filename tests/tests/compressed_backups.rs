//! The promise: `"compress": true` gives smaller qcow2 images that are the disk as of their instant like any others: full, on a
//! chain, as a node, tried again after a failure, beside a guest that writes. A target that cannot compress is refused in
//! QEMU's words and nothing is made; a daemon that is killed in the middle leaves an image that nobody takes for one.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest, Options};
use blkmark_backup::qmp::Event;
use blkmark_tests::daemon::{Daemon, Kind, blkmark_binary};
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::small_fs::SmallFileSystem;
use blkmark_tests::{images, tools};
use serde_json::{Value, json};

const SIZE: u64 = 24 * MIB;

/// What deflates to about half.
fn text(seed: u64, len: u64) -> Vec<u8> {
    let mut x = seed | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x as u8
    };
    (0..len).map(|i| if i / 64 % 2 == 0 { next() } else { b'a' }).collect()
}

struct Scene {
    disk: Disk,
    guest: Attached,
    qmp: Qmp,
    daemon: Daemon,
    lab: Lab,
}

impl Scene {
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let disk = lab.disk("drive0", SIZE)?;
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
        let mut guest = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
        guest.write_at(&text(1, SIZE - 4 * MIB), MIB)?;
        Ok(Self { disk, guest, qmp, daemon, lab })
    }

    fn backup(&mut self, command: &str, more: Value) -> Result<()> {
        let mut arguments = json!({
            "job-id": "j", "device": "drive0", "sync": "incremental", "bitmap": "b", "compress": true,
        });
        for (name, value) in more.as_object().context("members")? {
            arguments[name] = value.clone();
        }
        self.qmp.run(command, arguments)?;
        Ok(())
    }
}

/// It is sound, and holds compressed clusters, so many of a hundred.
fn compressed(image: &Path, at_least: f64) -> Result<f64> {
    let report = tools::run(tools::command("qemu-img")?.args(["check", "-f", "qcow2"]).arg(image))?;
    ensure!(report.contains("No errors were found"), "{report}");
    let share = report.split(", ").find_map(|part| part.split_once("% compressed")).map(|(share, _)| share);
    let share: f64 = share.with_context(|| report.clone())?.trim().parse()?;
    ensure!(share >= at_least, "only {share} % are compressed: {report}");
    Ok(share)
}

#[test]
fn a_chain_of_compressed_images_is_the_disk() -> Result<()> {
    let mut scene = Scene::new()?;
    let full = scene.lab.path("full.qcow2");
    scene.backup("drive-backup", json!({ "target": full, "format": "qcow2" }))?;
    // The guest goes on meanwhile.
    scene.guest.write_at(&text(2, MIB), 3 * MIB)?;
    scene.qmp.job_completed("j")?;
    compressed(&full, 90.0)?;
    let plain = scene.lab.path("plain.qcow2");
    scene.qmp.run(
        "drive-backup",
        json!({ "job-id": "p", "device": "drive0", "sync": "full", "target": plain, "format": "qcow2" }),
    )?;
    scene.qmp.job_completed("p")?;
    let (small, large) = (fs::metadata(&full)?.len(), fs::metadata(&plain)?.len());
    ensure!(small < large * 2 / 3, "{small} bytes compressed, {large} bytes plain");

    // As scripts do: an image made by qemu-img, opened by the command, and one that is a node.
    let first = scene.lab.path("inc1.qcow2");
    images::create_on_top(&full, "qcow2", &first)?;
    scene.backup("drive-backup", json!({ "target": first, "format": "qcow2", "mode": "existing" }))?;
    scene.qmp.job_completed("j")?;
    compressed(&first, 90.0)?;
    images::assert_equal(&first, &scene.disk.path)?;

    scene.guest.write_at(&text(3, 2 * MIB), 7 * MIB)?;
    let second = scene.lab.path("inc2.qcow2");
    images::create_on_top(&first, "qcow2", &second)?;
    let file = json!({ "driver": "file", "filename": second });
    scene.qmp.run("blockdev-add", json!({ "driver": "qcow2", "node-name": "t", "file": file }))?;
    scene.backup("blockdev-backup", json!({ "target": "t" }))?;
    scene.qmp.job_completed("j")?;
    // The next job into the same node does as it is told itself: nothing of `compress` is left.
    scene.guest.write_at(&text(4, MIB), 10 * MIB)?;
    scene.backup("blockdev-backup", json!({ "target": "t", "compress": false }))?;
    scene.qmp.job_completed("j")?;
    scene.qmp.run("blockdev-del", json!({ "node-name": "t" }))?;
    let share = compressed(&second, 60.0)?;
    ensure!(share < 80.0, "{share} % are compressed: the second job's too");
    images::assert_equal(&second, &scene.disk.path)
}

#[test]
fn what_cannot_compress_is_refused_and_nothing_is_made() -> Result<()> {
    let mut scene = Scene::new()?;
    let before = (scene.qmp.bitmap("drive0", "b")?, scene.qmp.bitmap_hash("drive0", "b")?);
    let (new, there) = (scene.lab.path("new.raw"), scene.lab.path("there.raw"));
    fs::File::create(&there)?.set_len(SIZE)?;
    let file = json!({ "driver": "file", "filename": there });
    scene.qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": file }))?;
    let arguments = json!({
        "job-id": "j", "device": "drive0", "sync": "incremental", "bitmap": "b", "compress": true,
    });
    for (command, more) in [
        ("drive-backup", json!({ "target": new, "format": "raw" })),
        ("drive-backup", json!({ "target": new })),
        ("drive-backup", json!({ "target": there, "format": "raw", "mode": "existing" })),
        ("blockdev-backup", json!({ "target": "t" })),
    ] {
        let mut arguments = arguments.clone();
        for (name, value) in more.as_object().context("members")? {
            arguments[name] = value.clone();
        }
        let error = scene.qmp.refused(command, arguments)?;
        ensure!(error.desc.starts_with("Compression is not supported for this drive "), "{more}: {}", error.desc);
        ensure!(!new.exists() && scene.qmp.run("query-jobs", json!({}))? == json!([]), "{more}");
        ensure!((scene.qmp.bitmap("drive0", "b")?, scene.qmp.bitmap_hash("drive0", "b")?) == before, "{more}");
    }
    Ok(())
}

/// QEMU has the same words, with a device's name behind them that a node does not have.
#[test]
fn qemu_refuses_a_raw_target_in_the_same_words() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", MIB)?;
    let daemon = Daemon::start(Kind::Qsd, &lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let there = lab.path("there.raw");
    fs::File::create(&there)?.set_len(MIB)?;
    let file = json!({ "driver": "file", "filename": there });
    qmp.run("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": file }))?;
    let arguments = json!({ "job-id": "j", "device": "drive0", "sync": "full", "target": "t", "compress": true });
    let error = qmp.refused("blockdev-backup", arguments)?;
    ensure!(error.desc == "Compression is not supported for this drive ", "{}", error.desc);
    Ok(())
}

#[test]
fn a_failed_backup_is_compressed_again() -> Result<()> {
    let mut scene = Scene::new()?;
    let small = SmallFileSystem::mount(4 * MIB)?;
    let full = small.folder().join("full.qcow2");
    let instant = scene.lab.write("instant.raw", scene.disk.content()?)?;
    scene.backup(
        "drive-backup",
        json!({ "target": full, "format": "qcow2", "on-failure": "keep", "on-target-error": "report" }),
    )?;
    let end = scene.qmp.event(|event| event.name == "BLOCK_JOB_COMPLETED")?;
    ensure!(end.data["error"] == "No space left on device", "{}", end.data);
    scene.qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "concluded")?;
    scene.guest.write_at(&text(9, 2 * MIB), 2 * MIB)?;
    let raw = scene.lab.path("again.raw");
    let error = scene.qmp.refused("job-retry", json!({ "id": "j", "target": raw, "format": "raw" }))?;
    ensure!(error.desc.starts_with("Compression is not supported for this drive"), "{}", error.desc);
    ensure!(!raw.exists());
    let again = scene.lab.path("again.qcow2");
    scene.qmp.run("job-retry", json!({ "id": "j", "target": again, "format": "qcow2" }))?;
    scene.qmp.job_completed("j")?;
    compressed(&again, 90.0)?;
    images::assert_equal(&again, &instant)
}

#[test]
fn a_full_target_rests_until_there_is_space() -> Result<()> {
    let mut scene = Scene::new()?;
    let small = SmallFileSystem::mount(4 * MIB)?;
    let full = small.folder().join("full.qcow2");
    let instant = scene.lab.write("instant.raw", scene.disk.content()?)?;
    let members = json!({ "target": full, "format": "qcow2", "on-target-error": "enospc" });
    scene.backup("drive-backup", members)?;
    for _ in 0..2 {
        let paused = |event: &Event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused";
        scene.qmp.event(paused)?;
        let jobs = scene.qmp.run("query-block-jobs", json!({}))?;
        ensure!(jobs[0]["io-status"] == "nospace", "{jobs}");
        scene.guest.write_at(&text(9, 2 * MIB), 2 * MIB)?;
        scene.qmp.run("block-job-resume", json!({ "device": "j" }))?;
    }
    scene.qmp.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data["status"] == "paused")?;
    tools::run(tools::command("mount")?.args(["-o", "remount,size=64m"]).arg(small.folder()))?;
    scene.qmp.run("block-job-resume", json!({ "device": "j" }))?;
    scene.qmp.job_completed("j")?;
    compressed(&full, 90.0)?;
    images::assert_equal(&full, &instant)
}

#[test]
fn an_image_whose_writer_was_killed_is_refused_by_everybody() -> Result<()> {
    let mut scene = Scene::new()?;
    let full = scene.lab.path("full.qcow2");
    scene.backup("drive-backup", json!({ "target": full, "format": "qcow2", "speed": 4 * MIB }))?;
    // Something is in it.
    while scene.qmp.run("query-block-jobs", json!({}))?[0]["offset"].as_u64().is_none_or(|offset| offset < MIB) {
        std::thread::yield_now();
    }
    scene.daemon.process().kill()?;
    for words in [&["check"][..], &["info"], &["convert", "-O", "raw"]] {
        let mut command = tools::command("qemu-img")?;
        command.args(words).args(["-f", "qcow2"]).arg(&full);
        if words.len() > 1 {
            command.arg(scene.lab.path("out.raw"));
        }
        let output = command.output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && said.contains("unfinished backup"), "{words:?}: {said}");
    }
    Ok(())
}

#[test]
fn the_command_line_compresses() -> Result<()> {
    let scene = Scene::new()?;
    let full = scene.lab.path("cli.qcow2");
    let mut command = std::process::Command::new(blkmark_binary()?);
    command.arg("--control").arg(scene.daemon.control());
    command.args(["backup", "full", "--compress", "--disk", "drive0", "--target"]).arg(&full);
    tools::run(&mut command)?;
    compressed(&full, 90.0)?;
    images::assert_equal(&full, &scene.disk.path)
}
