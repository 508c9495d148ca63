//! The command line of the torture.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::guest::GuestArgs;

/// Kills a daemon, its guests and its clients, fills file systems, takes targets away, for as long as it is told; looks
/// at every backup meanwhile and at the end
#[derive(Debug, Parser)]
#[command(
    name = "torture",
    after_help = "Exit status: 0 nothing was lost; 1 something was, or went wrong: the seed, \
    what happened, and where the files are is told; 2 wrong usage."
)]
pub struct Cli {
    /// What to do instead.
    #[command(subcommand)]
    pub part: Option<Part>,

    /// How to torture.
    #[command(flatten)]
    pub options: Options,
}

/// Parts that the torture starts as processes of their own.
#[derive(Debug, Subcommand)]
pub enum Part {
    /// A guest of one disk.
    #[command(hide = true)]
    Guest(GuestArgs),
}

/// How to torture.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// How long
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Go on, however long it takes, until there were so many kills
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub kills: u64,
    /// What fixes the schedule of events [default: the clock]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Where everything lies [default: the folder for temporary files]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Disks, each with a guest
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub disks: u8,
    /// Without a store: bitmaps end with the daemon
    #[arg(long)]
    pub volatile: bool,
    /// Keep all files, also when nothing was lost
    #[arg(long)]
    pub keep: bool,
    /// Say each event when it happens
    #[arg(long, short)]
    pub verbose: bool,
}
