//! The promise: bitmaps survive. A clean restart leaves them exactly as they were; kill -9 under load loses no bit; what a reboot
//! leaves (the live maps are gone) is wider and never narrower; and what cannot be vouched for says so, while the guest is
//! served.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Buffer, Guest, Options, Queue, Request, Wait};
use blkmark_tests::beside::{Stop, Worker, beside};
use blkmark_tests::blkio_client::BlkioClient;
use blkmark_tests::daemon::{Daemon, Kind, serve_command};
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::GIVE_UP;
use blkmark_tests::qmp::Qmp;
use blkmark_tests::random::Random;
use blkmark_tests::small_fs::SmallFileSystem;
use serde_json::json;

const SIZE: u64 = 192 * MIB;
const DEPTH: usize = 24;
const LONGEST: usize = 64 << 10;

fn store_of(disk: &Disk) -> PathBuf {
    PathBuf::from(format!("{}.blkmark", disk.path.display()))
}

fn add(qmp: &mut Qmp, name: &str, more: serde_json::Value) -> Result<()> {
    let mut data = json!({"node": "drive0", "name": name});
    for (key, value) in more.as_object().into_iter().flatten() {
        data[key] = value.clone();
    }
    qmp.run("block-dirty-bitmap-add", data).map(drop)
}

fn serve(lab: &Lab, disk: &Disk) -> Result<Daemon> {
    Daemon::blkmark(lab, std::slice::from_ref(disk))
}

fn write_some(disk: &Disk, seed: u64) -> Result<()> {
    let mut client = BlkioClient::connect(&disk.socket, 1)?;
    let mut random = Random(seed);
    for _ in 0..40 {
        let data = random.next().to_le_bytes().repeat(512);
        client.write(random.below(SIZE / 4096 - 1) * 4096, &data)?;
    }
    Ok(())
}

/// An increment over `base`, which has to make it equal the disk.
fn increment_equals_the_disk(lab: &Lab, mut daemon: Daemon, disk: &Disk, bitmap: &str, base: &Path) -> Result<()> {
    let image = lab.path("increment.qcow2");
    images::create_on_top(base, "raw", &image)?;
    let mut qmp = daemon.qmp()?;
    let data = json!({
        "job-id": "job", "device": "drive0", "target": image, "format": "qcow2", "mode": "existing",
        "sync": "incremental", "bitmap": bitmap,
    });
    qmp.run("drive-backup", data)?;
    qmp.job_completed("job").with_context(|| daemon.process().log_tail())?;
    drop(qmp);
    daemon.stop()?;
    images::assert_equal(&image, &disk.path)
}

#[test]
fn a_clean_restart_keeps_bitmaps_exactly() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let daemon = serve(&lab, &disk)?;
    ensure!(!store_of(&disk).exists(), "a disk without bitmaps has a store");
    let mut qmp = daemon.qmp()?;
    add(&mut qmp, "fine", json!({"granularity": 512}))?;
    add(&mut qmp, "off", json!({"granularity": 1 << 20}))?;
    add(&mut qmp, "passing", json!({"persistent": false}))?;
    write_some(&disk, 7)?;
    qmp.run("block-dirty-bitmap-disable", json!({"node": "drive0", "name": "off"}))?;
    write_some(&disk, 8)?;
    let (mut hashes, mut shown) = (Vec::new(), Vec::new());
    for name in ["fine", "off"] {
        hashes.push(qmp.bitmap_hash("drive0", name)?);
        shown.push(qmp.bitmap("drive0", name)?);
    }
    ensure!(shown[0]["persistent"] == true && shown[0]["recording"] == true && shown[1]["recording"] == false);
    ensure!(fs::metadata(store_of(&disk))?.permissions().mode() & 0o777 == 0o700);
    drop(qmp);
    daemon.stop()?;
    for _ in 0..2 {
        let daemon = serve(&lab, &disk)?;
        let mut qmp = daemon.qmp()?;
        for (at, name) in ["fine", "off"].into_iter().enumerate() {
            ensure!(qmp.bitmap("drive0", name)? == shown[at], "{name} is shown differently");
            ensure!(qmp.bitmap_hash("drive0", name)? == hashes[at], "the bits of {name} differ");
        }
        ensure!(qmp.bitmap("drive0", "passing").is_err(), "a bitmap that is not persistent survived");
        drop(qmp);
        daemon.stop()?;
    }
    Ok(())
}

#[test]
fn kill_nine_under_load_loses_no_bit() -> Result<()> {
    survives(false)
}

#[test]
fn a_reboot_widens_and_loses_no_bit() -> Result<()> {
    survives(true)
}

