//! The error a command answers with: a class that programs match, and a text that people (and scripts) read.
//!
//! Made by every command, put on the wire by `session`, made again from the wire by [`super::client`].

use std::fmt;

use serde_json::{Value, json};

/// QEMU's error classes. Everything new is a `GenericError`; the others are kept for old clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorClass {
    /// Anything without a class of its own.
    GenericError,
    /// No such command, or not before (or again after) negotiation.
    CommandNotFound,
    /// A block job that does not run.
    DeviceNotActive,
    /// A device that does not exist, where QEMU says so by class.
    DeviceNotFound,
    /// QEMU's class for a missing capability of KVM: never sent here, known so that no reply is misread.
    KVMMissingCap,
}

impl ErrorClass {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
            ErrorClass::KVMMissingCap => "KVMMissingCap",
        }
    }

    /// The class of a name on the wire; a class unknown here is a `GenericError`, as QMP's rules for clients say.
    pub fn from_wire(name: &str) -> ErrorClass {
        match name {
            "CommandNotFound" => ErrorClass::CommandNotFound,
            "DeviceNotActive" => ErrorClass::DeviceNotActive,
            "DeviceNotFound" => ErrorClass::DeviceNotFound,
            "KVMMissingCap" => ErrorClass::KVMMissingCap,
            _ => ErrorClass::GenericError,
        }
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a command was refused, or why it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// What programs match.
    pub class: ErrorClass,
    /// What people read: one line, in QEMU's words where QEMU has the case.
    pub desc: String,
}

impl QmpError {
    /// An error of the class that fits nearly everything.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// An error of class CommandNotFound.
    pub fn command_not_found(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }

    /// An error of class DeviceNotActive.
    pub fn device_not_active(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::DeviceNotActive, desc: desc.into() }
    }

    /// An error of class DeviceNotFound.
    pub fn device_not_found(desc: impl Into<String>) -> QmpError {
        QmpError { class: ErrorClass::DeviceNotFound, desc: desc.into() }
    }

    /// The value of the member `error` in a reply.
    pub fn to_wire(&self) -> Value {
        json!({ "class": self.class.as_str(), "desc": self.desc })
    }

    /// Reads the member `error` of a reply; what lacks a text is shown as it came.
    pub fn from_wire(value: &Value) -> QmpError {
        let text = |name: &str| value.get(name).and_then(Value::as_str);
        QmpError {
            class: ErrorClass::from_wire(text("class").unwrap_or_default()),
            desc: text("desc").map_or_else(|| value.to_string(), str::to_owned),
        }
    }
}
