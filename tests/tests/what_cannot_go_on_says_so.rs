//! The promise: what a killed blkmark leaves of a backup, or of a populate (`searches`), and cannot be gone on with ends with a clear word. The job is shown as
//! concluded with the reason, its bitmap is as if it had never begun, the disk is served, nothing is left behind, and
//! nobody gets an image that is not what was ordered. That holds for every file of the backup that is gone, cut
//! short or damaged, for a target that is gone or another, and for a machine that was started anew.

#[path = "what_cannot_go_on_says_so/searches.rs"]
mod searches;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use blkmark_tests::blkio_client::BlkioClient;
use blkmark_tests::daemon::{Daemon, Kind, blkmark_binary};
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::GIVE_UP;
use blkmark_tests::qmp::Qmp;
use blkmark_tests::small_fs::SmallFileSystem;
use blkmark_tests::tools;
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;
const UNIT: u64 = 64 << 10;

struct Story {
    lab: Lab,
    disk: Disk,
    tmpfs: SmallFileSystem,
    starts: usize,
}

impl Story {
    fn new() -> Result<Story> {
        let lab = Lab::new()?;
        let disk = lab.filled_disk("drive0", SIZE)?;
        Ok(Story { lab, disk, tmpfs: SmallFileSystem::mount(96 * MIB)?, starts: 0 })
    }

    fn start(&mut self) -> Result<Daemon> {
        self.starts += 1;
        let (disks, control) = (std::slice::from_ref(&self.disk), format!("control-{}.sock", self.starts));
        let runtime = self.tmpfs.folder().display().to_string();
        Daemon::start_with(Kind::Blkmark, &self.lab, disks, &control, &["--runtime-dir", &runtime])
    }

    fn write(&self, units: impl Iterator<Item = u64>, seed: u8) -> Result<()> {
        let mut client = BlkioClient::connect(&self.disk.socket, 1)?;
        for unit in units {
            client.write(unit * UNIT, &[seed ^ unit as u8; 4096])?;
        }
        Ok(())
    }

    /// The only file of this kind that points in time have left.
    fn left(&self, kind: &str) -> Result<PathBuf> {
        let found = self.all_left()?.into_iter().find(|path| path.extension().is_some_and(|end| end == kind));
        found.with_context(|| format!("no {kind} among {:?}", self.all_left()))
    }

    /// The file of this kind that belongs to the point or job in whose note this stands.
    fn left_of(&self, noted: &str, kind: &str) -> Result<PathBuf> {
        for path in self.all_left()? {
            if path.extension().is_some_and(|end| end == "note") && fs::read_to_string(&path)?.contains(noted) {
                return Ok(path.with_extension(kind));
            }
        }
        anyhow::bail!("no note of {noted} among {:?}", self.all_left()?)
    }

