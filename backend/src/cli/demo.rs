//! The words of `blkmark demo`, which `crate::demo` runs.

use std::path::PathBuf;

use clap::Args;

use super::size;

/// `blkmark demo`.
#[derive(Debug, Args)]
#[command(after_help = "Everything lies in a directory of its own, which is removed at the end.\n\n\
    Exit status: 0 every restored image was proved equal to the disk as of its instant; 1 one was not, or something \
    failed; 2 wrong usage; 130 interrupted.")]
pub struct DemoArgs {
    /// The directory to put the demo's own directory in [default: $TMPDIR, or /tmp]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,

    /// Size of the disk, in whole MiB
    #[arg(long, default_value = "1G", value_parser = size::parse)]
    pub size: u64,

    /// How long the guest writes, in seconds, besides the time that backups take
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,

    /// Keep all files, the restored images too
    #[arg(long)]
    pub keep: bool,
}
