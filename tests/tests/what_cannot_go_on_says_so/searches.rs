//! The same of a populate: what cannot be searched anew ends as one that failed, a bitmap that was made for it is gone, and any other
//! holds what it held and what was written. One that was killed while its end was being stored is told as what it came to.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::qmp::{JobEnd, Qmp};
use serde_json::{Value, json};

use crate::{SIZE, Story, UNIT, flip};

/// What was dirty before the search, and what is written meanwhile.
const BEFORE: u64 = 5;
const MEANWHILE: u64 = 3;

/// What a bitmap holds that was there.
const RECLAIMED: Option<u64> = Some((BEFORE + MEANWHILE) * UNIT);
/// The same where what was written before the kill is not known any more.
const WIDE: Option<u64> = Some(SIZE);

/// The end of a job that ended with its daemon.
const OVER: &str = "The job ended with the daemon that ran it: ";

impl Story {
    /// A comparison with an older image, into a bitmap with something in it or one that is made for it.
    fn searching(&mut self, made: bool, more: Value) -> Result<(Daemon, Qmp, PathBuf)> {
        let daemon = self.start()?;
        let mut qmp = daemon.qmp()?;
        let older = self.lab.path("older.raw");
        fs::copy(&self.disk.path, &older)?;
        let mut fill = json!({"job-id": "fill", "node": "drive0", "name": "b", "pattern": "diff", "image": older,
            "format": "raw", "mode": "overwrite", "speed": UNIT});
        for (member, value) in more.as_object().into_iter().flatten() {
            fill[member] = value.clone();
        }
        let add = json!({"node": "drive0", "name": "b"});
        if made {
            let actions = json!([{"type": "block-dirty-bitmap-add", "data": add},
                {"type": "block-dirty-bitmap-populate", "data": fill}]);
            // So that there is a store, and it tells what became of it.
            qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "other"}))?;
            qmp.run("transaction", json!({"actions": actions}))?;
        } else {
            qmp.run("block-dirty-bitmap-add", add)?;
            self.write(0..BEFORE, 1)?;
            qmp.run("block-dirty-bitmap-populate", fill)?;
        }
        self.write(100..100 + MEANWHILE, 2)?;
        Ok((daemon, qmp, older))
    }

    /// Starts again: the search has ended for this reason, and the bitmap holds so much, or is gone.
    fn has_ended(&mut self, left: Option<u64>, reason: &str) -> Result<()> {
        let mut daemon = self.start()?;
        let log = daemon.process().log();
        let mut qmp = daemon.qmp()?;
        let jobs = qmp.run("query-jobs", json!({}))?;
        let error = jobs[0]["error"].as_str().unwrap_or_default();
        ensure!(jobs[0]["id"] == "fill" && jobs[0]["type"] == "bitmap-populate", "{jobs}\n{log}");
        ensure!(jobs[0]["status"] == "concluded" && error.starts_with(OVER) && error.contains(reason), "{jobs}\n{log}");
        ensure!(log.contains(reason) && log.contains("ended with the process"), "{log}");
        qmp.run("job-dismiss", json!({"id": "fill"}))?;
        let bitmap = qmp.bitmap("drive0", "b");
        match left {
            None => ensure!(bitmap.is_err(), "{bitmap:?}"),
            Some(count) => {
                let bitmap = bitmap?;
                ensure!(bitmap["busy"] == false && bitmap["recording"] == true, "{bitmap}");
                ensure!(bitmap["count"] == count && bitmap.get("inconsistent").is_none(), "{bitmap}");
            }
        }
        ensure!(self.all_left()?.is_empty(), "{:?}", self.all_left()?);
        drop(qmp);
        daemon.stop().map(drop)
    }
}

/// Killed; then something happens to its older image.
fn image(reason: &str, damage: impl Fn(&PathBuf) -> Result<()>) -> Result<()> {
    for made in [false, true] {
        let mut story = Story::new()?;
        let (mut daemon, _, older) = story.searching(made, json!({}))?;
        daemon.process().kill()?;
        damage(&older)?;
        story.has_ended(if made { None } else { RECLAIMED }, reason)?;
    }
    Ok(())
}

