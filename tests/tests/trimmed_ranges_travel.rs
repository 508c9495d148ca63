//! The promise: what a guest has trimmed or zeroed travels as such. An increment after it is small, the image takes no more space than
//! the disk, and reads as zeroes where the disk does: raw, qcow2, and over NBD.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest as FrontEnd, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::ext4;
use blkmark_tests::guest::Guest;
use blkmark_tests::images;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::Process;
use blkmark_tests::qmp::Qmp;
use blkmark_tests::tools::{command, run};
use serde_json::{Value, json};

const SIZE: u64 = 64 * MIB;

/// What is trimmed, what is zeroed with its space given back, what is zeroed in place.
const TRIMMED: (u64, u64) = (4 * MIB, 24 * MIB);
const UNMAPPED: (u64, u64) = (32 * MIB, 8 * MIB);
const ZEROED: (u64, u64) = (48 * MIB, 8 * MIB);

/// Bytes that are written as data after it.
const WRITTEN: u64 = 64 << 10;

/// Bytes that a file takes.
fn taken(file: &Path) -> Result<u64> {
    Ok(fs::metadata(file)?.blocks() * 512)
}

fn same(image: &Path, disk: &Path) -> Result<()> {
    run(command("qemu-img")?.args(["compare", "-f", "raw", "-F", "raw"]).arg(image).arg(disk))?;
    Ok(())
}

struct Scene {
    disk: Disk,
    guest: Attached,
    qmp: Qmp,
    _daemon: Daemon,
    lab: Lab,
}

impl Scene {
    /// A disk that is full, with bitmap b.
    fn new() -> Result<Self> {
        let lab = Lab::new()?;
        let disk = lab.filled_disk("drive0", SIZE)?;
        let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        let mut qmp = daemon.qmp()?;
        qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
        let guest = FrontEnd::connect(&disk.socket, Options::default())?.into_disk()?;
        Ok(Self { disk, guest, qmp, _daemon: daemon, lab })
    }

    fn backup(&mut self, command: &str, more: Value) -> Result<()> {
        let mut arguments = json!({ "job-id": "j", "device": "drive0" });
        for (name, value) in more.as_object().context("members")? {
            arguments[name] = value.clone();
        }
        self.qmp.run(command, arguments)?;
        self.qmp.job_completed("j")
    }

    fn trim(&mut self) -> Result<()> {
        self.guest.discard(TRIMMED.0, TRIMMED.1)?;
        self.guest.write_zeroes(UNMAPPED.0, UNMAPPED.1, true)?;
        self.guest.write_zeroes(ZEROED.0, ZEROED.1, false)?;
        self.guest.write_at(&[0x5a; WRITTEN as usize], SIZE - WRITTEN)?;
        self.guest.flush()?;
        let marked = self.qmp.bitmap("drive0", "b")?["count"].as_u64();
        ensure!(marked == Some(TRIMMED.1 + UNMAPPED.1 + ZEROED.1 + WRITTEN), "{marked:?} bytes are marked");
        Ok(())
    }
}

/// A file behind an NBD server that counts what it is sent as data.
struct Counted {
    server: Process,
    file: PathBuf,
    socket: PathBuf,
    statistics: PathBuf,
}

