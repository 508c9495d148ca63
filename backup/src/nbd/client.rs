//! A connection to an NBD server, on which many threads have requests under way at once.
//!
//! Used by `target` and `reader`. Who makes a request writes it under a lock and waits; one thread reads all replies and wakes whom each
//! is for. One connection is enough: a server works on the requests of one as it does on those of several, and a flush then
//! covers everything that was answered before it, whatever the server promises of several connections.
//!
//! Invariants: a request is answered once, with what the server said or with why the connection is over; a connection that
//! broke stays broken, for what an unknown server forgot of the writes since the last flush cannot be known; no request
//! outlasts the time limit, and [`Client::shutdown`] ends all of them at once.

use super::address::{Address, Stream, Timed};
use super::handshake::negotiate;
use super::payload::Payload;
use super::protocol::{
    REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, STRING_MAX, STRUCTURED_REPLY_MAGIC, chunk, command, errno_of, shown,
};
use crate::target::{Policy, os_text};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a send that does not get on looks whether it still should.
const SEND_TICK: Duration = Duration::from_secs(1);

/// How long the last word to a server may take.
const FAREWELL: Duration = Duration::from_millis(200);

/// How long is waited before a server that was not there is tried again.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// Time limits of a connection.
#[derive(Clone, Copy, Debug)]
pub struct ClientSettings {
    /// For how long a server that is not there is tried again (QEMU's `open-timeout`).
    pub open: Duration,
    /// Connecting and the handshake, together.
    pub handshake: Duration,
    /// One request. Generous: a flush may have gigabytes to bring home.
    pub request: Duration,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self { open: Duration::ZERO, handshake: Duration::from_secs(30), request: Duration::from_secs(300) }
    }
}

/// What the server said of the export, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Bytes; a multiple of `min_block`.
    pub size: u64,
    /// Of [`super::protocol::export_flag`].
    pub flags: u16,
    /// What offsets and lengths are multiples of; a power of two.
    pub min_block: u32,
    /// What they had better be multiples of; a power of two.
    pub preferred_block: u32,
    /// The longest payload; a multiple of `min_block`.
    pub max_payload: u32,
    /// Whether replies may come in chunks.
    pub structured: bool,
    /// The number of `base:allocation`, if the server was asked for it and has it.
    pub allocation: Option<u32>,
}

impl ExportInfo {
    /// Whether it has this flag of [`super::protocol::export_flag`].
    pub fn can(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// Why there is no connection to an export. The text is QEMU's where it has the case.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody is there.
    #[error("Failed to connect to '{address}': {}", os_text(source))]
    Connect {
        /// Where.
        address: Address,
        /// The reason.
        source: io::Error,
    },
    /// The connection ended in the handshake.
    #[error("Failed to read data: {}", handshake_text(.0))]
    Lost(#[from] io::Error),
    /// No such export.
    #[error("Requested export not available")]
    NoExport(String),
    /// The server talks only over TLS.
    #[error("Server requires TLS, which blkmark does not speak to targets")]
    TlsRequired,
    /// The server does not want to.
    #[error("{0}")]
    Refused(String),
    /// The server makes no sense.
    #[error("NBD server at fault: {0}")]
    Protocol(String),
    /// A name that no export has.
    #[error("export name too long to send to server")]
    NameTooLong,
    /// The export exists and cannot be written.
    #[error("Export '{0}' is read-only")]
    ReadOnly(String),
    /// The export can be written, but not safely.
    #[error("Export '{0}' supports neither flush nor FUA: a backup in it could not be made durable")]
    NotDurable(String),
}

fn handshake_text(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        io::ErrorKind::TimedOut => "the server does not answer".to_owned(),
        _ => os_text(error),
    }
}

/// A request under way.
enum Waiting {
    /// Not answered; with an error that came ahead of the end of the reply.
    Open(Option<i32>, Payload),
    Answered(Result<Payload, i32>),
}

#[derive(Default)]
struct Table {
    last: u64,
    waiting: HashMap<u64, Waiting>,
    /// Why the connection is over.
    broken: Option<String>,
}

struct Shared {
    stream: Stream,
    table: Mutex<Table>,
    answered: Condvar,
    /// Held by who sends.
    sending: Mutex<()>,
    name: String,
    structured: bool,
}

/// A connection in its transmission phase.
pub struct Client {
    shared: Arc<Shared>,
    export: ExportInfo,
    request_time: Duration,
    reader: Option<JoinHandle<()>>,
}

/// A request without its payload.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// Of [`command`].
    pub kind: u16,
    /// Of [`super::protocol::command_flag`].
    pub flags: u16,
    /// Where.
    pub offset: u64,
    /// How much.
    pub len: u32,
}

