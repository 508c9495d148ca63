//! Who uses a target node: at most one overlay or one job at a time.

use super::nodes::TargetNode;
use crate::job::Kind;
use crate::qmp::QmpError;
use std::sync::{Arc, Mutex, MutexGuard};

/// What somebody does with a node, as error texts put it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// A job writes to it.
    Job,
    /// A job reads it.
    Populate,
    /// It is the `file` of the node of this name.
    FileOf(String),
}

/// The place where the user is noted.
#[derive(Debug, Default)]
pub(super) struct Claims(Mutex<Option<Use>>);

impl Claims {
    fn user(&self) -> MutexGuard<'_, Option<Use>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Who uses it.
    pub(super) fn current(&self) -> Option<Use> {
        self.user().clone()
    }
}

/// The right to use a node; given back when dropped.
#[derive(Debug)]
pub(super) struct Claim(Arc<TargetNode>);

impl Claim {
    /// Refused in QEMU's words while somebody else has it.
    pub(super) fn take(node: &Arc<TargetNode>, purpose: Use) -> Result<Self, QmpError> {
        let mut user = node.claims.user();
        if let Some(other) = &*user {
            return Err(busy(&node.name, other));
        }
        *user = Some(purpose);
        drop(user);
        Ok(Self(Arc::clone(node)))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        *self.0.claims.user() = None;
    }
}

pub(super) fn busy(name: &str, user: &Use) -> QmpError {
    QmpError::generic(match user {
        Use::Job => format!("Node '{name}' is busy: block device is in use by block job: {}", Kind::Backup.name()),
        Use::Populate => {
            format!("Node '{name}' is busy: block device is in use by block job: {}", Kind::Populate.name())
        }
        Use::FileOf(parent) => format!("Node '{name}' is busy: node is used as 'file' of '{parent}'"),
    })
}
