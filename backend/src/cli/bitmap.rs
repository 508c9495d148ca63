//! `blkmark bitmap`: one QMP command each; `populate` also makes the bitmap, at the same instant, and waits.

use std::path::PathBuf;

use blkmark_backup::qmp::Client;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::backup::{self, ImageFormat};
use super::failure::Failure;
use super::output::Output;
use super::query;
use super::wait::Wait;
use super::{checkpoint, size};

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

/// Runs it.
pub(super) fn run(client: &mut Client, args: &BitmapArgs, output: &Output) -> Result<(), Failure> {
    let (command, arguments) = match &args.action {
        BitmapAction::Populate(args) => return populate(client, args, output),
        BitmapAction::List { disk } => return query::bitmaps(client, disk.as_deref(), output),
        BitmapAction::Add { bitmap, granularity, transient, disabled } => {
            let mut arguments = named(bitmap);
            arguments["persistent"] = (!transient).into();
            arguments["disabled"] = (*disabled).into();
            if let Some(granularity) = granularity {
                arguments["granularity"] = (*granularity).into();
            }
            ("block-dirty-bitmap-add", arguments)
        }
        BitmapAction::Remove(bitmap) => ("block-dirty-bitmap-remove", named(bitmap)),
        BitmapAction::Enable(bitmap) => ("block-dirty-bitmap-enable", named(bitmap)),
        BitmapAction::Disable(bitmap) => ("block-dirty-bitmap-disable", named(bitmap)),
        BitmapAction::Clear(bitmap) => ("block-dirty-bitmap-clear", named(bitmap)),
        BitmapAction::Freeze(bitmap) => ("block-dirty-bitmap-create-successor", named(bitmap)),
        BitmapAction::Abdicate(bitmap) => ("block-dirty-bitmap-abdicate", named(bitmap)),
        BitmapAction::Reclaim(bitmap) => ("block-dirty-bitmap-reclaim", named(bitmap)),
        BitmapAction::Show(bitmap) => {
            return checkpoint::regions(client, "query-block-dirty-bitmap", named(bitmap), output);
        }
        BitmapAction::Merge { target, sources, from } => {
            let source = |name: &String| match from {
                Some(disk) => json!({ "node": disk, "name": name }),
                None => json!(name),
            };
            let sources: Vec<Value> = sources.iter().map(source).collect();
            let arguments = json!({ "node": target.disk, "target": target.name, "bitmaps": sources });
            ("block-dirty-bitmap-merge", arguments)
        }
    };
    output.done(&client.execute(command, arguments)?);
    Ok(())
}

fn populate(client: &mut Client, args: &PopulateArgs, output: &Output) -> Result<(), Failure> {
    let job = args.job.as_ref().unwrap_or(&args.bitmap.disk).clone();
    let mut arguments = named(&args.bitmap);
    arguments["job-id"] = json!(job);
    arguments["pattern"] = json!(match args.pattern.unwrap_or(MarkPattern::Diff) {
        MarkPattern::Diff => "diff",
        MarkPattern::AllocationTop => "allocation-top",
        MarkPattern::All => "all",
    });
    arguments["mode"] = json!(match args.mode {
        MarkMode::Overwrite => "overwrite",
        MarkMode::Union => "union",
        MarkMode::Difference => "difference",
    });
    if let (Some(image), Some(format)) = (&args.image, args.format) {
        arguments["image"] = json!(backup::told(image)?);
        arguments["format"] = json!(backup::format(format).name());
    }
    if let Some(node) = &args.image_node {
        arguments["image-node"] = json!(node);
    }
    if let Some(speed) = args.speed {
        arguments["speed"] = json!(speed);
    }
    if query::has_bitmap(client, &args.bitmap.disk, &args.bitmap.name)? {
        client.execute("block-dirty-bitmap-populate", arguments)?;
    } else {
        let mut add = named(&args.bitmap);
        if let Some(granularity) = args.granularity {
            add["granularity"] = json!(granularity);
        }
        let actions = json!([
            { "type": "block-dirty-bitmap-add", "data": add },
            { "type": "block-dirty-bitmap-populate", "data": arguments },
        ]);
        client.execute("transaction", json!({ "actions": actions }))?;
    }
    if args.no_wait {
        output.result(&json!({ "return": { "jobs": [job] } }), || job.clone());
        return Ok(());
    }
    Wait::new([job]).run(client, output)
}

fn named(bitmap: &BitmapName) -> Value {
    json!({ "node": bitmap.disk, "name": bitmap.name })
}
