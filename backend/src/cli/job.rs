//! `blkmark job`: one QMP command each, and waiting.

use blkmark_backup::qmp::Client;
use serde_json::{Value, json};

use super::args::{JobAction, JobArgs, JobName, RetryArgs};
use super::backup;
use super::failure::Failure;
use super::output::Output;
use super::query;
use super::wait::Wait;

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
