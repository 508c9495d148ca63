//! How QMP objects are put on the wire: one line each, CRLF, in QEMU's spelling.
//!
//! QEMU writes `", "` and `": "` between members and escapes all that is not printable ASCII. People grep sockets
//! for `"return": {}`, so the same is done here. Called by `session` and [`super::event`].

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter};
use serde_json::{Map, Value, json};

use super::error::QmpError;

/// QEMU's spelling of JSON.
struct QemuSpelling;

impl Formatter for QemuSpelling {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut plain = 0;
        for (at, character) in fragment.char_indices() {
            if matches!(character, ' '..='~') {
                continue;
            }
            writer.write_all(&fragment.as_bytes()[plain..at])?;
            let mut units = [0; 2];
            for unit in character.encode_utf16(&mut units) {
                write!(writer, "\\u{unit:04X}")?;
            }
            plain = at + character.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[plain..])
    }

    fn write_char_escape<W: ?Sized + Write>(&mut self, writer: &mut W, escape: CharEscape) -> io::Result<()> {
        let spelling: &[u8] = match escape {
            CharEscape::Quote => b"\\\"",
            CharEscape::ReverseSolidus => b"\\\\",
            CharEscape::Solidus => b"/",
            CharEscape::Backspace => b"\\b",
            CharEscape::FormFeed => b"\\f",
            CharEscape::LineFeed => b"\\n",
            CharEscape::CarriageReturn => b"\\r",
            CharEscape::Tab => b"\\t",
            CharEscape::AsciiControl(byte) => return write!(writer, "\\u{byte:04X}"),
        };
        writer.write_all(spelling)
    }
}

/// One object as it goes on the wire, line end included.
pub fn line(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(128);
    // Writing to memory cannot fail and a `Value` has no keys that are not strings.
    let _ = value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, QemuSpelling));
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// A reply to the command that carried `id`. QEMU writes the id after a result and before an error.
pub fn reply(id: Option<Value>, result: Result<Value, QmpError>) -> Value {
    let mut object = Map::new();
    match result {
        Ok(value) => {
            object.insert("return".into(), value);
            object.extend(id.map(|id| ("id".to_owned(), id)));
        }
        Err(error) => {
            object.extend(id.map(|id| ("id".to_owned(), id)));
            object.insert("error".into(), error.to_wire());
        }
    }
    Value::Object(object)
}

/// An event, stamped with the wall clock.
pub fn event(name: &str, data: Value) -> Value {
    event_at(SystemTime::now(), name, data)
}

/// An event that happened at `time`.
pub fn event_at(time: SystemTime, name: &str, data: Value) -> Value {
    let time = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let mut object = Map::new();
    object.insert("timestamp".into(), json!({ "seconds": time.as_secs(), "microseconds": time.subsec_micros() }));
    object.insert("event".into(), name.into());
    // An event without data has no such member, as the specification of QMP says.
    if !data.is_null() {
        object.insert("data".into(), data);
    }
    Value::Object(object)
}

/// What is sent on connect. No capability is offered: commands return at once, so out-of-band ones have no use.
pub fn greeting() -> Value {
    json!({ "QMP": { "version": super::version(), "capabilities": [] } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_spelt_as_qemu_spells_them() {
        let value = json!({ "return": {}, "id": [1, "a\"\u{e9}\u{1f600}\u{7f}\u{b}\n/", null] });
        let expected = "{\"return\": {}, \"id\": [1, \"a\\\"\\u00E9\\uD83D\\uDE00\\u007F\\u000B\\n/\", null]}\r\n";
        assert_eq!(String::from_utf8(line(&value)).unwrap(), expected);
    }

    #[test]
    fn an_event_without_data_has_no_such_member() {
        assert!(event("SHUTDOWN", Value::Null).get("data").is_none());
        assert_eq!(event("X", json!({}))["data"], json!({}));
    }
}