    /// Waits until each job has brought something to its target and noted it, which it does with what comes a tenth of a second
    /// later.
    fn brought_something(&self, qmp: &mut Qmp) -> Result<()> {
        loop {
            let jobs = qmp.run("query-block-jobs", json!({}))?;
            if jobs.as_array().into_iter().flatten().all(|job| job["offset"].as_u64() > Some(UNIT)) {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }

    fn all_left(&self) -> Result<Vec<PathBuf>> {
        let mut left = Vec::new();
        for directory in [self.lab.folder(), self.tmpfs.folder()] {
            for entry in fs::read_dir(directory)? {
                let path = entry?.path();
                if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(".blkmark-point-")) {
                    left.push(path);
                }
            }
        }
        Ok(left)
    }

    /// A full backup is done, and an increment is under way when the daemon is killed; then `damage` is done.
    /// Gives the full image.
    fn killed(&mut self, damage: impl FnOnce(&Story) -> Result<()>) -> Result<PathBuf> {
        let mut daemon = self.start()?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?;
        let full = self.lab.path("full.raw");
        let order = json!({"job-id": "full", "device": "drive0", "target": full, "format": "raw", "sync": "full",
            "bitmap": "b", "bitmap-mode": "on-success"});
        qmp.run("drive-backup", order)?;
        qmp.job_completed("full")?;
        self.write(0..200, 1)?;
        let target = self.lab.path("increment.raw");
        fs::copy(&full, &target)?;
        let order = json!({"job-id": "inc", "device": "drive0", "target": target, "format": "raw", "mode": "existing",
            "sync": "incremental", "bitmap": "b", "speed": 10 * UNIT});
        qmp.run("drive-backup", order)?;
        // Some of it is copied, and some of what is not is saved.
        while qmp.run("query-block-jobs", json!({}))?[0]["offset"].as_u64() < Some(5 * UNIT) {
            std::thread::yield_now();
        }
        self.write((0..SIZE / UNIT).filter(|unit| unit % 3 == 0), 2)?;
        daemon.process().kill()?;
        damage(self)?;
        Ok(full)
    }

    /// What a client hears that connects now, before the answer to its first command.
    fn told(&self, daemon: &Daemon) -> Result<Vec<Value>> {
        let mut qmp = daemon.qmp()?;
        let client = qmp.client();
        client.send_raw(b"{\"execute\": \"query-version\"}\n")?;
        let mut told = Vec::new();
        loop {
            let message = client.receive_raw(GIVE_UP)?.context("an answer")?;
            if message.get("return").is_some() {
                return Ok(told);
            }
            told.push(message);
        }
    }

    /// It ended, for this reason; and nothing else came of it.
    fn ends(mut self, reason: &str, damage: impl FnOnce(&Story) -> Result<()>) -> Result<()> {
        let full = self.killed(damage)?;
        let mut daemon = self.start()?;
        let log = daemon.process().log();
        let mut qmp = daemon.qmp()?;
        let jobs = qmp.run("query-jobs", json!({}))?;
        let error = jobs[0]["error"].as_str().unwrap_or_default().to_owned();
        ensure!(jobs[0]["id"] == "inc" && jobs[0]["status"] == "concluded" && error.contains(reason), "{jobs}\n{log}");
        ensure!(log.contains(reason) && log.contains("ended with the process"), "{log}");
        let bitmap = qmp.bitmap("drive0", "b")?;
        ensure!(bitmap["busy"] == false && bitmap.get("inconsistent").is_none(), "{bitmap}");
        ensure!(self.all_left()?.is_empty(), "{:?}", self.all_left()?);
        self.write((0..SIZE / UNIT).filter(|unit| unit % 7 == 0), 3)?;
        // It gives way to a job of its name, which has to copy all that it would have, and what came since.
        let target = self.lab.path("again.raw");
        fs::copy(&full, &target)?;
        let order = json!({"job-id": "inc", "device": "drive0", "target": target, "format": "raw", "mode": "existing",
            "sync": "incremental", "bitmap": "b"});
        qmp.run("drive-backup", order)?;
        qmp.job_completed("inc").with_context(|| daemon.process().log_tail())?;
        ensure!(qmp.run("query-jobs", json!({}))? == json!([]));
        drop(qmp);
        daemon.stop()?;
        equal(&target, &self.disk)
    }
}

fn equal(image: &Path, disk: &Disk) -> Result<()> {
    let (image, disk) = (fs::read(image)?, disk.content()?);
    let differs = image.iter().zip(&disk).position(|(image, disk)| image != disk);
    ensure!(image.len() == disk.len() && differs.is_none(), "the image differs from the disk at {differs:?}");
    Ok(())
}

fn flip(path: &Path, from: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let bytes = fs::read(path)?;
    let at = bytes.iter().skip(from as usize).position(|byte| *byte != 0).context("nothing but zeroes")? as u64 + from;
    file.write_all_at(&[bytes[at as usize] ^ 1], at).map_err(Into::into)
}

fn cut(path: &Path) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(file.metadata()?.len() / 2).map_err(Into::into)
}

