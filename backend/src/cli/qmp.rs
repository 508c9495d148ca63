//! `blkmark qmp`: QMP itself, for scripts and for what has no command of its own.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use blkmark_backup::qmp::{Client, ClientError, QmpError};
use serde_json::Value;

use super::args::QmpArgs;
use super::failure::Failure;
use super::output::Output;

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

/// Sends standard input as it comes and prints what comes back, until the daemon has answered everything.
fn stream(client: &mut Client, output: &Output) -> Result<(), Failure> {
    let socket = client.stream().try_clone().map_err(ClientError::from)?;
    // Never joined: when the daemon goes first, this may wait for input for ever, and the process ends without it.
    thread::spawn(move || send_input(&socket));
    let mut refused = None;
    loop {
        match client.receive_raw(Duration::from_secs(3600)) {
            Ok(None) => {}
            Ok(Some(message)) => {
                output.line(&message);
                refused = message.get("error").map(QmpError::from_wire).or(refused);
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

fn send_input(mut socket: &UnixStream) {
    let mut buffer = vec![0; 64 << 10];
    let mut input = io::stdin().lock();
    loop {
        match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) if socket.write_all(&buffer[..length]).is_err() => break,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    // The daemon answers what it was sent and then hangs up.
    let _ = socket.shutdown(Shutdown::Write);
}
