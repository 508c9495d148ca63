//! The server's side of the handshake: from a fresh connection to an export that a client has chosen.
//!
//! Called by `server`, on the thread of the connection, within a time limit for all of it. Fixed newstyle, every option of
//! the protocol document. Invariants: no length is believed before it was compared with a bound; with TLS
//! demanded, nothing about exports is told in clear, and nothing agreed before it counts after it.

use super::address::Timed;
use super::export::Export;
use super::protocol::{
    INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX, STRING_MAX, export_flag, handshake_flag, info, option,
    reply,
};
use super::tls::TlsCredentials;
use rustls::ServerConnection;
use std::io::{self, Read, Write};
use std::sync::Arc;

/// Longest data of an option that is read; more than any sensible one has.
const DATA_MAX: u32 = 64 << 10;

/// Longest data of an option that is passed over, to say that it is too long.
const SKIP_MAX: u32 = 16 << 20;

/// One export, as clients see it.
#[derive(Clone)]
pub(super) struct Entry {
    pub export: Arc<dyn Export>,
    pub description: String,
}

/// Which exports there are at the moment.
pub(super) trait Catalogue {
    /// Names and descriptions.
    fn list(&self) -> Vec<(String, String)>;
    /// What a client asks about.
    fn look(&self, name: &str) -> Option<Entry>;
    /// What this client takes, and uses from now on.
    fn enter(&self, name: &str) -> Option<Entry>;
}

/// The form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Headers {
    /// Replies are simple.
    Simple,
    /// Replies come in chunks.
    Structured,
    /// Both have 64-bit lengths, and replies come in chunks.
    Extended,
}

/// What was agreed.
pub(super) struct Agreed {
    pub export: Arc<dyn Export>,
    pub headers: Headers,
    /// Numbers of the metadata contexts that the client wants, which are also their ids on the wire.
    pub contexts: Vec<usize>,
    pub tls: Option<Box<ServerConnection>>,
}

enum Wire<'a> {
    Clear(Timed<'a>),
    Tls(Timed<'a>, Box<ServerConnection>),
}

impl Read for Wire<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Wire::Clear(stream) => stream.read(buf),
            Wire::Tls(stream, session) => rustls::Stream::new(&mut **session, stream).read(buf),
        }
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Wire::Clear(stream) => stream.write(buf),
            Wire::Tls(stream, session) => rustls::Stream::new(&mut **session, stream).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Wire::Clear(stream) => stream.flush(),
            Wire::Tls(stream, session) => rustls::Stream::new(&mut **session, stream).flush(),
        }
    }
}

struct Negotiation<'a> {
    wire: Wire<'a>,
    catalogue: &'a dyn Catalogue,
    credentials: Option<&'a TlsCredentials>,
    padded: bool,
    headers: Headers,
    /// What contexts were chosen of.
    chosen: Option<(Arc<dyn Export>, Vec<usize>)>,
}

/// How an option ends.
enum End {
    /// The next one may come.
    Next,
    /// There will be none: the client has chosen.
    Chosen(Arc<dyn Export>),
    /// There will be none.
    Leave,
}

/// Negotiates. `None`: the client went without choosing. An error ends the connection.
pub(super) fn negotiate(
    stream: Timed<'_>,
    catalogue: &dyn Catalogue,
    credentials: Option<&TlsCredentials>,
) -> io::Result<Option<Agreed>> {
    let mut wire = Wire::Clear(stream);
    let offered = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
    wire.write_all(&[&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &offered.to_be_bytes()].concat())?;
    let mut flags = [0; 4];
    wire.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(offered) != 0 {
        return Err(nonsense("unknown flags"));
    }
    let padded = flags & u32::from(handshake_flag::NO_ZEROES) == 0;
    let headers = Headers::Simple;
    let mut negotiation = Negotiation { wire, catalogue, credentials, padded, headers, chosen: None };
    loop {
        let export = match negotiation.option()? {
            End::Next => continue,
            End::Chosen(export) => export,
            End::Leave => return Ok(None),
        };
        let contexts = match negotiation.chosen {
            Some((of, contexts)) if Arc::ptr_eq(&of, &export) => contexts,
            _ => Vec::new(),
        };
        let tls = match negotiation.wire {
            Wire::Clear(_) => None,
            Wire::Tls(_, session) => Some(session),
        };
        return Ok(Some(Agreed { export, headers: negotiation.headers, contexts, tls }));
    }
}

fn nonsense(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Reads the data of an option; `None` where it does not go up.
struct Data<'a>(&'a [u8]);

