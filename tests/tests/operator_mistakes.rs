//! The promise: an operator's mistake ends in one clear error and changes nothing.
//!
//! Mistakes at the start end the program with a status and one line that names what is wrong, and touch no disk; a
//! daemon that runs meanwhile goes on. Mistakes on the control socket are refused, or fail their job; the bitmap then
//! holds what it held, no half-made target is left, and the guest's writes go on without a single error.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use blkmark::frontend::{Guest, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{self, Daemon};
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::GIVE_UP;
use blkmark_tests::qmp::{JobEnd, Qmp};
use blkmark_tests::small_fs::SmallFileSystem;
use blkmark_tests::{images, tools};
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;

/// Runs a command that has to fail at once, with a status that is no signal's, and one line on stderr that holds
/// every one of `words`.
fn fails(lab: &Lab, command: &mut Command, words: &[&str]) -> Result<()> {
    let mut process = lab.start("mistake", command)?;
    let status = process.wait(GIVE_UP)?;
    let said = process.log();
    let code = status.code().with_context(|| format!("{status}: {said}"))?;
    ensure!(code != 0 && code != 101, "{command:?} ended with {code}: {said}");
    for word in words {
        ensure!(said.contains(word), "{command:?} does not say {word:?} but: {said}");
    }
    let lines = said.lines().filter(|line| !line.trim().is_empty()).count();
    ensure!(lines >= 1 && (lines == 1 || code == 2), "more than one line: {said}");
    Ok(())
}

fn serve(lab: &Lab, disks: &[Disk]) -> Result<Command> {
    daemon::serve_command(disks, &lab.path("mistaken.sock"))
}

#[test]
fn a_disk_that_cannot_be_served_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let good = lab.filled_disk("good", MIB)?;

    let missing = Disk { path: lab.path("missing.raw"), ..good.clone() };
    fails(&lab, &mut serve(&lab, &[missing])?, &["missing.raw", "No such file"])?;
    ensure!(!lab.path("missing.raw").exists(), "a missing disk was made");

    let folder = Disk { path: lab.folder().to_owned(), ..good.clone() };
    fails(&lab, &mut serve(&lab, &[folder])?, &[&lab.folder().display().to_string()])?;

    let odd = lab.disk("odd", MIB + 100)?;
    fails(&lab, &mut serve(&lab, std::slice::from_ref(&odd))?, &["odd.raw", "512"])?;
    ensure!(fs::metadata(&odd.path)?.len() == MIB + 100, "an odd-sized file was resized");

    let nowhere = Disk { socket: lab.path("no/such/folder.sock"), ..good.clone() };
    fails(&lab, &mut serve(&lab, &[nowhere])?, &["no/such/folder.sock"])?;

    let twice = [good.clone(), Disk { socket: lab.path("second.sock"), ..good.clone() }];
    fails(&lab, &mut serve(&lab, &twice)?, &["good"])?;
    Ok(())
}

#[test]
fn an_unknown_option_is_named() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", MIB)?;
    let binary = daemon::blkmark_binary()?;
    let option = daemon::disk_option(&disk);
    let with = |more: &str| format!("{option},{more}");
    for (value, words) in [
        (with("quues=2"), ["quues", ""]),
        (with("readonly=maybe"), ["readonly", "maybe"]),
        (with("queues=0"), ["queues", "0"]),
        (with("queues=many"), ["queues", "many"]),
        (with("queue-size=100"), ["queue-size", "100"]),
        (with("id=again"), ["id", ""]),
        (format!("id=a,path={}", disk.path.display()), ["socket", ""]),
        ("".to_owned(), ["disk", ""]),
    ] {
        let control = lab.path("control.sock");
        let mut command = Command::new(&binary);
        command.args(["serve", "--disk", &value, "--control"]).arg(control);
        fails(&lab, &mut command, &words).with_context(|| format!("--disk {value}"))?;
    }
    for arguments in [vec!["serve", "--dsik", "x"], vec!["sevre"], vec!["serve"]] {
        fails(&lab, Command::new(&binary).args(&arguments), &[]).with_context(|| format!("{arguments:?}"))?;
    }
    let before = lab.filled_disk("same", MIB)?.content()?;
    ensure!(disk.content()? == before, "the disk was touched");
    Ok(())
}

