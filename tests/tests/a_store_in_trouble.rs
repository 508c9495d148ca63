//! The promise: whatever is wrong with the file system under a disk's bitmaps, the disk is served. One without room costs no bitmap,
//! neither while the disk is served nor at a start after SIGTERM or kill -9; one that may not be written to, or not any more, costs bitmaps, and
//! says so, and no bitmap lies once it may be written to again. And disks that are devices have their bitmaps in the one place
//! that is made for them, or where the operator says.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use blkmark_tests::blkio_client::BlkioClient;
use blkmark_tests::daemon::blkmark_binary;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::loop_device::Loop;
use blkmark_tests::loop_fs::{Kind, LoopFileSystem};
use blkmark_tests::process::Process;
use blkmark_tests::qmp::Qmp;
use blkmark_tests::small_fs::SmallFileSystem;
use blkmark_tests::tools::{command, run};
use serde_json::json;

const SIZE: u64 = 192 * MIB;

/// A daemon over one disk, with its store at `store` or where it is by default.
struct Served {
    process: Process,
    qmp: Qmp,
}

impl Served {
    fn start(lab: &Lab, disk: &Disk, store: Option<&Path>) -> Result<Served> {
        Self::start_with(lab, disk, store, &[])
    }

    fn start_with(lab: &Lab, disk: &Disk, store: Option<&Path>, more: &[&str]) -> Result<Served> {
        let (path, socket) = (disk.path.display(), disk.socket.display());
        let store = store.map_or_else(String::new, |store| format!(",bitmaps={}", store.display()));
        let control = lab.path("control.sock");
        let mut serve = std::process::Command::new(blkmark_binary()?);
        serve.args(["serve", "--disk", &format!("id=drive0,path={path},socket={socket}{store}"), "--control"]);
        let mut process = lab.start("blkmark", serve.arg(&control).args(more))?;
        process.first_line()?;
        Ok(Served { process, qmp: Qmp::connect(&control)? })
    }

    fn add(&mut self, name: &str) -> Result<()> {
        self.qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": name})).map(drop)
    }

    /// Whether bitmap `b` is good, and its bits.
    fn look(&mut self) -> Result<(bool, String)> {
        let good = self.qmp.bitmap("drive0", "b")?.get("inconsistent").is_none();
        Ok((good, if good { self.qmp.bitmap_hash("drive0", "b")? } else { String::new() }))
    }

    fn end(mut self, kill: bool) -> Result<()> {
        if kill {
            return self.process.kill().map(drop);
        }
        let status = self.process.terminate()?;
        ensure!(status.success(), "{status}: {}", self.process.log_tail());
        Ok(())
    }
}

fn write(disk: &Disk, at: u64) -> Result<()> {
    BlkioClient::connect(&disk.socket, 1)?.write(at, &[7; 4096])
}

/// Takes all room in `folder`, to the last block that can be had.
fn fill(folder: &Path) -> Result<()> {
    for (round, len) in [1 << 20, 64 << 10, 4096].into_iter().enumerate() {
        for number in 0.. {
            let path = folder.join(format!("filler-{round}-{number}"));
            if fs::write(&path, vec![1; len]).and_then(|()| fs::File::open(&path)?.sync_all()).is_err() {
                break;
            }
        }
    }
    ensure!(fs::write(folder.join("one-more"), [1; 4096]).is_err(), "there is room left");
    Ok(())
}

/// Commands are refused and nothing is lost, before a start and behind it.
fn full(folder: &Path) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let store = folder.join("store");
    let mut served = Served::start(&lab, &disk, Some(&store))?;
    served.add("b")?;
    write(&disk, 0)?;
    for (kill, at) in [(false, 40 * MIB), (true, 80 * MIB), (true, 120 * MIB), (false, 160 * MIB)] {
        write(&disk, at)?;
        // What fails may give room back: until nothing is to be had.
        for number in 0.. {
            ensure!(number < 50, "the file system does not get full");
            fill(folder)?;
            if served.add(&format!("at-{at}-{number}")).is_err() {
                break;
            }
        }
        let before = served.look()?;
        ensure!(before.0, "a full file system cost a bitmap while it was served: {}", served.process.log_tail());
        let name = json!({"node": "drive0", "name": "b"});
        let refused = served.qmp.refused("block-dirty-bitmap-disable", name)?.to_string();
        ensure!(refused.contains("No space left on device"), "{refused}");
        ensure!(served.look()? == before, "a refused command changed something");
        served.end(kill)?;
        served = Served::start(&lab, &disk, Some(&store))?;
        ensure!(served.look()? == before, "a start without room, kill={kill}: {}", served.process.log_tail());
    }
    write(&disk, 190 * MIB)?;
    served.end(false)
}

#[test]
fn no_room_on_tmpfs_costs_no_bitmap() -> Result<()> {
    full(SmallFileSystem::mount(1 << 20)?.folder())
}

#[test]
fn no_room_on_ext4_costs_no_bitmap() -> Result<()> {
    full(&LoopFileSystem::mount(Kind::Ext4, 16 * MIB)?.folder())
}

