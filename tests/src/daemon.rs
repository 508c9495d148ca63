//! The daemon under test: blkmark, or `qemu-storage-daemon` in its place as the oracle.
//!
//! Both serve raw disks over vhost-user-blk and take QMP orders on one control socket. Tests that hold for both are
//! run with both, so that a wrong belief of a test about the protocols does not become a "bug" of blkmark.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use crate::lab::{Disk, Lab};
use crate::process::Process;
use crate::qmp::Qmp;
use crate::tools;

/// Which program serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The built binary of this workspace.
    Blkmark,
    /// `qemu-storage-daemon`.
    Qsd,
}

/// A daemon that serves disks. Killed and reaped when dropped.
#[derive(Debug)]
pub struct Daemon {
    kind: Kind,
    process: Process,
    control: PathBuf,
}

impl Daemon {
    /// Starts blkmark over `disks`; returns when it says that it is ready.
    pub fn blkmark(lab: &Lab, disks: &[Disk]) -> Result<Daemon> {
        Daemon::start(Kind::Blkmark, lab, disks)
    }

    /// Starts a daemon of either kind over `disks`, with its control socket in the lab.
    pub fn start(kind: Kind, lab: &Lab, disks: &[Disk]) -> Result<Daemon> {
        Daemon::start_with(kind, lab, disks, "control.sock", &[])
    }

    /// The same with a control socket of another name and more arguments.
    pub fn start_with(kind: Kind, lab: &Lab, disks: &[Disk], control: &str, more: &[&str]) -> Result<Daemon> {
        let control = lab.path(control);
        let mut process = match kind {
            Kind::Blkmark => {
                let mut command = serve_command(disks, &control)?;
                lab.start("blkmark", command.args(more))?
            }
            Kind::Qsd => {
                // A second monitor on stdout: its greeting says that everything on the command line is served. Its
                // stdin has to stay open, which the process sees to.
                let mut command = tools::command("qemu-storage-daemon")?;
                qsd_arguments(&mut command, disks);
                command
                    .arg("--chardev")
                    .arg(format!("socket,id=control,path={},server=on,wait=off", control.display()))
                    .args(["--monitor", "chardev=control"])
                    .args(["--chardev", "stdio,id=ready", "--monitor", "chardev=ready"])
                    .args(more)
                    .stdin(Stdio::piped());
                lab.start("qemu-storage-daemon", &mut command)?
            }
        };
        process.first_line()?;
        Ok(Daemon { kind, process, control })
    }

    /// Which program this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// A new client of the control socket.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.control).with_context(|| self.process.log_tail())
    }

    /// The control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// The process, for signals and its log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Ends it as an operator does: SIGTERM. blkmark has to end with 0.
    pub fn stop(mut self) -> Result<ExitStatus> {
        let status = self.process.terminate()?;
        if self.kind == Kind::Blkmark && !status.success() {
            bail!("blkmark ended with {status} on SIGTERM\n{}", self.process.log_tail());
        }
        Ok(status)
    }

    /// Fails with the log if the daemon has ended.
    pub fn assert_running(&mut self) -> Result<()> {
        if !self.process.is_running() {
            let status = self.process.wait(crate::process::GIVE_UP)?;
            bail!("the daemon has ended: {status}\n{}", self.process.log_tail());
        }
        Ok(())
    }
}

/// The built `blkmark`: `BLKMARK_BIN`, or the one beside the test executables. A test run builds it first.
pub fn blkmark_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("BLKMARK_BIN") {
        let path = PathBuf::from(path);
        if !path.is_file() {
            bail!("BLKMARK_BIN names {}, which is no file", path.display());
        }
        return Ok(path);
    }
    let test = std::env::current_exe().context("cannot tell where the test executable is")?;
    let beside = test.ancestors().skip(1).take(2).map(|folder| folder.join("blkmark")).find(|file| file.is_file());
    match beside {
        Some(file) => Ok(file),
        None => bail!(
            "no blkmark beside {}: build it first (`cargo build -p blkmark`), or name it in BLKMARK_BIN",
            test.display()
        ),
    }
}

/// `blkmark serve` for these disks.
pub fn serve_command(disks: &[Disk], control: &Path) -> Result<Command> {
    let mut command = Command::new(blkmark_binary()?);
    command.arg("serve");
    for disk in disks {
        command.arg("--disk").arg(disk_option(disk));
    }
    command.arg("--control").arg(control).stdin(Stdio::null());
    Ok(command)
}

/// The value of `--disk`.
pub fn disk_option(disk: &Disk) -> String {
    let mut option =
        format!("id={},path={},socket={},queues={}", disk.id, disk.path.display(), disk.socket.display(), disk.queues);
    if disk.readonly {
        option.push_str(",readonly=on");
    }
    if let Some(direct) = disk.direct {
        option.push_str(if direct { ",direct=on" } else { ",direct=off" });
    }
    // The store of a device has a place for all daemons of a machine; a test keeps its own.
    if fs::metadata(&disk.path).is_ok_and(|found| found.file_type().is_block_device()) {
        option.push_str(&format!(",bitmaps={}.blkmark", disk.socket.display()));
    }
    option
}

fn qsd_arguments(command: &mut Command, disks: &[Disk]) {
    for disk in disks {
        let (id, path, socket) = (&disk.id, disk.path.display(), disk.socket.display());
        let readonly = if disk.readonly { "on" } else { "off" };
        // A socket left by an earlier run would be in its way.
        let _ = fs::remove_file(&disk.socket);
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=raw,node-name={id},read-only={readonly},discard=unmap,file.driver=file,file.filename={path},file.discard=unmap"
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export-{id},node-name={id},addr.type=unix,addr.path={socket},writable={},num-queues={}",
                if disk.readonly { "off" } else { "on" },
                disk.queues
            ));
    }
}
