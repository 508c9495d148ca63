//! The promise: a backup that is pushed to an NBD server is, once concluded, what the disk was, durably, whichever server it is.
//!
//! The servers are qemu-nbd, qemu-storage-daemon and nbdkit; `scripts/setup` installs them.

mod control_common;

use blkmark_backup::nbd::{Address, ClientSettings, NbdTarget};
use blkmark_backup::target::{Policy, Target};
use control_common::*;
use serde_json::{Value, json};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// A server that ends with the test.
struct Server(Child);

impl Server {
    /// Starts it, and waits until it listens.
    fn start(command: &mut Command, socket: &Path) -> Self {
        let server = Self(command.stdout(Stdio::null()).spawn().expect("the server is installed"));
        server.wait(|| std::os::unix::net::UnixStream::connect(socket).is_ok())
    }

    fn wait(mut self, up: impl Fn() -> bool) -> Self {
        let start = Instant::now();
        while !up() {
            assert!(start.elapsed() < GIVE_UP && self.0.try_wait().unwrap().is_none(), "the server listens");
            std::thread::yield_now();
        }
        self
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu_nbd(image: &str, format: &str, socket: &str, more: &[&str]) -> Server {
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "0", "-f", format, "-k", socket]).args(more).arg(image);
    Server::start(&mut command, socket.as_ref())
}

/// nbdkit, which is a failure where it is missing.
fn nbdkit(socket: &str) -> Command {
    let installed = Command::new("nbdkit").arg("--version").output().is_ok();
    assert!(installed, "`nbdkit` is missing: install the package nbdkit, or run scripts/setup");
    let mut command = Command::new("nbdkit");
    command.args(["-f", "-U", socket]);
    command
}

fn unix(socket: &str) -> Value {
    json!({ "type": "unix", "path": socket })
}

/// A disk with data, zeroes and holes.
fn lab() -> Lab {
    let lab = Lab::new(1);
    lab.disks[0].dirty([0, 1, 5, 6, 40, 63], 4);
    lab.disks[0].dirty([7, 8], 0);
    lab.disks[0].write(20 * CLUSTER + 512, 512, 9);
    lab
}

/// Opens `server` as a target, backs d0 up to it, and closes it.
fn push(lab: &Lab, server: Value, export: &str) {
    let nbd = json!({ "driver": "nbd", "server": server, "export": export });
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": nbd }));
    back_up(lab);
}

