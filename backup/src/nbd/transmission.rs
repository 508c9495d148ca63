//! The server's side after the handshake: requests in, replies out, several at a time.
//!
//! Run by `server`. A few threads share a connection: one of them waits for a request, takes it, and lets the next one wait while
//! it works on its own. So a request costs no queue and no hand-over, and a connection holds as many buffers as it has
//! requests under way. While there is nothing but one request, its thread keeps its place and nobody is woken.
//!
//! Invariants: a request is answered once, in whole messages; nothing is allocated for a length that the client named; whatever
//! it sends, only its own connection ends.

use super::export::{Export, Extent};
use super::link::{Incoming, Link};
use super::negotiate::{Agreed, Headers};
use super::protocol::{
    EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC, PAYLOAD_MAX, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC, chunk, command, command_flag, error_of,
};
use crate::buffer::AlignedBuffer;
use crate::target::os_text;
use std::io::{self, BufReader, Read};
use std::sync::{Arc, Mutex, MutexGuard};

/// Requests of one connection that are worked on at once.
const CREW: usize = 8;

/// Bytes that are moved at once, and the buffer of each thread.
const PIECE: usize = 256 << 10;

/// Ranges that are asked after whether they are holes: below this, reading is as quick.
const HOLE_MIN: usize = 64 << 10;

/// Extents of one context in one reply.
const EXTENTS: usize = 8192;

struct Request {
    flags: u16,
    kind: u16,
    cookie: u64,
    offset: u64,
    /// Of the payload, or of the range.
    len: u64,
}

struct Input {
    reader: BufReader<Incoming>,
    /// Nothing more is to be read.
    over: bool,
}

#[derive(Default)]
struct Crew {
    threads: usize,
    /// Those that wait for their turn to read.
    waiting: usize,
    /// Those that work on a request.
    busy: usize,
}

/// A connection in its transmission phase. Whoever is told of its end is told when it is dropped.
pub(super) struct Transmission<T> {
    link: Arc<Link>,
    export: Arc<dyn Export>,
    headers: Headers,
    contexts: Vec<usize>,
    input: Mutex<Input>,
    output: Mutex<()>,
    crew: Mutex<Crew>,
    _seat: T,
}