#[test]
fn a_ledger_that_is_gone() -> Result<()> {
    Story::new()?.ends("its ledger cannot be read", |story| Ok(fs::remove_file(story.left("ledger")?)?))
}

#[test]
fn a_ledger_that_is_cut_short() -> Result<()> {
    Story::new()?.ends("its ledger cannot be read", |story| cut(&story.left("ledger")?))
}

#[test]
fn a_ledger_with_a_flipped_bit() -> Result<()> {
    Story::new()?.ends("its ledger cannot be read: a place is damaged", |story| flip(&story.left("ledger")?, 4096))
}

#[test]
fn a_note_that_is_gone() -> Result<()> {
    Story::new()?.ends("what it had noted is gone", |story| Ok(fs::remove_file(story.left("note")?)?))
}

#[test]
fn a_note_with_a_flipped_bit() -> Result<()> {
    Story::new()?.ends("its note is damaged", |story| flip(&story.left("note")?, 100))
}

#[test]
fn scratch_that_is_gone() -> Result<()> {
    Story::new()?.ends("its scratch cannot be used", |story| Ok(fs::remove_file(story.left("memory")?)?))
}

#[test]
fn scratch_that_is_cut_short() -> Result<()> {
    Story::new()?.ends("its scratch cannot be used: scratch is not as it was left", |story| cut(&story.left("memory")?))
}

#[test]
fn a_target_that_is_gone() -> Result<()> {
    Story::new()?
        .ends("its target cannot be gone on with", |story| Ok(fs::remove_file(story.lab.path("increment.raw"))?))
}

#[test]
fn a_target_that_is_another_file() -> Result<()> {
    Story::new()?.ends("is another file", |story| {
        let target = story.lab.path("increment.raw");
        fs::copy(&target, story.lab.path("other.raw"))?;
        Ok(fs::rename(story.lab.path("other.raw"), target)?)
    })
}

#[test]
fn a_machine_that_was_started_anew() -> Result<()> {
    Story::new()?.ends("what it had noted is gone", |story| {
        for entry in fs::read_dir(story.tmpfs.folder())? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    })
}

#[test]
fn every_client_that_comes_hears_of_it_until_somebody_dismisses_it() -> Result<()> {
    let mut story = Story::new()?;
    let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    story.killed(|story| cut(&story.left("ledger")?))?;
    let daemon = story.start()?;
    let first = story.told(&daemon)?;
    ensure!(first.len() == 2 && first == story.told(&daemon)?, "{first:?} {:?}", story.told(&daemon)?);
    let end = json!({"device": "inc", "type": "backup", "speed": 0, "offset": 0, "len": SIZE,
        "error": first[0]["data"]["error"]});
    ensure!(first[0]["event"] == "BLOCK_JOB_COMPLETED" && first[0]["data"] == end, "{first:?}");
    ensure!(end["error"].as_str().is_some_and(|error| error.contains("its ledger cannot be read")), "{end}");
    ensure!(first[1]["event"] == "JOB_STATUS_CHANGE", "{first:?}");
    ensure!(first[1]["data"] == json!({"id": "inc", "status": "concluded"}), "{first:?}");
    for told in &first {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
        let time = told["timestamp"]["seconds"].as_u64().context("a time")?;
        ensure!((began..=now).contains(&time), "{told}");
    }
    // QEMU's own library hears it too.
    let script = story.lab.write("ended.py", include_str!("clients_qmp/ended.py"))?;
    let said = tools::run(tools::python("python")?.arg(script).arg(daemon.control()))?;
    ensure!(said.trim_end().ends_with("all is well"), "the script said:\n{said}");
    let (mut one, mut other) = (daemon.qmp()?, daemon.qmp()?);
    one.run("job-dismiss", json!({"id": "inc"}))?;
    other.event(|event| event.name == "JOB_STATUS_CHANGE" && event.data == json!({"id": "inc", "status": "null"}))?;
    let last = story.told(&daemon)?;
    ensure!(last.is_empty(), "{last:?}");
    drop((one, other));
    daemon.stop().map(drop)
}

