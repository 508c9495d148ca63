//! What the process gives up once it serves, so that whoever takes it over through a hostile guest gets little for it.
//!
//! The daemon calls [`apply`] once, before anything is opened and before the first thread: threads inherit both
//! parts. `system_calls` is a list of what may be asked of the kernel at all (seccomp), `files` says which files and ports
//! (landlock). Neither part suffices alone: operations that go through io_uring are not system calls, so seccomp does not see
//! them, and landlock knows nothing of ptrace, modules or raw sockets.
//!
//! Invariant: nothing here ends a process that serves guests. What is not allowed is an error of that one call (EPERM, EACCES,
//! EXDEV), and what the kernel does not have is said and gone without.

mod files;
mod system_calls;

use blkmark_backup::control::{Confinement, Sandbox};
use std::path::PathBuf;

/// What to give up, and what has to remain.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// Limit the system calls.
    pub seccomp: bool,
    /// Limit files, ports, and whom one may signal.
    pub landlock: bool,
    /// Somebody may order connections: sockets of the Internet are allowed.
    pub network: bool,
    /// Directories beneath which clients may name files. Empty: anywhere, and then landlock leaves all of the file system, but
    /// no way to execute a file or to make devices, pipes and links.
    pub roots: Vec<PathBuf>,
    /// Directories in which the daemon itself makes files.
    pub directories: Vec<PathBuf>,
    /// Single files that the daemon reads and writes.
    pub files: Vec<PathBuf>,
    /// Sockets that are made, and removed at the end.
    pub sockets: Vec<PathBuf>,
}

/// Gives it all up, for this thread and those it will start. What could not be done is logged and told.
pub fn apply(rules: &Rules) -> Sandbox {
    let mut sandbox = Sandbox::default();
    if rules.landlock {
        sandbox.landlock = files::restrict(rules).unwrap_or_else(|error| {
            tracing::warn!(%error, "landlock is not in force");
            Confinement::Unavailable
        });
    }
    if rules.seccomp {
        sandbox.seccomp = match system_calls::restrict(rules.network) {
            Ok(()) => Confinement::On,
            Err(error) => {
                tracing::warn!(%error, "seccomp is not in force");
                Confinement::Unavailable
            }
        };
    }
    if threads() > 1 && rules.landlock {
        tracing::warn!("other threads run already: landlock does not limit them");
        sandbox.landlock = sandbox.landlock.min(Confinement::Partial);
    }
    tracing::debug!(seccomp = sandbox.seccomp.name(), landlock = sandbox.landlock.name(), "locked down");
    sandbox
}

/// Threads of this process; 1 if nobody can tell.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}
