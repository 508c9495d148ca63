//! Cuts a stream of bytes into JSON tokens, whatever pieces the bytes arrive in.
//!
//! Called by [`super::parser`] alone. Behaves as QEMU's lexer was seen to: strings in double or single quotes, and
//! after an error it skips to the next byte from which a fresh start is promising (punctuation, a control character
//! except the tab, 0xFE or 0xFF). A client that is not sure of the state sends 0xFF, which is an error anywhere and
//! so always ends in a clean state. Total: any bytes in, tokens out, with no memory of its own.

/// What a token is. Its text is the parser's to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `{`
    BraceOpen,
    /// `}`
    BraceClose,
    /// `[`
    BracketOpen,
    /// `]`
    BracketClose,
    /// `:`
    Colon,
    /// `,`
    Comma,
    /// A string with its quotes.
    String,
    /// A number without fraction and exponent.
    Integer,
    /// A number with a fraction or an exponent.
    Float,
    /// A run of lower-case letters.
    Keyword,
    /// Bytes that are no token: the last of them is the one that does not fit.
    Error,
}

/// What the lexer makes of a byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The byte belongs to no token.
    Skip,
    /// The byte belongs to the token that is being read.
    Take,
    /// The byte is the last of a token.
    End(Kind),
    /// A token ended before this byte, which has to be fed once more.
    EndBefore(Kind),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Start,
    String {
        quote: u8,
        escaped: bool,
    },
    Minus,
    Zero,
    Digits,
    Point,
    Fraction,
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
    Recovery,
}

/// A lexer between two bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lexer {
    state: State,
}

impl Lexer {
    /// Drops the token that is being read and skips to the next promising byte, as after an error.
    pub fn recover(&mut self) {
        self.state = State::Recovery;
    }

    /// Feeds one byte.
    pub fn feed(&mut self, byte: u8) -> Step {
        match self.state {
            State::Start => self.start(byte),
            State::String { quote, escaped } => self.string(byte, quote, escaped),
            State::Recovery => {
                if is_fresh_start(byte) {
                    self.start(byte)
                } else {
                    Step::Skip
                }
            }
            State::Keyword => match byte {
                b'a'..=b'z' => Step::Take,
                _ => self.before(Kind::Keyword),
            },
            State::Minus => match byte {
                b'0' => self.take(State::Zero),
                b'1'..=b'9' => self.take(State::Digits),
                _ => self.error(),
            },
            State::Zero => match byte {
                b'0'..=b'9' => self.error(),
                b'.' => self.take(State::Point),
                b'e' | b'E' => self.take(State::Exponent),
                _ => self.before(Kind::Integer),
            },
            State::Digits => match byte {
                b'0'..=b'9' => Step::Take,
                b'.' => self.take(State::Point),
                b'e' | b'E' => self.take(State::Exponent),
                _ => self.before(Kind::Integer),
            },
            State::Point => match byte {
                b'0'..=b'9' => self.take(State::Fraction),
                _ => self.error(),
            },
            State::Fraction => match byte {
                b'0'..=b'9' => Step::Take,
                b'e' | b'E' => self.take(State::Exponent),
                _ => self.before(Kind::Float),
            },
            State::Exponent => match byte {
                b'0'..=b'9' => self.take(State::ExponentDigits),
                b'+' | b'-' => self.take(State::ExponentSign),
                _ => self.error(),
            },
            State::ExponentSign => match byte {
                b'0'..=b'9' => self.take(State::ExponentDigits),
                _ => self.error(),
            },
            State::ExponentDigits => match byte {
                b'0'..=b'9' => Step::Take,
                _ => self.before(Kind::Float),
            },
        }
    }

    fn start(&mut self, byte: u8) -> Step {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => self.skip(),
            b'{' => self.end(Kind::BraceOpen),
            b'}' => self.end(Kind::BraceClose),
            b'[' => self.end(Kind::BracketOpen),
            b']' => self.end(Kind::BracketClose),
            b':' => self.end(Kind::Colon),
            b',' => self.end(Kind::Comma),
            b'"' | b'\'' => self.take(State::String { quote: byte, escaped: false }),
            b'-' => self.take(State::Minus),
            b'0' => self.take(State::Zero),
            b'1'..=b'9' => self.take(State::Digits),
            b'a'..=b'z' => self.take(State::Keyword),
            _ => self.error(),
        }
    }

    fn string(&mut self, byte: u8, quote: u8, escaped: bool) -> Step {
        match byte {
            0..=0x1f | 0xfe | 0xff => self.error(),
            _ if escaped => self.take(State::String { quote, escaped: false }),
            b'\\' => self.take(State::String { quote, escaped: true }),
            _ if byte == quote => self.end(Kind::String),
            _ => Step::Take,
        }
    }

    fn skip(&mut self) -> Step {
        self.state = State::Start;
        Step::Skip
    }

    fn take(&mut self, state: State) -> Step {
        self.state = state;
        Step::Take
    }

    fn end(&mut self, kind: Kind) -> Step {
        self.state = State::Start;
        Step::End(kind)
    }

    fn before(&mut self, kind: Kind) -> Step {
        self.state = State::Start;
        Step::EndBefore(kind)
    }

    fn error(&mut self) -> Step {
        self.state = State::Recovery;
        Step::End(Kind::Error)
    }
}

fn is_fresh_start(byte: u8) -> bool {
    match byte {
        b'\t' => false,
        0..=0x1f | b'{' | b'}' | b'[' | b']' | b':' | b',' | 0xfe | 0xff => true,
        _ => false,
    }
}
