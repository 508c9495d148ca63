//! The tools of the machine that the tests lean on: found early, run with their output kept.
//!
//! A tool that is missing is a failure with its name and the package that brings it, never a skipped test.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Tools and the Debian packages they come in; `scripts/setup` installs these.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-storage-daemon", "qemu-utils"),
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdkit", "nbdkit"),
    ("openssl", "openssl"),
    ("busybox", "busybox-static"),
    ("mke2fs", "e2fsprogs"),
    ("e2fsck", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("filefrag", "e2fsprogs"),
    ("modprobe", "kmod"),
    ("ldd", "libc-bin"),
    ("mount", "mount"),
    ("losetup", "mount"),
    ("setpriv", "util-linux"),
    ("fsfreeze", "util-linux"),
    ("mkfs.xfs", "xfsprogs"),
    ("mkfs.btrfs", "btrfs-progs"),
];

/// Where `tool` is, looked for in `PATH` and in the folders of system tools.
pub fn find(tool: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    for folder in folders {
        let file = folder.join(tool);
        if file.is_file() {
            return Ok(file);
        }
    }
    let package = PACKAGES.iter().find(|(name, _)| *name == tool).map_or("unknown", |(_, package)| package);
    bail!("`{tool}` is missing: install the package {package}, or run scripts/setup");
}

/// A command for `tool`, or the error that names what is missing.
pub fn command(tool: &str) -> Result<Command> {
    Ok(Command::new(find(tool)?))
}

/// A program of the Python environment that `scripts/setup` makes: `BLKMARK_PYTHON_BIN`, or `target/python/bin`.
pub fn python(program: &str) -> Result<Command> {
    let folder = match std::env::var_os("BLKMARK_PYTHON_BIN") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("target").join("python/bin"),
    };
    let file = folder.join(program);
    if !file.exists() {
        bail!("{} is missing: run scripts/setup, which makes a Python environment with qemu.qmp", file.display());
    }
    Ok(Command::new(file))
}

/// What a tool answered.
#[derive(Debug)]
pub struct Answer {
    /// Exit code, or -1 if a signal ended it.
    pub code: i32,
    /// stdout and, after it, stderr.
    pub text: String,
}

impl Answer {
    fn of(output: Output) -> Answer {
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Answer { code: output.status.code().unwrap_or(-1), text }
    }
}

/// Runs a tool to its end, whatever its exit code.
pub fn answer(command: &mut Command) -> Result<Answer> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    Ok(Answer::of(output))
}

/// Runs a tool that has to succeed.
pub fn run(command: &mut Command) -> Result<String> {
    let answer = answer(command)?;
    if answer.code != 0 {
        bail!("{command:?} ended with {}:\n{}", answer.code, answer.text);
    }
    Ok(answer.text)
}

/// Fails with one message that names every missing tool.
pub fn require_all() -> Result<()> {
    let missing: Vec<String> = PACKAGES
        .iter()
        .filter(|(tool, _)| find(tool).is_err())
        .map(|(tool, package)| format!("{tool} (package {package})"))
        .collect();
    if !missing.is_empty() {
        bail!("missing: {}. Run scripts/setup", missing.join(", "));
    }
    let version = run(command("qemu-img")?.arg("--version"))?;
    let major = version.split_whitespace().find_map(|word| word.split('.').next()?.parse::<u32>().ok());
    match major {
        Some(10..) => Ok(()),
        _ => bail!("QEMU 10 or later is needed, this is: {version}"),
    }
}