#[test]
fn an_older_image_that_is_gone() -> Result<()> {
    image("cannot be gone on with: Could not open", |older| Ok(fs::remove_file(older)?))
}

#[test]
fn an_older_image_that_is_another_file() -> Result<()> {
    image("cannot be gone on with: it is another file", |older| {
        let other = older.with_extension("other");
        fs::copy(older, &other)?;
        Ok(fs::rename(other, older)?)
    })
}

#[test]
fn an_older_image_of_another_size() -> Result<()> {
    image("cannot be gone on with: it has another size", |older| {
        Ok(OpenOptions::new().write(true).open(older)?.set_len(SIZE / 2)?)
    })
}

#[test]
fn an_older_image_that_is_a_point_in_time_which_did_not_go_on() -> Result<()> {
    let mut story = Story::new()?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?;
    story.write(0..BEFORE, 1)?;
    qmp.run("point-add", json!({"node": "drive0", "name": "p"}))?;
    let fill =
        json!({"job-id": "fill", "node": "drive0", "name": "b", "pattern": "diff", "image-node": "p", "speed": UNIT});
    qmp.run("block-dirty-bitmap-populate", fill)?;
    story.write(100..100 + MEANWHILE, 2)?;
    drop(qmp);
    daemon.process().kill()?;
    flip(&story.left("ledger")?, 16)?;
    story.has_ended(RECLAIMED, "the point in time that it compares with did not go on")
}

/// It does not look where this one's notes are, so it ends the freeze.
#[test]
fn a_daemon_that_served_the_disk_with_other_options_in_the_middle_of_a_search() -> Result<()> {
    let mut story = Story::new()?;
    let (mut daemon, ..) = story.searching(false, json!({}))?;
    daemon.process().kill()?;
    let disk = std::slice::from_ref(&story.disk);
    Daemon::start_with(Kind::Blkmark, &story.lab, disk, "meanwhile.sock", &[])?.stop()?;
    story.has_ended(WIDE, "its bitmap is not in the freeze any more that it began with")
}

#[test]
fn a_bitmap_that_is_gone_with_the_process() -> Result<()> {
    let mut story = Story::new()?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b", "persistent": false}))?;
    let fill = json!({"job-id": "fill", "node": "drive0", "name": "b", "pattern": "all", "auto-finalize": false});
    qmp.run("block-dirty-bitmap-populate", fill)?;
    drop(qmp);
    daemon.process().kill()?;
    story.has_ended(None, "its bitmap is not in the freeze any more that it began with")
}

/// The bitmap was made in the same transaction, so nobody has ever seen it as one that can be used.
#[test]
fn a_search_on_a_machine_that_was_started_anew() -> Result<()> {
    for made in [false, true] {
        let mut story = Story::new()?;
        let (mut daemon, ..) = story.searching(made, json!({}))?;
        // Until it is there, nothing durable tells of the job.
        while story.left("notice").is_err() {
            std::thread::yield_now();
        }
        daemon.process().kill()?;
        for entry in fs::read_dir(story.tmpfs.folder())? {
            fs::remove_file(entry?.path())?;
        }
        let daemon = story.start()?;
        let mut qmp = daemon.qmp()?;
        let jobs = qmp.run("query-jobs", json!({}))?;
        let error = jobs[0]["error"].as_str().unwrap_or_default();
        ensure!(jobs[0]["id"] == "fill" && error.contains("what it had noted is gone"), "{jobs}");
        let bitmap = qmp.bitmap("drive0", "b")?;
        ensure!(bitmap["busy"] == false && (bitmap["inconsistent"] == true) == made, "{bitmap}");
        ensure!(story.all_left()?.is_empty(), "{:?}", story.all_left()?);
        drop(qmp);
        daemon.stop()?;
    }
    Ok(())
}

