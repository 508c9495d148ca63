//! The administrator: gives orders over the control socket, in QMP, and waits for jobs, as any backup tool would.

use std::path::Path;
use std::time::{Duration, Instant};

use blkmark_backup::qmp::Client;
use blkmark_backup::target::{self, Backing, CreateOptions, Format, Policy};
use serde_json::{Value, json};

use super::error::DemoError;
use super::show::{Bar, Show};
use super::signals::Signals;

/// The disk's name.
pub const DISK: &str = "drive0";
/// The bitmap's.
pub const BITMAP: &str = "daily";

/// How often a job is asked how far it is, and Ctrl-C is looked for.
const LOOK: Duration = Duration::from_millis(50);

/// An administrator at the control socket.
pub struct Orders {
    client: Client,
}

impl Orders {
    /// Connects.
    pub fn connect(control: &Path) -> Result<Self, DemoError> {
        Ok(Orders { client: Client::connect(control)? })
    }

    /// A full backup into a new image, together with a bitmap that records from the same instant on.
    pub fn full(&mut self, job: &str, image: &Path) -> Result<(), DemoError> {
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": { "node": DISK, "name": BITMAP } },
            { "type": "drive-backup", "data": {
                "job-id": job, "device": DISK, "target": image, "format": "qcow2", "sync": "full",
            }},
        ]);
        self.client.execute("transaction", json!({ "actions": actions }))?;
        Ok(())
    }

    /// What changed since the last backup, into an image made by [`stand_on`].
    pub fn incremental(&mut self, job: &str, image: &Path) -> Result<(), DemoError> {
        let arguments = json!({
            "job-id": job, "device": DISK, "target": image, "format": "qcow2", "mode": "existing",
            "sync": "incremental", "bitmap": BITMAP,
        });
        self.client.execute("drive-backup", arguments)?;
        Ok(())
    }

    /// Waits until the job is over and gone; the bytes that it copied or skipped as holes. `go_on` may end the wait.
    pub fn wait(
        &mut self,
        job: &str,
        show: &Show,
        signals: &Signals,
        go_on: impl Fn() -> Result<(), DemoError>,
    ) -> Result<u64, DemoError> {
        let started = Instant::now();
        let mut bar: Option<Bar> = None;
        let mut copied = 0;
        loop {
            let mut failure = None;
            let gone = self.client.wait_event(LOOK, |event| {
                let (name, data) = (event.name.as_str(), &event.data);
                match (name, data["status"].as_str()) {
                    ("BLOCK_JOB_COMPLETED", _) if data["device"] == job => {
                        copied = data["offset"].as_u64().unwrap_or(0);
                        failure = data["error"].as_str().map(str::to_owned);
                    }
                    ("BLOCK_JOB_CANCELLED", _) if data["device"] == job => failure = Some("it was cancelled".into()),
                    ("JOB_STATUS_CHANGE", Some("null")) => return data["id"] == job,
                    _ => {}
                }
                failure.is_some()
            })?;
            if let Some(reason) = failure {
                return Err(DemoError::Backup { job: job.to_owned(), reason });
            }
            if gone.is_some() {
                if let Some(bar) = bar.or_else(|| show.bar(job, started)) {
                    bar.finish(copied, started.elapsed());
                }
                return Ok(copied);
            }
            signals.check()?;
            go_on()?;
            if show.has_bars() {
                let jobs = self.client.execute("query-jobs", Value::Null)?;
                let found = jobs.as_array().and_then(|jobs| jobs.iter().find(|found| found["id"] == job));
                let member = |name: &str| found.and_then(|found| found[name].as_u64()).unwrap_or(0);
                bar = bar.or_else(|| show.bar(job, started));
                if let Some(bar) = &bar {
                    bar.set(member("current-progress"), member("total-progress"));
                }
            }
        }
    }

    /// Bytes that the bitmap calls dirty.
    pub fn dirty_bytes(&mut self) -> Result<u64, DemoError> {
        let nodes = self.client.execute("query-named-block-nodes", Value::Null)?;
        let bitmaps = nodes
            .as_array()
            .and_then(|nodes| nodes.iter().find(|node| node["node-name"] == DISK))
            .and_then(|node| node["dirty-bitmaps"].as_array());
        let count = bitmaps
            .and_then(|bitmaps| bitmaps.iter().find(|bitmap| bitmap["name"] == BITMAP))
            .and_then(|bitmap| bitmap["count"].as_u64());
        count.ok_or_else(|| std::io::Error::other(format!("the daemon lists no bitmap '{BITMAP}'")).into())
    }
}

/// Makes an empty qcow2 beside `below` that stands on it.
pub fn stand_on(below: &Path, image: &Path, size: u64) -> Result<(), DemoError> {
    let name = below.file_name().unwrap_or(below.as_os_str());
    let backing = Backing { path: name.into(), format: Format::Qcow2 };
    let options = CreateOptions { backing: Some(backing), ..CreateOptions::new(size) };
    target::create(image, Format::Qcow2, &options, &Policy::default())?.conclude()?;
    Ok(())
}
