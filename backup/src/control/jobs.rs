//! `job-*` and `block-job-*`: the two names of each verb, and the two queries.
//!
//! They differ in how they call a job that is not there, and in that `block-job-cancel` spares a paused job.

use super::{Control, done, options};
use crate::job::{JobError, Jobs, Kind};
use crate::qmp::{Arguments, QmpError};
use serde_json::Value;

type Answer = Result<Value, QmpError>;

/// Reads the one argument `id`, and does `verb`.
fn by_id(control: &Control, mut arguments: Arguments, verb: fn(&Jobs, &str) -> Result<(), JobError>) -> Answer {
    let id = arguments.string("id")?;
    arguments.finish()?;
    verb(&control.jobs, &id)?;
    done()
}

/// As `job-*` does, with the error of `block-job-*` for a job that is not there.
fn block_error(id: &str, error: JobError) -> QmpError {
    match error {
        JobError::NotFound => QmpError::device_not_active(format!("Block job '{id}' not found")),
        error => error.into(),
    }
}

fn block_by(
    control: &Control,
    mut arguments: Arguments,
    member: &str,
    verb: fn(&Jobs, &str) -> Result<(), JobError>,
) -> Answer {
    let id = arguments.string(member)?;
    arguments.finish()?;
    verb(&control.jobs, &id).map_err(|error| block_error(&id, error))?;
    done()
}

pub(super) fn cancel(control: &Control, arguments: Arguments) -> Answer {
    by_id(control, arguments, |jobs, id| jobs.cancel(id, false, false))
}

pub(super) fn complete(control: &Control, arguments: Arguments) -> Answer {
    by_id(control, arguments, Jobs::complete)
}

pub(super) fn dismiss(control: &Control, arguments: Arguments) -> Answer {
    by_id(control, arguments, Jobs::dismiss)
}

pub(super) fn finalize(control: &Control, arguments: Arguments) -> Answer {
    by_id(control, arguments, Jobs::finalize)
}

pub(super) fn pause(control: &Control, arguments: Arguments) -> Answer {
    by_id(control, arguments, Jobs::pause)
}

pub(super) fn resume(control: &Control, arguments: Arguments) -> Answer {
    by_id(control, arguments, Jobs::resume)
}

pub(super) fn query(control: &Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(control.jobs.query())
}

pub(super) fn block_cancel(control: &Control, mut arguments: Arguments) -> Answer {
    let id = arguments.string("device")?;
    let force = arguments.opt_bool("force")?.unwrap_or(false);
    arguments.finish()?;
    control.jobs.cancel(&id, force, true).map_err(|error| block_error(&id, error))?;
    done()
}

pub(super) fn block_complete(control: &Control, arguments: Arguments) -> Answer {
    block_by(control, arguments, "device", Jobs::complete)
}

pub(super) fn block_dismiss(control: &Control, arguments: Arguments) -> Answer {
    block_by(control, arguments, "id", Jobs::dismiss)
}

pub(super) fn block_finalize(control: &Control, arguments: Arguments) -> Answer {
    block_by(control, arguments, "id", Jobs::finalize)
}

pub(super) fn block_pause(control: &Control, arguments: Arguments) -> Answer {
    block_by(control, arguments, "device", Jobs::pause)
}

pub(super) fn block_resume(control: &Control, arguments: Arguments) -> Answer {
    block_by(control, arguments, "device", Jobs::resume)
}

pub(super) fn block_set_speed(control: &Control, mut arguments: Arguments) -> Answer {
    let id = arguments.string("device")?;
    let speed = arguments.i64("speed")?;
    arguments.finish()?;
    control.jobs.set_speed(&id, speed).map_err(|error| block_error(&id, error))?;
    done()
}

/// `block-job-change`, which QEMU has for its mirror jobs.
pub(super) fn block_change(control: &Control, mut arguments: Arguments) -> Answer {
    let id = arguments.string("id")?;
    let kind = arguments.choice("type", &Kind::ALL.map(|kind| (kind.name(), kind)))?;
    let latency = options::guest_latency(&mut arguments)?;
    let limit = latency.ok_or_else(|| arguments.missing("max-guest-latency"))?;
    arguments.finish()?;
    control.jobs.set_guest_latency(&id, kind, limit).map_err(|error| block_error(&id, error))?;
    done()
}

pub(super) fn query_block(control: &Control, arguments: Arguments) -> Answer {
    arguments.finish()?;
    Ok(control.jobs.query_block())
}
