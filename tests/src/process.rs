//! Processes that a test starts: they are awaited, never polled, and never outlive the test.
//!
//! Everything a process says on stderr lands in a log file, and every failure message of the harness carries its end.
//! A dropped [`Process`] is killed and reaped, so that the next test finds neither the process nor its locks.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How long the harness waits for anything before it calls it hung. Generous: it is no measure of speed.
pub const GIVE_UP: Duration = Duration::from_secs(120);

/// A running child with its stderr in a file.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    pidfd: OwnedFd,
    stdout: Option<ChildStdout>,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` with stdout piped to [`Process::first_line`] and stderr going to `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Process> {
        let stderr = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(stderr)
            .spawn()
            .with_context(|| format!("cannot start {name} ({:?})", command.get_program()))?;
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
        let stdout = child.stdout.take();
        Ok(Process { name: name.to_owned(), child, pidfd, stdout, log: log.to_owned(), ended: None })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The first line on stdout: how servers say that they are ready. An end before it is an error with the log.
    pub fn first_line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        let deadline = Instant::now() + GIVE_UP;
        let Some(mut stdout) = self.stdout.take() else {
            bail!("the first line of {} was read already", self.name);
        };
        loop {
            if !readable_until(&stdout, deadline)? {
                bail!("{} did not become ready\n{}", self.name, self.log_tail());
            }
            let mut byte = [0u8];
            match stdout.read(&mut byte)? {
                0 => {
                    let status = self.wait(GIVE_UP)?;
                    bail!("{} ended before it was ready ({status})\n{}", self.name, self.log_tail());
                }
                _ if byte[0] == b'\n' => break,
                _ => line.push(byte[0]),
            }
        }
        // Kept open: a server may go on talking, and must not die of it.
        self.stdout = Some(stdout);
        Ok(String::from_utf8_lossy(&line).into_owned())
    }

    /// Waits for the end of the process and reaps it. A process that goes on for `limit` is an error.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        if !readable_until(&self.pidfd, Instant::now() + limit)? {
            bail!("{} did not end within {limit:?}\n{}", self.name, self.log_tail());
        }
        let status = self.child.wait()?;
        self.ended = Some(status);
        Ok(status)
    }

    /// Whether the process has not ended yet. A zombie has ended: it is reaped here.
    pub fn is_running(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
        }
        self.ended.is_none()
    }

    /// Ends its standard input, if that was piped.
    pub fn end_input(&mut self) {
        self.child.stdin = None;
    }

    /// Sends a signal to a process that was not reaped yet.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.is_running() {
            kill_process(Pid::from_child(&self.child), signal)?;
        }
        Ok(())
    }

    /// SIGTERM, then the exit status.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(GIVE_UP)
    }

    /// SIGKILL, then the exit status.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::KILL)?;
        self.wait(GIVE_UP)
    }

    /// Everything said on stderr so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The end of the log, headed by whose it is.
    pub fn log_tail(&self) -> String {
        tail(&format!("{} on stderr", self.name), &self.log())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.is_running() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let by_signal = self.ended.and_then(|status| status.signal());
        if std::thread::panicking() || matches!(by_signal, Some(libc::SIGSEGV | libc::SIGABRT | libc::SIGBUS)) {
            eprintln!("{}", self.log_tail());
        }
    }
}

/// Waits until `fd` is readable (or hung up) or the deadline has passed: which of the two is the answer.
pub fn readable_until(fd: &impl AsFd, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The last forty lines of `text` under a title.
pub fn tail(title: &str, text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(40);
    format!("--- {title}:\n{}\n---", lines[from..].join("\n"))
}
