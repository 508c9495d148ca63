//! `blkmark qmp`: QMP itself, for scripts and for what has no command of its own.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use blkmark_backup::qmp::parser::{Limits, Parser};
use blkmark_backup::qmp::{Client, ClientError, QmpError};
use clap::Args;
use serde_json::Value;

use super::failure::Failure;
use super::output::Output;

/// `blkmark qmp`.
#[derive(Debug, Args)]
#[command(after_help = "Without COMMAND, standard input is sent as it comes, after negotiation, and every reply and \
    event is printed on a line of its own until all requests are answered:\n  \
    echo '{\"execute\": \"query-jobs\"}' | blkmark qmp\n\n\
    Exit status: 0 success; 1 an error was among the replies; 2 wrong usage; 3 the daemon cannot be reached.")]
pub struct QmpArgs {
    /// The command
    pub command: Option<String>,
    /// Its arguments, a JSON object
    pub arguments: Option<String>,
}

/// Runs it.
pub(super) fn run(client: &mut Client, args: &QmpArgs, output: &Output) -> Result<(), Failure> {
    let Some(command) = &args.command else { return stream(client, output) };
    let arguments = match args.arguments.as_deref().map(serde_json::from_str) {
        None => Value::Null,
        Some(Ok(Value::Object(arguments))) => Value::Object(arguments),
        Some(Ok(_)) => return Err(Failure::Usage("the arguments have to be a JSON object".into())),
        Some(Err(error)) => return Err(Failure::Usage(format!("the arguments are no JSON: {error}"))),
    };
    let result = client.execute(command, arguments)?;
    output.result(&result, || format!("{result:#}"));
    Ok(())
}

/// Replies that have come, for the thread that sends requests.
#[derive(Default)]
struct Answered {
    count: Mutex<u64>,
    changed: Condvar,
}

/// Sends standard input as it comes and prints what comes back, until everything is answered.
fn stream(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let socket = client.stream().try_clone().map_err(ClientError::from)?;
    let answered = Arc::new(Answered::default());
    let sender = Arc::clone(&answered);
    // Never joined: when the daemon goes first, this may wait for input for ever, and the process ends without it.
    thread::spawn(move || send_input(&socket, &sender));
    let mut refused = None;
    loop {
        match client.receive_raw(Duration::from_secs(3600)) {
            Ok(None) => {}
            Ok(Some(message)) => {
                output.line(&message);
                refused = message.get("error").map(QmpError::from_wire).or(refused);
                if message.get("event").is_none() {
                    *answered.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
                    answered.changed.notify_all();
                }
            }
            Err(ClientError::Closed) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match refused {
        None => Ok(()),
        Some(error) => Err(Failure::Refused(error)),
    }
}

/// Sends standard input, waits for the replies to it and then ends the connection, which ends the other thread's loop.
///
/// QEMU drops replies to a client that has ended its half of the connection, so that has to come last. Each message and
/// each error in the stream has one reply, so the parser knows how many there will be.
fn send_input(mut socket: &UnixStream, answered: &Answered) {
    let mut parser = Parser::new(Limits::COMMAND);
    let mut requests = 0;
    let mut buffer = vec![0; 64 << 10];
    let mut input = io::stdin().lock();
    let mut is_open = true;
    while is_open {
        let mut bytes: &[u8] = match input.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(length) if length > 0 => &buffer[..length],
            _ => {
                is_open = false;
                // A line end completes what the input leaves open, were it only a number.
                b"\n"
            }
        };
        if socket.write_all(bytes).is_err() {
            return;
        }
        while !bytes.is_empty() {
            let (used, message) = parser.feed(bytes);
            bytes = &bytes[used..];
            requests += u64::from(message.is_some());
        }
    }
    let mut count = answered.count.lock().unwrap_or_else(PoisonError::into_inner);
    while *count < requests {
        count = answered.changed.wait(count).unwrap_or_else(PoisonError::into_inner);
    }
    let _ = socket.shutdown(Shutdown::Write);
}
