//! The promise: backup software pulls a served disk over NBD, with a bitmap that says which ranges to take, while the guest goes on;
//! exports come and go by QEMU's commands, and whoever uses one is not cut off unless that is asked for.
//!
//! The clients are nbdinfo, nbdcopy and qemu-img. An export of a disk shows it as it stands: what is pulled is compared where
//! the guest does not write.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as Attached, Guest as FrontEnd, Options};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::{Daemon, Kind};
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::qmp::Qmp;
use blkmark_tests::tools;
use serde_json::{Value, json};

const SIZE: u64 = 16 * MIB;
const CLUSTER: u64 = 64 * 1024;

fn attach(disk: &Disk) -> Result<Attached> {
    Ok(FrontEnd::connect(&disk.socket, Options::default())?.into_disk()?)
}

fn uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn start(qmp: &mut Qmp, socket: &Path) -> Result<()> {
    qmp.run("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } })).map(drop)
}

fn export(qmp: &mut Qmp, id: &str, more: Value) -> Result<()> {
    let mut arguments = json!({ "type": "nbd", "id": id, "node-name": "drive0", "name": id });
    for (name, value) in more.as_object().into_iter().flatten() {
        arguments[name] = value.clone();
    }
    qmp.run("block-export-add", arguments).map(drop)
}

fn deleted(qmp: &mut Qmp, id: &str) -> Result<()> {
    qmp.event(|event| event.name == "BLOCK_EXPORT_DELETED" && event.data["id"] == id).map(drop)
}

/// The dirty clusters, as nbdinfo shows them.
fn dirty(uri: &str, bitmap: &str) -> Result<Vec<u64>> {
    let map =
        tools::run(tools::command("nbdinfo")?.args(["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}")]).arg(uri))?;
    let map: Value = serde_json::from_str(&map)?;
    let cluster = |extent: &Value, name: &str| extent[name].as_u64().unwrap_or(u64::MAX) / CLUSTER;
    let extents = map.as_array().context("a map")?.iter().filter(|extent| extent["type"] == 1);
    Ok(extents.flat_map(|e| cluster(e, "offset")..cluster(e, "offset") + cluster(e, "length")).collect())
}

#[test]
fn a_full_and_an_incremental_pull_are_the_disk() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let mut guest = attach(&disk)?;
    let socket = lab.path("nbd.sock");
    start(&mut qmp, &socket)?;
    ensure!(fs::metadata(&socket)?.permissions().mode() & 0o777 == 0o600, "others may connect");
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
    export(&mut qmp, "full", json!({ "description": "all of it" }))?;
    let listed = tools::run(tools::command("nbdinfo")?.arg("--list").arg(uri(&socket, "")))?;
    ensure!(listed.contains("export=\"full\"") && listed.contains("all of it"), "{listed}");
    ensure!(listed.contains("is_read_only: true"), "{listed}");
    let image = lab.path("full.raw");
    tools::run(tools::command("nbdcopy")?.args(["--connections=4", &uri(&socket, "full")]).arg(&image))?;
    ensure!(fs::read(&image)? == disk.content()?, "what nbdcopy got is not the disk");
    let qcow2 = lab.path("full.qcow2");
    tools::run(
        tools::command("qemu-img")?.args(["convert", "-f", "raw", "-O", "qcow2", &uri(&socket, "full")]).arg(&qcow2),
    )?;
    blkmark_tests::images::assert_equal(&qcow2, &disk.path)?;

    // The guest writes on; then a copy of its bitmap stands still, and the guest does not.
    for cluster in [3, 4, 100] {
        guest.write_at(&vec![7; CLUSTER as usize], cluster * CLUSTER)?;
    }
    let copy = json!({ "node": "drive0", "name": "copy", "disabled": true });
    let merge = json!({ "node": "drive0", "target": "copy", "bitmaps": ["b"] });
    let clear = json!({ "node": "drive0", "name": "b" });
    let actions = json!([
        { "type": "block-dirty-bitmap-add", "data": copy },
        { "type": "block-dirty-bitmap-merge", "data": merge },
        { "type": "block-dirty-bitmap-clear", "data": clear },
    ]);
    qmp.run("transaction", json!({ "actions": actions }))?;
    // One bitmap in two exports, and in one of them by another way.
    export(&mut qmp, "inc", json!({ "bitmaps": ["copy"] }))?;
    export(&mut qmp, "same", json!({ "bitmaps": [{ "node": "drive0", "name": "copy" }] }))?;
    guest.write_at(&vec![8; CLUSTER as usize], 200 * CLUSTER)?;
    // The exports have the bits already.
    qmp.run("block-dirty-bitmap-remove", json!({ "node": "drive0", "name": "copy" }))?;
    for id in ["inc", "same"] {
        ensure!(dirty(&uri(&socket, id), "copy")? == [3, 4, 100]);
    }
    // Only those ranges are read, onto the full pull.
    let pulled = lab.path("now.raw");
    tools::run(tools::command("nbdcopy")?.arg(uri(&socket, "inc")).arg(&pulled))?;
    let now = fs::read(&pulled)?;
    let mut chain = fs::read(&image)?;
    for cluster in dirty(&uri(&socket, "inc"), "copy")? {
        let range = (cluster * CLUSTER) as usize..((cluster + 1) * CLUSTER) as usize;
        chain[range.clone()].copy_from_slice(&now[range]);
    }
    let mut disk_then = disk.content()?;
    let later = (200 * CLUSTER) as usize..(201 * CLUSTER) as usize;
    disk_then[later.clone()].copy_from_slice(&chain[later]);
    ensure!(chain == disk_then, "the chain is not the disk");
    ensure!(qmp.bitmap("drive0", "b")?["count"] == CLUSTER);
    // A guest's disk does not change its size under a client.
    let error = qmp.refused("block_resize", json!({ "node-name": "drive0", "size": SIZE * 2 }))?;
    ensure!(error.desc.starts_with("Node 'drive0' is busy: it is exported as '"), "{}", error.desc);
    qmp.run("nbd-server-stop", json!({}))?;
    for id in ["same", "inc", "full"] {
        deleted(&mut qmp, id)?;
    }
    ensure!(!socket.exists(), "the socket is still there");
    qmp.run("block_resize", json!({ "node-name": "drive0", "size": SIZE * 2 }))?;
    drop(guest);
    daemon.stop()?;
    Ok(())
}

