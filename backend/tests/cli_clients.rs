//! The client commands do what they say, and their exit status says how it went. They talk to
//! `qemu-storage-daemon`, whose QMP is the one they are written for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use blkmark_backup::qmp::Client;
use serde_json::{Value, json};

/// A `qemu-storage-daemon` with a disk of 16 MiB that can be written over NBD; told to quit when dropped.
struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Lab {
        let lab = Lab { directory: tempfile::tempdir().unwrap() };
        fs::File::create(lab.path("disk.raw")).unwrap().set_len(16 << 20).unwrap();
        let name = |file: &str| lab.path(file).display().to_string();
        // It returns once everything is served.
        let started = Command::new("qemu-storage-daemon")
            .args(["--daemonize", "--pidfile", &name("pid")])
            .args(["--blockdev", &format!("driver=file,filename={},node-name=drive0", name("disk.raw"))])
            .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", name("nbd"))])
            .args(["--export", "type=nbd,id=guest,node-name=drive0,writable=on"])
            .args(["--chardev", &format!("socket,path={},server=on,wait=off,id=c", name("control"))])
            .args(["--monitor", "chardev=c"])
            .status();
        assert!(started.expect("qemu-storage-daemon can be run (Debian: qemu-utils)").success());
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkmark"));
        command.args(words.split(' ')).current_dir(self.directory.path());
        command.env("BLKMARK_CONTROL", self.path("control"));
        command
    }

    fn run(&self, words: &str) -> Output {
        self.command(words).output().unwrap()
    }

    fn succeeds(&self, words: &str) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(0), "{words}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &str) -> Value {
        serde_json::from_str(&self.succeeds(&format!("--json {words}"))).unwrap()
    }

    /// Fails with a status, and with one line on standard error that says `part`.
    fn fails(&self, words: &str, status: i32, part: &str) {
        let output = self.run(words);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{words}: {said}");
        assert!(said.starts_with("blkmark: ") && said.lines().count() == 1 && said.contains(part), "{words}: {said}");
    }

    fn write(&self, pattern: u8, offset: &str) {
        let nbd = format!("nbd+unix:///drive0?socket={}", self.path("nbd").display());
        tool("qemu-io", &["-f", "raw", "-c", &format!("write -P {pattern} {offset} 128K"), &nbd]);
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.path("pid")).unwrap_or_default();
        let quit = Client::connect(self.path("control")).and_then(|mut client| client.execute("quit", Value::Null));
        // It can get stuck over a job that a failed test left behind.
        if quit.is_err() || std::thread::panicking() {
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

fn tool(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("QEMU's tools can be run (Debian: qemu-utils)");
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

fn same(image: &Path, raw: &Path) {
    let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}

#[test]
fn a_full_and_an_incremental_backup_restore_to_the_disk_as_it_was_at_each() {
    let lab = Lab::new();
    lab.write(1, "0");
    lab.write(2, "8M");
    let full = lab.json("backup full --disk drive0 --target full.qcow2 --bitmap daily");
    assert_eq!(full, json!({ "return": [{ "job": "drive0", "result": "completed" }] }));
    fs::copy(lab.path("disk.raw"), lab.path("first.raw")).unwrap();

    lab.write(3, "4M");
    let bitmaps = lab.json("bitmap list drive0");
    assert_eq!((&bitmaps[0]["name"], &bitmaps[0]["count"]), (&json!("daily"), &json!(128 << 10)));
    lab.succeeds("backup incremental --disk drive0 --target inc.qcow2 --backing full.qcow2 --bitmap daily");
    assert_eq!(lab.json("query bitmaps")[0]["count"], 0);

    same(&lab.path("full.qcow2"), &lab.path("first.raw"));
    same(&lab.path("inc.qcow2"), &lab.path("disk.raw"));
    // The chain can be moved: its images lie side by side.
    let moved = lab.path("moved");
    fs::create_dir(&moved).unwrap();
    for image in ["full.qcow2", "inc.qcow2"] {
        fs::rename(lab.path(image), moved.join(image)).unwrap();
    }
    same(&moved.join("inc.qcow2"), &lab.path("disk.raw"));
    // A second full backup with the same bitmap starts the chain anew.
    lab.write(4, "1M");
    lab.succeeds("backup full --disk drive0 --target full2.qcow2 --bitmap daily");
    assert_eq!(lab.json("query bitmaps")[0]["count"], 0);
}

#[test]
fn a_refused_backup_leaves_nothing_behind_and_existing_files_alone() {
    let lab = Lab::new();
    lab.succeeds("backup full --disk drive0 --target full.qcow2");
    let before = fs::read(lab.path("full.qcow2")).unwrap();
    lab.fails("backup full --disk drive0 --target full.qcow2", 1, "exists");
    assert_eq!(fs::read(lab.path("full.qcow2")).unwrap(), before);
    let incremental = "backup incremental --disk drive0 --backing full.qcow2 --target inc.qcow2 --bitmap missing";
    lab.fails(incremental, 1, "Bitmap 'missing' could not be found");
    assert!(!lab.path("inc.qcow2").exists());
    lab.fails("backup full --disk nope --target nope.qcow2", 1, "Cannot find device='nope'");
    lab.fails("backup full --disk drive0 --target missing/x.qcow2", 1, "No such file or directory");
    lab.succeeds("backup full --disk drive0 --target full.qcow2 --overwrite");
}

#[test]
fn jobs_are_steered_by_their_ids() {
    let lab = Lab::new();
    lab.write(1, "0");
    assert_eq!(lab.succeeds("backup full --disk drive0 --target slow.qcow2 --speed 1 --job slow --no-wait"), "slow\n");
    assert_eq!(lab.json("job list")[0]["id"], "slow");
    lab.succeeds("job pause slow");
    lab.fails("job pause slow", 1, "Job is already paused");
    assert!(lab.succeeds("query jobs").contains("slow"));
    lab.succeeds("job resume slow");
    lab.fails("job resume slow", 1, "Can't resume a job that was not paused");
    lab.succeeds("job set-speed slow 1K");
    lab.succeeds("job cancel slow");
    lab.fails("job wait slow", 1, "not found");
    lab.fails("job cancel slow", 1, "Job not found");
}

#[test]
fn bitmaps_are_changed_as_the_words_say() {
    let lab = Lab::new();
    lab.succeeds("bitmap add drive0 a --transient --granularity 128K");
    lab.succeeds("bitmap add drive0 b --transient --disabled");
    lab.write(1, "0");
    lab.succeeds("bitmap merge drive0 b a");
    lab.succeeds("bitmap disable drive0 a");
    lab.succeeds("bitmap enable drive0 b");
    lab.write(2, "8M");
    let all = lab.json("bitmap list");
    let state = |name: &str| {
        let found = all.as_array().unwrap().iter().find(|bitmap| bitmap["name"] == name).unwrap();
        (found["recording"].clone(), found["count"].clone(), found["granularity"].clone())
    };
    assert_eq!(state("a"), (json!(false), json!(128 << 10), json!(128 << 10)));
    assert_eq!(state("b"), (json!(true), json!(256 << 10), json!(64 << 10)));
    assert_eq!(lab.succeeds("bitmap list").lines().count(), 3);
    lab.succeeds("bitmap clear drive0 a");
    lab.succeeds("bitmap remove drive0 b");
    assert_eq!(lab.json("bitmap list")[0]["count"], 0);
    lab.fails("bitmap remove drive0 b", 1, "Dirty bitmap 'b' not found");
    lab.fails("bitmap list nope", 1, "nope");
}

#[test]
fn the_exit_status_says_what_went_wrong() {
    let lab = Lab::new();
    lab.fails("qmp nope", 1, "The command nope has not been found");
    lab.fails("qmp query-version []", 2, "JSON object");
    lab.fails("backup incremental --disk drive0 --target x", 2, "--bitmap");
    lab.fails("--control /nonexistent query jobs", 3, "/nonexistent");
    assert_eq!(lab.run("query nonsense").status.code(), Some(2));
    // For machines the failure is an object, too.
    let output = lab.run("--json qmp nope");
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said["error"]["class"], "CommandNotFound");
    // A socket on which something else speaks is not a daemon that refused.
    let nbd = lab.path("nbd");
    lab.fails(&format!("--control {} query jobs", nbd.display()), 3, "not a QMP server");
}

#[test]
fn raw_qmp_is_passed_on_and_errors_in_it_are_told() {
    let lab = Lab::new();
    assert_eq!(lab.json("qmp query-version")["qemu"]["major"], 10);
    let stream = |input: &str| {
        let mut child = lab.command("qmp").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (status, said) = stream("{'execute': 'query-jobs', 'id': 1}");
    assert_eq!((status, said.as_str()), (Some(0), "{\"return\":[],\"id\":1}\n"));
    let (status, said) = stream("{'execute': 'nope'}\n{'execute': 'query-jobs'}\n");
    assert_eq!((status, said.lines().count()), (Some(1), 2));
    let many = "{'execute': 'query-named-block-nodes'} garbage ".repeat(500) + "1";
    let (status, said) = stream(&many);
    assert_eq!((status, said.lines().count()), (Some(1), 1001));
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let lab = Lab::new();
    let mut child =
        lab.command("query named-block-nodes").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}
