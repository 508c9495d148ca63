//! Orders on the control socket, as a test tells them: what has to succeed, what has to be refused, how a job ends.
//!
//! On top of the client that `blkmark`'s own commands use. That this client and the server do not agree on a mistake
//! is what `clients_qmp.rs` sees to, with clients written by others, and that it also drives `qemu-storage-daemon`.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use blkmark_backup::qmp::client::{begun_job, is_of_job};
use blkmark_backup::qmp::{Client, ClientError, Event, QmpError};
use serde_json::{Value, json};

use crate::process::GIVE_UP;

/// A connected client past the negotiation.
pub struct Qmp {
    client: Client,
    /// Events that were passed over while another was awaited.
    kept: VecDeque<Event>,
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
    /// Connects, reads the greeting and negotiates. `qemu-storage-daemon` now and then greets twice, if one comes just as it begins
    /// to listen: then once more.
    pub fn connect(socket: &Path) -> Result<Qmp> {
        let mut client = match Client::connect(socket) {
            Err(ClientError::Protocol(said)) if said.starts_with("it answers with {\"QMP\"") => {
                Client::connect(socket)?
            }
            connected => connected?,
        };
        client.set_reply_limit(GIVE_UP);
        Ok(Qmp { client, kept: VecDeque::new() })
    }

    /// The client beneath, for what a well-behaved one does not send.
    pub fn client(&mut self) -> &mut Client {
        &mut self.client
    }

    /// A command that has to succeed.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.client.execute(command, arguments.clone()).with_context(|| format!("{command} {arguments}"))
    }

    /// A command that has to be refused.
    pub fn refused(&mut self, command: &str, arguments: Value) -> Result<QmpError> {
        match self.client.execute(command, arguments.clone()) {
            Err(ClientError::Refused(error)) => Ok(error),
            Err(error) => Err(error).with_context(|| format!("{command} {arguments}")),
            Ok(value) => bail!("{command} {arguments} was accepted: {value}"),
        }
    }

    /// The next event that `wanted` picks; the others stay for later.
    pub fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
        let kept = &mut self.kept;
        let mut keep = |event: &Event| {
            if let Some(job) = begun_job(&event.name, &event.data) {
                // As the client does with those it has: an earlier job of this name is none of this one's business.
                kept.retain(|event| !is_of_job(event, job));
            }
            kept.push_back(event.clone());
        };
        // What is there already, so that it is known which jobs have begun.
        self.client.wait_event(Duration::ZERO, |event| {
            keep(event);
            false
        })?;
        if let Some(at) = self.kept.iter().position(&wanted)
            && let Some(event) = self.kept.remove(at)
        {
            return Ok(event);
        }
        let kept = &mut self.kept;
        let event = self.client.wait_event(GIVE_UP, |event| {
            let found = wanted(event);
            if !found {
                kept.push_back(event.clone());
            }
            found
        })?;
        event.with_context(|| format!("no such event within {GIVE_UP:?}; there were {:?}", self.kept))
    }

    /// Waits until a backup job has ended and is gone, so that the bitmap it used is free again.
    pub fn job_end(&mut self, job: &str) -> Result<JobEnd> {
        let end = self
            .event(|event| {
                matches!(event.name.as_str(), "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED")
                    && event.data["device"] == job
            })
            .with_context(|| format!("awaiting the end of job {job}"))?;
        self.event(|event| {
            event.name == "JOB_STATUS_CHANGE" && event.data["id"] == job && event.data["status"] == "null"
        })?;
        if end.name == "BLOCK_JOB_CANCELLED" {
            return Ok(JobEnd::Cancelled);
        }
        Ok(match end.data["error"].as_str() {
            Some(error) => JobEnd::Failed(error.to_owned()),
            None => JobEnd::Completed,
        })
    }

    /// Waits for the end of a job that has to complete.
    pub fn job_completed(&mut self, job: &str) -> Result<()> {
        match self.job_end(job)? {
            JobEnd::Completed => Ok(()),
            other => bail!("job {job}: {other:?}"),
        }
    }

    /// Waits for the end of a job that has to fail; its error.
    pub fn job_failed(&mut self, job: &str) -> Result<String> {
        match self.job_end(job)? {
            JobEnd::Failed(error) => Ok(error),
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
