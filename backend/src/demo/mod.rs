//! `blkmark demo`: shows on throw-away files what this program does, and proves it.
//!
//! Needs nothing but the binary: no QEMU, no root, no network. `main` calls [`run`]. Rooms:
//!
//! ```text
//! story ── the sequence: serve, write, back up, restore, prove
//!   ├─ place ── the demo's own directory and its disk
//!   ├─ writers ── the guest: a thread a virtqueue, at full speed
//!   │    ├─ workload ── which request comes next
//!   │    └─ model ── what each block holds, from its number and a stamp
//!   ├─ orders ── the administrator at the control socket
//!   ├─ prove ── is a restored image the disk at that instant? (disproof: how it is not)
//!   └─ map, show, report ── what the user sees
//! ```
//!
//! Invariant: it says "equal" only of what it has compared, and any check that fails ends it with the block that differs.

mod disproof;
mod error;
mod map;
mod model;
mod orders;
mod place;
mod prove;
mod report;
mod show;
mod signals;
mod story;
mod workload;
mod writers;

pub use error::DemoError;

use std::process::ExitCode;

use crate::cli::{DemoArgs, Failure, Output};
use show::Show;
use signals::Signals;

/// Ended by a signal, as shells count it.
const INTERRUPTED: u8 = 130;

/// Runs it. The exit status is 0 only if every check passed.
pub fn run(args: &DemoArgs, json: bool) -> ExitCode {
    let output = Output::new(json);
    match attempt(args, &output, json) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let failure = Failure::Failed(format!("demo: {error}"));
            output.failure(&failure);
            match error {
                DemoError::Interrupted => ExitCode::from(INTERRUPTED),
                _ => failure.exit_code(),
            }
        }
    }
}

fn attempt(args: &DemoArgs, output: &Output, json: bool) -> Result<(), DemoError> {
    let signals = Signals::catch()?;
    let show = Show::new(output, json);
    let report = story::tell(args, &show, &signals)?;
    output.result(&report.json(), || {
        let kept = report.kept.as_ref().map_or_else(String::new, |directory| format!("\nThe files are in {directory}"));
        format!("\n{}\n\n{}, in {}{kept}", report.tables(), report.verdict(), report::time(report.took))
    });
    Ok(())
}
