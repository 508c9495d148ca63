//! A QMP client that knows nothing of blkmark: it is written from the protocol alone, so that client and server
//! cannot agree on a mistake. It also drives `qemu-storage-daemon`.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::process::{GIVE_UP, readable_until};

/// A connected client past the negotiation.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    unread: Vec<u8>,
    events: VecDeque<Value>,
    next_id: u64,
    /// What the server said on connect.
    pub greeting: Value,
}

/// The server's `error` member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QmpError {
    /// `GenericError`, `CommandNotFound`, ...
    pub class: String,
    /// The text people read.
    pub desc: String,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEnd {
    /// BLOCK_JOB_COMPLETED without an error.
    Completed,
    /// BLOCK_JOB_COMPLETED with this error.
    Failed(String),
    /// BLOCK_JOB_CANCELLED.
    Cancelled,
}

impl Qmp {
    /// Connects, reads the greeting and negotiates.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let stream = UnixStream::connect(socket).with_context(|| format!("cannot connect to {}", socket.display()))?;
        let mut qmp = Qmp { stream, unread: Vec::new(), events: VecDeque::new(), next_id: 0, greeting: Value::Null };
        qmp.greeting = qmp.read_value()?;
        if qmp.greeting.get("QMP").is_none() {
            bail!("no QMP greeting but {}", qmp.greeting);
        }
        qmp.run("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Sends a command and gives the server's answer: its `return`, or its `error`.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Result<Value, QmpError>> {
        self.next_id += 1;
        let id = json!(format!("t{}", self.next_id));
        let mut line = json!({"execute": command, "arguments": arguments, "id": id}).to_string();
        line.push_str("\r\n");
        self.send_raw(line.as_bytes())?;
        loop {
            let value = self.read_value().with_context(|| format!("awaiting the answer to {command}"))?;
            if value.get("event").is_some() {
                self.events.push_back(value);
                continue;
            }
            if value.get("id") != Some(&id) {
                bail!("answer to another command than {id}: {value}");
            }
            if let Some(error) = value.get("error") {
                let text = |key: &str| error[key].as_str().map(str::to_owned);
                return match (text("class"), text("desc")) {
                    (Some(class), Some(desc)) => Ok(Err(QmpError { class, desc })),
                    _ => bail!("malformed error: {value}"),
                };
            }
            return value.get("return").cloned().map(Ok).ok_or_else(|| anyhow!("neither return nor error: {value}"));
        }
    }

    /// A command that has to succeed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.execute(command, arguments.clone())?
            .map_err(|error| anyhow!("{command} {arguments}: {}: {}", error.class, error.desc))
    }

    /// A command that has to be refused.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Result<QmpError> {
        match self.execute(command, arguments.clone())? {
            Err(error) => Ok(error),
            Ok(value) => bail!("{command} {arguments} was accepted: {value}"),
        }
    }

    /// Bytes as they are, for what no well-behaved client sends.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).context("cannot send to the control socket")
    }

    /// The next message, event or answer.
    pub fn read_value(&mut self) -> Result<Value> {
        let deadline = Instant::now() + GIVE_UP;
        loop {
            if let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line)
                    .with_context(|| format!("not JSON: {}", String::from_utf8_lossy(&line)));
            }
            if !readable_until(&self.stream, deadline)? {
                bail!("the control socket was silent for {GIVE_UP:?}");
            }
            let mut chunk = [0u8; 4096];
            let length = self.stream.read(&mut chunk)?;
            if length == 0 {
                bail!("the control socket was closed");
            }
            self.unread.extend_from_slice(&chunk[..length]);
        }
    }

    /// The next event that `wanted` picks; the others stay for later.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        if let Some(at) = self.events.iter().position(&wanted)
            && let Some(event) = self.events.remove(at)
        {
            return Ok(event);
        }
        loop {
            let value = self.read_value()?;
            if value.get("event").is_none() {
                bail!("an answer nobody waits for: {value}");
            }
            if wanted(&value) {
                return Ok(value);
            }
            self.events.push_back(value);
        }
    }

    /// Waits until a backup job has ended.
    pub fn job_end(&mut self, job: &str) -> Result<JobEnd> {
        let event = self.event(|event| {
            matches!(event["event"].as_str(), Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED"))
                && event["data"]["device"] == job
        })?;
        if event["event"] == "BLOCK_JOB_CANCELLED" {
            return Ok(JobEnd::Cancelled);
        }
        Ok(match event["data"]["error"].as_str() {
            Some(error) => JobEnd::Failed(error.to_owned()),
            None => JobEnd::Completed,
        })
    }

    /// Waits until a job is gone, so that the bitmap it used is free again; it has to have completed.
    pub fn job_completed(&mut self, job: &str) -> Result<()> {
        let end = self.job_end(job)?;
        self.event(|event| {
            event["event"] == "JOB_STATUS_CHANGE" && event["data"]["id"] == job && event["data"]["status"] == "null"
        })?;
        match end {
            JobEnd::Completed => Ok(()),
            other => bail!("job {job}: {other:?}"),
        }
    }

    /// A bitmap as `query-named-block-nodes` shows it.
    pub fn bitmap(&mut self, node: &str, name: &str) -> Result<Value> {
        let nodes = self.run("query-named-block-nodes", json!({}))?;
        nodes
            .as_array()
            .into_iter()
            .flatten()
            .filter(|entry| entry["node-name"] == node)
            .flat_map(|entry| entry["dirty-bitmaps"].as_array().into_iter().flatten())
            .find(|bitmap| bitmap["name"] == name)
            .cloned()
            .ok_or_else(|| anyhow!("no bitmap {name} on {node} in {nodes}"))
    }

    /// The hash of a bitmap's bits.
    pub fn bitmap_hash(&mut self, node: &str, name: &str) -> Result<String> {
        let answer = self.run("x-debug-block-dirty-bitmap-sha256", json!({"node": node, "name": name}))?;
        answer["sha256"].as_str().map(str::to_owned).ok_or_else(|| anyhow!("no sha256 in {answer}"))
    }
}