impl Client {
    /// Connects to `export` at `address`, trying again for as long as the settings say.
    pub fn connect(
        address: &Address,
        export: &str,
        settings: ClientSettings,
        policy: &Policy,
    ) -> Result<Self, ClientError> {
        Self::connect_for(address, export, settings, policy, false)
    }

    /// The same, to read: the server is asked for `base:allocation` too.
    pub fn connect_to_read(
        address: &Address,
        export: &str,
        settings: ClientSettings,
        policy: &Policy,
    ) -> Result<Self, ClientError> {
        Self::connect_for(address, export, settings, policy, true)
    }

    fn connect_for(
        address: &Address,
        export: &str,
        settings: ClientSettings,
        policy: &Policy,
        allocation: bool,
    ) -> Result<Self, ClientError> {
        if export.len() > STRING_MAX {
            return Err(ClientError::NameTooLong);
        }
        let give_up = Instant::now() + settings.open;
        loop {
            match Self::connect_once(address, export, settings, policy, allocation) {
                Err(ClientError::Connect { .. } | ClientError::Lost(_)) if Instant::now() < give_up => {
                    std::thread::sleep(RECONNECT_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    fn connect_once(
        address: &Address,
        name: &str,
        settings: ClientSettings,
        policy: &Policy,
        allocation: bool,
    ) -> Result<Self, ClientError> {
        let deadline = Instant::now() + settings.handshake;
        let stream = address
            .connect(policy, deadline)
            .map_err(|source| ClientError::Connect { address: address.clone(), source })?;
        Self::over(stream, name, address.url(name), allocation, settings, deadline)
    }

    /// Takes the export `name` over a connection that was just made; `shown` is what the client is called.
    pub(super) fn over(
        stream: Stream,
        name: &str,
        shown: String,
        allocation: bool,
        settings: ClientSettings,
        deadline: Instant,
    ) -> Result<Self, ClientError> {
        let export = negotiate(Timed::new(&stream, deadline), name, allocation)?;
        stream.set_timeouts(None, Some(SEND_TICK))?;
        let shared = Arc::new(Shared {
            stream,
            table: Mutex::default(),
            answered: Condvar::new(),
            sending: Mutex::default(),
            name: shown,
            structured: export.structured,
        });
        let reads = Arc::clone(&shared);
        let reader = std::thread::Builder::new().name("nbd-replies".to_owned()).spawn(move || reads.read_replies())?;
        Ok(Self { shared, export, request_time: settings.request, reader: Some(reader) })
    }

    /// What the server said of the export.
    pub fn export(&self) -> &ExportInfo {
        &self.export
    }

    /// Refuses what no server would have to answer: bytes outside of the export, or less than its blocks.
    pub(super) fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let export = self.export();
        let end = offset.checked_add(len).filter(|end| *end <= export.size);
        if end.is_none() || !(offset | len).is_multiple_of(u64::from(export.min_block)) {
            let text = format!("{len} bytes at {offset:#x} are not within the export, or not whole blocks");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        Ok(())
    }

    /// QEMU's way to write where this leads.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Ends the connection; requests under way fail at once, and so do later ones. May be called from any thread.
    pub fn shutdown(&self) {
        self.shared.end("it was shut down");
    }

    /// Makes a request, with its payload if it is a write, and waits for the answer. Errors that the server
    /// gave have a `raw_os_error`.
    pub fn request(&self, request: Request, payload: &[u8]) -> io::Result<()> {
        self.ask(request, payload, Payload::Nothing).map(drop)
    }

    /// Reads as many bytes at `offset` as `room` has, and gives it back filled. Whole blocks, of at most the longest payload.
    pub fn read(&self, offset: u64, room: Vec<u8>) -> io::Result<Vec<u8>> {
        let Ok(len) = u32::try_from(room.len()) else { return Err(io::ErrorKind::InvalidInput.into()) };
        let request = Request { kind: command::READ, flags: 0, offset, len };
        match self.ask(request, &[], Payload::data(offset, room))? {
            Payload::Data { bytes, .. } => Ok(bytes),
            _ => unreachable!("a payload keeps its kind"),
        }
    }

    /// What `base:allocation` says of `len` bytes at `offset`: lengths and flags, at least one, the last perhaps too long. `None`
    /// if the server does not have it.
    pub fn allocation(&self, offset: u64, len: u32) -> io::Result<Option<Vec<(u32, u32)>>> {
        let Some(context) = self.export.allocation else { return Ok(None) };
        let request = Request { kind: command::BLOCK_STATUS, flags: 0, offset, len };
        match self.ask(request, &[], Payload::extents(context))? {
            Payload::Extents { extents, .. } => Ok(Some(extents)),
            _ => unreachable!("a payload keeps its kind"),
        }
    }

    fn ask(&self, request: Request, payload: &[u8], wanted: Payload) -> io::Result<Payload> {
        let deadline = Instant::now() + self.request_time;
        let cookie = self.shared.register(wanted)?;
        let mut head = [0; 28];
        head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[4..6].copy_from_slice(&request.flags.to_be_bytes());
        head[6..8].copy_from_slice(&request.kind.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.to_be_bytes());
        head[16..24].copy_from_slice(&request.offset.to_be_bytes());
        head[24..].copy_from_slice(&request.len.to_be_bytes());
        {
            let _sending = self.shared.sending.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            if let Err(error) = self.shared.stream.send(&head, payload, || Instant::now() < deadline) {
                // Half a request may be out: there is no way on.
                self.shared.end(&match error.kind() {
                    io::ErrorKind::WouldBlock => "the server takes no more data".to_owned(),
                    _ => os_text(&error),
                });
            }
        }
        match self.shared.answer(cookie, deadline)? {
            Ok(payload) => Ok(payload),
            Err(errno) => {
                if errno == libc::ESHUTDOWN {
                    self.shared.end("the server is shutting down");
                }
                Err(io::Error::from_raw_os_error(errno))
            }
        }
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The connection is over. The first reason is the one that counts.
    fn end(&self, reason: &str) {
        let mut table = self.table();
        if table.broken.is_none() {
            table.broken = Some(reason.to_owned());
        }
        drop(table);
        self.stream.shutdown();
        self.answered.notify_all();
    }

    fn gone(&self, reason: &str) -> io::Error {
        io::Error::new(io::ErrorKind::ConnectionAborted, format!("Connection to '{}' is over: {reason}", self.name))
    }

    fn register(&self, wanted: Payload) -> io::Result<u64> {
        let mut table = self.table();
        if let Some(reason) = &table.broken {
            return Err(self.gone(reason));
        }
        table.last += 1;
        let cookie = table.last;
        table.waiting.insert(cookie, Waiting::Open(None, wanted));
        Ok(cookie)
    }

    fn answer(&self, cookie: u64, deadline: Instant) -> io::Result<Result<Payload, i32>> {
        let mut table = self.table();
        loop {
            match table.waiting.remove(&cookie) {
                Some(Waiting::Answered(answer)) => return Ok(answer),
                Some(open) => drop(table.waiting.insert(cookie, open)),
                None => {}
            }
            if let Some(reason) = &table.broken {
                let error = self.gone(reason);
                table.waiting.remove(&cookie);
                return Err(error);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(table);
                self.end("the server does not answer");
                table = self.table();
                continue;
            }
            table = self.answered.wait_timeout(table, left).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// The reader's thread.
    fn read_replies(&self) {
        let mut replies = BufReader::new(&self.stream);
        let reason = loop {
            match self.read_reply(&mut replies) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    break "the server closed the connection".to_owned();
                }
                Err(error) => break os_text(&error),
            }
        };
        self.end(&reason);
    }

    fn read_reply(&self, replies: &mut impl Read) -> io::Result<()> {
        let mut magic = [0; 4];
        replies.read_exact(&mut magic)?;
        match u32::from_be_bytes(magic) {
            SIMPLE_REPLY_MAGIC => {
                let (mut error, mut cookie) = ([0; 4], [0; 8]);
                replies.read_exact(&mut error)?;
                replies.read_exact(&mut cookie)?;
                let cookie = u64::from_be_bytes(cookie);
                match u32::from_be_bytes(error) {
                    0 => {
                        let mut payload = self.expected(cookie)?;
                        if self.structured && !payload.is_nothing() {
                            return Err(fault("a reply without its chunks"));
                        }
                        payload.take_all(replies)?;
                        self.chunk(cookie, payload, None, true)
                    }
                    error => self.chunk(cookie, self.expected(cookie)?, Some(errno_of(error)), true),
                }
            }
            STRUCTURED_REPLY_MAGIC => {
                let (mut flags, mut kind, mut cookie, mut length) = ([0; 2], [0; 2], [0; 8], [0; 4]);
                replies.read_exact(&mut flags)?;
                replies.read_exact(&mut kind)?;
                replies.read_exact(&mut cookie)?;
                replies.read_exact(&mut length)?;
                let done = u16::from_be_bytes(flags) & chunk::DONE != 0;
                let (cookie, length) = (u64::from_be_bytes(cookie), u32::from_be_bytes(length));
                let mut payload = self.expected(cookie)?;
                let mut error = None;
                match u16::from_be_bytes(kind) {
                    chunk::NONE if length == 0 && done => {}
                    chunk::OFFSET_DATA => payload.take_data(replies, length)?,
                    chunk::OFFSET_HOLE => payload.take_hole(replies, length)?,
                    chunk::BLOCK_STATUS => payload.take_extents(replies, length)?,
                    kind if kind & chunk::ERROR_BIT != 0 => error = Some(self.error_chunk(replies, length)?),
                    _ => return Err(fault("a reply that fits no request")),
                }
                self.chunk(cookie, payload, error, done)
            }
            _ => Err(fault("a reply with the wrong magic")),
        }
    }

    /// All errors begin with a number and a text; what follows is of no interest here.
    fn error_chunk(&self, replies: &mut impl Read, length: u32) -> io::Result<i32> {
        // Number, length of the text, the text, and an offset.
        if !(6..=6 + STRING_MAX as u32 + 8).contains(&length) {
            return Err(fault("an error with the wrong length"));
        }
        let mut data = vec![0; length as usize];
        replies.read_exact(&mut data)?;
        let (head, rest) = data.split_at(6);
        let text = usize::from(u16::from_be_bytes([head[4], head[5]]));
        let text = rest.get(..text).ok_or_else(|| fault("an error with the wrong length"))?;
        let errno = errno_of(u32::from_be_bytes([head[0], head[1], head[2], head[3]]));
        if !text.is_empty() {
            tracing::warn!(target = self.name, errno, text = shown(text), "the NBD server explains an error");
        }
        Ok(errno)
    }

    /// Takes out what is expected of the reply to a request, to be filled with no lock held.
    fn expected(&self, cookie: u64) -> io::Result<Payload> {
        match self.table().waiting.get_mut(&cookie) {
            Some(Waiting::Open(_, payload)) => Ok(std::mem::take(payload)),
            _ => Err(fault("a reply to no request")),
        }
    }

    /// Notes what a reply says, and wakes who waits for it if that was all.
    fn chunk(&self, cookie: u64, payload: Payload, error: Option<i32>, done: bool) -> io::Result<()> {
        let mut table = self.table();
        let Some(Waiting::Open(earlier, place)) = table.waiting.get_mut(&cookie) else {
            return Err(fault("a reply to no request"));
        };
        let error = earlier.or(error);
        *earlier = error;
        if !done {
            *place = payload;
            return Ok(());
        }
        let answer = match error {
            Some(errno) => Err(errno),
            None if payload.is_whole() => Ok(payload),
            None => return Err(fault("a reply that is not whole")),
        };
        table.waiting.insert(cookie, Waiting::Answered(answer));
        drop(table);
        self.answered.notify_all();
        Ok(())
    }
}

pub(super) fn fault(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server is at fault: {text}"))
}

impl Drop for Client {
    /// Says goodbye, if the connection still stands.
    fn drop(&mut self) {
        if self.shared.table().broken.is_none() {
            let mut head = [0; 28];
            head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            head[6..8].copy_from_slice(&command::DISC.to_be_bytes());
            let polite = self.shared.stream.set_timeouts(None, Some(FAREWELL));
            let _ = polite.and_then(|()| self.shared.stream.send(&head, &[], || false));
        }
        self.shared.end("it was closed");
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("name", &self.shared.name).field("export", &self.export).finish_non_exhaustive()
    }
}
