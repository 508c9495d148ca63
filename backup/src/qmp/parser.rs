//! Turns a stream of bytes into JSON values, or into the errors that QEMU would give for them.
//!
//! Called by the session of each client and by [`super::client`]. Values may follow each other with or without white
//! space and arrive in any pieces: the result depends on the bytes alone. After an error the stream goes on with the
//! next promising byte (see [`super::lexer`]). Bounded: a message is at most [`Limits::bytes`] long and
//! [`Limits::depth`] deep, and nothing is recursed into before that is known.

use serde_json::{Map, Number, Value};

use super::lexer::{Kind, Lexer, Step};

/// How much one message may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of its tokens.
    pub bytes: usize,
    /// Tokens.
    pub tokens: usize,
    /// Arrays and objects within each other.
    pub depth: usize,
}

impl Limits {
    /// For what clients send. QEMU takes 64 MiB and a depth of 1024, which 64 clients could turn into gigabytes here;
    /// the largest sensible command, a transaction over thousands of disks, stays far below.
    pub const COMMAND: Limits = Limits { bytes: 1 << 20, tokens: 1 << 18, depth: 128 };

    /// For what a server answers: listings of everything may be long.
    pub const REPLY: Limits = Limits { bytes: 64 << 20, tokens: 8 << 20, depth: 128 };
}

/// Why some bytes were no message. The text is the one a client is sent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// Bytes that are no token.
    #[error("JSON parse error, stray '{0}'")]
    Stray(String),
    /// Tokens that make no value.
    #[error("JSON parse error, {0}")]
    Syntax(String),
    /// More than the limit says.
    #[error("JSON {0} limit exceeded")]
    Limit(&'static str),
}

#[derive(Clone, Copy)]
struct Token {
    kind: Kind,
    start: u32,
    end: u32,
}

/// A parser between two bytes.
pub struct Parser {
    lexer: Lexer,
    limits: Limits,
    text: Vec<u8>,
    token_start: usize,
    tokens: Vec<Token>,
    braces: isize,
    brackets: isize,
}

/// Memory that a parser keeps from one message to the next.
const KEPT: usize = 64 << 10;

impl Parser {
    /// A parser at the beginning of a stream.
    pub fn new(limits: Limits) -> Parser {
        Parser {
            lexer: Lexer::default(),
            limits,
            text: Vec::new(),
            token_start: 0,
            tokens: Vec::new(),
            braces: 0,
            brackets: 0,
        }
    }

    /// Feeds bytes up to the end of the next message or error. Returns how many bytes were used, and what they
    /// completed; `None` means that all of them were used and the message goes on.
    pub fn feed(&mut self, bytes: &[u8]) -> (usize, Option<Result<Value, ParseError>>) {
        let mut used = 0;
        while let Some(&byte) = bytes.get(used) {
            let step = self.lexer.feed(byte);
            let kind = match step {
                Step::Skip => {
                    used += 1;
                    continue;
                }
                Step::Take | Step::End(_) => {
                    used += 1;
                    if self.text.len() >= self.limits.bytes {
                        self.lexer.recover();
                        self.reset();
                        return (used, Some(Err(ParseError::Limit("token size"))));
                    }
                    self.text.push(byte);
                    match step {
                        Step::End(kind) => kind,
                        _ => continue,
                    }
                }
                Step::EndBefore(kind) => kind,
            };
            if let Some(message) = self.token(kind) {
                self.reset();
                return (used, Some(message));
            }
        }
        (used, None)
    }

    /// Whether the stream stands between two messages.
    pub fn is_idle(&self) -> bool {
        self.text.is_empty()
    }

    fn token(&mut self, kind: Kind) -> Option<Result<Value, ParseError>> {
        let start = std::mem::replace(&mut self.token_start, self.text.len());
        match kind {
            Kind::Error => return Some(Err(ParseError::Stray(printable(&self.text[start..])))),
            Kind::BraceOpen => self.braces += 1,
            Kind::BraceClose => self.braces -= 1,
            Kind::BracketOpen => self.brackets += 1,
            Kind::BracketClose => self.brackets -= 1,
            _ => {}
        }
        if self.tokens.len() >= self.limits.tokens {
            return Some(Err(ParseError::Limit("token count")));
        }
        if usize::try_from(self.braces + self.brackets).is_ok_and(|depth| depth > self.limits.depth) {
            return Some(Err(ParseError::Limit("nesting depth")));
        }
        // The limit on bytes keeps both within 32 bits.
        self.tokens.push(Token { kind, start: start as u32, end: self.text.len() as u32 });
        // Braces and brackets are counted each for themselves, not matched: `{]` is a complete, wrong message.
        let open = self.braces > 0 || self.brackets > 0;
        if open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        Some(Reader { text: &self.text, tokens: &self.tokens, at: 0 }.message())
    }

