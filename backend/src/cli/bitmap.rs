//! `blkmark bitmap`: one QMP command each.

use blkmark_backup::qmp::Client;
use serde_json::{Value, json};

use super::args::{BitmapAction, BitmapArgs, BitmapName};
use super::checkpoint;
use super::failure::Failure;
use super::output::Output;
use super::query;

/// Runs it.
pub(super) fn run(client: &mut Client, args: &BitmapArgs, output: &Output) -> Result<(), Failure> {
    let (command, arguments) = match &args.action {
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

fn named(bitmap: &BitmapName) -> Value {
    json!({ "node": bitmap.disk, "name": bitmap.name })
}