#[test]
fn what_a_live_daemon_uses_is_not_taken_from_it() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut client = Guest::connect(&disk.socket, Options::default())?.into_disk()?;

    // Its disk, by another blkmark and by QEMU's tools.
    let same_disk = Disk { socket: lab.path("other.sock"), ..disk.clone() };
    fails(&lab, &mut serve(&lab, &[same_disk])?, &["drive0.raw", "lock"])?;
    let answer = tools::answer(tools::command("qemu-io")?.args(["-f", "raw", "-c", "write 0 4k"]).arg(&disk.path))?;
    ensure!(answer.code != 0 && answer.text.contains("lock"), "qemu-io may write to a served disk: {}", answer.text);

    // Its sockets.
    let other = lab.filled_disk("other", MIB)?;
    let same_socket = Disk { socket: disk.socket.clone(), ..other.clone() };
    fails(&lab, &mut serve(&lab, &[same_socket])?, &["drive0.sock", "in use"])?;
    fails(&lab, &mut daemon::serve_command(&[other], daemon.control())?, &["control.sock", "in use"])?;

    client.write_at(&[9; 4096], 0)?;
    client.flush()?;
    daemon.qmp()?.run("query-version", json!({}))?;
    drop(client);
    Guest::connect(&disk.socket, Options::default())?.into_disk()?.flush()?;
    daemon.assert_running()?;
    daemon.stop()?;

    // And what a dead one left behind is no obstacle.
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    daemon.process().kill()?;
    ensure!(disk.socket.exists(), "a killed daemon cleared up after itself?");
    drop(daemon);
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    daemon.stop()?;
    Ok(())
}

#[test]
fn a_disk_that_qemu_uses_is_not_served() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let other = blkmark_tests::daemon::Daemon::start_with(
        daemon::Kind::Qsd,
        &lab,
        std::slice::from_ref(&disk),
        "qsd.sock",
        &[],
    )?;
    let second = Disk { socket: lab.path("second.sock"), ..disk.clone() };
    fails(&lab, &mut serve(&lab, &[second])?, &["drive0.raw", "lock"])?;
    other.stop()?;
    Daemon::blkmark(&lab, &[disk])?.stop()?;
    Ok(())
}

#[test]
fn a_misspelt_order_is_refused_in_qemus_words() -> Result<()> {
    beside_a_writing_guest(|_, qmp| {
        for (command, arguments, class, text) in [
            (
                "block-dirty-bitmap-ad",
                json!({}),
                "CommandNotFound",
                "The command block-dirty-bitmap-ad has not been found",
            ),
            (
                "block-dirty-bitmap-add",
                json!({"node": "drive0", "nmae": "b1"}),
                "GenericError",
                "Parameter 'name' is missing",
            ),
            (
                "block-dirty-bitmap-add",
                json!({"node": "drive0", "name": "b1", "granluarity": 512}),
                "GenericError",
                "Parameter 'granluarity' is unexpected",
            ),
            (
                "block-dirty-bitmap-add",
                json!({"node": "drive1", "name": "b1"}),
                "GenericError",
                "Cannot find device='drive1' nor node-name='drive1'",
            ),
            (
                "block-dirty-bitmap-add",
                json!({"node": "drive0", "name": "b1", "granularity": 1000}),
                "GenericError",
                "Granularity must be power of 2 and at least 512",
            ),
            (
                "block-dirty-bitmap-clear",
                json!({"node": "drive0", "name": "b"}),
                "GenericError",
                "Dirty bitmap 'b' not found",
            ),
            ("block-job-cancel", json!({"device": "j"}), "DeviceNotActive", "Block job 'j' not found"),
        ] {
            let error = qmp.refused(command, arguments.clone())?;
            ensure!(
                error.class.as_str() == class && error.desc == text,
                "{command} {arguments}: {}: {}",
                error.class,
                error.desc
            );
        }
        Ok(())
    })
}