    fn reset(&mut self) {
        self.text.clear();
        self.text.shrink_to(KEPT);
        self.tokens.clear();
        self.tokens.shrink_to(KEPT / size_of::<Token>());
        self.token_start = 0;
        self.braces = 0;
        self.brackets = 0;
    }
}

/// Text of a token for an error message; QEMU prints it as a C string.
fn printable(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn syntax<T>(reason: impl Into<String>) -> Result<T, ParseError> {
    Err(ParseError::Syntax(reason.into()))
}

/// Reads one value from the tokens of a complete message. Its depth is bounded by the limit checked before.
struct Reader<'a> {
    text: &'a [u8],
    tokens: &'a [Token],
    at: usize,
}

impl Reader<'_> {
    fn message(mut self) -> Result<Value, ParseError> {
        self.value()
    }

    fn peek(&self) -> Option<Kind> {
        self.tokens.get(self.at).map(|token| token.kind)
    }

    fn next(&mut self) -> Result<Token, ParseError> {
        let Some(&token) = self.tokens.get(self.at) else { return syntax("premature EOI") };
        self.at += 1;
        Ok(token)
    }

    fn value(&mut self) -> Result<Value, ParseError> {
        let token = self.next()?;
        let text = &self.text[token.start as usize..token.end as usize];
        match token.kind {
            Kind::BraceOpen => self.object(),
            Kind::BracketOpen => self.array(),
            Kind::String => string(text).map(Value::String),
            Kind::Integer | Kind::Float => number(token.kind, text),
            Kind::Keyword => match text {
                b"true" => Ok(Value::Bool(true)),
                b"false" => Ok(Value::Bool(false)),
                b"null" => Ok(Value::Null),
                _ => syntax(format!("invalid keyword '{}'", printable(text))),
            },
            _ => syntax("expecting value"),
        }
    }

    fn object(&mut self) -> Result<Value, ParseError> {
        let mut object = Map::new();
        if self.peek() == Some(Kind::BraceClose) {
            self.at += 1;
            return Ok(Value::Object(object));
        }
        loop {
            let Value::String(key) = self.value()? else { return syntax("key is not a string in object") };
            if self.next()?.kind != Kind::Colon {
                return syntax("missing : in object pair");
            }
            let value = self.value()?;
            if object.insert(key, value).is_some() {
                return syntax("duplicate key");
            }
            match self.next()?.kind {
                Kind::BraceClose => return Ok(Value::Object(object)),
                Kind::Comma => {}
                _ => return syntax("expected separator in dict"),
            }
        }
    }

    fn array(&mut self) -> Result<Value, ParseError> {
        let mut array = Vec::new();
        if self.peek() == Some(Kind::BracketClose) {
            self.at += 1;
            return Ok(Value::Array(array));
        }
        loop {
            array.push(self.value()?);
            match self.next()?.kind {
                Kind::BracketClose => return Ok(Value::Array(array)),
                Kind::Comma => {}
                _ => return syntax("expected separator in list"),
            }
        }
    }
}

fn number(kind: Kind, text: &[u8]) -> Result<Value, ParseError> {
    let text = String::from_utf8_lossy(text);
    if kind == Kind::Integer {
        if let Ok(number) = text.parse::<i64>() {
            return Ok(number.into());
        }
        if let Ok(number) = text.parse::<u64>() {
            return Ok(number.into());
        }
    }
    // QEMU takes 1e400 for infinity and echoes it as `inf`, which is no JSON: refused here.
    match text.parse::<f64>().ok().and_then(Number::from_f64) {
        Some(number) => Ok(Value::Number(number)),
        None => syntax(format!("number {text} is out of range")),
    }
}

fn string(quoted: &[u8]) -> Result<String, ParseError> {
    let inner = quoted.get(1..quoted.len().saturating_sub(1)).unwrap_or_default();
    let Ok(mut rest) = std::str::from_utf8(inner) else { return syntax("invalid UTF-8 sequence in string") };
    let mut plain = String::with_capacity(rest.len());
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        let mut escape = rest[at + 1..].chars();
        let character = match escape.next() {
            Some(literal @ ('"' | '\'' | '\\' | '/')) => literal,
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some('n') => '\n',
            Some('r') => '\r',
            Some('t') => '\t',
            Some('u') => {
                let (character, after) = unicode_escape(escape.as_str())?;
                plain.push(character);
                rest = after;
                continue;
            }
            _ => return syntax("invalid escape sequence in string"),
        };
        plain.push(character);
        rest = escape.as_str();
    }
    plain.push_str(rest);
    Ok(plain)
}