/// Several clients with several connections each, and a guest that writes all the time.
#[test]
fn clients_pull_beside_a_busy_guest_and_nothing_is_torn_down() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let socket = lab.path("nbd.sock");
    start(&mut qmp, &socket)?;
    export(&mut qmp, "e", json!({}))?;
    let before = disk.content()?;
    let mut guest = attach(&disk)?;
    let written = AtomicU64::new(0);
    // The guest keeps to the second half.
    let half = SIZE / 2;
    let write = |stop: &Stop| {
        for n in 1u64.. {
            if stop.is_due() {
                break;
            }
            let at = half + n.wrapping_mul(0x9e37_79b9) % (half / 4096) * 4096;
            guest.write_at(&vec![n as u8; 4096], at)?;
            written.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    };
    beside(vec![Box::new(write)], || {
        for round in 0..3 {
            let from = written.load(Ordering::SeqCst);
            let pulls: Vec<_> = (0..3)
                .map(|n| {
                    let image = lab.path(&format!("{round}-{n}.raw"));
                    let mut command = tools::command("nbdcopy")?;
                    command.args(["--connections=4", &uri(&socket, "e")]).arg(&image).stdin(Stdio::null());
                    Ok((image, command.spawn()?))
                })
                .collect::<Result<_>>()?;
            for (image, mut child) in pulls {
                ensure!(child.wait()?.success(), "a pull failed");
                ensure!(fs::read(&image)?[..half as usize] == before[..half as usize]);
            }
            while written.load(Ordering::SeqCst) == from {
                std::thread::yield_now();
            }
        }
        Ok(())
    })?;
    drop(guest);
    let image = lab.path("quiet.raw");
    tools::run(tools::command("nbdcopy")?.arg(uri(&socket, "e")).arg(&image))?;
    ensure!(fs::read(&image)? == disk.content()?);
    daemon.assert_running()?;
    daemon.stop()?;
    ensure!(!socket.exists(), "the socket outlived the daemon");
    Ok(())
}

/// A client that stays connected, reading when told to.
struct Client(std::process::Child);