impl<'a> Data<'a> {
    fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(*self.bytes(2)?.first_chunk()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(*self.bytes(4)?.first_chunk()?))
    }

    /// A string that is preceded by its length.
    fn string(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        if len > STRING_MAX {
            return None;
        }
        std::str::from_utf8(self.bytes(len)?).ok()
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

impl Negotiation<'_> {
    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut message = Vec::with_capacity(20 + data.len());
        message.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&(data.len() as u32).to_be_bytes());
        message.extend_from_slice(data);
        self.wire.write_all(&message)?;
        self.wire.flush()
    }

    fn refuse(&mut self, option: u32, kind: u32, text: &str) -> io::Result<End> {
        self.reply(option, kind, text.as_bytes())?;
        Ok(End::Next)
    }

    fn acknowledge(&mut self, option: u32) -> io::Result<End> {
        self.reply(option, reply::ACK, &[])?;
        Ok(End::Next)
    }

    /// Hears one option and replies to it.
    fn option(&mut self) -> io::Result<End> {
        let mut head = [0; 16];
        self.wire.read_exact(&mut head)?;
        let mut fields = Data(&head);
        let magic = fields.bytes(8).unwrap_or_default();
        let (option, length) = (fields.u32().unwrap_or_default(), fields.u32().unwrap_or_default());
        if magic != OPTION_MAGIC.to_be_bytes() {
            return Err(nonsense("an option with the wrong magic"));
        }
        if length > DATA_MAX {
            if length > SKIP_MAX || option == option::EXPORT_NAME {
                return Err(nonsense("an option that is too long"));
            }
            io::copy(&mut (&mut self.wire).take(length.into()), &mut io::sink())?;
            return self.refuse(option, reply::ERR_TOO_BIG, "the option is too long");
        }
        let mut data = vec![0; length as usize];
        self.wire.read_exact(&mut data)?;
        let secure = self.credentials.is_none() || matches!(self.wire, Wire::Tls(..));
        match option {
            option::ABORT => {
                // Who says goodbye may not wait for the answer.
                let _ = self.reply(option, reply::ACK, &[]);
                Ok(End::Leave)
            }
            option::STARTTLS => self.start_tls(&data),
            option::EXPORT_NAME if !secure => Err(nonsense("an export without TLS")),
            _ if !secure => self.refuse(option, reply::ERR_TLS_REQD, "TLS is required"),
            option::EXPORT_NAME => self.export_name(&data),
            option::LIST => self.list(&data),
            option::INFO | option::GO => self.info(option, &data),
            option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if !data.is_empty() => {
                self.refuse(option, reply::ERR_INVALID, "the option takes no data")
            }
            option::STRUCTURED_REPLY if self.headers == Headers::Extended => {
                self.refuse(option, reply::ERR_EXT_HEADER_REQD, "extended headers are in force")
            }
            option::STRUCTURED_REPLY => {
                self.headers = Headers::Structured;
                self.acknowledge(option)
            }
            option::EXTENDED_HEADERS => {
                self.headers = Headers::Extended;
                self.acknowledge(option)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(option, &data),
            _ => self.refuse(option, reply::ERR_UNSUP, "unknown option"),
        }
    }

    fn start_tls(&mut self, data: &[u8]) -> io::Result<End> {
        let option = option::STARTTLS;
        if !data.is_empty() {
            return self.refuse(option, reply::ERR_INVALID, "the option takes no data");
        }
        let Some(credentials) = self.credentials else {
            return self.refuse(option, reply::ERR_POLICY, "TLS is not configured");
        };
        if matches!(self.wire, Wire::Tls(..)) {
            return self.refuse(option, reply::ERR_INVALID, "TLS is in force already");
        }
        self.acknowledge(option)?;
        let Wire::Clear(stream) = &mut self.wire else { return Err(nonsense("TLS twice")) };
        let mut session = Box::new(credentials.session()?);
        while session.is_handshaking() {
            session.complete_io(stream)?;
        }
        self.wire = Wire::Tls(*stream, session);
        (self.headers, self.chosen) = (Headers::Simple, None);
        Ok(End::Next)
    }

    fn list(&mut self, data: &[u8]) -> io::Result<End> {
        if !data.is_empty() {
            return self.refuse(option::LIST, reply::ERR_INVALID, "the option takes no data");
        }
        for (name, description) in self.catalogue.list() {
            let entry = [&(name.len() as u32).to_be_bytes(), name.as_bytes(), description.as_bytes()].concat();
            self.reply(option::LIST, reply::SERVER, &entry)?;
        }
        self.acknowledge(option::LIST)
    }

    fn flags(&self, export: &dyn Export) -> u16 {
        let mut flags = export_flag::HAS_FLAGS | export_flag::SEND_FLUSH | export_flag::SEND_FUA;
        flags |= export_flag::SEND_CACHE;
        flags |= match export.read_only() {
            // Nobody writes, so all connections see the same.
            true => export_flag::READ_ONLY | export_flag::CAN_MULTI_CONN,
            false => export_flag::SEND_TRIM | export_flag::SEND_WRITE_ZEROES,
        };
        if self.headers != Headers::Simple {
            flags |= export_flag::SEND_DF;
        }
        flags
    }

    fn export_name(&mut self, data: &[u8]) -> io::Result<End> {
        if self.headers == Headers::Extended {
            return Err(nonsense("an option that does not go with extended headers"));
        }
        let name = std::str::from_utf8(data).map_err(|_| nonsense("a name that is no text"))?;
        let entry = self.catalogue.enter(name).ok_or_else(|| nonsense("no such export"))?;
        let flags = self.flags(&*entry.export);
        let mut answer = [&entry.export.size().to_be_bytes()[..], &flags.to_be_bytes()].concat();
        if self.padded {
            answer.resize(answer.len() + 124, 0);
        }
        self.wire.write_all(&answer)?;
        self.wire.flush()?;
        Ok(End::Chosen(entry.export))
    }

    fn info(&mut self, option: u32, data: &[u8]) -> io::Result<End> {
        let mut fields = Data(data);
        let parsed = fields.string().and_then(|name| {
            let wanted: Option<Vec<u16>> = (0..fields.u16()?).map(|_| fields.u16()).collect();
            fields.end()?;
            Some((name, wanted?))
        });
        let Some((name, wanted)) = parsed else {
            return self.refuse(option, reply::ERR_INVALID, "the option makes no sense");
        };
        let entry = if option == option::GO { self.catalogue.enter(name) } else { self.catalogue.look(name) };
        let Some(entry) = entry else {
            return self.refuse(option, reply::ERR_UNKNOWN, &format!("export '{name}' not present"));
        };
        let flags = self.flags(&*entry.export);
        let about = [&info::EXPORT.to_be_bytes()[..], &entry.export.size().to_be_bytes(), &flags.to_be_bytes()];
        self.reply(option, reply::INFO, &about.concat())?;
        if wanted.contains(&info::NAME) {
            self.reply(option, reply::INFO, &[&info::NAME.to_be_bytes(), name.as_bytes()].concat())?;
        }
        if wanted.contains(&info::DESCRIPTION) && !entry.description.is_empty() {
            let text = [&info::DESCRIPTION.to_be_bytes(), entry.description.as_bytes()].concat();
            self.reply(option, reply::INFO, &text)?;
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            let sizes = [1, entry.export.preferred_block(), PAYLOAD_MAX].map(u32::to_be_bytes).concat();
            self.reply(option, reply::INFO, &[&info::BLOCK_SIZE.to_be_bytes(), &sizes[..]].concat())?;
        }
        self.acknowledge(option)?;
        Ok(if option == option::GO { End::Chosen(entry.export) } else { End::Next })
    }

    fn contexts(&mut self, option: u32, data: &[u8]) -> io::Result<End> {
        let setting = option == option::SET_META_CONTEXT;
        if setting {
            self.chosen = None;
        }
        if self.headers == Headers::Simple {
            return self.refuse(option, reply::ERR_INVALID, "structured replies come first");
        }
        let mut fields = Data(data);
        let parsed = fields.string().and_then(|name| {
            // Each takes four bytes at least, so their number is bounded by the data.
            let queries: Option<Vec<&str>> = (0..fields.u32()?).map(|_| fields.string()).collect();
            fields.end()?;
            Some((name, queries?))
        });
        let Some((name, queries)) = parsed else {
            return self.refuse(option, reply::ERR_INVALID, "the option makes no sense");
        };
        let Some(entry) = self.catalogue.look(name) else {
            return self.refuse(option, reply::ERR_UNKNOWN, &format!("export '{name}' not present"));
        };
        let mut chosen = Vec::new();
        for (number, context) in entry.export.contexts().iter().enumerate() {
            let wanted = match setting {
                true => queries.contains(&context.as_str()),
                false => queries.is_empty() || queries.iter().any(|query| matches(query, context)),
            };
            if wanted {
                let id = if setting { number as u32 } else { 0 };
                self.reply(option, reply::META_CONTEXT, &[&id.to_be_bytes(), context.as_bytes()].concat())?;
                chosen.push(number);
            }
        }
        if setting {
            self.chosen = Some((entry.export, chosen));
        }
        self.acknowledge(option)
    }
}

/// Whether a context is asked for by name, or by the beginning of its name up to a colon.
fn matches(query: &str, context: &str) -> bool {
    query == context || (query.ends_with(':') && context.starts_with(query))
}