#[test]
fn a_target_that_cannot_be_is_refused_and_not_left_behind() -> Result<()> {
    beside_a_writing_guest(|lab, qmp| {
        let source = lab.path("drive0.raw");
        let target = lab.path("target.qcow2");
        let order = |target: &Path, more: Value| {
            let mut order = json!({
                "job-id": "j0", "device": "drive0", "target": target, "sync": "incremental", "bitmap": "b0",
                "format": "qcow2",
            });
            if let (Some(order), Some(more)) = (order.as_object_mut(), more.as_object()) {
                order.extend(more.clone());
            }
            order
        };

        // A folder that does not exist, a format that does not exist, a bitmap that does not exist.
        let nowhere = lab.path("nowhere/t.qcow2");
        let error = qmp.refused("drive-backup", order(&nowhere, json!({})))?;
        ensure!(error.desc.contains("nowhere/t.qcow2") && error.desc.contains("No such file"), "{error}");
        let error = qmp.refused("drive-backup", order(&target, json!({"format": "spaghetti"})))?;
        ensure!(error.desc == "Unknown file format 'spaghetti'", "{error}");
        ensure!(!target.exists(), "a target was made for a refused order");
        let error = qmp.refused("drive-backup", order(&target, json!({"bitmap": "b7"})))?;
        ensure!(error.desc == "Bitmap 'b7' could not be found", "{error}");
        ensure!(!target.exists(), "a target was made for a refused order");

        // The source itself, by its name and by another.
        let link = lab.path("link.raw");
        std::os::unix::fs::symlink(&source, &link)?;
        let hard = lab.path("hard.raw");
        fs::hard_link(&source, &hard)?;
        for path in [&source, &link, &hard] {
            let error = qmp.refused("drive-backup", order(path, json!({"format": "raw", "mode": "existing"})))?;
            ensure!(!error.desc.is_empty(), "no text");
            qmp.refused("drive-backup", order(path, json!({"format": "raw"})))
                .with_context(|| format!("{} as a new target", path.display()))?;
        }
        ensure!(fs::metadata(&source)?.len() == SIZE, "the source was cut to length");

        // An existing target that is too small, is none of the format, or is missing.
        let small = lab.path("small.qcow2");
        tools::run(tools::command("qemu-img")?.args(["create", "-q", "-f", "qcow2"]).arg(&small).arg("1M"))?;
        let before = fs::read(&small)?;
        let error = qmp.refused("drive-backup", order(&small, json!({"mode": "existing"})))?;
        ensure!(error.desc == "Source and target image have different sizes", "{error}");
        ensure!(fs::read(&small)? == before, "a refused target was written to");
        let text = lab.write("text.qcow2", "this is no image")?;
        let error = qmp.refused("drive-backup", order(&text, json!({"mode": "existing"})))?;
        ensure!(error.desc.contains("text.qcow2"), "{error}");
        ensure!(fs::read(&text)? == b"this is no image", "a refused target was written to");
        let error = qmp.refused("drive-backup", order(&target, json!({"mode": "existing"})))?;
        ensure!(error.desc.contains("target.qcow2") && error.desc.contains("No such file"), "{error}");

        // One bad action of a transaction, and none is done.
        let good = json!({"type": "drive-backup", "data": order(&target, json!({}))});
        let bad = json!({"type": "block-dirty-bitmap-clear", "data": {"node": "drive0", "name": "b7"}});
        let add = json!({"type": "block-dirty-bitmap-add", "data": {"node": "drive0", "name": "b1"}});
        let error = qmp.refused("transaction", json!({"actions": [add, good, bad]}))?;
        ensure!(error.desc == "Dirty bitmap 'b7' not found", "{error}");
        ensure!(!target.exists(), "a refused transaction left a target");
        ensure!(qmp.bitmap("drive0", "b1").is_err(), "a refused transaction left a bitmap");
        let jobs = qmp.run("query-jobs", json!({}))?;
        ensure!(jobs == json!([]), "a refused order left a job: {jobs}");
        Ok(())
    })
}

#[test]
fn a_target_without_space_fails_its_job_and_nothing_else() -> Result<()> {
    let small = SmallFileSystem::mount(6 * MIB)?;
    beside_a_writing_guest(|_, qmp| {
        for format in ["qcow2", "raw"] {
            let target = small.folder().join(format!("target.{format}"));
            let order = json!({
                "job-id": "j0", "device": "drive0", "target": target, "format": format,
                "sync": "incremental", "bitmap": "b0",
            });
            // Raw targets may have their space taken before anything is copied: refused is as good as failed.
            match qmp.client().execute("drive-backup", order) {
                Ok(_) => {
                    let end = qmp.job_end("j0")?;
                    let JobEnd::Failed(error) = end else { return Err(anyhow!("{format}: {end:?}")) };
                    ensure!(error.contains("No space left"), "{format}: {error}");
                }
                Err(error) => ensure!(error.to_string().contains("No space left"), "{format}: {error}"),
            }
            if target.exists() {
                fs::remove_file(&target)?;
            }
        }
        Ok(())
    })
}

#[test]
fn a_target_without_space_stops_where_that_is_asked_for() -> Result<()> {
    let small = SmallFileSystem::mount(6 * MIB)?;
    beside_a_writing_guest(|_, qmp| {
        let target = small.folder().join("target.qcow2");
        let order = json!({
            "job-id": "j0", "device": "drive0", "target": target, "format": "qcow2", "sync": "incremental",
            "bitmap": "b0", "on-target-error": "enospc",
        });
        qmp.run("drive-backup", order)?;
        let event = qmp.event(|event| event.name == "BLOCK_JOB_ERROR")?;
        ensure!(event.data["action"] == "stop" && event.data["operation"] == "write", "{:?}", event.data);
        let jobs = qmp.run("query-block-jobs", json!({}))?;
        ensure!(jobs[0]["io-status"] == "nospace", "{jobs}");
        qmp.run("block-job-cancel", json!({"device": "j0", "force": true}))?;
        let end = qmp.job_end("j0")?;
        ensure!(end == JobEnd::Cancelled, "{end:?}");
        Ok(())
    })
}

