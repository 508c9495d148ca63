//! The promise: nothing is lost, whoever dies and whatever runs full. Some time of torture, with a new seed each time;
//! `torture --seconds N --seed S` goes on for longer and repeats what failed.
//!
//! What the figures must show besides the absence of losses is that the run was one: daemons, guests and clients were killed,
//! backups were verified meanwhile, and the end was reached.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use blkmark_tests::tools::answer;

#[test]
fn nothing_is_lost_in_some_time_of_torture() -> Result<()> {
    torture(&["--seconds", "20"])
}

#[test]
fn nothing_is_lost_without_a_store() -> Result<()> {
    torture(&["--seconds", "10", "--volatile"])
}

fn torture(options: &[&str]) -> Result<()> {
    let told = answer(Command::new(env!("CARGO_BIN_EXE_torture")).args(options))?;
    println!("{}", told.text);
    ensure!(told.code == 0, "it ended with {}", told.code);
    let figure = |group: &str, what: &str| -> Result<u64> {
        let line = told.text.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{group}: ")));
        let line = line.with_context(|| format!("no {group} are told"))?;
        let figure = line.split(", ").find_map(|figure| figure.strip_prefix(&format!("{what} ")));
        Ok(figure.with_context(|| format!("no {what} among {line}"))?.parse()?)
    };
    ensure!(figure("kills", "daemon")? > 3 && figure("kills", "guest")? > 0);
    ensure!(figure("verified", "backups")? > 0 && figure("verified", "restarts")? > 3);
    ensure!(figure("verified", "chains and mirrors equal to their disks")? == 4);
    Ok(())
}
