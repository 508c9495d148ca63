//! The words of the command line, as `--help` shows them.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::backup::BackupArgs;
use super::bitmap::BitmapArgs;
use super::checkpoint::CheckpointArgs;
use super::demo::DemoArgs;
use super::export::ExportArgs;
use super::job::JobArgs;
use super::point::PointArgs;
use super::qmp::QmpArgs;
use super::query::QueryArgs;
use super::serve::ServeArgs;
use super::store::StoreArgs;
use super::{CONTROL_VARIABLE, DEFAULT_CONTROL};

const EXIT_STATUS: &str = "Exit status: 0 success; 1 the daemon refused, or the job failed; 2 wrong usage; 3 the \
    daemon cannot be reached.";

/// A vhost-user-blk backend that marks what a guest changes and backs it up live.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = EXIT_STATUS)]
pub struct Cli {
    /// Path of the control socket: made by `serve`, used by all other commands
    /// [default of clients: $BLKMARK_CONTROL, or /run/blkmark/control.sock]
    #[arg(long, global = true, value_name = "SOCKET")]
    pub control: Option<PathBuf>,

    /// Print JSON for machines instead of tables for people
    #[arg(long, global = true)]
    pub json: bool,

    /// Print what this vhost-user back end can do, as QEMU's convention wants it, and exit
    #[arg(long, exclusive = true)]
    pub print_capabilities: bool,

    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The options of QEMU's convention for back ends, which come without a command.
const CONVENTION: &[&str] = &["--blk-file", "--socket-path", "--fd", "--read-only"];

impl Cli {
    /// Reads the command line of this process. Management layers start a back end by the options of QEMU's convention
    /// alone (`docs/interop/vhost-user.rst`), which means `serve`.
    pub fn from_words(words: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut words: Vec<OsString> = words.into_iter().collect();
        let first = words.get(1).map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
        if CONVENTION.contains(&first.split('=').next().unwrap_or_default()) {
            words.insert(1, "serve".into());
        }
        Self::try_parse_from(words)
    }

    /// The control socket that a client command talks to.
    pub fn control_path(&self) -> PathBuf {
        let named = || std::env::var_os(CONTROL_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
        self.control.clone().or_else(named).unwrap_or_else(|| DEFAULT_CONTROL.into())
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve disks to guests over vhost-user, in the foreground
    Serve(ServeArgs),
    /// Show on throw-away files what this program does: serve, write, back up, restore, compare
    Demo(DemoArgs),
    /// Look into a disk's bitmap store without a daemon; writes nothing
    Store(StoreArgs),
    /// A client of a running daemon.
    #[command(flatten)]
    Client(ClientCommand),
}

/// Commands that ask a running daemon.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Add, change and list dirty bitmaps
    Bitmap(BitmapArgs),
    /// Back up disks, and wait until that is done
    Backup(BackupArgs),
    /// Freeze disks as of one instant, for others to read
    Point(PointArgs),
    /// Export disks and points in time over NBD
    Export(ExportArgs),
    /// Name instants, and ask what has changed between them
    Checkpoint(CheckpointArgs),
    /// List and steer jobs
    Job(JobArgs),
    /// Show disks, jobs, bitmaps and nodes
    Query(QueryArgs),
    /// Execute QMP commands: one from the arguments, or all from standard input
    Qmp(QmpArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(format!("blkmark {words}").split(' '))
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn capabilities_need_no_command() {
        assert!(parse("--print-capabilities").unwrap().print_capabilities);
    }

    #[test]
    fn the_control_socket_can_be_named_before_and_after_the_command() {
        for words in ["--control s query jobs", "query --control s jobs", "query jobs --control s"] {
            assert_eq!(parse(words).unwrap().control_path(), PathBuf::from("s"), "{words}");
        }
    }
}
