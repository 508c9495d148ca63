//! The benchmark of backups: blkmark, `qemu-storage-daemon` and the copying tools of a system, side by side in one run.
//!
//! Three scenes. *Guest*: what requests at a steady rate wait while a full backup goes to a fast, a slow, a very slow and a hanging
//! target. *Copy*: how fast a whole disk is copied without a guest. *Increment*: how long an incremental backup takes, by
//! what changed and by the size of the disk. `bin/bench-backup.rs` is the command; `docs/performance.md` says how to read it.
//!
//! The load is open: a request that could not be sent because earlier ones hang counts from the moment when it was due.

pub mod copies;
pub mod guest;
pub mod increments;
pub mod latency;
pub mod options;
pub mod place;
pub mod server;
pub mod warm;

use anyhow::Result;
use serde_json::{Value, json};

use options::{Options, Scene};

/// Runs what the options ask for; tables go to stdout as they come (with `--json` one document at the end).
pub fn run(options: &Options) -> Result<()> {
    let mut scenes = serde_json::Map::new();
    let mut note = |name: &str, result: Value| scenes.insert(name.into(), result);
    for scene in options.scenes() {
        match scene {
            Scene::Guest => note("guest", latency::run(options)?),
            Scene::Copy => note("copy", copies::run(options)?),
            Scene::Increment => note("increment", increments::run(options)?),
        };
    }
    if options.json {
        println!("{:#}", json!({"dir": options.dir(), "size": options.size, "scenes": scenes}));
    }
    Ok(())
}

/// The median of some figures; 0 of none.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_unstable_by(f64::total_cmp);
    match figures.len() {
        0 => 0.0,
        n if n % 2 == 1 => figures[n / 2],
        n => (figures[n / 2 - 1] + figures[n / 2]) / 2.0,
    }
}
