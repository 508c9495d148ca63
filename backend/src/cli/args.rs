//! The words of the command line, as `--help` shows them.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::checkpoint::CheckpointArgs;
use super::export::ExportArgs;
use super::failure::Failure;
use super::point::PointArgs;
use super::serve::ServeArgs;
use super::{CONTROL_VARIABLE, DEFAULT_CONTROL, size};

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

/// `blkmark store`.
#[derive(Debug, Args)]
#[command(
    after_help = "Exit status: 0 all that was asked for could be read (check: and can be relied on); 1 not so; 2 wrong usage."
)]
pub struct StoreArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: StoreAction,
}

/// What can be done with a store.
#[derive(Debug, Subcommand)]
pub enum StoreAction {
    /// Read all of it, and fail if anything in it cannot be relied on
    Check {
        /// The store's directory, or the disk it belongs to
        path: PathBuf,
    },
    /// Show the bitmaps in it
    Show {
        /// The store's directory, or the disk it belongs to
        path: PathBuf,
    },
}

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

/// `blkmark bitmap`.
#[derive(Debug, Args)]
pub struct BitmapArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: BitmapAction,
}

/// A bitmap by its disk and name.
#[derive(Debug, Args)]
pub struct BitmapName {
    /// The disk
    pub disk: String,
    /// The bitmap
    pub name: String,
}

/// What to do with a bitmap.
#[derive(Debug, Subcommand)]
pub enum BitmapAction {
    /// Add a bitmap, which records from now on
    Add {
        /// The new bitmap.
        #[command(flatten)]
        bitmap: BitmapName,
        /// Bytes that one bit stands for, a power of two [default: the daemon chooses]
        #[arg(long, value_parser = size::parse)]
        granularity: Option<u64>,
        /// Do not keep it over the end of the daemon
        #[arg(long)]
        transient: bool,
        /// Add it disabled
        #[arg(long)]
        disabled: bool,
    },
    /// Remove a bitmap
    Remove(BitmapName),
    /// Record again
    Enable(BitmapName),
    /// Record no more
    Disable(BitmapName),
    /// Forget what was recorded
    Clear(BitmapName),
    /// Add to a bitmap what others recorded
    Merge {
        /// The bitmap that is added to.
        #[command(flatten)]
        target: BitmapName,
        /// The bitmaps to add, which stay as they are
        #[arg(required = true)]
        sources: Vec<String>,
        /// The disk that has these [default: the same]
        #[arg(long, value_name = "DISK")]
        from: Option<String>,
    },
    /// Mark what differs from an older image, and so begin a chain from a backup that exists
    Populate(PopulateArgs),
    /// Freeze a bitmap: what it holds stands still, and a successor records
    Freeze(BitmapName),
    /// End a freeze in success: the bitmap is what was recorded since
    Abdicate(BitmapName),
    /// End a freeze in failure: the bitmap is what it held, and what was recorded since
    Reclaim(BitmapName),
    /// Show which regions a bitmap holds
    Show(BitmapName),
    /// List bitmaps
    List {
        /// Of this disk only
        disk: Option<String>,
    },
}

/// `blkmark bitmap populate`.
#[derive(Debug, Args)]
#[command(after_help = "A bitmap that does not exist is made, and is gone again if the job does not succeed.\n\
    What the guest writes meanwhile is in the bitmap too.\n\n\
    Exit status: 0 success; 1 refused, or the job failed; 2 wrong usage; 3 the daemon cannot be reached.")]
pub struct PopulateArgs {
    /// The bitmap.
    #[command(flatten)]
    pub bitmap: BitmapName,
    /// The older image: a backup of the disk, with its whole chain
    #[arg(long, value_name = "FILE", requires = "format", conflicts_with = "image_node")]
    pub image: Option<PathBuf>,
    /// Format of the older image
    #[arg(long, value_enum, requires = "image")]
    pub format: Option<ImageFormat>,
    /// The older image as a node: one that is read-only, an NBD export for instance, or a point in time
    #[arg(long, value_name = "NODE")]
    pub image_node: Option<String>,
    /// What to mark [default: diff]
    #[arg(long, value_enum)]
    pub pattern: Option<MarkPattern>,
    /// How that meets what the bitmap holds
    #[arg(long, value_enum, default_value_t = MarkMode::Union)]
    pub mode: MarkMode,
    /// Bytes that one bit stands for, a power of two, if the bitmap is made [default: the daemon chooses]
    #[arg(long, value_parser = size::parse)]
    pub granularity: Option<u64>,
    /// Bytes a second at most [default: no limit]
    #[arg(long, value_parser = size::parse_signed)]
    pub speed: Option<u64>,
    /// Id of the job [default: the disk's]
    #[arg(long)]
    pub job: Option<String>,
    /// Return as soon as it runs
    #[arg(long)]
    pub no_wait: bool,
}

/// What to mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MarkPattern {
    /// Blocks that differ from the older image
    Diff,
    /// Blocks that the disk holds, not its holes
    AllocationTop,
    /// Every block
    All,
}

