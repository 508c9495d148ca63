//! The client's side of the handshake: from a fresh connection to an export that can be used.
//!
//! Called by `client`. Fixed newstyle with `GO`; servers that know only `EXPORT_NAME` are taken too. Invariant: what the
//! server says of the export was checked for sense before anybody relies on it.

use super::client::{ClientError, ExportInfo};
use super::protocol::{
    INIT_MAGIC, MIN_BLOCK_MAX, OLDSTYLE_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, PAYLOAD_MAX, export_flag,
    handshake_flag, info, option, reply, shown,
};
use std::io::{self, Read, Write};

/// More than any reply to the options asked here has.
const REPLY_MAX: u32 = 16 << 10;

/// Padding after `EXPORT_NAME`.
const PADDING: usize = 124;

struct Handshake<S> {
    stream: S,
}

/// One reply to an option.
struct Reply {
    kind: u32,
    data: Vec<u8>,
}

fn broken(text: impl Into<String>) -> ClientError {
    ClientError::Protocol(text.into())
}

/// The metadata context that tells data from zeroes.
const ALLOCATION: &[u8] = b"base:allocation";

/// Takes the export `name` over a connection that was just made, with its `base:allocation` if that is wanted and there.
pub(super) fn negotiate(stream: impl Read + Write, name: &str, allocation: bool) -> Result<ExportInfo, ClientError> {
    let mut handshake = Handshake { stream };
    if handshake.u64()? != INIT_MAGIC {
        return Err(broken("the server does not speak NBD"));
    }
    match handshake.u64()? {
        OPTION_MAGIC => {}
        OLDSTYLE_MAGIC => return Err(broken("the server speaks only the oldest form of NBD")),
        _ => return Err(broken("the server does not speak NBD")),
    }
    let flags = handshake.u16()?;
    let taken = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    handshake.stream.write_all(&u32::from(taken).to_be_bytes())?;
    let padded = taken & handshake_flag::NO_ZEROES == 0;
    if taken & handshake_flag::FIXED_NEWSTYLE == 0 {
        return handshake.export_name(name, padded, false);
    }
    let taken = handshake.structured().and_then(|structured| {
        let context = if allocation && structured { handshake.allocation(name)? } else { None };
        Ok((structured, handshake.go(name, structured)?.map(|export| ExportInfo { allocation: context, ..export })))
    });
    match taken {
        Ok((_, Some(export))) => Ok(export),
        Ok((structured, None)) => handshake.export_name(name, padded, structured),
        Err(error @ (ClientError::NoExport(_) | ClientError::TlsRequired | ClientError::Refused(_))) => {
            // A server that made sense is told goodbye; its answer is of no interest.
            let _ = handshake.ask(option::ABORT, &[]);
            Err(error)
        }
        Err(error) => Err(error),
    }
}

