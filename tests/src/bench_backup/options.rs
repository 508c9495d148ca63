//! The command line of the benchmark of backups.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};

use super::server::Contender;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scene {
    /// What a guest waits while its disk is backed up.
    Guest,
    /// How fast a whole disk is copied.
    Copy,
    /// How long an increment takes.
    Increment,
}

/// Where the backup of the guest scene goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Speed {
    /// A file beside the disk.
    Fast,
    /// An NBD server that takes 20 MB/s.
    #[value(name = "20m")]
    Slow,
    /// An NBD server that takes 1 MB/s.
    #[value(name = "1m")]
    VerySlow,
    /// An NBD server that stops for ten seconds.
    Hang,
}

/// Measures backups of blkmark and of `qemu-storage-daemon` side by side: what the guest waits, how fast a disk is
/// copied, how long an increment takes.
#[derive(Clone, Debug, Parser)]
#[command(name = "bench-backup")]
pub struct Options {
    /// Where disks, targets and scratch lie [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Size of the disk, as 512M or 4G
    #[arg(long, value_name = "SIZE", default_value = "4G", value_parser = parse_size)]
    pub size: u64,
    /// What to measure [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    scenes: Vec<Scene>,
    /// Who takes part
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "blkmark,qsd,qsd-1,qsd-fleecing")]
    contenders: Vec<Contender>,
    /// Paired rounds, of which medians are shown
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,
    /// Where backups of the guest scene go
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "fast,20m,1m,hang")]
    pub targets: Vec<Speed>,
    /// Requests a second of the guest
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub rate: u32,
    /// Most requests of the guest in flight
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub depth: u16,
    /// Seconds of load before each backup, which are the idle figures
    #[arg(long, value_name = "S", default_value_t = 3.0)]
    pub idle: f64,
    /// After so many seconds a backup to a slow target is cancelled
    #[arg(long, value_name = "S", default_value_t = 15.0)]
    pub patience: f64,
    /// Sizes of the sparse disks of the increment scene
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "4G,64G,1T", value_parser = parse_size)]
    pub sparse: Vec<u64>,
    /// What has changed, in percent of 4 GiB
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0.1,1,10")]
    pub dirty: Vec<f64>,
    /// Granularities of the bitmap in the increment scene
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "4096,65536")]
    pub granularities: Vec<u64>,
    /// `max-guest-latency` of blkmark's backups, in microseconds [default: blkmark's own]
    #[arg(long, value_name = "US")]
    pub max_guest_latency: Option<u64>,
    /// Bitmaps of blkmark are in memory alone (`"persistent": false`); QSD's always are
    #[arg(long)]
    pub no_persistence: bool,
    /// Take and give back so much memory before each run, where the machine's host gives memory at first use: less than is free
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub warm_memory: Option<u64>,
    /// Another build of blkmark, which takes part before this one
    #[arg(long, value_name = "PATH")]
    before: Option<PathBuf>,
    /// Print one JSON document instead of tables
    #[arg(long)]
    pub json: bool,
    /// The qemu-storage-daemon to run
    #[arg(long, value_name = "PATH", default_value = "qemu-storage-daemon")]
    pub qsd: PathBuf,
}

impl Options {
    /// Where everything lies.
    pub fn dir(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(std::env::temp_dir)
    }

    /// What to measure.
    pub fn scenes(&self) -> Vec<Scene> {
        if self.scenes.is_empty() { Scene::value_variants().to_vec() } else { self.scenes.clone() }
    }

    /// Who takes part, the other build first.
    pub fn contenders(&self) -> Vec<Contender> {
        let other = self.before.as_ref().map(|_| Contender::BlkmarkBefore);
        let named = self.contenders.iter().copied().filter(|who| *who != Contender::BlkmarkBefore);
        other.into_iter().chain(named).collect()
    }

    /// The other build of blkmark.
    pub fn before(&self) -> Result<&Path> {
        self.before.as_deref().context("blkmark-before is the build that --before names")
    }

    /// Refuses what cannot be measured.
    pub fn check(&self) -> Result<()> {
        if self.contenders.contains(&Contender::BlkmarkBefore) {
            self.before()?;
        }
        for seconds in [self.idle, self.patience] {
            if !(0.1..=3600.0).contains(&seconds) {
                bail!("give seconds from 0.1 to 3600");
            }
        }
        if let Some(percent) = self.dirty.iter().find(|percent| !(0.001..=50.0).contains(*percent)) {
            bail!("--dirty {percent}: give percents from 0.001 to 50");
        }
        if let Some(bytes) = self.granularities.iter().find(|g| !g.is_power_of_two() || !(4096..=1 << 20).contains(*g))
        {
            bail!("--granularities {bytes}: give powers of two from 4096 to 1048576");
        }
        Ok(())
    }
}

fn parse_size(text: &str) -> Result<u64> {
    let (number, shift) = match text.char_indices().last() {
        Some((at, 'm' | 'M')) => (&text[..at], 20),
        Some((at, 'g' | 'G')) => (&text[..at], 30),
        Some((at, 't' | 'T')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .with_context(|| format!("`{text}` is no size: give bytes, or a number with M, G or T"))?;
    if !(64 << 20..=64 << 40).contains(&bytes) || !bytes.is_multiple_of(1 << 20) {
        bail!("`{text}`: give whole MiB, from 64M to 64T");
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_build_takes_part_once_and_first() {
        for args in [&["--before", "other"][..], &["--before", "other", "--contenders", "blkmark,blkmark-before"]] {
            let options = Options::parse_from(["bench-backup"].iter().chain(args));
            assert!(options.check().is_ok());
            assert_eq!(options.contenders()[..2], [Contender::BlkmarkBefore, Contender::Blkmark]);
            assert_eq!(options.contenders().iter().filter(|who| **who == Contender::BlkmarkBefore).count(), 1);
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        for (args, say) in [
            (&["--size", "12"][..], "whole MiB"),
            (&["--sparse", "4G,1P"], "`1P` is no size"),
            (&["--scenes", "all"], "[possible values: guest, copy, increment]"),
            (&["--contenders", "nbd"], "[possible values: blkmark, "),
            (&["--dirty", "90"], "--dirty 90"),
            (&["--granularities", "5000"], "powers of two"),
            (&["--patience", "0"], "give seconds"),
            (&["--contenders", "blkmark-before,qsd"], "--before"),
        ] {
            let parsed = Options::try_parse_from(["bench-backup"].iter().chain(args));
            let error = match parsed {
                Ok(options) => options.check().unwrap_err().to_string(),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(say), "{args:?}: {error}");
        }
    }
}
