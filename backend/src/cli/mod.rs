//! The command line: what can be asked of `blkmark`, and the thin clients of its control socket.
//!
//! `main` parses [`Cli`], runs the daemon and the demo itself, and hands every other command to [`run`]. Clients know
//! nothing that the daemon did not tell them: each is a few QMP commands and a table. What they print goes to standard
//! output, what went wrong to standard error, and the exit status says which kind of wrong it was ([`Failure`]).

pub mod args;
mod backup;
mod bitmap;
mod checkpoint;
mod demo;
mod export;
mod failure;
mod job;
pub(crate) mod output;
mod point;
mod qmp;
mod query;
mod serve;
pub(crate) mod size;
mod store;
mod wait;

pub use args::{Cli, ClientCommand, Command};
pub use demo::DemoArgs;
pub use failure::Failure;
pub use output::Output;
pub use serve::ServeArgs;
pub use store::StoreArgs;

use std::process::ExitCode;

use blkmark_backup::qmp::Client;

/// Where the control socket is unless `--control` or BLKMARK_CONTROL says otherwise.
pub const DEFAULT_CONTROL: &str = "/run/blkmark/control.sock";

/// The environment variable that names the control socket to clients.
pub const CONTROL_VARIABLE: &str = "BLKMARK_CONTROL";

/// Runs a client command against the daemon at `cli`'s control socket.
pub fn run(cli: &Cli, command: &ClientCommand) -> ExitCode {
    let output = Output::new(cli.json);
    match execute(cli, command, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            failure.exit_code()
        }
    }
}

/// Looks into a bitmap store; no daemon is asked.
pub fn look_into(cli: &Cli, args: &StoreArgs) -> ExitCode {
    let output = Output::new(cli.json);
    match store::run(&args.action, &output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output.failure(&failure);
            failure.exit_code()
        }
    }
}

fn execute(cli: &Cli, command: &ClientCommand, output: &Output) -> Result<(), Failure> {
    // Before the daemon is bothered: a wrong option is a wrong option whether or not it runs.
    if let ClientCommand::Backup(args) = command {
        args.check()?;
    }
    if let ClientCommand::Bitmap(args) = command {
        args.check()?;
    }
    let mut client = Client::connect(cli.control_path())?;
    match command {
        ClientCommand::Bitmap(args) => bitmap::run(&mut client, args, output),
        ClientCommand::Backup(args) => backup::run(&mut client, args, output),
        ClientCommand::Point(args) => point::run(&mut client, args, output),
        ClientCommand::Export(args) => export::run(&mut client, args, output),
        ClientCommand::Checkpoint(args) => checkpoint::run(&mut client, args, output),
        ClientCommand::Job(args) => job::run(&mut client, args, output),
        ClientCommand::Query(args) => query::run(&mut client, args, output),
        ClientCommand::Qmp(args) => qmp::run(&mut client, args, output),
    }
}