impl<S: Read + Write> Handshake<S> {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        Ok(u16::from_be_bytes(self.bytes()?))
    }

    fn u32(&mut self) -> io::Result<u32> {
        Ok(u32::from_be_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> io::Result<u64> {
        Ok(u64::from_be_bytes(self.bytes()?))
    }

    fn ask(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut message = Vec::with_capacity(16 + data.len());
        message.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        message.extend_from_slice(&option.to_be_bytes());
        message.extend_from_slice(&(data.len() as u32).to_be_bytes());
        message.extend_from_slice(data);
        self.stream.write_all(&message)
    }

    fn reply(&mut self, option: u32) -> Result<Reply, ClientError> {
        if self.u64()? != OPTION_REPLY_MAGIC {
            return Err(broken("a reply to an option has the wrong magic"));
        }
        if self.u32()? != option {
            return Err(broken("the server replied to an option that was not asked"));
        }
        let (kind, length) = (self.u32()?, self.u32()?);
        if length > REPLY_MAX {
            return Err(broken(format!("a reply to an option is {length} bytes long")));
        }
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { kind, data })
    }

    /// Asks for structured replies: they tell more of errors.
    fn structured(&mut self) -> Result<bool, ClientError> {
        self.ask(option::STRUCTURED_REPLY, &[])?;
        let reply = self.reply(option::STRUCTURED_REPLY)?;
        match reply.kind {
            reply::ACK => Ok(true),
            reply::ERR_TLS_REQD | reply::ERR_SHUTDOWN => Err(refused(&reply)),
            kind if kind & reply::ERROR != 0 => Ok(false),
            kind => Err(broken(format!("reply {kind} to an option"))),
        }
    }

    /// Chooses `base:allocation`; `None` if the server does not have it for this export.
    fn allocation(&mut self, name: &str) -> Result<Option<u32>, ClientError> {
        let mut data = Vec::with_capacity(name.len() + ALLOCATION.len() + 12);
        data.extend_from_slice(&(name.len() as u32).to_be_bytes());
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&1_u32.to_be_bytes());
        data.extend_from_slice(&(ALLOCATION.len() as u32).to_be_bytes());
        data.extend_from_slice(ALLOCATION);
        self.ask(option::SET_META_CONTEXT, &data)?;
        let mut context = None;
        loop {
            let reply = self.reply(option::SET_META_CONTEXT)?;
            match reply.kind {
                reply::ACK => return Ok(context),
                reply::META_CONTEXT if reply.data.get(4..) == Some(ALLOCATION) && context.is_none() => {
                    context = Some(word(&reply.data, 0));
                }
                reply::META_CONTEXT => return Err(broken("a metadata context that was not asked for")),
                reply::ERR_TLS_REQD | reply::ERR_SHUTDOWN => return Err(refused(&reply)),
                // Whether there is such an export at all is seen next.
                kind if kind & reply::ERROR != 0 => return Ok(None),
                kind => return Err(broken(format!("reply {kind} to an option"))),
            }
        }
    }

    /// `None`: the server does not know the option.
    fn go(&mut self, name: &str, structured: bool) -> Result<Option<ExportInfo>, ClientError> {
        let mut data = Vec::with_capacity(name.len() + 8);
        data.extend_from_slice(&(name.len() as u32).to_be_bytes());
        data.extend_from_slice(name.as_bytes());
        data.extend_from_slice(&1_u16.to_be_bytes());
        data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
        self.ask(option::GO, &data)?;
        let (mut about, mut sizes) = (None, None);
        loop {
            let reply = self.reply(option::GO)?;
            match reply.kind {
                reply::ACK => break,
                reply::INFO => match (reply.data.first_chunk().map(|kind| u16::from_be_bytes(*kind)), reply.data.len())
                {
                    (Some(info::EXPORT), 12) => about = Some((long(&reply.data, 2), short(&reply.data, 10))),
                    (Some(info::BLOCK_SIZE), 14) => {
                        sizes = Some((word(&reply.data, 2), word(&reply.data, 6), word(&reply.data, 10)));
                    }
                    (Some(info::EXPORT | info::BLOCK_SIZE) | None, _) => {
                        return Err(broken("information on the export has the wrong length"));
                    }
                    (Some(_), _) => {}
                },
                reply::ERR_UNSUP => return Ok(None),
                kind if kind & reply::ERROR != 0 => return Err(refused(&reply)),
                kind => return Err(broken(format!("reply {kind} to an option"))),
            }
        }
        let (size, flags) = about.ok_or_else(|| broken("the server does not tell the export's size"))?;
        let (min_block, preferred_block, max_payload) = sizes.unwrap_or((1, 4096, PAYLOAD_MAX));
        let allocation = None;
        checked(ExportInfo { size, flags, min_block, preferred_block, max_payload, structured, allocation }).map(Some)
    }

    fn export_name(&mut self, name: &str, padded: bool, structured: bool) -> Result<ExportInfo, ClientError> {
        self.ask(option::EXPORT_NAME, name.as_bytes())?;
        // This option has no other way to fail than a closed connection.
        let size = match self.u64() {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Err(ClientError::NoExport("the server closed the connection".to_owned()));
            }
            size => size?,
        };
        let flags = self.u16()?;
        if padded {
            self.bytes::<PADDING>()?;
        }
        // Servers that say nothing on block sizes take everything, but some want whole sectors.
        checked(ExportInfo {
            size,
            flags,
            min_block: 512,
            preferred_block: 4096,
            max_payload: PAYLOAD_MAX,
            structured,
            allocation: None,
        })
    }
}

fn checked(export: ExportInfo) -> Result<ExportInfo, ClientError> {
    let ExportInfo { size, flags, min_block, preferred_block, max_payload, .. } = export;
    if flags & export_flag::HAS_FLAGS == 0 {
        return Err(broken("the export's flags make no sense"));
    }
    if !min_block.is_power_of_two() || min_block > MIN_BLOCK_MAX || !preferred_block.is_power_of_two() {
        return Err(broken(format!("block sizes {min_block} and {preferred_block} make no sense")));
    }
    if preferred_block < min_block || max_payload < min_block {
        return Err(broken(format!("block sizes {min_block} and {preferred_block} make no sense")));
    }
    if i64::try_from(size).is_err() || !size.is_multiple_of(u64::from(min_block)) {
        return Err(broken(format!("the export's size {size} makes no sense with blocks of {min_block}")));
    }
    // A longer payload is of no use, and a piece must be whole blocks.
    let max_payload = max_payload.min(PAYLOAD_MAX) / min_block * min_block;
    Ok(ExportInfo { max_payload, ..export })
}

fn refused(reply: &Reply) -> ClientError {
    let text = shown(&reply.data);
    match reply.kind {
        reply::ERR_UNKNOWN => ClientError::NoExport(text),
        reply::ERR_TLS_REQD => ClientError::TlsRequired,
        reply::ERR_POLICY => ClientError::Refused(format!("Denied by server{}", told(&text))),
        reply::ERR_SHUTDOWN => ClientError::Refused(format!("Server is shutting down{}", told(&text))),
        reply::ERR_BLOCK_SIZE_REQD => ClientError::Refused(format!("Server wants other block sizes{}", told(&text))),
        kind => ClientError::Refused(format!("Server refused the export with error {:#x}{}", kind, told(&text))),
    }
}

fn told(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

// The lengths of what these are used on were checked.

fn short(data: &[u8], at: usize) -> u16 {
    data[at..].first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes))
}

fn word(data: &[u8], at: usize) -> u32 {
    data[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes))
}

fn long(data: &[u8], at: usize) -> u64 {
    data[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}
