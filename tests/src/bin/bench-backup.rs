//! `bench-backup`: backups of blkmark and `qemu-storage-daemon` side by side. See `docs/performance.md`.

use std::process::ExitCode;

use blkmark_tests::bench_backup::{self, options::Options};
use clap::Parser;

fn main() -> ExitCode {
    let options = Options::parse();
    match options.check().and_then(|()| bench_backup::run(&options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench-backup: {error:#}");
            ExitCode::FAILURE
        }
    }
}
