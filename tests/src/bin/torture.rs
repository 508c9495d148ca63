//! `torture`: kills and faults without end, and no write lost. See `docs/reliability.md`.

use std::process::ExitCode;

use blkmark_tests::torture::{self, options::Cli};
use clap::Parser;

fn main() -> ExitCode {
    match torture::run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}
