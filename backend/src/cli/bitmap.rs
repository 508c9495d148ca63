//! `blkmark bitmap`: one QMP command each; `populate` also makes the bitmap, at the same instant, and waits.

use blkmark_backup::qmp::Client;
use serde_json::{Value, json};

use super::args::{BitmapAction, BitmapArgs, BitmapName, MarkMode, MarkPattern, PopulateArgs};
use super::failure::Failure;
use super::output::Output;
use super::query;
use super::wait::Wait;
use super::{backup, checkpoint};

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