/// How a request ends, as far as the connection is concerned: an error is one of the connection.
type Answered = io::Result<()>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl<T: Send + Sync + 'static> Transmission<T> {
    /// Serves what was agreed, until the connection is over and all its requests are. `seat` is dropped then.
    pub fn run(link: Arc<Link>, agreed: Agreed, seat: T) {
        let reader = BufReader::with_capacity(16 << 10, link.incoming());
        let Agreed { export, headers, contexts, .. } = agreed;
        let crew = Mutex::new(Crew { threads: 1, ..Crew::default() });
        let input = Mutex::new(Input { reader, over: false });
        let output = Mutex::default();
        Arc::new(Self { link, export, headers, contexts, input, output, crew, _seat: seat }).work();
    }

    /// A thread of the crew.
    fn work(self: Arc<Self>) {
        let mut buffer = AlignedBuffer::new(PIECE);
        loop {
            lock(&self.crew).waiting += 1;
            let mut input = lock(&self.input);
            lock(&self.crew).waiting -= 1;
            if input.over {
                break;
            }
            let outcome = self.next(&mut input, &mut buffer);
            let (request, prepared) = match outcome {
                Ok(Some(next)) => next,
                Ok(None) => {
                    input.over = true;
                    break;
                }
                Err(_) => {
                    input.over = true;
                    self.link.stream().shutdown();
                    break;
                }
            };
            let alone = {
                let mut crew = lock(&self.crew);
                crew.busy += 1;
                crew.busy == 1
            };
            let input = if alone && !more(&input) {
                Some(input)
            } else {
                drop(input);
                self.recruit();
                None
            };
            let answered = self.serve(&request, prepared, &mut buffer);
            drop(input);
            lock(&self.crew).busy -= 1;
            if answered.is_err() {
                self.link.stream().shutdown();
                lock(&self.input).over = true;
                break;
            }
        }
        let last = {
            let mut crew = lock(&self.crew);
            crew.threads -= 1;
            crew.threads == 0
        };
        if last {
            self.link.close();
        }
    }

    /// Sees to it that somebody reads while this thread works.
    fn recruit(self: &Arc<Self>) {
        let mut crew = lock(&self.crew);
        if crew.waiting > 0 || crew.threads == CREW {
            return;
        }
        crew.threads += 1;
        drop(crew);
        let member = Arc::clone(self);
        let thread = std::thread::Builder::new().name("nbd-serve".to_owned()).spawn(move || member.work());
        if thread.is_err() {
            // It goes on with the threads that there are.
            lock(&self.crew).threads -= 1;
        }
    }

    /// Reads the next request and, if it is a write, its payload; `None` at the end. What comes beside the request
    /// is the outcome of a write that was too long for the buffer, or why the request cannot be served.
    fn next(&self, input: &mut Input, buffer: &mut [u8]) -> io::Result<Option<(Request, Option<io::Result<()>>)>> {
        let reader = &mut input.reader;
        let extended = self.headers == Headers::Extended;
        let mut head = [0; 32];
        let head = &mut head[..if extended { 32 } else { 28 }];
        match reader.read(&mut head[..1]) {
            Ok(0) => return Ok(None),
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            read => {
                let read = read.unwrap_or(0);
                reader.read_exact(&mut head[read..])?;
            }
        }
        let word = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let long = |at: usize| (u64::from(word(at)) << 32) | u64::from(word(at + 4));
        if word(0) != if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a request with the wrong magic"));
        }
        let request = Request {
            flags: (word(4) >> 16) as u16,
            kind: word(4) as u16,
            cookie: long(8),
            offset: long(16),
            len: if extended { long(24) } else { word(24).into() },
        };
        if request.kind == command::DISC {
            return Ok(None);
        }
        // QEMU's clients leave the flag out of extended writes.
        let payload = request.kind == command::WRITE || extended && request.flags & command_flag::PAYLOAD_LEN != 0;
        let mut refusal = self.refusal(&request).map(Err);
        if payload {
            if request.len > u64::from(PAYLOAD_MAX) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "a payload that is too long"));
            }
            if refusal.is_some() {
                io::copy(&mut reader.take(request.len), &mut io::sink())?;
            } else if request.len <= buffer.len() as u64 {
                reader.read_exact(&mut buffer[..request.len as usize])?;
            } else {
                refusal = Some(self.write_through(reader, &request, buffer)?);
            }
        }
        Ok(Some((request, refusal)))
    }

    /// Why a request is not for this export, if so.
    fn refusal(&self, request: &Request) -> Option<io::Error> {
        let invalid = |text: &str| Some(io::Error::new(io::ErrorKind::InvalidInput, text.to_owned()));
        let taken = match request.kind {
            command::READ => command_flag::FUA | command_flag::DF,
            command::WRITE => command_flag::FUA | command_flag::PAYLOAD_LEN,
            command::WRITE_ZEROES => command_flag::FUA | command_flag::NO_HOLE,
            command::TRIM | command::FLUSH | command::CACHE => command_flag::FUA,
            command::BLOCK_STATUS => command_flag::FUA | command_flag::REQ_ONE,
            _ => return invalid("unknown command"),
        };
        if request.flags & !taken != 0 {
            return invalid("flags that do not go with the command");
        }
        if request.kind == command::FLUSH {
            return None;
        }
        if matches!(request.kind, command::WRITE | command::WRITE_ZEROES | command::TRIM) && self.export.read_only() {
            return Some(io::Error::from_raw_os_error(libc::EPERM));
        }
        let size = self.export.size();
        if request.offset.checked_add(request.len).is_none_or(|end| end > size) {
            return match request.kind {
                command::WRITE | command::WRITE_ZEROES => Some(io::Error::from_raw_os_error(libc::ENOSPC)),
                _ => invalid("a range past the end"),
            };
        }
        match request.kind {
            command::READ if request.len > PAYLOAD_MAX.into() => Some(io::Error::from_raw_os_error(libc::EOVERFLOW)),
            command::BLOCK_STATUS if self.contexts.is_empty() => invalid("no metadata context was chosen"),
            command::BLOCK_STATUS if request.len == 0 => invalid("a range of nothing"),
            _ => None,
        }
    }

    /// Writes a payload that the buffer cannot hold, as it comes. All of it is read, whatever becomes of it.
    fn write_through(
        &self,
        reader: &mut impl Read,
        request: &Request,
        buffer: &mut [u8],
    ) -> io::Result<io::Result<()>> {
        let (mut at, mut outcome) = (0, Ok(()));
        while at < request.len {
            let piece = &mut buffer[..(request.len - at).min(PIECE as u64) as usize];
            reader.read_exact(piece)?;
            if outcome.is_ok() {
                outcome = self.export.write_at(piece, request.offset + at);
            }
            at += piece.len() as u64;
        }
        Ok(outcome)
    }

    fn serve(&self, request: &Request, prepared: Option<io::Result<()>>, buffer: &mut [u8]) -> Answered {
        let outcome = match (prepared, request.kind) {
            (Some(Err(error)), _) => Err(error),
            (Some(Ok(())), _) | (None, command::CACHE) => Ok(()),
            (None, command::READ) => return self.read(request, buffer),
            (None, command::BLOCK_STATUS) => return self.block_status(request),
            (None, command::WRITE) => self.export.write_at(&buffer[..request.len as usize], request.offset),
            (None, command::WRITE_ZEROES) => {
                let hole = request.flags & command_flag::NO_HOLE == 0;
                self.export.write_zeroes_at(request.offset, request.len, hole)
            }
            (None, command::TRIM) => self.export.trim(request.offset, request.len),
            (None, _) => self.export.flush(),
        };
        let writes = matches!(request.kind, command::WRITE | command::WRITE_ZEROES | command::TRIM);
        let durable = outcome.and_then(|()| match writes && request.flags & command_flag::FUA != 0 {
            true => self.export.flush(),
            false => Ok(()),
        });
        match durable {
            Ok(()) => self.done(request),
            Err(error) => self.fail(request, &error),
        }
    }

    fn read(&self, request: &Request, buffer: &mut [u8]) -> Answered {
        if self.headers == Headers::Simple {
            return self.read_simply(request, buffer);
        }
        let whole = request.flags & command_flag::DF != 0;
        if whole && request.len > PIECE as u64 {
            return self.fail(request, &io::Error::from_raw_os_error(libc::EOVERFLOW));
        }
        let mut at = 0;
        loop {
            let piece = (request.len - at).min(PIECE as u64) as usize;
            let offset = request.offset + at;
            at += piece as u64;
            let last = at == request.len;
            if piece == 0 {
                return self.done(request);
            }
            if !whole && piece >= HOLE_MIN && self.export.is_hole(offset, piece as u64) {
                let hole = [&offset.to_be_bytes()[..], &(piece as u32).to_be_bytes()].concat();
                self.chunk(request, last, chunk::OFFSET_HOLE, &hole, &[])?;
            } else {
                let data = &mut buffer[..piece];
                if let Err(error) = self.export.read_at(data, offset) {
                    return self.fail(request, &error);
                }
                self.chunk(request, last, chunk::OFFSET_DATA, &offset.to_be_bytes(), data)?;
            }
            if last {
                return Ok(());
            }
        }
    }

    /// Without chunks the first word says whether all went well: an error behind it can only end the connection.
    fn read_simply(&self, request: &Request, buffer: &mut [u8]) -> Answered {
        let mut piece = request.len.min(PIECE as u64) as usize;
        if let Err(error) = self.export.read_at(&mut buffer[..piece], request.offset) {
            return self.fail(request, &error);
        }
        let _output = lock(&self.output);
        self.link.send(&simple(request, 0), &buffer[..piece])?;
        let mut at = piece as u64;
        while at < request.len {
            piece = (request.len - at).min(PIECE as u64) as usize;
            self.export.read_at(&mut buffer[..piece], request.offset + at)?;
            self.link.send(&[], &buffer[..piece])?;
            at += piece as u64;
        }
        Ok(())
    }

    fn block_status(&self, request: &Request) -> Answered {
        let most = if request.flags & command_flag::REQ_ONE != 0 { 1 } else { EXTENTS };
        for (n, context) in self.contexts.iter().enumerate() {
            let extents = match self.export.block_status(*context, request.offset, request.len, most) {
                Ok(extents) => tidy(extents, request.len, most),
                Err(error) => return self.fail(request, &error),
            };
            if extents.is_empty() {
                return self.fail(request, &io::Error::from_raw_os_error(libc::EIO));
            }
            let id = (*context as u32).to_be_bytes();
            let last = n + 1 == self.contexts.len();
            let mut list = Vec::with_capacity(extents.len() * 16);
            if self.headers == Headers::Extended {
                for extent in &extents {
                    list.extend_from_slice(&extent.len.to_be_bytes());
                    list.extend_from_slice(&u64::from(extent.flags).to_be_bytes());
                }
                let head = [id, (extents.len() as u32).to_be_bytes()].concat();
                self.chunk(request, last, chunk::BLOCK_STATUS_EXT, &head, &list)?;
            } else {
                for extent in &extents {
                    // No longer than what was asked for, which fits.
                    list.extend_from_slice(&(extent.len as u32).to_be_bytes());
                    list.extend_from_slice(&extent.flags.to_be_bytes());
                }
                self.chunk(request, last, chunk::BLOCK_STATUS, &id, &list)?;
            }
        }
        Ok(())
    }

    fn done(&self, request: &Request) -> Answered {
        match self.headers {
            Headers::Simple => self.simple(request, 0),
            _ => self.chunk(request, true, chunk::NONE, &[], &[]),
        }
    }

    fn fail(&self, request: &Request, error: &io::Error) -> Answered {
        let number = error_of(error);
        if self.headers == Headers::Simple {
            return self.simple(request, number);
        }
        let text = os_text(error);
        let text = &text.as_bytes()[..text.len().min(256)];
        let head = [&number.to_be_bytes()[..], &(text.len() as u16).to_be_bytes()].concat();
        self.chunk(request, true, chunk::ERROR, &head, text)
    }

    fn simple(&self, request: &Request, error: u32) -> Answered {
        let _output = lock(&self.output);
        self.link.send(&simple(request, error), &[])
    }

    fn chunk(&self, request: &Request, last: bool, kind: u16, head: &[u8], data: &[u8]) -> Answered {
        let flags = if last { chunk::DONE } else { 0 };
        let len = head.len() + data.len();
        let mut message = Vec::with_capacity(48);
        let extended = self.headers == Headers::Extended;
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        message.extend_from_slice(&magic.to_be_bytes());
        message.extend_from_slice(&flags.to_be_bytes());
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&request.cookie.to_be_bytes());
        if extended {
            message.extend_from_slice(&request.offset.to_be_bytes());
            message.extend_from_slice(&(len as u64).to_be_bytes());
        } else {
            message.extend_from_slice(&(len as u32).to_be_bytes());
        }
        message.extend_from_slice(head);
        let _output = lock(&self.output);
        self.link.send(&message, data)
    }
}

fn simple(request: &Request, error: u32) -> [u8; 16] {
    let mut reply = [0; 16];
    reply[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    reply[4..8].copy_from_slice(&error.to_be_bytes());
    reply[8..].copy_from_slice(&request.cookie.to_be_bytes());
    reply
}

/// Whether the next request is here already, or begins to be.
fn more(input: &Input) -> bool {
    let waiting = rustix::io::ioctl_fionread(input.reader.get_ref().stream());
    !input.reader.buffer().is_empty() || waiting.is_ok_and(|bytes| bytes > 0)
}

/// Joins what is alike, and keeps to what was asked for.
fn tidy(extents: Vec<Extent>, len: u64, most: usize) -> Vec<Extent> {
    let mut tidy: Vec<Extent> = Vec::with_capacity(extents.len().min(most));
    let mut left = len;
    for extent in extents {
        let len = extent.len.min(left);
        left -= len;
        let full = tidy.len() == most;
        match tidy.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.flags == extent.flags => last.len += len,
            _ if full => break,
            _ => tidy.push(Extent { len, ..extent }),
        }
    }
    tidy
}
