//! What the user sees while the demo runs: lines, and on a terminal bars that move.

use std::fmt::Display;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::cli::Output;
use crate::cli::size::human;

/// Where it is shown.
pub struct Show<'a> {
    output: &'a Output,
    quiet: bool,
    bars: bool,
}

impl<'a> Show<'a> {
    /// On `output`; nothing at all for machines, who get one object at the end.
    pub fn new(output: &'a Output, json: bool) -> Self {
        Show { output, quiet: json, bars: output.shows_progress() && std::io::stdout().is_terminal() }
    }

    /// A line for people.
    pub fn line(&self, line: impl Display) {
        if !self.quiet {
            self.output.line(line);
        }
    }

    /// Whether there are bars.
    pub fn has_bars(&self) -> bool {
        self.bars
    }

    /// A bar of something that began at `since`, on a terminal.
    pub fn bar(&self, name: &str, since: Instant) -> Option<Bar> {
        self.bars.then(|| Bar::new(name, since))
    }
}

/// A bar of bytes and their rate.
pub struct Bar {
    bar: ProgressBar,
    since: Instant,
}

impl Bar {
    fn new(name: &str, since: Instant) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr()).with_prefix(name.to_owned());
        let template = "  {prefix:<8} [{bar:30}] {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {msg}";
        // The template is fixed; were it wrong, the plain bar would do.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Bar { bar, since }
    }

    /// Moves it.
    pub fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        self.bar.set_message(rate(done, self.since.elapsed()));
    }

    /// Leaves it there, full.
    pub fn finish(self, bytes: u64, took: Duration) {
        self.bar.set_length(bytes);
        self.bar.set_position(bytes);
        self.bar.set_message(rate(bytes, took));
        self.bar.finish();
    }
}

/// Bytes a second.
pub fn rate(bytes: u64, took: Duration) -> String {
    format!("{}/s", human((bytes as f64 / took.as_secs_f64().max(1e-6)) as u64))
}
