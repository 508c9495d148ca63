//! The benchmark's command line.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use super::cell::{self, Cell};
use super::cpu::Pin;
use super::server::{Aio, Contender, Program};
use super::target::Place;
use crate::daemon::blkmark_binary;

/// A switch that is spelt out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// Runs `blkmark serve` and `qemu-storage-daemon` side by side on the same disk and prints their ratios.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench")]
pub struct Options {
    /// Make a disk in this folder (repeatable: tmpfs and disk, say) [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Vec<PathBuf>,
    /// Measure on this file or block device (repeatable); its content is overwritten
    #[arg(long, value_name = "PATH")]
    file: Vec<PathBuf>,
    /// Measure without a medium: blkmark's null disk beside QSD's null-co
    #[arg(long)]
    null: bool,
    /// Agree that the content of --file is lost
    #[arg(long)]
    pub overwrite: bool,
    /// Size of the disk, as 512M or 1G; of a larger --file only so much is used
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    pub size: u64,
    /// Seconds to measure each run [default: 2, with --quick 1]
    #[arg(long, value_name = "S", value_parser = parse_seconds)]
    seconds: Option<f64>,
    /// Seconds of load before measuring
    #[arg(long, value_name = "S", default_value = "0.3", value_parser = parse_seconds)]
    pub warmup: f64,
    /// Paired rounds, of which the medians are taken
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Open the disk with O_DIRECT
    #[arg(long, value_name = "on|off", default_value = "on")]
    direct: Switch,
    /// Tie the server and the guest's threads to processors, as 0:1
    #[arg(long, value_name = "SERVER:GUEST")]
    pub pin: Option<Pin>,
    /// Repeat a run, up to 20 times, in which other processes used more than this share of the processors
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub calm: Option<u8>,
    /// Only a few cells, one second each
    #[arg(long)]
    quick: bool,
    /// Only cells whose name contains this (repeatable)
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Print the cells' names and end
    #[arg(long)]
    pub list: bool,
    /// Print one JSON document instead of tables
    #[arg(long)]
    pub json: bool,
    /// Which servers to run, and fio, which needs none [default: qsd,blkmark, with --before blkmark]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    servers: Vec<Program>,
    /// Numbers of bitmaps to run blkmark with
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1,64")]
    bitmaps: Vec<u32>,
    /// Numbers of bitmaps to run qemu-storage-daemon with; the first is the baseline of the ratios
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1")]
    qsd_bitmaps: Vec<u32>,
    /// How qemu-storage-daemon does its I/O (several: each is a contender) [default: native with --direct on, else
    /// threads]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    qsd_aio: Vec<Aio>,
    /// The qemu-storage-daemon to run
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    pub qsd: PathBuf,
    /// The blkmark to run [default: BLKMARK_BIN, or the one beside this program]
    #[arg(long, value_name = "PATH")]
    blkmark: Option<PathBuf>,
    /// Another build of blkmark, to compare with: the baseline, and the only contender besides blkmark unless --servers is given
    #[arg(long, value_name = "PATH")]
    before: Option<PathBuf>,
    /// The fio to run (with `--servers fio`)
    #[arg(long, value_name = "PATH", default_value = "fio")]
    pub fio: PathBuf,
    /// Bitmaps of blkmark that survive (`"persistent": true`), instead of ones in memory alone
    #[arg(long)]
    pub persistent: bool,
    /// Count blkmark's instructions a request under callgrind instead of taking times
    #[arg(long)]
    pub instructions: bool,
    /// More for blkmark's --disk, as bitmaps=off
    #[arg(long, value_name = "OPTIONS")]
    pub blkmark_disk: Option<String>,
    /// Give each request three ring entries even where indirect descriptors are offered
    #[arg(long)]
    pub no_indirect: bool,
}

