//! One client's conversation: negotiation, the shape of requests, and the call of the command.
//!
//! Driven by [`super::server`], one message at a time; knows nothing of sockets and threads. Every message gets
//! exactly one reply, a request's `id` whatever it is.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::{Map, Value, json};

use super::arguments::Arguments;
use super::error::QmpError;
use super::parser::ParseError;
use super::{Commands, wire};

const NEGOTIATE: &str = "qmp_capabilities";

/// Where the conversation stands.
#[derive(Default)]
pub(super) struct Session {
    negotiated: bool,
}

struct Request {
    command: String,
    arguments: Map<String, Value>,
}

impl Session {
    /// Whether the client has negotiated, from when on it gets events.
    pub(super) fn is_negotiated(&self) -> bool {
        self.negotiated
    }

    /// The reply to a message.
    pub(super) fn answer(&mut self, message: Result<Value, ParseError>, commands: &dyn Commands) -> Value {
        let message = match message {
            Ok(message) => message,
            Err(error) => return wire::reply(None, Err(QmpError::generic(error.to_string()))),
        };
        let Value::Object(mut members) = message else {
            return wire::reply(None, Err(QmpError::generic("QMP input must be a JSON object")));
        };
        let id = members.shift_remove("id");
        let result = request(members).and_then(|request| self.execute(request, commands));
        wire::reply(id, result)
    }

    fn execute(&mut self, request: Request, commands: &dyn Commands) -> Result<Value, QmpError> {
        let Request { command, arguments } = request;
        match (self.negotiated, command == NEGOTIATE) {
            (false, false) => {
                return Err(QmpError::command_not_found(format!(
                    "Expecting capabilities negotiation with '{NEGOTIATE}'"
                )));
            }
            (false, true) => {
                negotiate(arguments)?;
                self.negotiated = true;
                return Ok(json!({}));
            }
            (true, true) => {
                return Err(QmpError::command_not_found(
                    "Capabilities negotiation is already complete, command ignored",
                ));
            }
            (true, false) => {}
        }
        // A defect in one command must not take the client's connection, or anybody else's, with it.
        match catch_unwind(AssertUnwindSafe(|| commands.execute(&command, arguments))) {
            Ok(Some(result)) => result,
            Ok(None) => Err(QmpError::command_not_found(format!("The command {command} has not been found"))),
            Err(_) => {
                tracing::error!(command, "a command panicked");
                Err(QmpError::generic(format!("The command {command} failed because of a defect in the server")))
            }
        }
    }
}

fn request(mut members: Map<String, Value>) -> Result<Request, QmpError> {
    let is_known = |name: &String| name == "execute" || name == "arguments";
    if let Some(name) = members.keys().find(|name| !is_known(name)) {
        return Err(QmpError::generic(format!("QMP input member '{name}' is unexpected")));
    }
    let command = match members.shift_remove("execute") {
        None => None,
        Some(Value::String(command)) => Some(command),
        Some(_) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
    };
    let arguments = match members.shift_remove("arguments") {
        None => Map::new(),
        Some(Value::Object(arguments)) => arguments,
        Some(_) => return Err(QmpError::generic("QMP input member 'arguments' must be an object")),
    };
    match command {
        Some(command) => Ok(Request { command, arguments }),
        None => Err(QmpError::generic("QMP input lacks member 'execute'")),
    }
}

/// Checks the arguments of `qmp_capabilities`. QEMU knows one capability, `oob`, which is not offered here.
fn negotiate(arguments: Map<String, Value>) -> Result<(), QmpError> {
    let mut arguments = Arguments::new(arguments);
    let mut wants_oob = false;
    for capability in arguments.opt_list("enable")?.unwrap_or_default() {
        match capability.string()?.as_str() {
            "oob" => wants_oob = true,
            other => return Err(QmpError::generic(format!("Parameter 'null' does not accept value '{other}'"))),
        }
    }
    arguments.finish()?;
    if wants_oob { Err(QmpError::generic("Capability oob not available")) } else { Ok(()) }
}
