//! What happened, as tables for people and as one object for machines.

use std::time::Duration;

use serde_json::{Value, json};

use super::prove::Narrowed;
use super::show::rate;
use super::writers::Meter;
use crate::cli::output::table;
use crate::cli::size::human;

/// How an image was proved to be the disk of its instant.
#[derive(Clone, Debug)]
pub enum Proof {
    /// The guest was held for the moment of the order: one SHA-256.
    Held {
        /// How long the guest was held.
        pause: Duration,
        /// Of the restored image, and of the disk at that instant.
        sha256: String,
    },
    /// The guest wrote on: every block is whole and of one instant between order and answer.
    Between {
        /// From the order to the answer.
        answer: Duration,
        /// How narrow it was.
        narrowed: Narrowed,
    },
    /// The guest had stopped: one SHA-256 of the restored image and of the disk's file.
    Stopped {
        /// Of both.
        sha256: String,
    },
}

impl Proof {
    fn short(&self) -> String {
        match self {
            Proof::Held { sha256, .. } | Proof::Stopped { sha256 } => format!("SHA-256 {:.12}...", sha256),
            Proof::Between { .. } => "every block, one instant".into(),
        }
    }

    /// In words, on a few lines.
    pub fn lines(&self) -> Vec<String> {
        match self {
            Proof::Held { pause, sha256 } => vec![
                "equal to the disk at the instant of the order".into(),
                format!("SHA-256 {sha256}"),
                format!("(the guest was held for {} to know that instant to the byte,", time(*pause)),
                "and wrote on beside the copying)".into(),
            ],
            Proof::Between { answer, narrowed } => {
                let (held, missing) = narrowed.held;
                let span = narrowed.span.map_or_else(String::new, |span| format!(", known to {}", time(span)));
                vec![
                    format!("every block is whole and of one instant{span}"),
                    format!(
                        "(the guest was not held: {} blocks changed in the {} of the order;",
                        narrowed.open_blocks,
                        time(*answer)
                    ),
                    format!("of the requests around it {held} are found in it, and {missing} are not)"),
                ]
            }
            Proof::Stopped { sha256 } => vec![
                "equal to the disk's file, byte for byte".into(),
                format!("SHA-256 {sha256}"),
                "(the guest had stopped)".into(),
            ],
        }
    }

    fn json(&self) -> Value {
        match self {
            Proof::Held { pause, sha256 } => {
                json!({ "kind": "guest-held", "sha256": sha256, "held-us": micros(*pause) })
            }
            Proof::Between { answer, narrowed } => json!({
                "kind": "between-bounds",
                "open-blocks": narrowed.open_blocks,
                "answer-us": micros(*answer),
                "requests-in": narrowed.held.0,
                "requests-out": narrowed.held.1,
                "span-us": narrowed.span.map(micros),
            }),
            Proof::Stopped { sha256 } => json!({ "kind": "guest-stopped", "sha256": sha256 }),
        }
    }
}

/// One backup.
#[derive(Clone, Debug)]
pub struct Backup {
    /// Its job and the stem of its files.
    pub name: String,
    /// What the bitmap called dirty just before; of a full backup there is none.
    pub dirty: Option<u64>,
    /// Bytes of the image file.
    pub image: u64,
    /// From the order to the end of the job.
    pub took: Duration,
    /// What the guest saw meanwhile, if it was still writing.
    pub guest: Option<Meter>,
    /// How long the restore took.
    pub restored: Duration,
    /// The proof.
    pub proof: Proof,
}

/// All of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that held data at first.
    pub filled: u64,
    /// What the guest saw while no backup was under way.
    pub alone: Meter,
    /// In order.
    pub backups: Vec<Backup>,
    /// From start to end.
    pub took: Duration,
    /// Where the files are, if they were kept.
    pub kept: Option<String>,
}

impl Report {
    /// For people.
    pub fn tables(&self) -> String {
        let row = |backup: &Backup| {
            [
                backup.name.clone(),
                backup.dirty.map_or_else(|| "-".into(), human),
                human(backup.image),
                time(backup.took),
                time(backup.restored),
                backup.proof.short(),
            ]
        };
        let header = ["BACKUP", "DIRTY", "IMAGE", "TIME", "RESTORE", "PROVED BY"];
        let backups = table(header, self.backups.iter().map(row));

        let beside = |backup: &Backup| Some((format!("during {}", backup.name), backup.guest.clone()?));
        let alone = ("no backup".to_owned(), self.alone.clone());
        let rows = std::iter::once(alone).chain(self.backups.iter().filter_map(beside)).map(|(name, meter)| {
            let percentile = |percent| time(meter.latency.percentile(percent));
            [
                name,
                format!("{:.0}", meter.requests_per_second()),
                rate(meter.bytes, meter.elapsed),
                percentile(50.0),
                percentile(99.0),
                time(meter.latency.max()),
            ]
        });
        let header = ["GUEST'S WRITES", "IOPS", "DATA", "P50", "P99", "MAX"];
        format!("{backups}\n\n{}", table(header, rows))
    }