/// A copy of a point in time and a comparison are under way when the daemon is killed; then `damage` is done.
fn killed_with_a_copy_and_a_comparison(story: &mut Story, damage: impl FnOnce(&Story) -> Result<()>) -> Result<()> {
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?;
    qmp.run("point-add", json!({"node": "drive0", "name": "p"}))?;
    let copy = json!({"job-id": "copy", "device": "p", "target": story.lab.path("p.raw"), "format": "raw",
        "sync": "full", "speed": UNIT});
    qmp.run("drive-backup", copy)?;
    let image = story.lab.path("older.raw");
    fs::copy(&story.disk.path, &image)?;
    let fill = json!({"job-id": "fill", "node": "drive0", "name": "b", "pattern": "diff", "image": image,
        "format": "raw", "mode": "overwrite", "speed": UNIT});
    qmp.run("block-dirty-bitmap-populate", fill)?;
    story.write(0..8, 1)?;
    let held = qmp.bitmap("drive0", "b")?;
    ensure!(held["busy"] == true, "{held}");
    story.brought_something(&mut qmp)?;
    // Of each its own, and that of the point.
    while story.all_left()?.iter().filter(|path| path.extension().is_some_and(|end| end == "notice")).count() < 3 {
        std::thread::yield_now();
    }
    daemon.process().kill()?;
    damage(story)
}

/// What of the copy and the comparison ended, and why; and which points are there. Nothing is left in the end.
fn ended(
    mut story: Story,
    damage: impl FnOnce(&Story) -> Result<()>,
    expected: &[(&str, &str, &str)],
    points: usize,
) -> Result<()> {
    let instant = story.disk.content()?;
    killed_with_a_copy_and_a_comparison(&mut story, damage)?;
    let mut daemon = story.start()?;
    let told = story.told(&daemon)?;
    let ends: Vec<_> = told.iter().filter(|told| told["event"] == "BLOCK_JOB_COMPLETED").collect();
    ensure!(ends.len() == expected.len(), "{told:?}\n{}", daemon.process().log());
    for (job, kind, reason) in expected {
        let end = ends.iter().find(|told| told["data"]["device"] == *job);
        let data = &end.with_context(|| format!("{job}: {told:?}"))?["data"];
        ensure!(data["type"] == *kind, "{told:?}");
        ensure!(data["error"].as_str().is_some_and(|error| error.contains(reason)), "{told:?}");
        daemon.qmp()?.run("job-dismiss", json!({"id": job}))?;
    }
    ensure!(story.told(&daemon)?.is_empty());
    let mut qmp = daemon.qmp()?;
    if expected.iter().all(|(job, ..)| *job != "fill") {
        // It goes on whatever becomes of the others.
        qmp.run("block-job-set-speed", json!({"device": "fill", "speed": 0}))?;
        qmp.job_completed("fill").with_context(|| daemon.process().log_tail())?;
    }
    let bitmap = qmp.bitmap("drive0", "b")?;
    ensure!(bitmap["busy"] == false && bitmap.get("inconsistent").is_none(), "{bitmap}");
    let nodes = qmp.run("query-named-block-nodes", json!({}))?;
    let there = nodes.as_array().into_iter().flatten().filter(|node| node["node-name"] == "p").count();
    ensure!(there == points, "{nodes}");
    if points == 1 {
        // It can be copied again, unless its copy goes on.
        if qmp.run("query-jobs", json!({}))? == json!([]) {
            let target = story.lab.path("again.raw");
            let copy = json!({"job-id": "copy", "device": "p", "target": target, "format": "raw", "sync": "full"});
            qmp.run("drive-backup", copy)?;
            qmp.job_completed("copy").with_context(|| daemon.process().log_tail())?;
            ensure!(fs::read(&target)? == instant);
        } else {
            qmp.run("block-job-set-speed", json!({"device": "copy", "speed": 0}))?;
            qmp.job_completed("copy").with_context(|| daemon.process().log_tail())?;
            ensure!(fs::read(story.lab.path("p.raw"))? == instant);
        }
        qmp.run("point-remove", json!({"name": "p"}))?;
    }
    // One that ends in the usual way leaves nothing to be told.
    let fill = json!({"job-id": "fill", "node": "drive0", "name": "b", "pattern": "all"});
    qmp.run("block-dirty-bitmap-populate", fill)?;
    qmp.job_completed("fill")?;
    drop(qmp);
    daemon.stop()?;
    ensure!(story.all_left()?.is_empty(), "{:?}", story.all_left()?);
    Ok(())
}

