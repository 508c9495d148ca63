//! QMP's parser: the first byte says in which pieces the rest arrives.
//!
//! Promises: what is parsed depends on the bytes alone, not on the pieces; a value that was taken is read back from what
//! blkmark itself would write for it; after 0xff a command is understood, whatever came before.

use crate::qmp::parser::{Limits, ParseError, Parser};
use crate::qmp::wire;
use serde_json::Value;

/// Small, so that the fuzzer gets to them.
const LIMITS: Limits = Limits { bytes: 4096, tokens: 512, depth: 16 };

fn feed(parser: &mut Parser, mut bytes: &[u8]) -> Vec<Result<Value, ParseError>> {
    let mut messages = Vec::new();
    while !bytes.is_empty() {
        let (used, message) = parser.feed(bytes);
        assert!(used <= bytes.len() && (used > 0 || message.is_some()), "a step that goes nowhere");
        messages.extend(message);
        bytes = &bytes[used..];
    }
    messages
}

/// See the head of this file.
pub fn qmp(data: &[u8]) {
    let Some((first, stream)) = data.split_first() else { return };
    let whole = feed(&mut Parser::new(LIMITS), stream);

    let mut parser = Parser::new(LIMITS);
    let mut pieces = Vec::new();
    for piece in stream.chunks(usize::from(*first) + 1) {
        pieces.extend(feed(&mut parser, piece));
    }
    assert_eq!(pieces, whole);

    for value in whole.iter().flatten() {
        let again = feed(&mut Parser::new(Limits::COMMAND), &wire::line(value));
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].as_ref(), Ok(value));
    }

    let messages = feed(&mut parser, b"\xff{'execute':'x'}");
    assert_eq!(messages.last(), Some(&Ok(serde_json::json!({ "execute": "x" }))));
}