    /// The last word.
    pub fn verdict(&self) -> String {
        format!("all {} restored images are equal to the disk as of their instant", self.backups.len())
    }

    /// For machines.
    pub fn json(&self) -> Value {
        let backup = |backup: &Backup| {
            json!({
                "name": backup.name,
                "dirty-bytes": backup.dirty,
                "image-bytes": backup.image,
                "seconds": backup.took.as_secs_f64(),
                "guest": backup.guest.as_ref().map(meter),
                "restore-seconds": backup.restored.as_secs_f64(),
                "proof": backup.proof.json(),
            })
        };
        json!({
            "passed": true,
            "disk-bytes": self.size,
            "filled-bytes": self.filled,
            "no-backup": { "guest": meter(&self.alone) },
            "backups": self.backups.iter().map(backup).collect::<Vec<_>>(),
            "seconds": self.took.as_secs_f64(),
            "directory": self.kept,
        })
    }
}

impl Meter {
    /// Of all kinds.
    pub fn requests_per_second(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(1e-6)
    }

    /// In a sentence.
    pub fn sentence(&self) -> String {
        format!(
            "{:.0} IOPS, {}, write latency p50 {}, p99 {}, max {}",
            self.requests_per_second(),
            rate(self.bytes, self.elapsed),
            time(self.latency.percentile(50.0)),
            time(self.latency.percentile(99.0)),
            time(self.latency.max())
        )
    }
}

fn meter(meter: &Meter) -> Value {
    json!({
        "seconds": meter.elapsed.as_secs_f64(),
        "requests": meter.requests,
        "discards-and-zeroes": meter.zeroings,
        "iops": meter.requests_per_second(),
        "written-bytes": meter.bytes,
        "write-latency-us": {
            "p50": micros(meter.latency.percentile(50.0)),
            "p99": micros(meter.latency.percentile(99.0)),
            "max": micros(meter.latency.max()),
        },
    })
}

fn micros(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1000.0
}

/// A time to three digits.
pub fn time(time: Duration) -> String {
    let (value, unit) = match time.as_nanos() as f64 {
        ns if ns < 999.5e3 => (ns / 1e3, "us"),
        ns if ns < 999.5e6 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_shown_to_three_digits() {
        let shown = [
            (0, "0.00 us"),
            (1_234, "1.23 us"),
            (99_940, "99.9 us"),
            (999_499, "999 us"),
            (999_500, "1.00 ms"),
            (45_600_000, "45.6 ms"),
            (1_999_000_000, "2.00 s"),
            (123_000_000_000, "123 s"),
        ];
        for (ns, text) in shown {
            assert_eq!(time(Duration::from_nanos(ns)), text);
        }
    }

    #[test]
    fn tables_fit_the_terminal() {
        let meter = Meter { requests: 123_456, bytes: 1 << 33, elapsed: Duration::from_secs(1), ..Meter::default() };
        let narrowed = Narrowed { open_blocks: 1234, held: (123_456, 123_456), span: Some(Duration::from_micros(123)) };
        let sha256 = "f".repeat(64);
        let backup = |name: &str, proof| Backup {
            name: name.into(),
            dirty: Some(1000 << 20 | 1),
            image: 1000 << 20 | 1,
            took: Duration::from_millis(1999),
            guest: Some(meter.clone()),
            restored: Duration::from_millis(999),
            proof,
        };
        let report = Report {
            size: 1 << 30,
            filled: 1 << 28,
            alone: meter.clone(),
            backups: vec![
                backup("full", Proof::Held { pause: Duration::from_millis(999), sha256: sha256.clone() }),
                backup("inc2", Proof::Between { answer: Duration::from_millis(999), narrowed }),
                backup("last", Proof::Stopped { sha256 }),
            ],
            took: Duration::from_secs(20),
            kept: None,
        };
        let (tables, proofs) = (report.tables(), report.backups.iter().flat_map(|backup| backup.proof.lines()));
        for line in tables.lines().map(str::to_owned).chain(proofs) {
            assert!(line.chars().count() <= 78, "{line}");
        }
        assert_eq!(report.verdict(), "all 3 restored images are equal to the disk as of their instant");
        assert_eq!(report.json()["backups"][1]["proof"]["requests-out"], 123_456);
    }
}