#[test]
fn a_comparison_whose_slip_is_damaged() -> Result<()> {
    let fill = ("fill", "bitmap-populate", "its note is damaged");
    ended(Story::new()?, |story| flip(&story.left("slip")?, 100), &[fill], 1)
}

#[test]
fn a_copy_of_a_point_and_a_comparison_on_a_machine_that_was_started_anew() -> Result<()> {
    let gone = |story: &Story| {
        for entry in fs::read_dir(story.tmpfs.folder())? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    };
    let reason = "what it had noted is gone";
    ended(Story::new()?, gone, &[("copy", "backup", reason), ("fill", "bitmap-populate", reason)], 0)
}

#[test]
fn a_copy_of_a_point_that_did_not_go_on() -> Result<()> {
    let copy = ("copy", "backup", "the point in time that it copies did not go on");
    for kind in ["ledger", "note"] {
        ended(Story::new()?, |story| cut(&story.left_of("\"point\":\"p\"", kind)?), &[copy], 0)?;
    }
    ended(Story::new()?, |story| Ok(fs::remove_file(story.left("memory")?)?), &[copy], 0)
}

#[test]
fn a_copy_of_a_point_whose_own_ledger_or_note_is_damaged() -> Result<()> {
    for (kind, from, reason) in [("ledger", 16, "its ledger cannot be read"), ("note", 100, "its note is damaged")] {
        let damage = |story: &Story| flip(&story.left_of("\"reader\"", kind)?, from);
        ended(Story::new()?, damage, &[("copy", "backup", reason)], 1)?;
    }
    Ok(())
}

#[test]
fn a_copy_of_a_point_whose_target_is_gone() -> Result<()> {
    let copy = ("copy", "backup", "its target cannot be gone on with");
    ended(Story::new()?, |story| Ok(fs::remove_file(story.lab.path("p.raw"))?), &[copy], 1)
}

/// One of a group cannot go on, so none does.
fn a_group(damage: impl FnOnce(&Story) -> Result<()>, reasons: [&str; 2]) -> Result<()> {
    let mut story = Story::new()?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?;
    qmp.run("point-add", json!({"node": "drive0", "name": "p"}))?;
    let (copy, backup) = (story.lab.path("p.raw"), story.lab.path("full.raw"));
    let data = json!({"actions": [
        {"type": "drive-backup", "data": {"job-id": "copy", "device": "p", "target": copy, "format": "raw", "sync": "full",
            "speed": UNIT}},
        {"type": "drive-backup", "data": {"job-id": "backup", "device": "drive0", "target": backup, "format": "raw",
            "sync": "full", "bitmap": "b", "bitmap-mode": "on-success", "speed": UNIT}},
    ], "properties": {"completion-mode": "grouped"}});
    qmp.run("transaction", data)?;
    story.brought_something(&mut qmp)?;
    daemon.process().kill()?;
    damage(&story)?;
    let daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    let jobs = qmp.run("query-jobs", json!({}))?;
    for (id, reason) in ["copy", "backup"].into_iter().zip(reasons) {
        let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == id);
        let job = job.with_context(|| jobs.to_string())?;
        let error = job["error"].as_str().unwrap_or_default();
        ensure!(job["status"] == "concluded" && error.contains(reason), "{jobs}");
    }
    ensure!(qmp.bitmap("drive0", "b")?["busy"] == false);
    // The point belongs to nobody's group.
    qmp.run("point-remove", json!({"name": "p"}))?;
    drop(qmp);
    daemon.stop()?;
    ensure!(story.all_left()?.is_empty(), "{:?}", story.all_left()?);
    Ok(())
}

