//! `bench`: blkmark and `qemu-storage-daemon` side by side. See `docs/performance.md`.

use std::process::ExitCode;

use blkmark_tests::bench::{self, instructions, options::Options, report};
use clap::Parser;

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    if options.list {
        for cell in options.cells()? {
            println!("{}", cell.name());
        }
        return Ok(());
    }
    if options.instructions {
        print!("{}", instructions::report(options)?);
        return Ok(());
    }
    let reports = bench::run(options)?;
    if options.json {
        println!("{:#}", report::json(options, &reports));
    } else {
        print!("{}", report::tables(&reports));
    }
    Ok(())
}