/// Reads what follows `\u`: four hexadecimal digits, or the eight of a surrogate pair.
fn unicode_escape(text: &str) -> Result<(char, &str), ParseError> {
    let invalid = || {
        let shown: String = text.chars().take(4).collect();
        ParseError::Syntax(format!("\\u{shown} is not a valid Unicode character"))
    };
    let (first, rest) = hex4(text).ok_or_else(invalid)?;
    if let Some(character) = char::from_u32(first) {
        return Ok((character, rest));
    }
    let (second, rest) = rest.strip_prefix("\\u").and_then(hex4).ok_or_else(invalid)?;
    let units = [first as u16, second as u16];
    match char::decode_utf16(units).next() {
        Some(Ok(character)) => Ok((character, rest)),
        _ => Err(invalid()),
    }
}

fn hex4(text: &str) -> Option<(u32, &str)> {
    let digits = text.get(..4).filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))?;
    Some((u32::from_str_radix(digits, 16).ok()?, &text[4..]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(parser: &mut Parser, mut bytes: &[u8]) -> Vec<Result<Value, ParseError>> {
        let mut messages = Vec::new();
        while !bytes.is_empty() {
            let (used, message) = parser.feed(bytes);
            messages.extend(message);
            bytes = &bytes[used..];
        }
        messages
    }

    fn parse(bytes: impl AsRef<[u8]>) -> Vec<Result<Value, ParseError>> {
        all(&mut Parser::new(Limits::COMMAND), bytes.as_ref())
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_filter("JSON has no infinities", |n| n.is_finite()).prop_map(Value::from),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 64, 8, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
                prop::collection::hash_map(any::<String>(), inner, 0..8)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_exactly(value in any_json()) {
            prop_assert_eq!(parse(format!("{value} ")), vec![Ok(value.clone())]);
            prop_assert_eq!(parse(super::super::wire::line(&value)), vec![Ok(value)]);
        }

        #[test]
        fn pieces_give_what_the_whole_gives(
            values in prop::collection::vec(any_json(), 0..4),
            noise in prop::collection::vec(prop::sample::select(&b"{}[]:,\"'\\u00e9tx1-.e \n\t\xff\x00\xc3"[..]), 0..64),
            cuts in prop::collection::vec(1usize..20, 1..20),
        ) {
            let mut bytes = noise;
            for value in &values {
                bytes.extend(value.to_string().bytes());
            }
            let whole = parse(&bytes);
            let mut parser = Parser::new(Limits::COMMAND);
            let mut pieces = Vec::new();
            let (mut rest, mut cut) = (&bytes[..], cuts.iter().cycle());
            while !rest.is_empty() {
                let (piece, after) = rest.split_at((*cut.next().unwrap()).min(rest.len()));
                pieces.extend(all(&mut parser, piece));
                rest = after;
            }
            prop_assert_eq!(pieces, whole);
        }

        #[test]
        fn whatever_came_before_0xff_a_command_after_it_is_understood(
            noise in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = noise;
            bytes.extend(b"\xff{'execute':'x'}");
            let messages = parse(&bytes);
            prop_assert_eq!(messages.last(), Some(&Ok(serde_json::json!({ "execute": "x" }))));
        }
    }

    #[test]
    fn a_message_within_the_limits_is_taken_and_one_beyond_is_refused_once() {
        let deep = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(parse(deep(128))[0].is_ok());
        assert_eq!(parse("[".repeat(129)), vec![Err(ParseError::Limit("nesting depth"))]);
        let long = |length: usize| format!("\"{}\"", "x".repeat(length - 2));
        assert!(parse(long(1 << 20))[0].is_ok());
        assert_eq!(parse(long((1 << 20) + 1) + "\n"), vec![Err(ParseError::Limit("token size"))]);
        let many = parse(format!("[{}0]\n", "0,".repeat(1 << 17)));
        assert_eq!(many[0], Err(ParseError::Limit("token count")));
        let endless = parse(vec![b'a'; 10 << 20]);
        assert_eq!(endless, vec![Err(ParseError::Limit("token size"))]);
    }

    #[test]
    fn numbers_keep_their_64_bits() {
        let numbers = parse("[-9223372036854775808, 18446744073709551615, -0, 1e2]");
        assert_eq!(numbers, vec![Ok(serde_json::json!([i64::MIN, u64::MAX, 0, 100.0]))]);
        assert!(parse("1e400 ")[0].is_err());
    }
}