fn back_up(lab: &Lab) {
    lab.ok("blockdev-backup", json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full" }));
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    lab.state("j", "null");
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
}

/// An image full of what has to be overwritten.
fn image(lab: &Lab, name: &str, format: &str) -> String {
    let path = lab.path(name);
    qemu_img(&["create", "-q", "-f", format, &path, "4M"]);
    let output = Command::new("qemu-io").args(["-f", format, "-c", "write -P 7 0 4M", &path]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    path
}

#[test]
fn qemu_nbd_takes_a_backup_into_any_format() {
    let lab = lab();
    for format in ["raw", "qcow2"] {
        let (path, socket) = (image(&lab, format, format), lab.path("sock"));
        let server = qemu_nbd(&path, format, &socket, &["-x", "out", "--discard=unmap"]);
        push(&lab, unix(&socket), "out");
        drop(server);
        assert_same(&contents(lab.dir.path(), &path, format), &lab.disks[0].image());
    }
}

#[test]
fn qemu_nbd_takes_a_backup_over_tcp() {
    let lab = lab();
    let path = image(&lab, "a.raw", "raw");
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string();
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-e", "0", "-f", "raw", "-b", "127.0.0.1", "-p", &port, &path]);
    let address = format!("127.0.0.1:{port}");
    let server = Server(command.spawn().unwrap()).wait(|| std::net::TcpStream::connect(&address).is_ok());
    push(&lab, json!({ "type": "inet", "host": "127.0.0.1", "port": port }), "");
    drop(server);
    assert_same(&std::fs::read(&path).unwrap(), &lab.disks[0].image());
}

#[test]
fn qemu_storage_daemon_takes_a_backup() {
    let lab = lab();
    let (path, socket) = (image(&lab, "a.qcow2", "qcow2"), lab.path("sock"));
    let mut command = Command::new("qemu-storage-daemon");
    command
        .args(["--blockdev", &format!("driver=file,node-name=f,filename={path}")])
        .args(["--blockdev", "driver=qcow2,node-name=q,file=f"])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={socket}")])
        .args(["--export", "type=nbd,id=e,node-name=q,name=out,writable=on"]);
    let server = Server::start(&mut command, socket.as_ref());
    push(&lab, unix(&socket), "out");
    drop(server);
    assert_same(&contents(lab.dir.path(), &path, "qcow2"), &lab.disks[0].image());
}

/// nbdkit's filters are servers of all kinds: without zeroing, without flush, with block sizes that are enforced.
#[test]
fn servers_that_lack_or_demand_something_take_a_backup() {
    let lab = lab();
    let demands: &[&[&str]] = &[
        &[],
        &["--filter=nozero"],
        &["--filter=nozero", "zeromode=notrim"],
        &["--filter=fua", "fuamode=pass"],
        &[
            "--filter=blocksize-policy",
            "blocksize-minimum=64K",
            "blocksize-preferred=1M",
            "blocksize-maximum=1M",
            "blocksize-error-policy=error",
        ],
        &["--filter=noparallel"],
        &["--no-sr"],
        &["--filter=delay", "delay-write=10ms", "delay-zero=10ms"],
    ];
    for (n, demand) in demands.iter().enumerate() {
        let (path, socket) = (image(&lab, &format!("{n}.raw"), "raw"), lab.path(&format!("{n}.sock")));
        let (flags, parameters): (Vec<&str>, Vec<&str>) = demand.iter().partition(|word| word.starts_with('-'));
        let mut command = nbdkit(&socket);
        command.args(flags).args(["file", &path]).args(parameters);
        let server = Server::start(&mut command, socket.as_ref());
        push(&lab, unix(&socket), "");
        drop(server);
        assert_same(&std::fs::read(&path).unwrap(), &lab.disks[0].image());
    }
}

#[test]
fn an_nbd_node_is_described_flat_nested_or_in_two_commands() {
    let lab = lab();
    let (path, socket) = (image(&lab, "a.raw", "raw"), lab.path("sock"));
    let server = qemu_nbd(&path, "raw", &socket, &["-x", "out"]);
    let flat = json!({
        "driver": "nbd", "node-name": "t", "server.type": "unix", "server.path": socket, "export": "out",
        "reconnect-delay": 0, "open-timeout": 1,
    });
    lab.ok("blockdev-add", flat);
    let nodes = lab.ok("query-named-block-nodes", json!({}));
    assert_eq!(nodes[1]["drv"], "nbd");
    assert_eq!(nodes[1]["file"], format!("nbd+unix:///out?socket={socket}"));
    back_up(&lab);
    lab.ok("blockdev-add", json!({ "driver": "nbd", "node-name": "below", "server": unix(&socket), "export": "out" }));
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": "below" }));
    back_up(&lab);
    // The node beneath is still connected.
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": "below" }));
    lab.disks[0].dirty([3], 3);
    back_up(&lab);
    lab.ok("blockdev-add", json!({ "driver": "raw", "node-name": "t", "file": "below", "read-only": true }));
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
    lab.ok("blockdev-del", json!({ "node-name": "below" }));
    drop(server);
    assert_same(&std::fs::read(&path).unwrap(), &lab.disks[0].image());
}

#[test]
fn an_export_that_cannot_be_a_target_is_refused_with_its_reason() {
    let lab = lab();
    let (path, socket, gone) = (image(&lab, "a.raw", "raw"), lab.path("sock"), lab.path("gone"));
    let _server = qemu_nbd(&path, "raw", &socket, &["-x", "out", "-r"]);
    let nbd = |more: Value| {
        let mut node = json!({ "driver": "nbd", "node-name": "t", "server": unix(&socket), "export": "out" });
        node.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        node
    };
    let nobody = format!("Failed to connect to '{gone}': No such file or directory");
    let link = lab.path("link");
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    let by_link = format!("Failed to connect to '{link}': Connection refused");
    let cases = [
        (json!({}), "Export 'out' is read-only"),
        (json!({ "export": "other" }), "Requested export not available"),
        (json!({ "export": "x".repeat(4097) }), "export name too long to send to server"),
        (json!({ "server": unix(&gone) }), nobody.as_str()),
        (json!({ "server": unix(&link) }), by_link.as_str()),
        (json!({ "server": { "type": "unix" } }), "Parameter 'server.path' is missing"),
        (json!({ "server": { "type": "fd", "str": "1" } }), "Parameter 'type' does not accept value 'fd'"),
        (
            json!({ "server": { "type": "inet", "host": "h", "port": 1 } }),
            "Invalid parameter type for 'server.port', expected: string",
        ),
        (
            json!({ "server": { "type": "inet", "host": "127.0.0.1", "port": "zz" } }),
            "Failed to connect to '127.0.0.1:zz': the port is no number",
        ),
        (json!({ "tls-creds": "x" }), "Parameter 'tls-creds' is not supported"),
        (
            json!({ "reconnect-delay": 3 }),
            "reconnect-delay is not supported: a server that was lost may have lost what it had answered for",
        ),
        (json!({ "bogus": 1 }), "Parameter 'bogus' is unexpected"),
    ];
    for (more, text) in cases {
        assert_eq!(lab.err("blockdev-add", nbd(more.clone())), text, "{more}");
    }
    let below = json!({ "driver": "nbd", "server": unix(&socket), "export": "out", "read-only": true });
    assert_eq!(
        lab.err("blockdev-add", json!({ "driver": "qcow2", "node-name": "t", "file": below })),
        "An 'nbd' node holds a raw image: let the server open the format"
    );
    // To be looked at, it may be read-only.
    lab.ok("blockdev-add", nbd(json!({ "read-only": true })));
    assert_eq!(
        lab.err("blockdev-backup", json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "full" })),
        "Could not create node: Block node is read-only"
    );
}