/// Tells a story of mistakes about a disk with a bitmap `b0` of known marks and a guest that writes all the while; the
/// guest must not notice, and the bitmap must lose nothing.
///
/// The guest's writes go on, so the marks are told by two bitmaps: `still`, disabled before the story, must keep its
/// hash; `b0` must still give an increment that makes the old image equal to the disk.
fn beside_a_writing_guest(story: impl FnOnce(&Lab, &mut Qmp) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let before = lab.path("before.raw");
    fs::copy(&disk.path, &before)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    for name in ["b0", "still"] {
        qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": name, "persistent": false}))?;
    }
    let mut client = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    // Most of the disk changes, so that a small target cannot hold it.
    for at in (0..SIZE).step_by(MIB as usize) {
        let bytes: Vec<u8> = (0..MIB as usize).map(|index| (index as u64 * 31 + at / MIB + 1) as u8).collect();
        client.write_at(&bytes, at)?;
    }
    qmp.run("block-dirty-bitmap-disable", json!({"node": "drive0", "name": "still"}))?;
    let hash = qmp.bitmap_hash("drive0", "still")?;

    let writes = AtomicU64::new(0);
    let write_on = |stop: &Stop| {
        let mut at = 0;
        while !stop.is_due() {
            at = (at + 4096 * 37) % SIZE;
            client.write_at(&[at as u8 ^ 0x55; 4096], at).context("the guest noticed")?;
            writes.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    beside(vec![Box::new(write_on)], || {
        let told = story(&lab, &mut qmp);
        daemon.assert_running()?;
        told?;
        // The guest is still served after the last mistake.
        let goal = writes.load(Ordering::Relaxed) + 100;
        let deadline = Instant::now() + GIVE_UP;
        while writes.load(Ordering::Relaxed) < goal {
            ensure!(Instant::now() < deadline, "the guest is not served any more");
            std::thread::yield_now();
        }
        Ok(())
    })?;
    drop(client);

    ensure!(qmp.bitmap_hash("drive0", "still")? == hash, "a bitmap changed that nobody had touched");
    let bitmap = qmp.bitmap("drive0", "b0")?;
    ensure!(bitmap["busy"] == false && bitmap["recording"] == true, "{bitmap}");
    let image = lab.path("in-the-end.qcow2");
    images::create_on_top(&before, "raw", &image)?;
    qmp.run(
        "drive-backup",
        json!({
            "job-id": "last", "device": "drive0", "target": image, "format": "qcow2", "mode": "existing",
            "sync": "incremental", "bitmap": "b0",
        }),
    )?;
    qmp.job_completed("last")?;
    drop(qmp);
    daemon.stop()?;
    images::assert_sound(&image)?;
    images::assert_equal(&image, &disk.path)
}

#[test]
fn an_unreadable_disk_is_named() -> Result<()> {
    // Root reads everything: so blkmark runs as nobody, in a folder that nobody may enter.
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", MIB)?;
    let locked_away = disk.path.clone();
    set_mode(&locked_away, 0o000)?;
    set_mode(lab.folder(), 0o777)?;
    let binary = public_copy(&lab)?;
    let mut command = Command::new(tools::find("setpriv")?);
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .arg(binary)
        .args(["serve", "--disk", &daemon::disk_option(&disk), "--control"])
        .arg(lab.path("control.sock"));
    fails(&lab, &mut command, &["drive0.raw", "Permission denied"])
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// The binary where nobody may start it.
fn public_copy(lab: &Lab) -> Result<PathBuf> {
    let copy = lab.path("blkmark");
    fs::copy(daemon::blkmark_binary()?, &copy)?;
    set_mode(&copy, 0o755)?;
    Ok(copy)
}

#[test]
fn a_disk_that_shrinks_while_it_is_served_gives_errors_and_no_end() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut client = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    OpenOptions::new().write(true).open(&disk.path)?.set_len(MIB)?;
    let mut bytes = [0; 4096];
    ensure!(client.read_at(&mut bytes, 8 * MIB).is_err(), "bytes that are gone were read");
    client.read_at(&mut bytes, 0)?;
    let mut expected = [0; 4096];
    File::open(&disk.path)?.read_exact_at(&mut expected, 0)?;
    ensure!(bytes == expected, "what is left reads differently");
    drop(client);
    daemon.assert_running()?;
    daemon.stop()?;
    Ok(())
}
