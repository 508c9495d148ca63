//! Instructions a request, counted by valgrind's callgrind: a figure that no noise of the machine moves, for comparing builds.
//!
//! The server runs under callgrind twice with the same load, once for few and once for many requests; the difference of the
//! counts, divided by the difference of the requests, has no start-up in it. Only instructions of the server's own code
//! count, not the kernel's: what system calls cost shows in processor time.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cell::Cell;
use super::load;
use super::options::Options;
use super::server::{Contender, Server};
use super::target::Target;

/// Requests of the two runs: both long enough that each takes the same road.
const FEW: u64 = 20_000;
const MANY: u64 = 120_000;

/// See the file itself.
const SHIM: &str = include_str!("wait_shim.c");

/// What puts a server under callgrind.
pub struct Callgrind {
    dir: tempfile::TempDir,
}

impl Callgrind {
    /// Builds the shim.
    pub fn new() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("bench-callgrind-").tempdir()?;
        let (source, shim) = (dir.path().join("shim.c"), dir.path().join("shim.so"));
        std::fs::write(&source, SHIM)?;
        let built =
            Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o"]).arg(&shim).arg(&source).arg("-ldl").status();
        if !built.context("cannot run cc")?.success() {
            bail!("the shim for valgrind does not build");
        }
        Ok(Self { dir })
    }

    fn counts(&self) -> PathBuf {
        self.dir.path().join("counts")
    }

    /// The command that runs `program` under callgrind.
    pub fn wrap(&self, program: &Path) -> Command {
        let mut command = Command::new("valgrind");
        command
            .args(["--quiet", "--tool=callgrind", "--dump-instr=no"])
            .arg(format!("--callgrind-out-file={}", self.counts().display()))
            .arg(program)
            .env("LD_PRELOAD", self.dir.path().join("shim.so"));
        command
    }

    /// The instructions of the run that has ended.
    fn total(&self) -> Result<u64> {
        let path = self.counts();
        let text = std::fs::read_to_string(&path).context("callgrind has left no counts (is valgrind installed?)")?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals:").or(line.strip_prefix("summary:")));
        total.and_then(|rest| rest.trim().parse().ok()).context("callgrind's counts have no total")
    }
}

/// Instructions of the server for each request of the cell's load.
pub fn count(options: &Options, target: &Target, cell: &Cell, contender: &Contender) -> Result<f64> {
    let callgrind = Callgrind::new()?;
    let run = |requests: u64| -> Result<u64> {
        target.settle()?;
        let server = Server::start_under(options, target, cell, contender, Some(&callgrind))?;
        load::run_requests(options, target, cell, &server, requests)?;
        server.stop()?;
        callgrind.total()
    };
    let (few, many) = (run(FEW)?, run(MANY)?);
    Ok((many.saturating_sub(few)) as f64 / (MANY - FEW) as f64)
}

/// A line a cell: every contender, and its ratio to the first.
pub fn report(options: &Options) -> Result<String> {
    let contenders: Vec<Contender> =
        options.contenders()?.into_iter().filter(|c| matches!(c, Contender::Blkmark { .. })).collect();
    let Some(first) = contenders.first() else { bail!("--instructions counts those of blkmark only") };
    let mut out = format!("instructions a request, and the ratio to {first}\n");
    for place in options.targets()? {
        let target = Target::prepare(&place, options)?;
        for cell in options.cells()? {
            let mut base = None;
            for contender in &contenders {
                let counted = count(options, &target, &cell, contender)
                    .with_context(|| format!("{} with {contender} on {}", cell.name(), target.name()))?;
                let base = *base.get_or_insert(counted);
                let ratio = counted / base;
                out.push_str(&format!(
                    "  {:<22} on {:<14} {:<18} {counted:>8.0}  {ratio:>5.2}\n",
                    cell.name(),
                    target.name(),
                    contender.to_string()
                ));
            }
        }
    }
    Ok(out)
}