#[test]
fn no_room_on_xfs_costs_no_bitmap() -> Result<()> {
    let xfs = LoopFileSystem::mount(Kind::Xfs, 300 * MIB)?;
    // Most of it at once: what is looked at is what happens at the end of it.
    let mut ballast = 300 * MIB;
    let file = fs::File::create(xfs.path("ballast"))?;
    while rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, ballast).is_err() {
        ballast -= MIB;
    }
    file.set_len(ballast - 8 * MIB)?;
    file.sync_all()?;
    full(&xfs.folder())
}

/// All memory of a live map is taken before a guest marks in it: on a tmpfs that is full, a mark would kill the daemon.
#[test]
fn a_live_map_without_room_is_an_error_of_the_command() -> Result<()> {
    const LARGE: u64 = 16 << 30;
    const MAP: u64 = 4096 + LARGE / 512 / 8;
    // There is room for one map; and of another for less than a huge page, or more than one.
    for room in [MAP + MIB, 7 * MIB] {
        let lab = Lab::new()?;
        let disk = lab.disk("drive0", LARGE)?;
        let tmpfs = SmallFileSystem::mount(room)?;
        let runtime = tmpfs.folder().display().to_string();
        let mut served = Served::start_with(&lab, &disk, None, &["--runtime-dir", &runtime])?;
        let fine = |name: &str| json!({"node": "drive0", "name": name, "granularity": 512});
        served.qmp.run("block-dirty-bitmap-add", fine("b"))?;
        let free = || rustix::fs::statvfs(tmpfs.folder()).map(|stat| stat.f_bfree * stat.f_frsize);
        let left = free()?;
        ensure!(left + MAP <= room, "the map is not allocated in full: {left} of {room} left");
        let refused = served.qmp.refused("block-dirty-bitmap-add", fine("c"))?.to_string();
        ensure!(refused.contains("no memory for the live map"), "{refused}");
        ensure!(free()? == left, "what the refused command took is not given back");
        // A mark in every page of the map.
        let mut guest = BlkioClient::connect(&disk.socket, 1)?;
        let pages = LARGE / (4096 * 8 * 512);
        (0..pages).try_for_each(|page| guest.write(page * (LARGE / pages), &[7; 512]))?;
        let bits = served.qmp.bitmap("drive0", "b")?;
        ensure!(bits["count"] == pages * 512, "{bits}");
        drop(guest);
        served.end(false)?;
    }
    Ok(())
}

fn remount(folder: &Path, how: &str) -> Result<()> {
    run(command("mount")?.args(["-o", &format!("remount,{how}")]).arg(folder)).map(drop)
}

#[test]
fn a_store_that_may_not_be_written_to_says_so_and_the_disk_is_served() -> Result<()> {
    for kill in [false, true] {
        let lab = Lab::new()?;
        let disk = lab.disk("drive0", SIZE)?;
        let small = SmallFileSystem::mount(1 << 20)?;
        let store = small.folder().join("store");
        let mut served = Served::start(&lab, &disk, Some(&store))?;
        served.add("b")?;
        write(&disk, 0)?;
        served.end(kill)?;

        remount(small.folder(), "ro")?;
        let mut served = Served::start(&lab, &disk, Some(&store))?;
        write(&disk, 40 * MIB)?;
        ensure!(!served.look()?.0, "a bitmap that cannot be kept is shown as good");
        let data = json!({"node": "drive0", "name": "c"});
        let refused = served.qmp.refused("block-dirty-bitmap-add", data)?.to_string();
        ensure!(refused.contains("Read-only file system") && refused.contains("restart"), "{refused}");
        let data = json!({"node": "drive0", "name": "passing", "persistent": false});
        served.qmp.run("block-dirty-bitmap-add", data)?;
        let log = served.process.log();
        ensure!(log.contains("the bitmap store failed; its bitmaps are inconsistent, the disk is served on"), "{log}");
        served.end(kill)?;

        // What was written meanwhile is in no bitmap, so none may be good.
        remount(small.folder(), "rw")?;
        let mut served = Served::start(&lab, &disk, Some(&store))?;
        ensure!(!served.look()?.0, "kill={kill}: a bitmap lies: {}", served.process.log_tail());
        served.qmp.run("block-dirty-bitmap-remove", json!({"node": "drive0", "name": "b"}))?;
        served.add("b")?;
        served.end(false)?;
    }
    Ok(())
}

/// As after an error of the medium beneath it: nothing can be changed in it any more, whoever has it open.
fn fails(ext4: &LoopFileSystem) -> Result<()> {
    let device = run(command("findmnt")?.args(["--noheadings", "--output", "SOURCE"]).arg(ext4.folder()))?;
    let name = device.trim().trim_start_matches("/dev/");
    fs::write(format!("/sys/fs/ext4/{name}/trigger_fs_error"), "a test")?;
    ensure!(fs::write(ext4.path("probe"), "").is_err(), "the file system may still be written to");
    Ok(())
}

