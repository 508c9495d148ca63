//! What can be wrong with a configuration, and how the operator is told.

use std::path::PathBuf;

use thiserror::Error;

/// A mistake in the configuration. Its text is one line, for standard error.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error("unknown key '{key}'{}; known keys: {}", hint(.nearest), .known.join(", "))]
    UnknownKey { key: String, nearest: Option<&'static str>, known: &'static [&'static str] },
    #[error("missing key '{key}'; known keys: {}", .known.join(", "))]
    MissingKey { key: &'static str, known: &'static [&'static str] },
    #[error("key '{0}' is given twice")]
    DuplicateKey(String),
    #[error("'{0}' is not of the form key=value")]
    NotAPair(String),
    #[error("invalid value '{value}' for '{key}': expected {expected}")]
    BadValue { key: String, value: String, expected: &'static str },
    #[error("'path' and 'null' exclude each other; 'null' is for benchmarks: a disk that keeps nothing")]
    OneMedium,
    #[error("disk id '{0}' is given twice")]
    DuplicateId(String),
    #[error("socket {} is given twice", .0.display())]
    DuplicateSocket(PathBuf),
    #[error("no disk to serve: give at least one --disk, or [[disk]] in the file")]
    NoDisk,
    #[error("--socket-path and --fd exclude each other, and one of them is needed")]
    OneSocket,
    #[error("not a valid TOML file: {0}")]
    Toml(String),
    #[error("disk {number} ({id}): {source}")]
    Disk {
        /// Counted from 1.
        number: usize,
        id: String,
        source: Box<ConfigError>,
    },
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |n| format!(" (did you mean '{n}'?)"))
}

/// An unknown key, with the known one it looks like, if any does.
pub(super) fn unknown(key: &str, known: &'static [&'static str]) -> ConfigError {
    let nearest =
        known.iter().map(|k| (distance(key, k), *k)).min().filter(|(d, k)| *d <= (k.len() / 3).max(1)).map(|(_, k)| k);
    ConfigError::UnknownKey { key: key.to_owned(), nearest, known }
}

/// How many characters have to be added, dropped or changed to make one word the other, case and
/// the kind of dash aside.
fn distance(a: &str, b: &str) -> usize {
    let fold = |s: &str| -> Vec<char> {
        // No known key is longer; a huge word is not a slip of the finger.
        let chars = s.chars().take(64);
        chars.map(|c| if c == '_' { '-' } else { c.to_ascii_lowercase() }).collect()
    };
    let (a, b) = (fold(a), fold(b));
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}
