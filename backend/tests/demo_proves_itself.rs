//! `blkmark demo` needs nothing but the binary, proves what it says, and leaves nothing behind.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use sha2::{Digest, Sha256};

fn demo(directory: &Path, words: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blkmark"));
    // No tool of anybody else can be found.
    command.args(words.split(' ')).arg("--dir").arg(directory).env("PATH", "");
    command
}

fn run(directory: &Path, words: &str) -> Output {
    demo(directory, words).output().unwrap()
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|number| number > 0.0)
}

#[test]
fn every_restored_image_is_proved_and_nothing_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), "--json demo --size 64M --seconds 1");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stderr, b"", "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object and nothing else");

    assert_eq!(report["passed"], true);
    assert_eq!(report["disk-bytes"], 64 << 20);
    assert!(positive(&report["no-backup"]["guest"]["requests"]));
    let backups = report["backups"].as_array().unwrap();
    let names: Vec<_> = backups.iter().map(|backup| backup["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["full", "inc1", "inc2", "last"]);
    let proofs: Vec<_> = backups.iter().map(|backup| backup["proof"]["kind"].as_str().unwrap()).collect();
    assert_eq!(proofs, ["guest-held", "guest-held", "between-bounds", "guest-stopped"]);
    for backup in &backups[1..] {
        assert!(positive(&backup["dirty-bytes"]), "{backup}");
    }
    for backup in &backups[..3] {
        assert!(positive(&backup["guest"]["requests"]), "the guest stood still during {backup}");
        assert!(positive(&backup["guest"]["write-latency-us"]["p99"]), "{backup}");
    }
    let sums: Vec<_> = backups.iter().filter_map(|backup| backup["proof"]["sha256"].as_str()).collect();
    assert!(sums.len() == 3 && sums[0] != sums[1] && sums[1] != sums[2], "the disk never changed: {sums:?}");
    assert!(is_empty(directory.path()));
}

#[test]
fn for_people_it_prints_plain_lines_and_what_is_kept_is_what_was_said() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), "demo --size 64M --seconds 1 --keep");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(output.stderr, b"");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("all 4 restored images are equal to the disk as of their instant"), "{text}");
    assert!(!text.contains('\u{1b}') && !text.contains('\r'), "escape codes off a terminal: {text:?}");
    assert!(text.contains("0 MiB ") && text.contains('░'), "no map: {text}");

    let kept = fs::read_dir(directory.path()).unwrap().next().unwrap().unwrap().path();
    assert!(text.contains(kept.to_str().unwrap()));
    let read = |name: &str| fs::read(kept.join(name)).unwrap();
    assert!(read("last.raw") == read("disk.raw"), "the last image is not the disk");
    for name in ["full.raw", "inc1.raw", "last.raw"] {
        let sum: String = Sha256::digest(read(name)).iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(text.contains(&sum[..16]), "{name} has {sum}, which nobody spoke of");
    }
    for name in ["disk.sock", "control.sock"] {
        assert!(!kept.join(name).exists(), "{name} is left");
    }
}

#[test]
fn what_cannot_be_is_refused_in_one_line_before_anything_starts() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    for (place, words, status, part) in [
        (directory.path(), "demo --size 1M", 1, "from 64 MiB to 64 GiB"),
        (directory.path(), "demo --size 1T", 1, "from 64 MiB to 64 GiB"),
        (directory.path(), "demo --size 104858000", 1, "in whole MiB"),
        (directory.path(), "demo --size much", 2, "expected a number of bytes"),
        (directory.path(), "demo --seconds 0", 2, "0 is not in 1..=3600"),
        (&missing, "demo", 1, "No such file or directory"),
        (Path::new("/proc"), "demo --size 64M", 1, "/proc"),
    ] {
        let output = run(place, words);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{words}: {output:?}");
        assert!(text.contains(part), "{words}: {text}");
        assert!(status == 2 || text.lines().count() == 1, "{words}: {text}");
        assert!(output.stdout.is_empty(), "{words}: {output:?}");
    }
    assert!(is_empty(directory.path()));
}

#[test]
fn an_interrupt_ends_it_in_order_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = demo(directory.path(), "demo --size 64M --seconds 3600")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first line says that the disk is made.
    let mut first = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"A disk");
    assert!(!is_empty(directory.path()));
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "blkmark: demo: interrupted\n");
    assert!(is_empty(directory.path()));
}
