//! The promise: a script for QEMU's storage daemon gets the same answers and hears the same events here.
//!
//! Each scene runs twice, against `qemu-storage-daemon` and against the control room, and the two transcripts are compared.
//! Where the two differ on purpose, the scene leaves it out and docs/jobs.md names it.

mod control_common;

use blkmark_backup::qmp::{Client, ClientError, Event};
use control_common::*;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

/// Two disks `d0`, `d1` of 4 MiB and four targets: `t0`, `t1` alike, `small` of 1 MiB, and `ro`.
trait Subject {
    fn command(&mut self, name: &str, arguments: Value) -> Result<Value, String>;
    fn next_event(&mut self) -> Event;
    /// A guest writes clusters of 64 KiB.
    fn dirty(&mut self, disk: usize, clusters: &[u64], byte: u8);
}

struct Here(Lab);

impl Subject for Here {
    fn command(&mut self, name: &str, arguments: Value) -> Result<Value, String> {
        self.0.run(name, arguments)
    }
    fn next_event(&mut self) -> Event {
        self.0.events.next_within(GIVE_UP).unwrap().expect("an event comes")
    }
    fn dirty(&mut self, disk: usize, clusters: &[u64], byte: u8) {
        self.0.disks[disk].dirty(clusters.iter().copied(), byte);
    }
}

struct Qsd {
    daemon: Child,
    client: Client,
    dir: tempfile::TempDir,
}

impl Qsd {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let daemon = Command::new("qemu-storage-daemon")
            .args(["--chardev", &format!("socket,path={},server=on,wait=off,id=c", at("qmp"))])
            .args(["--monitor", "chardev=c"])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", at("nbd"))])
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon is installed");
        let begun = Instant::now();
        let client = loop {
            match Client::connect(at("qmp")) {
                Ok(client) => break client,
                Err(error) => assert!(begun.elapsed() < GIVE_UP, "{error}"),
            }
            std::thread::yield_now();
        };
        let mut qsd = Self { daemon, client, dir };
        for disk in ["d0", "d1"] {
            qsd.node(disk, 4 * MIB, false);
            let export = json!({ "type": "nbd", "id": format!("e-{disk}"), "node-name": disk, "writable": true });
            qsd.command("block-export-add", export).unwrap();
        }
        qsd
    }

    fn node(&mut self, name: &str, size: u64, read_only: bool) {
        let path = self.dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let file = json!({ "driver": "file", "filename": path, "read-only": read_only });
        let node = json!({ "driver": "raw", "node-name": name, "read-only": read_only, "file": file });
        self.command("blockdev-add", node).unwrap();
    }
}