#[test]
fn a_store_that_becomes_read_only_while_served_says_so_and_no_bitmap_lies() -> Result<()> {
    for kill in [false, true] {
        let lab = Lab::new()?;
        let disk = lab.disk("drive0", SIZE)?;
        let mut ext4 = LoopFileSystem::mount(Kind::Ext4, 16 * MIB)?;
        remount(&ext4.folder(), "errors=remount-ro")?;
        let store = ext4.path("store");
        let mut served = Served::start(&lab, &disk, Some(&store))?;
        served.add("b")?;
        write(&disk, 0)?;
        fails(&ext4)?;

        // The guest writes on, where the store knows that it does and where it cannot be told.
        write(&disk, 0)?;
        write(&disk, 160 * MIB)?;
        ensure!(!served.look()?.0, "a bitmap that cannot be kept is shown as good");
        let refused = served.qmp.refused("block-dirty-bitmap-add", json!({"node": "drive0", "name": "c"}))?.to_string();
        ensure!(refused.contains("Read-only file system") && refused.contains("restart"), "{refused}");
        served.qmp.run("block-dirty-bitmap-add", json!({"node": "drive0", "name": "passing", "persistent": false}))?;
        write(&disk, 80 * MIB)?;
        ensure!(served.qmp.bitmap("drive0", "passing")?["count"] == 65536, "a bitmap in memory has to go on");
        let log = served.process.log();
        ensure!(log.contains("the bitmap store failed; its bitmaps are inconsistent, the disk is served on"), "{log}");
        served.end(kill)?;

        // Mended and mounted anew.
        ext4.offline(|image| run(command("e2fsck")?.args(["-y", "-f"]).arg(image)).map(drop).or(Ok(())))?;
        let mut served = Served::start(&lab, &disk, Some(&store))?;
        ensure!(!served.look()?.0, "kill={kill}: a bitmap lies: {}", served.process.log_tail());
        served.qmp.run("block-dirty-bitmap-remove", json!({"node": "drive0", "name": "b"}))?;
        served.add("b")?;
        served.end(false)?;
    }
    Ok(())
}

#[test]
fn where_no_store_can_be_made_only_that_command_is_refused() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", SIZE)?;
    let small = SmallFileSystem::mount(1 << 20)?;
    remount(small.folder(), "ro")?;
    let mut served = Served::start(&lab, &disk, Some(&small.folder().join("store")))?;
    let refused = served.qmp.refused("block-dirty-bitmap-add", json!({"node": "drive0", "name": "b"}))?.to_string();
    ensure!(refused.contains("Read-only file system"), "{refused}");
    write(&disk, 0)?;
    remount(small.folder(), "rw")?;
    served.add("b")?;
    served.end(false)
}

/// The store of a device, gone at the end.
struct Store(PathBuf);

impl Drop for Store {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn bitmaps_of_a_device_are_in_the_place_for_those_of_devices() -> Result<()> {
    device(|_, device| {
        let name = device.path().file_name().map(|name| name.to_string_lossy().into_owned());
        (PathBuf::from(format!("/var/lib/blkmark/dev-{}.blkmark", name.unwrap_or_default())), false)
    })
}

#[test]
fn bitmaps_of_a_device_are_where_the_operator_says() -> Result<()> {
    device(|lab, _| (lab.path("somewhere"), true))
}

/// `place`: where the store is to be found, and whether blkmark has to be told.
fn device(place: impl Fn(&Lab, &Loop) -> (PathBuf, bool)) -> Result<()> {
    let lab = Lab::new()?;
    let file = lab.disk("drive0", SIZE)?;
    let device = Loop::over(&file.path, 512)?;
    let disk = Disk { path: device.path().to_owned(), ..file };
    let (path, told) = place(&lab, &device);
    // Nobody else has this loop device, so what lies there is of a test that was killed.
    drop(Store(path.clone()));
    let store = Store(path);
    let told = told.then_some(store.0.as_path());
    let mut served = Served::start(&lab, &disk, told)?;
    served.add("b")?;
    ensure!(store.0.join("slot.0").exists(), "{} is not there", store.0.display());
    for (kill, at) in [(true, 0), (false, 40 * MIB), (true, 80 * MIB)] {
        write(&disk, at)?;
        let before = served.look()?;
        served.end(kill)?;
        served = Served::start(&lab, &disk, told)?;
        ensure!(before.0 && served.look()? == before, "kill={kill}: {}", served.process.log_tail());
    }
    served.end(false)?;
    // Attached anew it has no name by which it could be known.
    drop(device);
    let device = Loop::over(&lab.path("drive0.raw"), 512)?;
    let disk = Disk { path: device.path().to_owned(), ..disk };
    if let Some(store) = told {
        let mut served = Served::start(&lab, &disk, Some(store))?;
        ensure!(!served.look()?.0, "a device that was attached anew was taken for the one before");
        served.end(false)?;
    }
    Ok(())
}