impl Counted {
    fn serve(lab: &Lab) -> Result<Self> {
        let [file, socket, statistics] = ["nbd.raw", "nbd.sock", "nbd.txt"].map(|name| lab.path(name));
        fs::File::create_new(&file)?.set_len(SIZE)?;
        let mut nbdkit = command("nbdkit")?;
        nbdkit.args(["--foreground", "--exit-with-parent", "--filter=stats", "--unix"]).arg(&socket).arg("file");
        nbdkit.arg(&file).arg(format!("statsfile={}", statistics.display()));
        let server = lab.start("nbdkit", &mut nbdkit)?;
        let began = std::time::Instant::now();
        while !socket.exists() && began.elapsed() < blkmark_tests::process::GIVE_UP {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        Ok(Self { server, file, socket, statistics })
    }

    /// Ends it; the line of its statistics for an operation, if there was any.
    fn ended(mut self) -> Result<String> {
        self.server.terminate()?;
        Ok(fs::read_to_string(&self.statistics)?)
    }
}

#[test]
fn into_a_raw_image() -> Result<()> {
    let mut scene = Scene::new()?;
    let image = scene.lab.path("image.raw");
    scene.backup(
        "drive-backup",
        json!({ "sync": "full", "bitmap": "b", "bitmap-mode": "on-success", "format": "raw", "target": image }),
    )?;
    ensure!(taken(&image)? >= SIZE, "the full image has all of the disk");
    scene.trim()?;
    scene.backup(
        "drive-backup",
        json!({ "sync": "incremental", "bitmap": "b", "format": "raw", "target": image, "mode": "existing" }),
    )?;
    same(&image, &scene.disk.path)?;
    // What was zeroed in place takes space on the disk, and none in the image.
    let expect = SIZE - TRIMMED.1 - UNMAPPED.1 - ZEROED.1;
    ensure!(taken(&image)? <= expect + MIB, "{} bytes for {expect}", taken(&image)?);
    // A new image is as sparse from the beginning.
    let fresh = scene.lab.path("fresh.raw");
    scene.backup("drive-backup", json!({ "sync": "full", "format": "raw", "target": fresh }))?;
    same(&fresh, &scene.disk.path)?;
    ensure!(taken(&fresh)? <= expect + MIB, "{} bytes for {expect}", taken(&fresh)?);
    Ok(())
}

#[test]
fn into_a_chain_of_qcow2_images() -> Result<()> {
    let mut scene = Scene::new()?;
    let (base, top) = (scene.lab.path("base.qcow2"), scene.lab.path("top.qcow2"));
    scene.backup(
        "drive-backup",
        json!({ "sync": "full", "bitmap": "b", "bitmap-mode": "on-success", "format": "qcow2", "target": base }),
    )?;
    scene.trim()?;
    images::create_on_top(&base, "qcow2", &top)?;
    scene.backup(
        "drive-backup",
        json!({ "sync": "incremental", "bitmap": "b", "format": "qcow2", "target": top, "mode": "existing" }),
    )?;
    images::assert_sound(&top)?;
    images::assert_equal(&top, &scene.disk.path)?;
    let length = fs::metadata(&top)?.len();
    ensure!(length <= WRITTEN + MIB, "an increment of {length} bytes for {WRITTEN} that were written");
    let restored = images::restore(&top)?;
    let expect = SIZE - TRIMMED.1 - UNMAPPED.1 - ZEROED.1;
    ensure!(taken(&restored)? <= expect + MIB, "restored, it takes {} bytes for {expect}", taken(&restored)?);
    Ok(())
}

#[test]
fn to_an_nbd_server() -> Result<()> {
    let mut scene = Scene::new()?;
    let nbd = Counted::serve(&scene.lab)?;
    let server = json!({ "type": "unix", "path": nbd.socket });
    scene.qmp.run("blockdev-add", json!({ "driver": "nbd", "node-name": "t", "server": server }))?;
    scene.backup(
        "blockdev-backup",
        json!({ "sync": "full", "bitmap": "b", "bitmap-mode": "on-success", "target": "t" }),
    )?;
    scene.trim()?;
    scene.backup("blockdev-backup", json!({ "sync": "incremental", "bitmap": "b", "target": "t" }))?;
    same(&nbd.file, &scene.disk.path)?;
    let expect = SIZE - TRIMMED.1 - UNMAPPED.1 - ZEROED.1;
    ensure!(taken(&nbd.file)? <= expect + MIB, "{} bytes for {expect}", taken(&nbd.file)?);
    scene.qmp.run("blockdev-del", json!({ "node-name": "t" }))?;
    // The full backup sent the disk as data; the increment what was written, and requests for zeroes.
    let statistics = nbd.ended()?;
    let sent = |kind: &str| -> Result<f64> {
        let line = statistics.lines().find(|line| line.starts_with(&format!("{kind}:"))).context(statistics.clone())?;
        // `write: 1024 ops, 0.018 s, 64.06 MiB, ...`
        let size = line.split(", ").find(|part| part.ends_with("iB")).with_context(|| line.to_owned())?;
        let (number, unit) = size.split_once(' ').with_context(|| line.to_owned())?;
        Ok(number.parse::<f64>()? * if unit == "MiB" { 1.0 } else { 1.0 / 1024.0 })
    };
    ensure!((64.0..65.0).contains(&sent("write")?), "{statistics}");
    ensure!((40.0..41.0).contains(&sent("zero")?), "{statistics}");
    Ok(())
}

#[test]
fn after_a_guest_has_trimmed_its_file_system() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", 128 * MIB)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = Guest::boot(&lab, std::slice::from_ref(&disk))?;
    guest.run("mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt")?;
    guest.run("yes ballast | head -c 60m >/mnt/ballast && echo stays >/mnt/small && sync")?;
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
    let (base, top) = (lab.path("base.qcow2"), lab.path("top.qcow2"));
    qmp.run(
        "drive-backup",
        json!({ "job-id": "j", "device": "drive0", "sync": "full", "bitmap": "b", "bitmap-mode": "on-success",
                "format": "qcow2", "target": base }),
    )?;
    qmp.job_completed("j")?;
    guest.run("rm /mnt/ballast && sync && fstrim -v /mnt && umount /mnt")?;
    let marked = qmp.bitmap("drive0", "b")?["count"].as_u64().context("count")?;
    ensure!(marked > 60 * MIB, "the trim is marked: {marked} bytes");
    images::create_on_top(&base, "qcow2", &top)?;
    qmp.run(
        "drive-backup",
        json!({ "job-id": "j", "device": "drive0", "sync": "incremental", "bitmap": "b", "format": "qcow2",
                "target": top, "mode": "existing" }),
    )?;
    qmp.job_completed("j")?;
    guest.assert_no_disk_errors()?;
    guest.poweroff()?;
    daemon.stop()?;
    let length = fs::metadata(&top)?.len();
    ensure!(length < 8 * MIB, "an increment of {length} bytes after a trim of {marked}");
    images::assert_sound(&top)?;
    images::assert_equal(&top, &disk.path)?;
    let restored = images::restore(&top)?;
    ensure!(taken(&restored)? <= taken(&disk.path)? + MIB, "restored, it takes {} bytes", taken(&restored)?);
    ext4::assert_clean(&restored)?;
    let files = ext4::extract(&lab, &restored, "files")?;
    ensure!(fs::read(files.join("small"))? == b"stays\n");
    ensure!(!files.join("ballast").exists());
    Ok(())
}