fn survives(reboot: bool) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?.with_queues(2);
    let before = lab.path("before.raw");
    fs::copy(&disk.path, &before)?;
    let tmpfs = SmallFileSystem::mount(16 << 20)?;
    let runtime = tmpfs.folder().display().to_string();
    let start = |n: u32| {
        let more = ["--runtime-dir", &runtime];
        Daemon::start_with(Kind::Blkmark, &lab, std::slice::from_ref(&disk), &format!("control-{n}.sock"), &more)
    };
    let mut daemon = start(0)?;
    let mut qmp = daemon.qmp()?;
    add(&mut qmp, "b", json!({}))?;
    add(&mut qmp, "still", json!({}))?;
    write_some(&disk, 3)?;
    qmp.run("block-dirty-bitmap-disable", json!({"node": "drive0", "name": "still"}))?;
    let still = qmp.bitmap_hash("drive0", "still")?;
    drop(qmp);
    for round in 1..4 {
        let mut guest = Guest::connect(&disk.socket, Options::default().queues(2))?;
        let done = AtomicU64::new(0);
        let writers = guest.take_queues().into_iter().map(|queue| {
            let (done, seed) = (&done, u64::from(round) * 77 + queue.index() as u64);
            Box::new(move |stop: &Stop| {
                // How it ends is not the matter: the daemon is killed under it.
                let _ = keep_writing(queue, stop, done, seed);
                Ok(())
            }) as Worker<'_>
        });
        beside(writers.collect(), || {
            let deadline = Instant::now() + GIVE_UP;
            while done.load(Ordering::Relaxed) < 2000 {
                ensure!(Instant::now() < deadline, "no progress\n{}", daemon.process().log_tail());
                std::thread::yield_now();
            }
            daemon.process().kill()?;
            Ok(())
        })?;
        if reboot {
            for entry in fs::read_dir(tmpfs.folder())? {
                fs::remove_file(entry?.path())?;
            }
        }
        daemon = start(round)?;
        let mut qmp = daemon.qmp()?;
        let shown = qmp.bitmap("drive0", "b")?;
        ensure!(shown["recording"] == true && shown.get("inconsistent").is_none(), "{shown}");
        ensure!(qmp.bitmap_hash("drive0", "still")? == still, "a bitmap that records nothing changed");
    }
    increment_equals_the_disk(&lab, daemon, &disk, "b", &before)
}

fn keep_writing(mut queue: Queue, stop: &Stop, done: &AtomicU64, seed: u64) -> Result<()> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
    let mut free: Vec<usize> = (0..DEPTH).collect();
    let mut completions = Vec::new();
    while !stop.is_due() {
        while let Some(slot) = free.pop() {
            let len = (1 + random.below(LONGEST as u64 / 4096)) * 4096;
            let buffer = Buffer::slot(slot, len as usize);
            let bytes: Vec<u8> = random.next().to_le_bytes().repeat(len as usize / 8);
            queue.write_data(buffer.offset, &bytes)?;
            let sector = random.below((SIZE - len) / 4096) * 8;
            queue.submit(Request::Write { sector, buffer }, slot as u64)?;
        }
        queue.kick()?;
        if queue.wait(Some(Duration::from_millis(100)))? == Wait::TimedOut {
            continue;
        }
        queue.completions(&mut completions)?;
        done.fetch_add(completions.len() as u64, Ordering::Relaxed);
        free.extend(completions.drain(..).map(|completion| completion.token as usize));
    }
    Ok(())
}

#[test]
fn a_disk_that_was_changed_or_swapped_meanwhile_makes_bitmaps_inconsistent() -> Result<()> {
    for swap in [false, true] {
        let lab = Lab::new()?;
        let disk = lab.disk("drive0", SIZE)?;
        let daemon = serve(&lab, &disk)?;
        add(&mut daemon.qmp()?, "b", json!({}))?;
        write_some(&disk, 5)?;
        daemon.stop()?;
        if swap {
            let other = lab.path("other.raw");
            fs::copy(&disk.path, &other)?;
            fs::rename(&other, &disk.path)?;
        } else {
            fs::OpenOptions::new().write(true).open(&disk.path).and_then(|file| {
                use std::os::unix::fs::FileExt;
                file.write_all_at(b"x", 4096)
            })?;
        }
        let daemon = serve(&lab, &disk)?;
        let mut qmp = daemon.qmp()?;
        let shown = qmp.bitmap("drive0", "b")?;
        ensure!(shown["inconsistent"] == true && shown["recording"] == false, "swap={swap}: {shown}");
        let name = json!({"node": "drive0", "name": "b"});
        for verb in ["clear", "enable", "disable"] {
            let refused = qmp.refused(&format!("block-dirty-bitmap-{verb}"), name.clone())?;
            ensure!(refused.to_string().contains("Bitmap 'b' is inconsistent and cannot be used"), "{refused}");
        }
        write_some(&disk, 6)?;
        qmp.run("block-dirty-bitmap-remove", name)?;
        add(&mut qmp, "b", json!({}))?;
        ensure!(qmp.bitmap("drive0", "b")?.get("inconsistent").is_none());
        drop(qmp);
        daemon.stop()?;
    }
    Ok(())
}

