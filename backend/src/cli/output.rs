//! Where clients print: tables for people, JSON for machines, and never a panic because nobody reads any more.
//!
//! With `--json` every command prints exactly one JSON value on one line (a stream of `qmp` prints one a message),
//! errors included, as `{"error": {...}}`.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Value, json};

use super::failure::Failure;

/// Standard output and error, in the form that was asked for.
pub struct Output {
    json: bool,
}

impl Output {
    /// For people, or with `json` for machines.
    pub fn new(json: bool) -> Output {
        Output { json }
    }

    /// Whether a progress bar would be seen by somebody.
    pub fn shows_progress(&self) -> bool {
        !self.json && io::stderr().is_terminal()
    }

    /// Prints a value for machines, or what `text` makes of it for people.
    pub fn result(&self, value: &Value, text: impl FnOnce() -> String) {
        if self.json { self.line(value) } else { self.line(text()) }
    }

    /// Prints a value for machines; says nothing to people, who hear of a success by silence.
    pub fn done(&self, value: &Value) {
        if self.json {
            self.line(value);
        }
    }

    /// Prints one line. A reader that went away (`blkmark query disks | head -1`) is no error.
    pub fn line(&self, line: impl Display) {
        let mut out = io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }

    /// Tells a failure: a line on standard error, and an object on standard output for machines.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            self.line(json!({ "error": failure.as_qmp().to_wire() }));
        }
        let _ = writeln!(io::stderr(), "blkmark: {}", printable(&failure.to_string()));
    }
}

/// A table for people: bare columns when it goes into a pipe, ruled ones on a terminal.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    let style = if io::stdout().is_terminal() { presets::UTF8_FULL_CONDENSED } else { presets::NOTHING };
    table.load_style(style).set_content_arrangement(ContentArrangement::Disabled).set_header(header);
    for row in rows {
        table.add_row(row.map(|cell| printable(&cell)));
    }
    table.trim_fmt()
}

/// A text that cannot steer the terminal, whatever a name or a path contains.
pub(super) fn printable(text: &str) -> String {
    let mut printable = String::with_capacity(text.len());
    for character in text.chars() {
        if character.is_control() {
            printable.extend(character.escape_default());
        } else {
            printable.push(character);
        }
    }
    printable
}

/// A member for a table's cell; nothing if it is missing.
pub(super) fn text(value: &Value, member: &str) -> String {
    match value.get(member) {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(true)) => "yes".into(),
        Some(Value::Bool(false)) => "no".into(),
        Some(other) => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_steer_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\r\né"), "a\\u{1b}[2Jb\\r\\né");
    }
}
