//! `blkmark job`: one QMP command each, and waiting.

use std::path::PathBuf;

use blkmark_backup::qmp::Client;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::backup::{self, ImageFormat};
use super::failure::Failure;
use super::output::Output;
use super::query;
use super::size;
use super::wait::Wait;

/// `blkmark job`.
#[derive(Debug, Args)]
pub struct JobArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: JobAction,
}

/// A job by its id.
#[derive(Debug, Args)]
pub struct JobName {
    /// The job
    pub id: String,
}

/// What to do with a job.
#[derive(Debug, Subcommand)]
pub enum JobAction {
    /// List jobs
    List,
    /// End a job without success
    Cancel(JobName),
    /// Let a job rest
    Pause(JobName),
    /// Let a paused job go on
    Resume(JobName),
    /// Limit a job's speed
    SetSpeed {
        /// The job.
        #[command(flatten)]
        job: JobName,
        /// Bytes a second; 0 is no limit
        #[arg(value_parser = size::parse_signed)]
        speed: u64,
    },
    /// Change what the guest may feel of a job
    SetGuestLatency {
        /// The job.
        #[command(flatten)]
        job: JobName,
        /// The copy leaves room while the guest's requests take longer; 0: it does not look
        #[arg(value_name = "MICROSECONDS")]
        limit: u64,
    },
    /// Let a pending job conclude
    Finalize(JobName),
    /// Forget a concluded job; a point in time that it kept is given up
    Dismiss(JobName),
    /// Begin a failed backup again that was started with --keep: the very same image, to where it went or elsewhere
    Retry(RetryArgs),
    /// Wait until a job has ended
    Wait(JobName),
}

/// `blkmark job retry`.
#[derive(Debug, Args)]
pub struct RetryArgs {
    /// The job.
    #[command(flatten)]
    pub job: JobName,
    /// Another image to write
    #[arg(long, value_name = "FILE")]
    pub target: Option<PathBuf>,
    /// Format of that image
    #[arg(long, value_enum, default_value_t = ImageFormat::Qcow2, requires = "target")]
    pub format: ImageFormat,
    /// It is there already
    #[arg(long, requires = "target")]
    pub existing: bool,
    /// Return as soon as it runs
    #[arg(long)]
    pub no_wait: bool,
}

/// Runs it.
pub(super) fn run(client: &mut Client, args: &JobArgs, output: &Output) -> Result<(), Failure> {
    let (command, arguments) = match &args.action {
        JobAction::List => return query::jobs(client, output),
        JobAction::Wait(job) => return Wait::new([job.id.clone()]).run(client, output),
        JobAction::Cancel(job) => ("job-cancel", named(job)),
        JobAction::Pause(job) => ("job-pause", named(job)),
        JobAction::Resume(job) => ("job-resume", named(job)),
        JobAction::Finalize(job) => ("job-finalize", named(job)),
        JobAction::Dismiss(job) => ("job-dismiss", named(job)),
        JobAction::Retry(args) => return retry(client, args, output),
        JobAction::SetGuestLatency { job, limit } => {
            ("block-job-change", json!({ "id": job.id, "type": "backup", "max-guest-latency": limit }))
        }
        JobAction::SetSpeed { job, speed } => ("block-job-set-speed", json!({ "device": job.id, "speed": speed })),
    };
    output.done(&client.execute(command, arguments)?);
    Ok(())
}

fn retry(client: &mut Client, args: &RetryArgs, output: &Output) -> Result<(), Failure> {
    let mut arguments = named(&args.job);
    if let Some(target) = &args.target {
        arguments["target"] = json!(backup::told(target)?);
        arguments["format"] = json!(backup::format(args.format).name());
        arguments["mode"] = json!(if args.existing { "existing" } else { "absolute-paths" });
    }
    let done = client.execute("job-retry", arguments)?;
    if args.no_wait {
        output.done(&done);
        return Ok(());
    }
    Wait::new([args.job.id.clone()]).run(client, output)
}

fn named(job: &JobName) -> Value {
    json!({ "id": job.id })
}