/// How what was found meets what a bitmap holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MarkMode {
    /// The bitmap holds what was found alone
    Overwrite,
    /// It holds both
    Union,
    /// It holds what it held, less what was found
    Difference,
}

impl BitmapArgs {
    /// What clap cannot check.
    pub(super) fn check(&self) -> Result<(), Failure> {
        match &self.action {
            BitmapAction::Populate(args) => args.check(),
            _ => Ok(()),
        }
    }
}

impl PopulateArgs {
    fn check(&self) -> Result<(), Failure> {
        let has_image = self.image.is_some() || self.image_node.is_some();
        let diff = self.pattern.unwrap_or(MarkPattern::Diff) == MarkPattern::Diff;
        match (diff, has_image) {
            (true, false) => Err(Failure::Usage("give the older image: --image or --image-node".to_owned())),
            (false, true) => Err(Failure::Usage("an older image has a meaning with --pattern diff only".to_owned())),
            _ => Ok(()),
        }
    }
}

/// Which blocks a backup holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BackupKind {
    /// Everything. With --bitmap, that bitmap then records what changes from this very instant
    Full,
    /// What changed since the last backup with --bitmap, which then starts anew
    Incremental,
    /// What changed since --bitmap started, which goes on
    Differential,
    /// What is allocated in the disk's topmost image
    Top,
}

/// `blkmark backup`.
#[derive(Debug, Args)]
#[command(after_help = "Several disks, each with its own target, are backed up as of one instant:\n  \
    blkmark backup full --disk a --target a.qcow2 --disk b --target b.qcow2 --bitmap daily\n\
    If one of them fails, all do; only with a full backup that starts bitmaps each disk stands alone.\n\
    Interrupting the wait leaves the jobs running; `blkmark job` steers them.\n\n\
    Exit status: 0 success; 1 refused, or a job failed; 2 wrong usage; 3 the daemon cannot be reached.")]
pub struct BackupArgs {
    /// What to copy
    #[arg(value_enum)]
    pub kind: BackupKind,
    /// The disk (repeatable)
    #[arg(long = "disk", required = true, value_name = "DISK")]
    pub disks: Vec<String>,
    /// The image to write, one a disk; made unless --existing is given
    #[arg(long = "target", required = true, value_name = "FILE")]
    pub targets: Vec<PathBuf>,
    /// Format of the image
    #[arg(long, value_enum, default_value_t = ImageFormat::Qcow2)]
    pub format: ImageFormat,
    /// The bitmap, of this name on each disk
    #[arg(long)]
    pub bitmap: Option<String>,
    /// The image that the new one stands on, one a disk: usually the backup before
    #[arg(long = "backing", value_name = "FILE")]
    pub backings: Vec<PathBuf>,
    /// Format of the backing image
    #[arg(long, value_enum, default_value_t = ImageFormat::Qcow2, requires = "backings")]
    pub backing_format: ImageFormat,
    /// Write into an image or block device that is there already
    #[arg(long, conflicts_with_all = ["backings", "overwrite"])]
    pub existing: bool,
    /// Empty and reuse a file that is there already
    #[arg(long)]
    pub overwrite: bool,
    /// Deflate what is written: smaller images, more processor time (qcow2 only)
    #[arg(long)]
    pub compress: bool,
    /// Bytes a second at most, a disk [default: no limit]
    #[arg(long, value_parser = size::parse_signed)]
    pub speed: Option<u64>,
    /// Leave room while the guest's requests take longer than this many microseconds; 0 does not look [default: 1000]
    #[arg(long, value_name = "US")]
    pub max_guest_latency: Option<u64>,
    /// Share blocks with the disk where the file system can: a raw image beside a raw disk, on XFS or btrfs
    #[arg(long)]
    pub reflink: bool,
    /// If it fails, keep its point in time for `job retry`; until then the bitmap stays frozen
    #[arg(long)]
    pub keep: bool,
    /// Id of the job, for a single disk [default: the disk's]
    #[arg(long)]
    pub job: Option<String>,
    /// Wait until it is done; this is the default
    #[arg(long, overrides_with = "no_wait")]
    pub wait: bool,
    /// Return as soon as it runs
    #[arg(long, overrides_with = "wait")]
    pub no_wait: bool,
}

/// Image formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The bytes of the disk.
    Raw,
    /// QEMU's qcow2.
    Qcow2,
}

impl BackupArgs {
    /// What clap cannot check.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let usage = |text: &str| Err(Failure::Usage(text.to_owned()));
        let needs_bitmap = matches!(self.kind, BackupKind::Incremental | BackupKind::Differential);
        if self.targets.len() != self.disks.len() {
            return usage("every --disk needs its own --target");
        }
        if !self.backings.is_empty() && self.backings.len() != self.disks.len() {
            return usage("give a --backing for every --disk, or none");
        }
        if needs_bitmap && self.bitmap.is_none() {
            return usage("this kind of backup needs --bitmap");
        }
        if self.kind == BackupKind::Top && self.bitmap.is_some() {
            return usage("a backup of the topmost image takes no --bitmap");
        }
        if self.job.is_some() && self.disks.len() > 1 {
            return usage("--job names the job of a single disk");
        }
        if self.format == ImageFormat::Raw && !self.backings.is_empty() {
            return usage("a raw image cannot stand on a backing file");
        }
        if self.format == ImageFormat::Raw && self.compress {
            return usage("a raw image cannot be compressed");
        }
        if self.kind != BackupKind::Full && self.format == ImageFormat::Raw && !self.existing {
            return usage(
                "a new raw image cannot tell what was copied: use qcow2, or update a full one with --existing",
            );
        }
        Ok(())
    }
}