/// One of a group cannot be searched anew, so none goes on.
#[test]
fn a_group_of_a_search_and_a_backup() -> Result<()> {
    let sibling = "another job of its group cannot be gone on with";
    for (file, reasons) in
        [("older.raw", ["its older image", sibling]), ("full.raw", [sibling, "its target cannot be gone on with"])]
    {
        let mut story = Story::new()?;
        let mut daemon = story.start()?;
        let mut qmp = daemon.qmp()?;
        for bitmap in ["b", "c"] {
            qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": bitmap}))?;
        }
        let (older, full) = (story.lab.path("older.raw"), story.lab.path("full.raw"));
        fs::copy(&story.disk.path, &older)?;
        let data = json!({"actions": [
            {"type": "block-dirty-bitmap-populate", "data": {"job-id": "fill", "node": "drive0", "name": "b",
                "pattern": "diff", "image": older, "format": "raw", "speed": UNIT}},
            {"type": "drive-backup", "data": {"job-id": "backup", "device": "drive0", "target": full, "format": "raw",
                "sync": "full", "bitmap": "c", "bitmap-mode": "on-success", "speed": UNIT}},
        ], "properties": {"completion-mode": "grouped"}});
        qmp.run("transaction", data)?;
        story.brought_something(&mut qmp)?;
        drop(qmp);
        daemon.process().kill()?;
        fs::remove_file(story.lab.path(file))?;
        let daemon = story.start()?;
        let mut qmp = daemon.qmp()?;
        let jobs = qmp.run("query-jobs", json!({}))?;
        for (id, reason) in ["fill", "backup"].into_iter().zip(reasons) {
            let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == id);
            let job = job.with_context(|| jobs.to_string())?;
            let error = job["error"].as_str().unwrap_or_default();
            ensure!(job["status"] == "concluded" && error.contains(reason), "{jobs}");
        }
        for bitmap in ["b", "c"] {
            ensure!(qmp.bitmap("drive0", bitmap)?["busy"] == false);
        }
        drop(qmp);
        daemon.stop()?;
        ensure!(story.all_left()?.is_empty(), "{:?}", story.all_left()?);
    }
    Ok(())
}

/// As the slip was when what the job had come to was being stored.
fn storing(slip: &str) -> Result<String> {
    let (_, text) = slip.split_once('\n').context("a checksum")?;
    let text = text.trim_end_matches('\n').replace("\"commits\":false", "\"commits\":true");
    Ok(format!("{:08x}\n{text}\n", crc32fast::hash(text.as_bytes())))
}

/// A kill in the middle of that: the commit is in force, or it is not.
#[test]
fn a_search_that_was_killed_while_its_end_was_being_stored() -> Result<()> {
    // Not in force: it is searched once more, and succeeds.
    let mut story = Story::new()?;
    let (mut daemon, qmp, _) = story.searching(true, json!({}))?;
    drop(qmp);
    daemon.process().kill()?;
    let slip = story.left("slip")?;
    fs::write(&slip, storing(&fs::read_to_string(&slip)?)?)?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-job-set-speed", json!({"device": "fill", "speed": 0}))?;
    qmp.job_completed("fill").with_context(|| daemon.process().log_tail())?;
    ensure!(qmp.bitmap("drive0", "b")?["count"] == MEANWHILE * UNIT);
    drop(qmp);
    daemon.stop()?;

    // In force, and the slip is still there: it has succeeded, unless nothing says that this was about to be stored.
    for succeeded in [true, false] {
        let mut story = Story::new()?;
        let (mut daemon, mut qmp, _) = story.searching(true, json!({}))?;
        let slip = story.left("slip")?;
        let noted = fs::read_to_string(&slip)?;
        qmp.run("block-job-set-speed", json!({"device": "fill", "speed": 0}))?;
        qmp.job_completed("fill")?;
        ensure!(!slip.exists());
        drop(qmp);
        daemon.process().kill()?;
        fs::write(&slip, if succeeded { storing(&noted)? } else { noted })?;
        let daemon = story.start()?;
        let mut qmp = daemon.qmp()?;
        let jobs = qmp.run("query-jobs", json!({}))?;
        ensure!(jobs[0]["id"] == "fill" && jobs[0]["status"] == "concluded", "{jobs}");
        ensure!(jobs[0].get("error").is_none() == succeeded, "{jobs}");
        let bitmap = qmp.bitmap("drive0", "b")?;
        ensure!(bitmap["count"] == MEANWHILE * UNIT && bitmap["busy"] == false, "{bitmap}");
        drop(qmp);
        daemon.stop()?;
    }
    Ok(())
}

