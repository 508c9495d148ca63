//! The benchmark's command line.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use super::cell::{self, Cell};
use super::cpu::Pin;
use super::server::{Aio, Bitmaps, Contender, Program};
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
#[command(name = "bench", args_override_self = true)]
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
    /// Size of each disk, as 512M, 1G or 1T; of a larger --file only so much is used
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    pub size: u64,
    /// So many disks, each under the whole load, served by one process
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    disks: u16,
    /// Disks of --dir are sparse and empty, anew for each run: what it costs to write where nobody wrote before
    #[arg(long)]
    pub sparse: bool,
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
    /// Which servers to run, and fio, which needs none; ratios are to the first [default: qsd,blkmark, with --before blkmark]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    servers: Vec<Program>,
    /// Numbers of bitmaps to run blkmark with; they are persistent, those of `1t` are in memory alone
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0,1t,1,64")]
    bitmaps: Vec<Bitmaps>,
    /// Numbers of bitmaps to run qemu-storage-daemon with
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
    /// Bitmaps of blkmark are in memory alone (`"persistent": false`)
    #[arg(long)]
    no_persistence: bool,
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

    /// Disks.
    pub fn disks(&self) -> usize {
        usize::from(self.disks)
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
        if !self.file.is_empty() && (self.disks > 1 || self.sparse) {
            bail!("--disks and --sparse make disks of their own, and have nothing to do with --file");
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
            contenders.extend(self.blkmark_contenders(true));
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
        for server in servers {
            match server {
                Program::Qsd => {
                    for &aio in &aios {
                        contenders.extend(self.qsd_bitmaps.iter().map(|&bitmaps| Contender::Qsd { aio, bitmaps }));
                    }
                }
                Program::Fio if self.null || self.disks > 1 => bail!("fio has nothing to do with --null or --disks"),
                Program::Fio => contenders.push(Contender::Fio),
                Program::Blkmark => {
                    self.build_blkmark()?;
                    self.blkmark(false)?;
                    contenders.extend(self.blkmark_contenders(false));
                }
            }
        }
        Ok(contenders)
    }

    fn blkmark_contenders(&self, other: bool) -> impl Iterator<Item = Contender> + '_ {
        self.bitmaps.iter().map(move |&Bitmaps { count, persistent }| {
            let persistent = persistent && !self.no_persistence;
            Contender::Blkmark { other, bitmaps: Bitmaps { count, persistent } }
        })
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
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .with_context(|| format!("`{text}` is no size: give bytes, or a number with K, M, G or T"))?;
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
            (&["--size", "1P"], "`1P` is no size"),
            (&["--bitmaps", "1p"], "`1p` is no number of bitmaps"),
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
    fn what_is_said_later_counts() {
        // scripts/perf-compare puts its caller's arguments behind its own.
        let options = parse(&["--rounds", "5", "--only", "qd1-", "--rounds", "9", "--only", "qd32"]).unwrap();
        assert_eq!((options.rounds(), options.only.len()), (9, 2));
    }

    #[test]
    fn native_aio_needs_direct_io() {
        let options = parse(&["--direct", "off", "--qsd-aio", "native", "--servers", "qsd"]).unwrap();
        let error = options.contenders().unwrap_err().to_string();
        assert!(error.contains("--direct on"), "{error}");
    }

    #[test]
    fn the_baseline_comes_first() {
        let names = |args: &[&str]| -> Vec<String> {
            parse(args).unwrap().contenders().unwrap().iter().map(ToString::to_string).collect()
        };
        let all = names(&["--servers", "qsd", "--qsd-aio", "io_uring,threads"]);
        assert_eq!(all, ["qsd-io_uring/0", "qsd-io_uring/1t", "qsd-threads/0", "qsd-threads/1t"]);
        assert_eq!(names(&["--servers", "qsd,fio", "--qsd-bitmaps", "0"]), ["qsd-native/0", "fio/0"]);
        assert_eq!(names(&["--servers", "fio,qsd", "--qsd-bitmaps", "0"]), ["fio/0", "qsd-native/0"]);
    }

    #[test]
    fn bitmaps_are_persistent_unless_said_otherwise() {
        let names = |args: &[&str]| -> Vec<String> {
            parse(args).unwrap().blkmark_contenders(false).map(|contender| contender.to_string()).collect()
        };
        assert_eq!(names(&[]), ["blkmark/0", "blkmark/1t", "blkmark/1", "blkmark/64"]);
        assert_eq!(names(&["--bitmaps", "8,8t"]), ["blkmark/8", "blkmark/8t"]);
        assert_eq!(names(&["--bitmaps", "8", "--no-persistence"]), ["blkmark/8t"]);
    }
}