#[test]
fn a_server_that_comes_late_is_waited_for() {
    let lab = lab();
    let (path, socket) = (image(&lab, "a.raw", "raw"), lab.path("sock"));
    let node = json!({ "driver": "nbd", "node-name": "t", "server": unix(&socket), "open-timeout": 100 });
    let server = std::thread::scope(|scope| {
        let added = scope.spawn(|| lab.ok("blockdev-add", node));
        let server = qemu_nbd(&path, "raw", &socket, &[]);
        added.join().unwrap();
        server
    });
    back_up(&lab);
    drop(server);
    assert_same(&std::fs::read(&path).unwrap(), &lab.disks[0].image());
}

#[test]
fn a_full_server_says_enospc_and_one_that_dies_ends_the_job_not_the_bitmap() {
    let lab = lab();
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    lab.disks[0].dirty([1, 2], 5);
    let socket = lab.path("sock");
    let serve = |arguments: &[&str]| {
        let _ = std::fs::remove_file(&socket);
        Server::start(nbdkit(&socket).args(arguments), socket.as_ref())
    };
    let path = lab.path("a.raw");
    qemu_img(&["create", "-q", "-f", "raw", &path, "4M"]);
    let server = serve(&["--filter=error", "file", &path, "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]);
    let address = Address::Unix(PathBuf::from(&socket));
    let target = NbdTarget::open(&address, "", ClientSettings::default(), &Policy::default()).unwrap();
    assert_eq!(target.write_at(&[1; 512], 0).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    drop(target);
    let node = json!({ "driver": "nbd", "node-name": "t", "server": unix(&socket) });
    let job = json!({ "job-id": "j", "device": "d0", "target": "t", "sync": "incremental", "bitmap": "b",
        "on-target-error": "enospc" });
    lab.ok("blockdev-add", node.clone());
    lab.ok("blockdev-backup", job.clone());
    assert_eq!(lab.event("BLOCK_JOB_ERROR")["action"], "stop");
    lab.state("j", "paused");
    assert_eq!(lab.ok("query-block-jobs", json!({}))[0]["io-status"], "nospace");
    // It dies while the job rests.
    drop(server);
    lab.ok("job-resume", json!({ "id": "j" }));
    let end = lab.event("BLOCK_JOB_COMPLETED");
    let error = end["error"].as_str().unwrap();
    assert!(error.contains("is over: the server closed the connection"), "{error}");
    lab.state("j", "null");
    assert_eq!(lab.disks[0].dirty_clusters("b"), [1, 2]);
    lab.ok("blockdev-del", json!({ "node-name": "t" }));
    // A new server, a new node, the same changes.
    let server = serve(&["file", &path]);
    lab.ok("blockdev-add", node);
    lab.ok("blockdev-backup", job);
    assert_eq!(lab.event("BLOCK_JOB_COMPLETED")["error"], Value::Null);
    lab.state("j", "null");
    drop(server);
    let copy = std::fs::read(&path).unwrap();
    let disk = lab.disks[0].image();
    let range = CLUSTER as usize..3 * CLUSTER as usize;
    assert_same(&copy[range.clone()], &disk[range]);
}