impl Options {
    /// Seconds to measure.
    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 1.0 } else { 2.0 })
    }

    /// Paired rounds.
    pub fn rounds(&self) -> usize {
        self.rounds as usize
    }

    /// O_DIRECT.
    pub fn direct(&self) -> bool {
        self.direct == Switch::On
    }

    /// The cells to run.
    pub fn cells(&self) -> Result<Vec<Cell>> {
        cell::select(self.quick, &self.only)
    }

    /// The smallest disk that has room for every cell.
    pub fn least_size(&self) -> u64 {
        16 << 20
    }

    /// The disks to run on.
    pub fn targets(&self) -> Result<Vec<Place>> {
        if self.size < self.least_size() {
            bail!("--size {}: a disk has at least {} MiB here", self.size, self.least_size() >> 20);
        }
        let mut places: Vec<Place> = self.dir.iter().cloned().map(Place::Dir).collect();
        places.extend(self.file.iter().cloned().map(Place::File));
        if self.null {
            places.push(Place::Null);
        }
        if places.is_empty() {
            places.push(Place::Dir(std::env::temp_dir()));
        }
        Ok(places)
    }

    /// Who runs, the baseline first.
    pub fn contenders(&self) -> Result<Vec<Contender>> {
        let mut contenders = Vec::new();
        let default = if self.before.is_some() { &[Program::Blkmark][..] } else { &[Program::Qsd, Program::Blkmark] };
        let servers = if self.servers.is_empty() { default } else { &self.servers };
        if self.before.is_some() {
            self.blkmark(true)?;
            contenders.extend(self.bitmaps.iter().map(|&bitmaps| Contender::Blkmark { other: true, bitmaps }));
        }
        let aios = match (self.qsd_aio.as_slice(), self.direct()) {
            ([], true) => vec![Aio::Native],
            ([], false) => vec![Aio::Threads],
            (list, true) => list.to_vec(),
            (list, false) if list.contains(&Aio::Native) => {
                bail!("--qsd-aio native works with --direct on only");
            }
            (list, false) => list.to_vec(),
        };
        if servers.contains(&Program::Qsd) {
            for &aio in &aios {
                contenders.extend(self.qsd_bitmaps.iter().map(|&bitmaps| Contender::Qsd { aio, bitmaps }));
            }
        }
        if servers.contains(&Program::Fio) {
            if self.null {
                bail!("fio has nothing to do with --null");
            }
            contenders.push(Contender::Fio);
        }
        if servers.contains(&Program::Blkmark) {
            self.build_blkmark()?;
            self.blkmark(false)?;
            contenders.extend(self.bitmaps.iter().map(|&bitmaps| Contender::Blkmark { other: false, bitmaps }));
        }
        Ok(contenders)
    }

    /// Under `cargo run` the blkmark beside this program may be missing or stale: cargo builds only the package that it
    /// runs. So it is asked for the other one too.
    fn build_blkmark(&self) -> Result<()> {
        let Some(cargo) = std::env::var_os("CARGO") else { return Ok(()) };
        if self.blkmark.is_some() || std::env::var_os("BLKMARK_BIN").is_some() {
            return Ok(());
        }
        let mut command = Command::new(cargo);
        command.args(["build", "--package", "blkmark", "--bin", "blkmark"]);
        if !cfg!(debug_assertions) {
            command.arg("--release");
        }
        let status = command.status().context("cannot run cargo")?;
        if !status.success() {
            bail!("blkmark does not build");
        }
        Ok(())
    }

    /// The blkmark to run; the `other` one is that of `--before`.
    pub fn blkmark(&self, other: bool) -> Result<PathBuf> {
        let (option, path) = if other { ("--before", &self.before) } else { ("--blkmark", &self.blkmark) };
        match path {
            Some(path) if path.is_file() => Ok(path.clone()),
            Some(path) => bail!("{option} {}: no such file", path.display()),
            None => {
                blkmark_binary().context("there is no blkmark to run (build it, or use --blkmark or --servers qsd)")
            }
        }
    }
}

fn parse_size(text: &str) -> Result<u64> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 10),
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .with_context(|| format!("`{text}` is no size: give bytes, or a number with K, M or G"))?;
    if bytes == 0 || !bytes.is_multiple_of(1 << 20) {
        bail!("a size in whole MiB is needed");
    }
    Ok(bytes)
}

fn parse_seconds(text: &str) -> Result<f64> {
    match text.parse::<f64>() {
        Ok(s) if (0.01..=3600.0).contains(&s) => Ok(s),
        _ => bail!("give seconds from 0.01 to 3600"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        Options::try_parse_from(["bench"].iter().chain(args)).map_err(|e| e.to_string())
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (args, say) in [
            (&["--size", "12"][..], "whole MiB"),
            (&["--size", "1T"], "`1T` is no size"),
            (&["--size", "99999999999G"], "is no size"),
            (&["--seconds", "0"], "seconds from"),
            (&["--rounds", "0"], "0 is not in 1..=1000"),
            (&["--direct", "maybe"], "[possible values: on, off]"),
            (&["--servers", "nbd"], "[possible values: blkmark, qsd, fio]"),
            (&["--pin", "7"], "as 0:1"),
            (&["--frobnicate"], "unexpected argument"),
        ] {
            let error = parse(args).unwrap_err();
            assert!(error.contains(say), "{args:?}: {error}");
        }
    }

    #[test]
    fn native_aio_needs_direct_io() {
        let options = parse(&["--direct", "off", "--qsd-aio", "native", "--servers", "qsd"]).unwrap();
        let error = options.contenders().unwrap_err().to_string();
        assert!(error.contains("--direct on"), "{error}");
    }

    #[test]
    fn the_baseline_comes_first() {
        let options = parse(&["--servers", "qsd", "--qsd-aio", "io_uring,threads"]).unwrap();
        let names: Vec<String> = options.contenders().unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["qsd-io_uring/0", "qsd-io_uring/1", "qsd-threads/0", "qsd-threads/1"]);
    }
}
