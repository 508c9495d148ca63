//! The daemon and its clients.

use std::process::ExitCode;

use blkmark::cli::{self, Cli, Command, DemoArgs, Failure, Output};
use blkmark::config::{CAPABILITIES, LogFormat, ServeOptions};
use blkmark::daemon;
use clap::CommandFactory;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::from_words(std::env::args_os()).unwrap_or_else(|error| error.exit());
    if cli.print_capabilities {
        Output::new(false).line(CAPABILITIES);
        return ExitCode::SUCCESS;
    }
    match &cli.command {
        Some(Command::Serve(args)) => match args.options(cli.control.clone()) {
            Ok(options) => serve(&options),
            Err(failure) => fail(&failure),
        },
        Some(Command::Demo(args)) => demo(args, cli.json),
        Some(Command::Store(args)) => cli::look_into(&cli, args),
        Some(Command::Client(command)) => cli::run(&cli, command),
        None => Cli::command().error(clap::error::ErrorKind::MissingSubcommand, "a command is missing").exit(),
    }
}

/// Runs the daemon until it is told to end.
fn serve(options: &ServeOptions) -> ExitCode {
    start_log(options.log_format.unwrap_or_default(), LevelFilter::INFO);
    match daemon::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&Failure::Failed(format!("{error:#}"))),
    }
}

/// Standard error gets the log; RUST_LOG chooses what.
fn start_log(format: LogFormat, level: LevelFilter) {
    let filter = EnvFilter::builder().with_default_directive(level.into()).from_env_lossy();
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

/// Only what is wrong is logged: the demo tells its story itself.
fn demo(args: &DemoArgs, json: bool) -> ExitCode {
    start_log(LogFormat::Text, LevelFilter::WARN);
    blkmark::demo::run(args, json)
}

fn fail(failure: &Failure) -> ExitCode {
    Output::new(false).failure(failure);
    failure.exit_code()
}
