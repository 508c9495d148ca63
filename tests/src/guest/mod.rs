//! A Linux guest under QEMU (TCG, so that it runs on any machine), with disks attached over vhost-user.
//!
//! The guest boots in about two seconds. It takes shell lines over its second serial port and answers each with its
//! output and status, so a test awaits events and never sleeps. The first serial port is the kernel's console; its
//! end is part of every failure message.
//!
//! What boots can be chosen from the environment, so that other test images can be used:
//! `BLKMARK_GUEST_KERNEL` (default: the newest Debian cloud kernel in `/boot`), `BLKMARK_GUEST_INITRD` (an initramfs
//! to lie beneath ours), `BLKMARK_GUEST_ROOTFS` (a raw ext4 image whose userland runs the shell lines) and
//! `BLKMARK_GUEST_MODULES` (a folder of kernel modules; default: that of the default kernel).

mod archive;
mod boot;
mod initramfs;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::lab::{Disk, Lab};
use crate::process::{GIVE_UP, Process, readable_until, tail};

/// Says that `init` takes orders.
const READY: &str = "@@ready";

/// A running guest. Killed when dropped.
#[derive(Debug)]
pub struct Guest {
    process: Process,
    orders: UnixStream,
    unread: Vec<u8>,
    console: PathBuf,
    next_order: u64,
}

/// What a shell line in the guest answered.
#[derive(Debug)]
pub struct Answer {
    /// The exit status of the line.
    pub status: i32,
    /// Its stdout and stderr as they came.
    pub output: String,
}

/// Fails with the name of what is missing for a guest to boot.
pub fn require() -> Result<()> {
    initramfs::build(&boot::Image::from_environment()?).map(drop)
}

impl Guest {
    /// Boots a guest with these disks as `/dev/vda`, `/dev/vdb`, ... and returns when it takes orders.
    pub fn boot(lab: &Lab, disks: &[Disk]) -> Result<Guest> {
        let image = boot::Image::from_environment()?;
        let number = (1..).find(|n| !lab.path(&format!("guest-{n}.sock")).exists());
        let name = format!("guest-{}", number.unwrap_or(1));
        let initrd = lab.write(&format!("{name}.initrd"), initramfs::build(&image)?)?;
        let console = lab.path(&format!("{name}.console"));
        let socket = lab.path(&format!("{name}.sock"));
        let listener = UnixListener::bind(&socket)?;

        let mut command = boot::qemu(&image, disks, &initrd, &console, &socket)?;
        let process = lab.start(&name, &mut command)?;
        if !readable_until(&listener, Instant::now() + GIVE_UP)? {
            bail!("QEMU did not start\n{}", process.log_tail());
        }
        let (orders, _) = listener.accept()?;
        let mut guest = Guest { process, orders, unread: Vec::new(), console, next_order: 0 };
        loop {
            let line = guest.line().context("the guest did not boot")?;
            if String::from_utf8_lossy(&line).trim_end() == READY {
                break;
            }
        }
        Ok(guest)
    }

    /// Runs a shell line in the guest, whatever its status.
    pub fn answer(&mut self, line: &str) -> Result<Answer> {
        self.next_order += 1;
        let mark = format!("@@{} ", self.next_order);
        let order = format!("{} {}\n", self.next_order, hex(line.as_bytes()));
        self.orders
            .write_all(order.as_bytes())
            .with_context(|| format!("the guest takes no orders\n{}", self.trouble()))?;
        let mut output = Vec::new();
        loop {
            let bytes = self.line().with_context(|| format!("the guest was running: {line}"))?;
            let text = String::from_utf8_lossy(&bytes);
            if let Some(status) = text.strip_prefix(&mark) {
                let status = status.trim().parse().context("malformed status from the guest")?;
                // The mark stands on a line of its own: the line end before it is not the output's.
                if output.last() == Some(&b'\n') {
                    output.pop();
                }
                let output = String::from_utf8_lossy(&output).into_owned();
                return Ok(Answer { status, output });
            }
            output.extend_from_slice(&bytes);
        }
    }

    /// Runs a shell line that has to succeed; gives its output without the last line end.
    pub fn run(&mut self, line: &str) -> Result<String> {
        let answer = self.answer(line)?;
        if answer.status != 0 {
            bail!("in the guest, `{line}` ended with {}:\n{}\n{}", answer.status, answer.output, self.trouble());
        }
        Ok(answer.output.trim_end_matches('\n').to_owned())
    }

    /// Starts a shell line that goes on in the background of the guest.
    pub fn spawn(&mut self, line: &str) -> Result<()> {
        self.run(&format!("( {line}\n) >/dev/null 2>&1 &")).map(drop)
    }

    /// Unmounts everything, powers off, and waits until QEMU has ended.
    pub fn poweroff(mut self) -> Result<()> {
        self.orders.write_all(b"poweroff\n")?;
        let status = self.process.wait(GIVE_UP).with_context(|| self.trouble())?;
        if !status.success() {
            bail!("QEMU ended with {status}\n{}", self.trouble());
        }
        Ok(())
    }

    /// Ends the guest as a power cut does: nothing more is written.
    pub fn cut_power(mut self) -> Result<()> {
        self.process.kill().map(drop)
    }

    /// What the kernel said on its console so far.
    pub fn console(&self) -> String {
        fs::read(&self.console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Fails if the kernel complained about a disk.
    pub fn assert_no_disk_errors(&self) -> Result<()> {
        let console = self.console();
        let complaint = console.lines().find(|line| {
            line.contains("I/O error") || line.contains("EXT4-fs error") || line.contains("blocked for more")
        });
        match complaint {
            Some(line) => bail!("the guest's kernel complains: {line}"),
            None => Ok(()),
        }
    }

    /// The next line from the guest, its end included.
    fn line(&mut self) -> Result<Vec<u8>> {
        let deadline = Instant::now() + GIVE_UP;
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                return Ok(self.unread.drain(..=end).collect());
            }
            if !readable_until(&self.orders, deadline)? {
                bail!("the guest was silent for {GIVE_UP:?}\n{}", self.trouble());
            }
            let mut chunk = [0u8; 4096];
            let length = self.orders.read(&mut chunk)?;
            if length == 0 {
                bail!("the guest has ended\n{}", self.trouble());
            }
            self.unread.extend_from_slice(&chunk[..length]);
        }
    }

    fn trouble(&self) -> String {
        format!("{}\n{}", tail("guest's console", &self.console()), self.process.log_tail())
    }
}

/// Orders travel as hexadecimal digits, so that no byte of a shell line can be taken for the end of the order.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
