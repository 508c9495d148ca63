//! A blocking QMP client: connects, negotiates, executes, waits for events.
//!
//! Used by the command line, the demo and the tests; talks to QEMU as well. One owner at a time; every wait has a limit.
//! Events that arrive while a reply is awaited are kept in order for [`Client::wait_event`]; when a job begins, what is kept of an
//! earlier one of its id is dropped, so that nobody takes that one's end for this one's.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::error::QmpError;
use super::event::Event;
use super::parser::{Limits, Parser};

/// How long a reply is waited for unless [`Client::set_reply_limit`] says otherwise.
pub const REPLY_LIMIT: Duration = Duration::from_secs(60);

/// Why an answer was not had.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot connect to '{path}': {error}")]
    Connect {
        /// The socket's path.
        path: String,
        /// Why.
        error: io::Error,
    },
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server hung up.
    #[error("the server closed the connection")]
    Closed,
    /// Nothing came in time.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    /// What answers does not speak QMP.
    #[error("not a QMP server: {0}")]
    Protocol(String),
    /// The server refused the command, or it failed.
    #[error("{0}")]
    Refused(QmpError),
}

/// A connection to a QMP server.
pub struct Client {
    stream: UnixStream,
    parser: Parser,
    received: VecDeque<u8>,
    greeting: Value,
    events: VecDeque<Event>,
    next_id: u64,
    reply_limit: Duration,
}

impl Client {
    /// Connects and negotiates.
    pub fn connect(path: impl AsRef<Path>) -> Result<Client, ClientError> {
        let path = path.as_ref();
        let stream = UnixStream::connect(path)
            .map_err(|error| ClientError::Connect { path: path.display().to_string(), error })?;
        Client::negotiate(stream)
    }

    /// Negotiates over a connection that exists.
    pub fn negotiate(stream: UnixStream) -> Result<Client, ClientError> {
        let mut client = Client {
            stream,
            parser: Parser::new(Limits::REPLY),
            received: VecDeque::new(),
            greeting: Value::Null,
            events: VecDeque::new(),
            next_id: 0,
            reply_limit: REPLY_LIMIT,
        };
        let message = client.receive_within(REPLY_LIMIT)?;
        if let Some(error) = message.get("error") {
            return Err(ClientError::Refused(QmpError::from_wire(error)));
        }
        match message.get("QMP") {
            Some(greeting) => client.greeting = greeting.clone(),
            None => return Err(ClientError::Protocol(format!("it greets with {message}"))),
        }
        client.execute("qmp_capabilities", Value::Null)?;
        Ok(client)
    }

    /// The member `QMP` of the greeting: version and capabilities.
    pub fn greeting(&self) -> &Value {
        &self.greeting
    }

    /// Sets how long replies are waited for.
    pub fn set_reply_limit(&mut self, limit: Duration) {
        self.reply_limit = limit;
    }

    /// Executes a command; `arguments` is an object, or null for none.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut request = Map::new();
        request.insert("execute".into(), command.into());
        if !arguments.is_null() {
            request.insert("arguments".into(), arguments);
        }
        request.insert("id".into(), id.into());
        let mut line = Value::Object(request).to_string();
        line.push('\n');
        self.stream.write_all(line.as_bytes()).map_err(ended)?;
        let give_up = Instant::now() + self.reply_limit;
        loop {
            let mut message = match self.receive_until(give_up)? {
                Some(message) => message,
                None => return Err(ClientError::TimedOut(self.reply_limit)),
            };
            if self.keep_event(&message) {
                continue;
            }
            match message.get("id").and_then(Value::as_u64) {
                // A reply that was given up on earlier.
                Some(other) if other < id => continue,
                // An error without id is about this request, since no other is open.
                Some(_) | None => {}
            }
            if let Some(error) = message.get("error") {
                return Err(ClientError::Refused(QmpError::from_wire(error)));
            }
            match message.get_mut("return") {
                Some(value) => return Ok(value.take()),
                None => return Err(ClientError::Protocol(format!("it answers with {message}"))),
            }
        }
    }

    /// The first event, of those not yet taken, for which `wanted` holds; `None` when there is none within `limit`.
    /// Earlier events are dropped.
    pub fn wait_event(
        &mut self,
        limit: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Option<Event>, ClientError> {
        let give_up = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(Some(event));
                }
            }
            match self.receive_until(give_up)? {
                None => return Ok(None),
                Some(message) => {
                    self.keep_event(&message);
                }
            }
        }
    }

    /// Sends bytes as they are, for those who speak QMP themselves.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.stream.write_all(bytes).map_err(ended)
    }

    /// The next message as it is, reply or event; `None` when there is none within `limit`.
    pub fn receive_raw(&mut self, limit: Duration) -> Result<Option<Value>, ClientError> {
        self.receive_until(Instant::now() + limit)
    }

    /// The connection itself, for those who poll it.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn keep_event(&mut self, message: &Value) -> bool {
        let Some(name) = message.get("event").and_then(Value::as_str) else { return false };
        let data = message.get("data").cloned().unwrap_or(Value::Null);
        if let Some(job) = begun_job(name, &data) {
            // What was told of an earlier job of its name, by a server that had lost that one for instance, is not of this one.
            self.events.retain(|event| !is_of_job(event, job));
        }
        self.events.push_back(Event { name: name.to_owned(), data });
        true
    }

    fn receive_within(&mut self, limit: Duration) -> Result<Value, ClientError> {
        self.receive_until(Instant::now() + limit)?.ok_or(ClientError::TimedOut(limit))
    }

    fn receive_until(&mut self, give_up: Instant) -> Result<Option<Value>, ClientError> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            while !self.received.is_empty() {
                let (used, message) = self.parser.feed(self.received.make_contiguous());
                self.received.drain(..used);
                match message {
                    Some(Ok(message)) => return Ok(Some(message)),
                    Some(Err(error)) => return Err(ClientError::Protocol(error.to_string())),
                    None => {}
                }
            }
            let left = give_up.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(length) => self.received.extend(&buffer[..length]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ended(error)),
            }
        }
    }
}

/// The job that this event says has been created.
pub fn begun_job<'a>(name: &str, data: &'a Value) -> Option<&'a str> {
    let begins = name == "JOB_STATUS_CHANGE" && data["status"] == "created";
    data["id"].as_str().filter(|_| begins)
}

/// Whether an event tells of a job of this id.
pub fn is_of_job(event: &Event, id: &str) -> bool {
    event.name.contains("JOB_") && (event.data["id"] == id || event.data["device"] == id)
}

/// A peer that is gone looks different to a writer and a reader; callers need not care.
fn ended(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => ClientError::Io(error),
    }
}
