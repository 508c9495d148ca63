//! Objects that other commands name: TLS credentials of the NBD server, `object-add` and `object-del` with QEMU's members.
//!
//! Certificates are read when the object is added; a server that was started with them keeps what was read. Invariant:
//! what is in the list can be used.

use super::exports::beneath;
use super::{Control, done};
use crate::job::well_formed;
use crate::nbd::TlsCredentials;
use crate::qmp::{Arguments, QmpError};
use crate::target::os_text;
use serde_json::Value;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The credentials, by id.
#[derive(Default)]
pub(super) struct Objects(Mutex<Vec<(String, TlsCredentials)>>);

impl Objects {
    fn list(&self) -> MutexGuard<'_, Vec<(String, TlsCredentials)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The credentials of this id.
    pub(super) fn credentials(&self, id: &str) -> Result<TlsCredentials, QmpError> {
        let list = self.list();
        let found = list.iter().find(|(other, _)| other == id);
        found.map_or_else(
            || Err(QmpError::generic(format!("No TLS credentials with id '{id}'"))),
            |(_, found)| Ok(found.clone()),
        )
    }
}

fn duplicate(id: &str) -> QmpError {
    QmpError::generic(format!("attempt to add duplicate property '{id}' to object (type 'container')"))
}

pub(super) fn add(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    arguments.choice("qom-type", &[("tls-creds-x509", ())])?;
    let id = arguments.string("id")?;
    let verify_peer = arguments.opt_bool("verify-peer")?.unwrap_or(true);
    let directory = arguments.opt_string("dir")?;
    let server = arguments.opt_choice("endpoint", &[("client", false), ("server", true)])?.unwrap_or(false);
    arguments.finish()?;
    if !well_formed(&id) {
        return Err(QmpError::generic("Parameter 'id' expects an identifier"));
    }
    let directory = directory.ok_or_else(|| QmpError::generic("Missing 'dir' property value"))?;
    if !server {
        return Err(QmpError::generic("Only credentials with \"endpoint\": \"server\" are supported"));
    }
    if control.objects.list().iter().any(|(other, _)| *other == id) {
        return Err(duplicate(&id));
    }
    let (way, _directory) = beneath(Path::new(&directory), &control.policy())
        .map_err(|error| QmpError::generic(format!("Unable to access credentials {directory}: {}", os_text(&error))))?;
    let credentials =
        TlsCredentials::load(&way, verify_peer).map_err(|error| QmpError::generic(format!("{error} ({directory})")))?;
    let mut list = control.objects.list();
    if list.iter().any(|(other, _)| *other == id) {
        return Err(duplicate(&id));
    }
    list.push((id, credentials));
    done()
}

pub(super) fn delete(control: &Control, mut arguments: Arguments) -> Result<Value, QmpError> {
    let id = arguments.string("id")?;
    arguments.finish()?;
    let mut list = control.objects.list();
    let at = list.iter().position(|(other, _)| *other == id);
    let at = at.ok_or_else(|| QmpError::generic(format!("object '{id}' not found")))?;
    list.remove(at);
    done()
}