/// Whoever opened the store meanwhile has ended the freeze, without what was found: that is no success.
#[test]
fn a_search_whose_end_was_being_stored_before_another_daemon_served_the_disk() -> Result<()> {
    let mut story = Story::new()?;
    let (mut daemon, ..) = story.searching(false, json!({}))?;
    daemon.process().kill()?;
    let slip = story.left("slip")?;
    fs::write(&slip, storing(&fs::read_to_string(&slip)?)?)?;
    let disk = std::slice::from_ref(&story.disk);
    let mut meanwhile = Daemon::start_with(Kind::Blkmark, &story.lab, disk, "meanwhile.sock", &[])?;
    meanwhile.process().kill()?;
    story.has_ended(WIDE, "its end was being stored, so look whether it succeeded")
}

/// The phase of a ledger whose job is having its success stored.
const COMMITTING: u64 = 0x2f93_6ce0_187d_b5aa;
const PHASE_AT: u64 = 2048;

/// A bitmap that is not persistent is gone with the process, which says nothing of the commit; one that is still frozen says that
/// there was none.
#[test]
fn a_group_that_was_killed_before_its_end_was_stored_has_not_succeeded() -> Result<()> {
    let mut story = Story::new()?;
    let mut daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?;
    qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "c", "persistent": false}))?;
    let data = json!({"actions": [
        {"type": "block-dirty-bitmap-populate", "data": {"job-id": "fill", "node": "drive0", "name": "b", "pattern": "all"}},
        {"type": "drive-backup", "data": {"job-id": "backup", "device": "drive0", "target": story.lab.path("full.raw"),
            "format": "raw", "sync": "full", "bitmap": "c", "bitmap-mode": "on-success", "speed": UNIT}},
    ], "properties": {"completion-mode": "grouped"}});
    qmp.run("transaction", data)?;
    drop(qmp);
    daemon.process().kill()?;
    let slip = story.left("slip")?;
    fs::write(&slip, storing(&fs::read_to_string(&slip)?)?)?;
    let ledger = OpenOptions::new().write(true).open(story.left("ledger")?)?;
    ledger.write_all_at(&COMMITTING.to_le_bytes(), PHASE_AT)?;
    let daemon = story.start()?;
    let mut qmp = daemon.qmp()?;
    let jobs = qmp.run("query-jobs", json!({}))?;
    let ended =
        jobs.as_array().into_iter().flatten().filter(|job| job["status"] == "concluded" && job["error"].is_string());
    ensure!(ended.count() == 2, "{jobs}");
    let bitmap = qmp.bitmap("drive0", "b")?;
    ensure!(bitmap["count"] == 0 && bitmap["busy"] == false, "{bitmap}");
    drop(qmp);
    daemon.stop().map(drop)
}

#[test]
fn a_search_that_is_cancelled_while_it_rests_leaves_nothing() -> Result<()> {
    let mut story = Story::new()?;
    let (daemon, mut qmp, _) = story.searching(true, json!({}))?;
    qmp.run("job-pause", json!({"id": "fill"}))?;
    qmp.run("job-cancel", json!({"id": "fill"}))?;
    ensure!(qmp.job_end("fill")? == JobEnd::Cancelled);
    ensure!(qmp.bitmap("drive0", "b").is_err());
    ensure!(story.all_left()?.is_empty(), "{:?}", story.all_left()?);
    drop(qmp);
    daemon.stop().map(drop)
}