#[test]
fn a_group_of_a_copy_of_a_point_and_a_backup() -> Result<()> {
    let (target, sibling) = ("its target cannot be gone on with", "another job of its group cannot be gone on with");
    a_group(|story| Ok(fs::remove_file(story.lab.path("p.raw"))?), [target, sibling])?;
    a_group(|story| Ok(fs::remove_file(story.lab.path("full.raw"))?), [sibling, target])
}

#[test]
fn a_job_of_the_same_name_is_not_taken_for_it() -> Result<()> {
    let mut story = Story::new()?;
    let full = story.killed(|story| cut(&story.left("ledger")?))?;
    let daemon = story.start()?;
    // Our own command, whose first connection has just been told of a job of this name that failed.
    let target = story.lab.path("again.raw");
    fs::copy(&full, &target)?;
    let mut command = Command::new(blkmark_binary()?);
    command.arg("--control").arg(daemon.control()).args(["backup", "incremental", "--disk", "drive0", "--bitmap", "b"]);
    command.args(["--format", "raw", "--existing", "--job", "inc", "--target"]).arg(&target);
    tools::run(&mut command)?;
    let told = story.told(&daemon)?;
    ensure!(told.is_empty(), "{told:?}");
    daemon.stop()?;
    equal(&target, &story.disk)
}

#[test]
fn a_daemon_that_served_the_disk_with_other_options_meanwhile() -> Result<()> {
    let mut story = Story::new()?;
    let full = story.killed(|_| Ok(()))?;
    // It does not look where this one's points are, and its guest overwrites what they have not saved.
    let disk = std::slice::from_ref(&story.disk);
    let meanwhile = Daemon::start_with(Kind::Blkmark, &story.lab, disk, "meanwhile.sock", &[])?;
    story.write(0..SIZE / UNIT, 9)?;
    meanwhile.stop()?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    let jobs = qmp.run("query-jobs", json!({}))?;
    ensure!(jobs[0]["id"] == "inc" && jobs[0]["status"] == "concluded" && jobs[0]["error"].is_string(), "{jobs}");
    let target = story.lab.path("again.raw");
    fs::copy(&full, &target)?;
    let order = json!({"job-id": "next", "device": "drive0", "target": target, "format": "raw", "mode": "existing",
        "sync": "incremental", "bitmap": "b"});
    qmp.run("drive-backup", order)?;
    qmp.job_completed("next").with_context(|| daemon.process().log_tail())?;
    qmp.run("job-dismiss", json!({"id": "inc"}))?;
    ensure!(qmp.run("query-jobs", json!({}))? == json!([]));
    drop(qmp);
    daemon.stop()?;
    equal(&target, &story.disk)
}

#[test]
fn scratch_with_a_flipped_bit_fails_the_job_and_gives_no_wrong_image() -> Result<()> {
    let mut story = Story::new()?;
    story.killed(|story| flip(&story.left("memory")?, 0))?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-job-set-speed", json!({"device": "inc", "speed": 0}))?;
    let error = qmp.job_failed("inc").with_context(|| daemon.process().log_tail())?;
    ensure!(error.contains("does not match its checksum"), "{error}");
    ensure!(qmp.bitmap("drive0", "b")?["busy"] == false);
    story.write(0..4, 5)?;
    drop(qmp);
    daemon.stop()?;
    ensure!(story.all_left()?.is_empty(), "{:?}", story.all_left()?);
    Ok(())
}