impl Client {
    fn connect(uri: &str) -> Result<Client> {
        let mut command = tools::command("qemu-io")?;
        command.args(["-r", "-f", "raw", uri]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut client = Client(command.spawn()?);
        let answer = client.read()?;
        ensure!(answer.contains("read 512/512"), "{answer}");
        Ok(client)
    }

    fn read(&mut self) -> Result<String> {
        self.0.stdin.as_mut().context("stdin")?.write_all(b"read 0 512\n")?;
        let mut line = String::new();
        BufReader::new(self.0.stdout.as_mut().context("stdout")?).read_line(&mut line)?;
        Ok(line)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_export_of_blkmark_in_use_ends_by_force_only() -> Result<()> {
    ends_by_force_only(Kind::Blkmark)
}

#[test]
fn an_export_of_qemu_storage_daemon_in_use_ends_by_force_only() -> Result<()> {
    ends_by_force_only(Kind::Qsd)
}

fn ends_by_force_only(kind: Kind) -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let daemon = Daemon::start(kind, &lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let socket = lab.path("nbd.sock");
    start(&mut qmp, &socket)?;
    export(&mut qmp, "used", json!({}))?;
    export(&mut qmp, "other", json!({}))?;
    let mut client = Client::connect(&uri(&socket, "used"))?;
    let mut bystander = Client::connect(&uri(&socket, "other"))?;
    let error = qmp.refused("block-export-del", json!({ "id": "used" }))?;
    ensure!(error.desc == "export 'used' still in use", "{}", error.desc);
    ensure!(client.read()?.contains("read 512/512"), "a refused removal cut the client off");
    qmp.run("block-export-del", json!({ "id": "used", "mode": "hard" }))?;
    deleted(&mut qmp, "used")?;
    ensure!(!client.read()?.contains("read 512/512"), "the client still reads");
    ensure!(bystander.read()?.contains("read 512/512"), "a client of another export was cut off");
    let again = tools::answer(tools::command("nbdinfo")?.arg(uri(&socket, "used")))?;
    ensure!(again.code != 0, "it is still exported");
    // The name is free again.
    export(&mut qmp, "used", json!({}))?;
    ensure!(Client::connect(&uri(&socket, "used"))?.read()?.contains("read 512/512"));
    qmp.run("nbd-server-stop", json!({}))?;
    deleted(&mut qmp, "other")?;
    ensure!(!bystander.read()?.contains("read 512/512"), "a client outlived the server");
    daemon.stop()?;
    Ok(())
}

#[test]
fn a_server_stays_beneath_the_allowed_paths_and_off_what_is_not_its_own() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let allowed = lab.path("allowed");
    fs::create_dir(&allowed)?;
    std::os::unix::fs::symlink(lab.folder(), allowed.join("out"))?;
    fs::write(allowed.join("file"), "a file of somebody's")?;
    let root = allowed.display().to_string();
    let daemon =
        Daemon::start_with(Kind::Blkmark, &lab, std::slice::from_ref(&disk), "c.sock", &["--allow-path", &root])?;
    let mut qmp = daemon.qmp()?;
    for path in [lab.path("nbd.sock"), allowed.join("../nbd.sock"), allowed.join("out/nbd.sock"), allowed.join("file")]
    {
        let addr = json!({ "addr": { "type": "unix", "data": { "path": path } } });
        let error = qmp.refused("nbd-server-start", addr)?;
        let begin = format!("Failed to bind socket to {}: ", path.display());
        ensure!(error.desc.starts_with(&begin), "{}", error.desc);
        ensure!(!error.desc.contains("/proc"), "{}", error.desc);
    }
    ensure!(!lab.path("nbd.sock").exists() && fs::read(allowed.join("file"))? == b"a file of somebody's");
    let socket = allowed.join("nbd.sock");
    start(&mut qmp, &socket)?;
    export(&mut qmp, "e", json!({}))?;
    Client::connect(&uri(&socket, "e"))?;
    let error = qmp.refused("nbd-server-start", json!({ "addr": { "type": "unix", "data": { "path": socket } } }))?;
    ensure!(error.desc == "NBD server already running", "{}", error.desc);
    qmp.run("nbd-server-stop", json!({}))?;
    ensure!(!socket.exists());

    // TCP, and what only blkmark refuses.
    let free = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
    let inet = json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": free } });
    qmp.run("nbd-server-start", json!({ "addr": inet }))?;
    export(&mut qmp, "e", json!({}))?;
    let image = lab.path("tcp.raw");
    tools::run(tools::command("nbdcopy")?.arg(format!("nbd://127.0.0.1:{free}/e")).arg(&image))?;
    ensure!(fs::read(&image)? == disk.content()?);
    qmp.run("block-dirty-bitmap-add", json!({ "node": "drive0", "name": "b" }))?;
    let file = json!({ "driver": "file", "node-name": "t", "filename": allowed.join("file") });
    qmp.run("blockdev-add", file)?;
    for (more, text) in [
        (json!({ "writable": true }), "Node 'drive0' is served to a guest: it can only be exported read-only"),
        (json!({ "allocation-depth": true }), "allocation-depth is not supported: a served disk stands on nothing"),
        (json!({ "node-name": "t" }), "Node 't' is a target: only served disks are exported"),
        (
            json!({ "bitmaps": [{ "node": "drive0", "name": "b" }] }),
            "Enabled bitmap 'b' incompatible with readonly export",
        ),
    ] {
        let mut arguments = json!({ "type": "nbd", "id": "x", "node-name": "drive0", "name": "x" });
        for (name, value) in more.as_object().into_iter().flatten() {
            arguments[name] = value.clone();
        }
        let error = qmp.refused("block-export-add", arguments)?;
        ensure!(error.desc == text, "{}", error.desc);
    }
    let exports = qmp.run("query-block-exports", json!({}))?;
    ensure!(exports.as_array().is_some_and(|exports| exports.len() == 1 && exports[0]["id"] == "e"), "{exports}");
    daemon.stop()?;
    Ok(())
}

#[test]
fn quit_ends_a_server_that_clients_are_connected_to() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.filled_disk("drive0", SIZE)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut qmp = daemon.qmp()?;
    let socket = lab.path("nbd.sock");
    start(&mut qmp, &socket)?;
    export(&mut qmp, "e", json!({}))?;
    let mut client = Client::connect(&uri(&socket, "e"))?;
    qmp.run("quit", json!({}))?;
    deleted(&mut qmp, "e")?;
    let status = daemon.process().wait(blkmark_tests::process::GIVE_UP)?;
    ensure!(status.success(), "{status}");
    ensure!(!client.read()?.contains("read 512/512") && !socket.exists());
    Ok(())
}