#[test]
fn a_damaged_store_never_stops_the_disk_from_being_served() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let daemon = serve(&lab, &disk)?;
    add(&mut daemon.qmp()?, "b", json!({}))?;
    write_some(&disk, 5)?;
    daemon.stop()?;
    for slot in ["slot.0", "slot.1"] {
        fs::write(store_of(&disk).join(slot), b"nonsense")?;
    }
    let daemon = serve(&lab, &disk)?;
    let mut qmp = daemon.qmp()?;
    ensure!(qmp.bitmap("drive0", "b").is_err());
    write_some(&disk, 6)?;
    let aside = PathBuf::from(format!("{}.damaged-1", store_of(&disk).display()));
    ensure!(aside.join("slot.0").exists(), "the damaged store was not kept");
    add(&mut qmp, "b", json!({}))?;
    drop(qmp);
    daemon.stop()?;
    Ok(())
}

#[test]
fn a_full_file_system_under_the_store_refuses_and_the_guest_goes_on() -> Result<()> {
    let lab = Lab::new()?;
    let small = SmallFileSystem::mount(256 << 10)?;
    let disk = lab.disk("drive0", SIZE)?;
    let mut command = std::process::Command::new(blkmark_tests::daemon::blkmark_binary()?);
    command.arg("serve").arg("--disk").arg(format!(
        "id=drive0,path={},socket={},bitmaps={}",
        disk.path.display(),
        disk.socket.display(),
        small.folder().join("store").display()
    ));
    let control = lab.path("control.sock");
    command.arg("--control").arg(&control);
    let mut process = lab.start("blkmark", &mut command)?;
    process.first_line()?;
    let mut qmp = Qmp::connect(&control)?;
    add(&mut qmp, "b", json!({}))?;
    write_some(&disk, 5)?;
    let hash = qmp.bitmap_hash("drive0", "b")?;
    fs::write(small.folder().join("filler"), vec![1; 200 << 10]).ok();
    let mut filler = 0;
    while fs::write(small.folder().join(format!("filler-{filler}")), [1; 4096]).is_ok() {
        filler += 1;
    }
    let refused = qmp.refused("block-dirty-bitmap-disable", json!({"node": "drive0", "name": "b"}))?;
    ensure!(refused.to_string().contains("No space left on device"), "{refused}");
    let shown = qmp.bitmap("drive0", "b")?;
    ensure!(shown["recording"] == true && shown.get("inconsistent").is_none(), "{shown}");
    ensure!(qmp.bitmap_hash("drive0", "b")? == hash);
    write_some(&disk, 6)?;
    ensure!(qmp.bitmap_hash("drive0", "b")? != hash, "it does not record any more");
    fs::remove_file(small.folder().join("filler"))?;
    qmp.run("block-dirty-bitmap-disable", json!({"node": "drive0", "name": "b"}))?;
    Ok(())
}

#[test]
fn without_a_store_only_what_is_not_persistent_can_be_had() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let mut command = std::process::Command::new(blkmark_tests::daemon::blkmark_binary()?);
    let (path, socket) = (disk.path.display(), disk.socket.display());
    command.arg("serve").arg("--disk").arg(format!("id=drive0,path={path},socket={socket},bitmaps=off"));
    let control = lab.path("control.sock");
    let mut process = lab.start("blkmark", command.arg("--control").arg(&control))?;
    process.first_line()?;
    let mut qmp = Qmp::connect(&control)?;
    let refused = qmp.refused("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b", "persistent": true}))?;
    ensure!(refused.to_string().contains("no bitmap store (bitmaps=off)"), "{refused}");
    add(&mut qmp, "b", json!({"persistent": false}))?;
    ensure!(!store_of(&disk).exists());
    Ok(())
}

#[test]
fn two_daemons_do_not_share_a_store() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let other = lab.disk("drive1", SIZE)?;
    let daemon = serve(&lab, &disk)?;
    add(&mut daemon.qmp()?, "b", json!({}))?;
    let mut command = serve_command(&[], &lab.path("second.sock"))?;
    let (path, socket) = (other.path.display(), other.socket.display());
    command.arg("--disk").arg(format!("id=drive1,path={path},socket={socket},bitmaps={}", store_of(&disk).display()));
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && text.contains("is in use by another process or disk"), "{text}");
    daemon.stop()?;
    Ok(())
}
