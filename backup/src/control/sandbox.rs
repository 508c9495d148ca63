//! What the process has given up since its start, as `query-sandbox` tells it. The daemon does it; here it is only told.

use super::Control;
use crate::qmp::{Arguments, QmpError};
use serde_json::{Value, json};

/// How far one part of the sandbox is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confinement {
    /// The operator turned it off.
    #[default]
    Off,
    /// The kernel does not have it, or does not let us.
    Unavailable,
    /// In force, as far as an older kernel can.
    Partial,
    /// In force.
    On,
}

impl Confinement {
    /// As it is told.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Unavailable => "unavailable",
            Self::Partial => "partial",
            Self::On => "on",
        }
    }

    /// All names.
    pub(super) const NAMES: &[&str] = &["off", "unavailable", "partial", "on"];
}

/// Both parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sandbox {
    /// Limits the system calls.
    pub seccomp: Confinement,
    /// Limits files and ports.
    pub landlock: Confinement,
}

pub(super) fn query(control: &Control, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    let Sandbox { seccomp, landlock } = control.settings.sandbox;
    let beneath = if control.settings.roots.is_empty() { "anywhere" } else { "allowed-paths" };
    Ok(json!({ "seccomp": seccomp.name(), "landlock": landlock.name(), "paths": beneath }))
}
