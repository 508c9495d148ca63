//! Files and ports, by landlock.
//!
//! Never granted to anybody: executing, and making device nodes, pipes and symbolic links. Where landlock is in force the kernel
//! refuses mounting and tracing other processes besides. With roots, files are only those that [`Rules`] names; without, all
//! that the user may. What a descriptor was opened for stays possible through it.
//!
//! Asked for is what Linux 6.12 has (ABI 6); an older kernel gets what it knows, and that is told as partial.

use super::Rules;
use blkmark_backup::control::Confinement;
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreated,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use std::path::Path;

const KNOWN: ABI = ABI::V6;

/// What resolving a host name takes, in glibc: its settings, and the libraries that it loads for them.
const NAMES: &[&str] = &[
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/ld.so.cache",
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/run/systemd/resolve",
];

/// What the standard library and glibc look at by the way.
const LOOKED_AT: &[&str] = &["/proc/self", "/proc/sys/kernel/random", "/sys", "/dev/urandom"];

fn never() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{Execute | MakeChar | MakeBlock | MakeFifo | MakeSym})
}

/// Restricts this thread and those that it starts.
pub(super) fn restrict(rules: &Rules) -> Result<Confinement, RulesetError> {
    let all = AccessFs::from_all(KNOWN);
    let mut ruleset = Ruleset::default().handle_access(all)?.scope(Scope::from_all(KNOWN))?;
    if !rules.network {
        ruleset = ruleset.handle_access(AccessNet::from_all(KNOWN))?;
    }
    let mut ruleset = ruleset.create()?;
    let work = all & !never();
    if rules.roots.is_empty() {
        ruleset = grant(ruleset, Path::new("/"), work)?;
    } else {
        let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        for root in &rules.roots {
            if !root.is_dir() {
                tracing::warn!(root = %root.display(), "there is no such directory: nothing beneath it can be used later");
            }
            ruleset = grant(ruleset, root, work)?;
        }
        // Live maps of bitmaps.
        ruleset = grant(ruleset, Path::new("/dev/shm"), work)?;
        for path in rules.directories.iter().chain(&rules.files) {
            ruleset = grant(ruleset, path, work)?;
        }
        for socket in &rules.sockets {
            let parent = socket.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
            ruleset = grant(ruleset, parent, make_bitflags!(AccessFs::{MakeSock | RemoveFile | ReadDir}))?;
        }
        for path in LOOKED_AT {
            ruleset = grant(ruleset, Path::new(path), read)?;
        }
        ruleset = grant(ruleset, Path::new("/dev/null"), read | AccessFs::WriteFile)?;
        for path in NAMES.iter().filter(|_| rules.network) {
            ruleset = grant(ruleset, Path::new(path), read)?;
        }
    }
    Ok(match ruleset.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Confinement::On,
        RulesetStatus::PartiallyEnforced => Confinement::Partial,
        RulesetStatus::NotEnforced => Confinement::Unavailable,
    })
}

/// Allows something beneath a path; what is not there needs no rule.
fn grant(ruleset: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated, RulesetError> {
    let Ok(opened) = PathFd::new(path) else { return Ok(ruleset) };
    // Of a file there are fewer rights, and the others count as not enforced.
    let access = if path.is_dir() { access } else { access & AccessFs::from_file(KNOWN) };
    ruleset.add_rule(PathBeneath::new(opened, access))
}
