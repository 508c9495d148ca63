//! What happened, in a file and, when something is lost, on the screen; and how often, for the summary.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};

/// So many of the last lines are shown after a loss; the file has all.
const SHOWN: usize = 80;

/// The log of events.
pub struct Log {
    file: File,
    began: Instant,
    last: VecDeque<String>,
    aloud: bool,
    figures: BTreeMap<(&'static str, &'static str), u64>,
}

impl Log {
    /// An empty log.
    pub fn create(path: &Path, aloud: bool) -> Result<Log> {
        let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Log { file, began: Instant::now(), last: VecDeque::new(), aloud, figures: BTreeMap::new() })
    }

    /// Something happened.
    pub fn say(&mut self, text: impl std::fmt::Display) {
        let line = format!("{:9.3} {text}", self.began.elapsed().as_secs_f64());
        if self.aloud {
            println!("{line}");
        }
        // The log is no part of what is tested: a full disk ends it, not the run.
        let _ = writeln!(self.file, "{line}");
        self.last.push_back(line);
        if self.last.len() > SHOWN {
            self.last.pop_front();
        }
    }

    /// Something happened that is counted.
    pub fn count(&mut self, group: &'static str, what: &'static str, times: u64) {
        *self.figures.entry((group, what)).or_default() += times;
    }

    /// How often things of a group happened.
    pub fn total(&self, group: &str) -> u64 {
        self.figures.iter().filter(|((of, _), _)| *of == group).map(|(_, times)| times).sum()
    }

    /// Seconds since the beginning.
    pub fn seconds(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// The last lines.
    pub fn tail(&self) -> String {
        self.last.iter().map(|line| format!("{line}\n")).collect()
    }

    /// All figures, a line a group.
    pub fn summary(&self) -> String {
        let mut groups: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for ((group, what), times) in &self.figures {
            groups.entry(group).or_default().push(format!("{what} {times}"));
        }
        let lines = groups.iter().map(|(group, whats)| format!("{group:>8}: {}\n", whats.join(", ")));
        lines.collect()
    }
}