impl Drop for Qsd {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

impl Subject for Qsd {
    fn command(&mut self, name: &str, arguments: Value) -> Result<Value, String> {
        match self.client.execute(name, arguments) {
            Ok(value) => Ok(value),
            Err(ClientError::Refused(error)) => Err(error.desc),
            Err(error) => panic!("{name}: {error}"),
        }
    }
    fn next_event(&mut self) -> Event {
        self.client.wait_event(GIVE_UP, |_| true).unwrap().expect("an event comes")
    }
    fn dirty(&mut self, disk: usize, clusters: &[u64], byte: u8) {
        let socket = self.dir.path().join("nbd");
        let mut tool = Command::new("qemu-io");
        for cluster in clusters {
            tool.args(["-c", &format!("write -P {byte} {} {CLUSTER}", cluster * CLUSTER)]);
        }
        let output =
            tool.args(["-f", "raw", &format!("nbd+unix:///d{disk}?socket={}", socket.display())]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

/// What is to be compared.
struct Story<'a> {
    subject: &'a mut dyn Subject,
    lines: Vec<String>,
    /// Jobs that QEMU paused on its own.
    drained: HashSet<String>,
}

impl Story<'_> {
    fn does(&mut self, command: &str, arguments: Value) {
        let answer = self.subject.command(command, arguments.clone());
        let answer = match answer {
            Ok(value) => format!("{value}"),
            Err(text) => format!("refused: {text}"),
        };
        self.lines.push(format!("{command} {arguments} -> {answer}"));
    }

    fn wrote(&mut self, disk: usize, clusters: &[u64]) {
        self.subject.dirty(disk, clusters, 3);
    }

    /// The hash of a bitmap, and what `query-named-block-nodes` shows of it.
    fn shows(&mut self, node: &str, bitmap: &str) {
        self.does("x-debug-block-dirty-bitmap-sha256", json!({ "node": node, "name": bitmap }));
        let nodes = self.subject.command("query-named-block-nodes", json!({})).unwrap();
        let nodes = nodes.as_array().unwrap();
        let shown = nodes.iter().find(|n| n["node-name"] == node).unwrap()["dirty-bitmaps"].as_array().unwrap();
        let shown = shown.iter().find(|b| b["name"] == bitmap).unwrap();
        let members = ["name", "count", "granularity", "recording", "busy", "persistent"];
        self.lines.push(members.map(|member| format!("{member}={}", shown[member])).join(" "));
    }

    /// The next event.
    fn hears(&mut self) {
        let event = self.subject.next_event();
        self.lines.push(format!("! {} {}", event.name, event.data));
    }

    /// Hears events until the job has this state. QEMU pauses every job for a moment whenever it drains a node; here
    /// nothing drains, so of a pause nobody asked for nothing is written down.
    fn hears_until(&mut self, job: &str, status: &str) {
        loop {
            let event = self.subject.next_event();
            let change = event.name == "JOB_STATUS_CHANGE";
            let id = event.data["id"].to_string();
            if change && event.data["status"] == "paused" {
                self.drained.insert(id);
                continue;
            }
            if change && event.data["status"] == "running" && self.drained.remove(&id) {
                continue;
            }
            let mut members: Vec<String> = match &event.data {
                Value::Object(members) => members.iter().map(|(name, value)| format!("{name}={value}")).collect(),
                other => vec![other.to_string()],
            };
            members.sort();
            self.lines.push(format!("! {} {}", event.name, members.join(" ")));
            if change && event.data["id"] == job && event.data["status"] == status {
                return;
            }
        }
    }
}

/// Plays `scene` on both and compares line by line.
#[track_caller]
fn same_as_qemu(scene: impl Fn(&mut Story<'_>)) {
    same_as(Qsd::new(), scene);
}

#[track_caller]
fn same_as(mut qsd: Qsd, scene: impl Fn(&mut Story<'_>)) {
    let lab = Lab::new(2);
    for (name, size) in [("t0", 4 * MIB), ("t1", 4 * MIB), ("small", MIB)] {
        qsd.node(name, size, false);
        lab.raw_target(name, size);
    }
    let mut story = Story { subject: &mut qsd, lines: Vec::new(), drained: HashSet::new() };
    scene(&mut story);
    let theirs = story.lines;
    let mut here = Here(lab);
    let mut story = Story { subject: &mut here, lines: Vec::new(), drained: HashSet::new() };
    scene(&mut story);
    for (at, (ours, theirs)) in story.lines.iter().zip(&theirs).enumerate() {
        assert_eq!(ours, theirs, "line {at}; ours is left, QEMU's right");
    }
    assert_eq!(story.lines.len(), theirs.len());
}

#[test]
fn bitmaps() {
    same_as_qemu(|story| {
        let b = |name: &str| json!({ "node": "d0", "name": name });
        for (name, granularity) in [("fine", 4096), ("plain", 65536), ("coarse", 1 << 20)] {
            let add = json!({ "node": "d0", "name": name, "granularity": granularity });
            story.does("block-dirty-bitmap-add", add);
        }
        story.does("block-dirty-bitmap-add", json!({ "node": "d0", "name": "off", "disabled": true }));
        story.does("block-dirty-bitmap-add", b("default"));
        story.wrote(0, &[0, 5, 17, 63]);
        for name in ["fine", "plain", "coarse", "off", "default"] {
            story.shows("d0", name);
        }
        story.does("block-dirty-bitmap-disable", b("plain"));
        story.does("block-dirty-bitmap-enable", b("off"));
        story.does("block-dirty-bitmap-clear", b("default"));
        story.wrote(0, &[7, 8]);
        story.does(
            "block-dirty-bitmap-merge",
            json!({ "node": "d0", "target": "default", "bitmaps": ["plain", { "node": "d0", "name": "coarse" }] }),
        );
        story.does("block-dirty-bitmap-merge", json!({ "node": "d0", "target": "fine", "bitmaps": ["fine", "off"] }));
        story.does("block-dirty-bitmap-merge", json!({ "node": "d0", "target": "coarse", "bitmaps": ["fine"] }));
        for name in ["fine", "plain", "coarse", "off", "default"] {
            story.shows("d0", name);
        }
        story.does("block-dirty-bitmap-remove", b("plain"));
        story.does("block-dirty-bitmap-remove", b("plain"));
        story.wrote(0, &[30]);
        story.shows("d0", "off");
    });
}

#[test]
fn misuses_of_bitmaps() {
    same_as_qemu(|story| {
        story.does("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
        for arguments in [
            json!({ "node": "nope", "name": "x" }),
            json!({ "node": "d0", "name": "" }),
            json!({ "node": "d0", "name": "b" }),
            json!({ "node": "d0", "name": "b", "granularity": 3 }),
            json!({ "node": "d0", "name": "x", "granularity": 256 }),
            json!({ "node": "d0", "name": "x", "granularity": 4294967296_u64 }),
            json!({ "node": "d0", "name": "x", "granularity": -1 }),
            json!({ "node": "d0", "name": "x".repeat(1024) }),
            json!({ "node": "d0", "name": 3 }),
            json!({ "node": "d0" }),
            json!({ "name": "x" }),
            json!({ "node": "d0", "name": "x", "bogus": 1 }),
            json!({ "node": "d0", "name": "x", "disabled": 1 }),
        ] {
            story.does("block-dirty-bitmap-add", arguments);
        }
        for verb in ["remove", "clear", "enable", "disable"] {
            for (node, name) in [("x", "b"), ("d0", "x"), ("d0", "")] {
                story.does(&format!("block-dirty-bitmap-{verb}"), json!({ "node": node, "name": name }));
            }
        }
        for (target, bitmaps) in [
            ("b", json!(["x"])),
            ("x", json!(["b"])),
            ("b", json!([{ "node": "q", "name": "b" }])),
            ("b", json!([3])),
            ("b", json!({ "a": 1 })),
            ("b", json!([{ "node": "d0" }])),
            ("b", json!(["b", { "node": "d0", "name": "b", "x": 1 }])),
        ] {
            let arguments = json!({ "node": "d0", "target": target, "bitmaps": bitmaps });
            story.does("block-dirty-bitmap-merge", arguments);
        }
        story.does("x-debug-block-dirty-bitmap-sha256", json!({ "node": "d0", "name": "x" }));
        story.does("x-debug-block-dirty-bitmap-sha256", json!({ "node": "x", "name": "x" }));
        story.shows("d0", "b");
    });
}

#[test]
fn misuses_of_blockdev_backup() {
    same_as_qemu(|story| {
        story.does("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
        story.wrote(0, &[1]);
        for change in [
            json!({ "job-id": "" }),
            json!({ "job-id": "1j" }),
            json!({ "job-id": "a b" }),
            json!({ "device": "nope" }),
            json!({ "target": "nope" }),
            json!({ "target": "d0" }),
            json!({ "target": "small" }),
            json!({ "sync": "zz" }),
            json!({ "sync": "incremental" }),
            json!({ "sync": "bitmap" }),
            json!({ "sync": "incremental", "bitmap": "b", "bitmap-mode": "never" }),
            json!({ "sync": "bitmap", "bitmap": "b" }),
            json!({ "sync": "bitmap", "bitmap": "x", "bitmap-mode": "never" }),
            json!({ "bitmap": "b" }),
            json!({ "bitmap-mode": "always" }),
            json!({ "bitmap": "b", "bitmap-mode": "never" }),
            json!({ "bitmap": "b", "bitmap-mode": "zz" }),
            json!({ "sync": "top", "bitmap": "b", "bitmap-mode": "never" }),
            json!({ "sync": "none", "bitmap": "b", "bitmap-mode": "always" }),
            json!({ "sync": "none", "bitmap": "b", "bitmap-mode": "never" }),
            json!({ "bitmap": "x", "bitmap-mode": "always" }),
            json!({ "target": "small", "bitmap": "b", "bitmap-mode": "always" }),
            json!({ "x-perf": { "max-workers": 0 } }),
            json!({ "x-perf": { "max-chunk": -1 } }),
            json!({ "x-perf": { "max-chunk": 1 } }),
            json!({ "x-perf": { "bogus": 1 } }),
            json!({ "filter-node-name": "t1" }),
            json!({ "filter-node-name": "9s" }),
            json!({ "on-target-error": "zz" }),
            json!({ "speed": "1" }),
            json!({ "auto-finalize": 1 }),
            json!({ "bogus": 1 }),
        ] {
            let mut arguments = json!({ "job-id": "j", "device": "d0", "target": "t0", "sync": "full" });
            for (name, value) in change.as_object().unwrap() {
                arguments[name] = value.clone();
            }
            story.does("blockdev-backup", arguments);
            story.shows("d0", "b");
        }
        for missing in ["device", "target", "sync"] {
            let mut arguments = json!({ "job-id": "j", "device": "d0", "target": "t0", "sync": "full" });
            arguments.as_object_mut().unwrap().remove(missing);
            story.does("blockdev-backup", arguments);
        }
    });
}

fn start(story: &mut Story<'_>, more: Value) {
    let mut arguments = json!({ "job-id": "j", "device": "d0", "target": "t0", "sync": "full" });
    for (name, value) in more.as_object().unwrap() {
        arguments[name] = value.clone();
    }
    story.does("blockdev-backup", arguments);
}

#[test]
fn the_life_of_a_job() {
    same_as_qemu(|story| {
        start(story, json!({}));
        story.hears_until("j", "null");
        start(story, json!({ "auto-finalize": false, "auto-dismiss": false }));
        story.hears_until("j", "pending");
        for verb in ["dismiss", "pause", "complete", "resume"] {
            story.does(&format!("job-{verb}"), json!({ "id": "j" }));
        }
        story.does("block-job-set-speed", json!({ "device": "j", "speed": 1 }));
        story.does("job-finalize", json!({ "id": "j" }));
        story.hears_until("j", "concluded");
        for verb in ["cancel", "finalize", "pause", "complete", "resume"] {
            story.does(&format!("job-{verb}"), json!({ "id": "j" }));
        }
        story.does("block-job-cancel", json!({ "device": "j" }));
        story.does("job-dismiss", json!({ "id": "j" }));
        story.hears_until("j", "null");
        start(story, json!({ "auto-finalize": false }));
        story.hears_until("j", "pending");
        story.does("job-cancel", json!({ "id": "j" }));
        story.hears_until("j", "null");
        for verb in ["cancel", "finalize", "pause", "complete", "resume", "dismiss"] {
            story.does(&format!("job-{verb}"), json!({ "id": "j" }));
            let member = if verb == "finalize" || verb == "dismiss" { "id" } else { "device" };
            story.does(&format!("block-job-{verb}"), json!({ member: "j" }));
        }
        story.does("block-job-set-speed", json!({ "device": "j", "speed": -1 }));
    });
}

#[test]
fn bitmaps_after_their_jobs() {
    same_as_qemu(|story| {
        story.does("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
        for (sync, mode) in [
            ("incremental", "on-success"),
            ("bitmap", "on-success"),
            ("bitmap", "never"),
            ("bitmap", "always"),
            ("full", "on-success"),
            ("full", "always"),
            ("top", "on-success"),
            ("top", "always"),
        ] {
            for end in ["job-finalize", "job-cancel"] {
                story.wrote(0, &[1, 2, 3, 20]);
                story.shows("d0", "b");
                start(story, json!({ "sync": sync, "bitmap": "b", "bitmap-mode": mode, "auto-finalize": false }));
                story.hears_until("j", "pending");
                story.shows("d0", "b");
                for verb in ["remove", "clear", "enable", "disable"] {
                    story.does(&format!("block-dirty-bitmap-{verb}"), json!({ "node": "d0", "name": "b" }));
                }
                story.wrote(0, &[3, 40]);
                story.does(end, json!({ "id": "j" }));
                story.hears_until("j", "null");
                story.shows("d0", "b");
            }
        }
        // Nothing to do.
        story.does("block-dirty-bitmap-clear", json!({ "node": "d0", "name": "b" }));
        start(story, json!({ "sync": "incremental", "bitmap": "b" }));
        story.hears_until("j", "null");
    });
}

#[test]
fn transactions() {
    same_as_qemu(|story| {
        let backup = |id: &str, n: u32| {
            json!({ "type": "blockdev-backup", "data": {
                "job-id": id, "device": format!("d{n}"), "target": format!("t{n}"), "sync": "full",
                "auto-finalize": false,
            } })
        };
        let add = |name: &str| json!({ "type": "block-dirty-bitmap-add", "data": { "node": "d0", "name": name } });
        let abort = json!({ "type": "abort", "data": {} });
        let grouped = json!({ "completion-mode": "grouped" });
        for (actions, properties) in [
            (json!([]), json!({})),
            (json!([]), grouped.clone()),
            (json!([]), json!({ "completion-mode": "zz" })),
            (json!([]), json!({ "zz": 1 })),
            (json!([{ "type": "zz", "data": {} }]), json!({})),
            (json!([{ "type": "abort" }]), json!({})),
            (json!([{ "data": {} }]), json!({})),
            (json!([{ "type": "abort", "data": { "x": 1 } }]), json!({})),
            (json!([{ "type": "abort", "data": {}, "y": 1 }]), json!({})),
            (json!([add("b"), add("b")]), json!({})),
            (json!([add("b"), abort]), json!({})),
            (json!([add("b")]), grouped.clone()),
            (json!([abort]), grouped.clone()),
            (json!([add("b"), { "type": "block-dirty-bitmap-clear", "data": { "node": "d0" } }]), json!({})),
            (
                json!([add("b"), { "type": "block-dirty-bitmap-clear", "data": { "node": "d0", "name": "x" } }]),
                json!({}),
            ),
        ] {
            story.does("transaction", json!({ "actions": actions, "properties": properties }));
        }
        story.does("transaction", json!({}));
        // Groups: finalized by one, cancelled by one.
        for end in ["job-finalize", "job-cancel"] {
            let actions = json!([backup("j0", 0), backup("j1", 1)]);
            story.does("transaction", json!({ "actions": actions, "properties": grouped }));
            story.lines.push("both are pending".to_owned());
            // Which of the two is first to wait is chance.
            let from = story.lines.len();
            story.hears_until("j0", "pending");
            story.lines[from..].sort();
            story.does(end, json!({ "id": "j1" }));
            let from = story.lines.len();
            story.hears_until("j0", "null");
            story.lines[from..].iter_mut().for_each(|line| line.push_str(" in this order"));
        }
    });
}

/// A client that is connected to an export, and stays.
struct Connected(Child);

impl Connected {
    fn to(export: &str, socket: &str) -> Self {
        let mut client = Command::new("qemu-io")
            .args(["-r", "-f", "raw", &format!("nbd+unix:///{export}?socket={socket}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        client.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut answer = String::new();
        BufReader::new(client.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
        assert!(answer.contains("read 512/512"), "{answer}");
        Self(client)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn exports_and_their_misuses() {
    let mut qsd = Qsd::new();
    qsd.command("nbd-server-stop", json!({})).unwrap();
    for _ in ["d0", "d1"] {
        assert_eq!(qsd.next_event().name, "BLOCK_EXPORT_DELETED");
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd").display().to_string();
    same_as(qsd, |story| {
        let unix = json!({ "type": "unix", "data": { "path": socket } });
        let export = |more: Value| {
            let mut arguments = json!({ "type": "nbd", "id": "e", "node-name": "d0" });
            for (name, value) in more.as_object().unwrap() {
                arguments[name] = value.clone();
            }
            arguments
        };
        for (name, disabled) in [("b0", false), ("off", true)] {
            story.does("block-dirty-bitmap-add", json!({ "node": "d0", "name": name, "disabled": disabled }));
        }
        story.does("nbd-server-stop", json!({}));
        story.does("block-export-add", export(json!({})));
        story.does("block-export-del", json!({ "id": "zz" }));
        story.does("query-block-exports", json!({}));
        for arguments in [
            json!({}),
            json!({ "addr": "x" }),
            json!({ "addr": {} }),
            json!({ "addr": { "type": "zz" } }),
            json!({ "addr": { "type": "unix" } }),
            json!({ "addr": { "type": "unix", "data": {} } }),
            json!({ "addr": { "type": "unix", "data": { "path": 1 } } }),
            json!({ "addr": { "type": "unix", "data": { "path": "/nonexistent/s" } } }),
            json!({ "addr": { "type": "unix", "data": { "path": socket, "x": 1 } } }),
            json!({ "addr": { "type": "unix", "data": { "path": socket }, "x": 1 } }),
            json!({ "addr": { "type": "inet", "data": { "host": "127.0.0.1" } } }),
            json!({ "addr": { "type": "inet", "data": { "host": "127.0.0.1", "port": 10809 } } }),
            json!({ "addr": unix, "tls-creds": "nope" }),
            json!({ "addr": unix, "max-connections": -1 }),
            json!({ "addr": unix, "max-connections": "1" }),
            json!({ "addr": unix, "bogus": 1 }),
        ] {
            story.does("nbd-server-start", arguments);
        }
        story.does("nbd-server-start", json!({ "addr": unix, "max-connections": 0, "handshake-max-seconds": 0 }));
        story.does("nbd-server-start", json!({ "addr": unix }));
        for arguments in [
            json!({}),
            json!({ "type": "nbd" }),
            json!({ "type": "nbd", "id": "e" }),
            json!({ "type": "zz", "id": "e", "node-name": "d0" }),
        ] {
            story.does("block-export-add", arguments);
        }
        for more in [
            json!({ "id": "" }),
            json!({ "id": "1e" }),
            json!({ "id": "a b" }),
            json!({ "id": "1", "node-name": "nope" }),
            json!({ "node-name": "nope" }),
            json!({ "node-name": "nope", "iothread": "zz" }),
            json!({ "iothread": "zz" }),
            json!({ "bitmaps": 3 }),
            json!({ "bitmaps": [3] }),
            json!({ "bitmaps": ["x"] }),
            json!({ "bitmaps": ["b0"] }),
            json!({ "bitmaps": ["off", "b0"] }),
            json!({ "bitmaps": [{ "node": "d0" }] }),
            json!({ "bitmaps": [{ "node": "q", "name": "b0" }] }),
            json!({ "bitmaps": [{ "node": "d0", "name": "x" }] }),
            json!({ "bogus": 1 }),
            json!({ "name": 1 }),
            json!({ "name": "n".repeat(4097) }),
            json!({ "description": "d".repeat(4097) }),
            json!({ "writable": 1 }),
        ] {
            story.does("block-export-add", export(more));
        }
        story.does("query-block-exports", json!({}));
        for more in [
            json!({ "bitmaps": ["off", "off"] }),
            json!({ "name": "", "fixed-iothread": true, "writethrough": true, "allow-inactive": false }),
            json!({ "name": "n".repeat(4096), "description": "d".repeat(4096) }),
            json!({ "bitmaps": [{ "node": "d0", "name": "off" }] }),
        ] {
            story.does("block-export-add", export(more));
            story.does("query-block-exports", json!({}));
            story.does("block-export-del", json!({ "id": "e" }));
            story.hears();
        }
        story.does("block-export-add", export(json!({ "bitmaps": ["off"] })));
        story.does("block-export-add", export(json!({})));
        story.does("block-export-add", export(json!({ "id": "f" })));
        story.does("block-export-add", export(json!({ "id": "f", "name": "g" })));
        story.does("block-export-add", export(json!({ "id": "g", "node-name": "d1" })));
        story.does("query-block-exports", json!({}));
        let client = Connected::to("g", &socket);
        story.does("block-export-del", json!({ "id": "f" }));
        story.does("block-export-del", json!({ "id": "f", "mode": "safe" }));
        story.does("block-export-del", json!({ "id": "f", "mode": "zz" }));
        story.does("block-export-del", json!({ "id": "f", "mode": "hard", "x": 1 }));
        story.does("block-export-del", json!({ "id": "f", "mode": "hard" }));
        story.hears();
        drop(client);
        story.does("block-export-del", json!({ "id": "f" }));
        story.does("query-block-exports", json!({}));
        let client = Connected::to("d1", &socket);
        story.does("nbd-server-stop", json!({}));
        let from = story.lines.len();
        story.hears();
        story.hears();
        // QEMU's export that has a client takes longer.
        story.lines[from..].sort();
        drop(client);
        story.does("query-block-exports", json!({}));
        story.does("nbd-server-start", json!({ "addr": unix }));
        for id in ["x", "y", "z"] {
            story.does("block-export-add", export(json!({ "id": id, "name": id })));
        }
        story.does("nbd-server-stop", json!({}));
        for _ in ["x", "y", "z"] {
            story.hears();
        }
        story.does("nbd-server-stop", json!({}));
    });
}

#[test]
fn misuses_of_objects() {
    same_as_qemu(|story| {
        let object = |more: Value| {
            let mut arguments = json!({ "qom-type": "tls-creds-x509", "id": "t" });
            for (name, value) in more.as_object().unwrap() {
                arguments[name] = value.clone();
            }
            arguments
        };
        story.does("object-add", json!({}));
        story.does("object-add", json!({ "qom-type": "zz", "id": "t" }));
        story.does("object-add", json!({ "qom-type": "tls-creds-x509" }));
        for more in [
            json!({ "id": "" }),
            json!({ "id": "1 a", "dir": "/" }),
            json!({}),
            json!({ "endpoint": "server" }),
            json!({ "endpoint": "zz" }),
            json!({ "dir": 1 }),
            json!({ "verify-peer": 1 }),
            json!({ "bogus": 1 }),
        ] {
            story.does("object-add", object(more));
        }
        story.does("object-del", json!({ "id": "t" }));
    });
}