/// `blkmark job`.
#[derive(Debug, Args)]
pub struct JobArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: JobAction,
}

/// A job by its id.
#[derive(Debug, Args)]
pub struct JobName {
    /// The job
    pub id: String,
}

/// What to do with a job.
#[derive(Debug, Subcommand)]
pub enum JobAction {
    /// List jobs
    List,
    /// End a job without success
    Cancel(JobName),
    /// Let a job rest
    Pause(JobName),
    /// Let a paused job go on
    Resume(JobName),
    /// Limit a job's speed
    SetSpeed {
        /// The job.
        #[command(flatten)]
        job: JobName,
        /// Bytes a second; 0 is no limit
        #[arg(value_parser = size::parse_signed)]
        speed: u64,
    },
    /// Change what the guest may feel of a job
    SetGuestLatency {
        /// The job.
        #[command(flatten)]
        job: JobName,
        /// The copy leaves room while the guest's requests take longer; 0: it does not look
        #[arg(value_name = "MICROSECONDS")]
        limit: u64,
    },
    /// Let a pending job conclude
    Finalize(JobName),
    /// Forget a concluded job; a point in time that it kept is given up
    Dismiss(JobName),
    /// Begin a failed backup again that was started with --keep: the very same image, to where it went or elsewhere
    Retry(RetryArgs),
    /// Wait until a job has ended
    Wait(JobName),
}

/// `blkmark job retry`.
#[derive(Debug, Args)]
pub struct RetryArgs {
    /// The job.
    #[command(flatten)]
    pub job: JobName,
    /// Another image to write
    #[arg(long, value_name = "FILE")]
    pub target: Option<PathBuf>,
    /// Format of that image
    #[arg(long, value_enum, default_value_t = ImageFormat::Qcow2, requires = "target")]
    pub format: ImageFormat,
    /// It is there already
    #[arg(long, requires = "target")]
    pub existing: bool,
    /// Return as soon as it runs
    #[arg(long)]
    pub no_wait: bool,
}

/// `blkmark query`.
#[derive(Debug, Args)]
pub struct QueryArgs {
    /// What to show
    #[arg(value_enum)]
    pub what: Query,
}

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Query {
    /// The disks that are served
    Disks,
    /// Jobs and their progress
    Jobs,
    /// Dirty bitmaps of all disks
    Bitmaps,
    /// Block devices, as QMP's query-block lists them
    Block,
    /// All nodes, targets included
    NamedBlockNodes,
    /// What the daemon has given up since it serves
    Sandbox,
}

/// `blkmark qmp`.
#[derive(Debug, Args)]
#[command(after_help = "Without COMMAND, standard input is sent as it comes, after negotiation, and every reply and \
    event is printed on a line of its own until all requests are answered:\n  \
    echo '{\"execute\": \"query-jobs\"}' | blkmark qmp\n\n\
    Exit status: 0 success; 1 an error was among the replies; 2 wrong usage; 3 the daemon cannot be reached.")]
pub struct QmpArgs {
    /// The command
    pub command: Option<String>,
    /// Its arguments, a JSON object
    pub arguments: Option<String>,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(format!("blkmark {words}").split(' '))
    }

    fn backup(words: &str) -> BackupArgs {
        match parse(&format!("backup {words}")).unwrap().command {
            Some(Command::Client(ClientCommand::Backup(args))) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn backups_that_make_no_sense_are_refused_before_anything_is_done() {
        for words in [
            "full --disk a --target b --target c",
            "incremental --disk a --target b",
            "top --disk a --target b --bitmap c",
            "full --disk a --target b --disk c --target d --job e",
            "full --disk a --target b --backing c --format raw",
            "full --disk a --target b --compress --format raw",
            "incremental --disk a --target b --bitmap c --format raw",
            "incremental --disk a --target b --disk c --target d --bitmap e --backing f",
        ] {
            assert!(matches!(backup(words).check(), Err(Failure::Usage(_))), "{words}");
        }
        for words in [
            "full --disk a --target b --bitmap c --speed 10M",
            "full --disk a --target b --compress",
            "full --disk a --target b --format raw --max-guest-latency 500 --reflink",
            "incremental --disk a --target b --bitmap c --backing d",
            "incremental --disk a --target b --bitmap c --format raw --existing",
        ] {
            assert!(backup(words).check().is_ok(), "{words}");
        }
        assert!(!backup("full --disk a --target b --no-wait --wait").no_wait);
        assert!(backup("full --disk a --target b --wait --no-wait").no_wait);
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
