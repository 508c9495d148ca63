//! The life of a job as two tables: which state may follow which, and which command a state accepts.
//!
//! Both are QEMU's but for `retry`, which it has not; consulted by `registry` alone and printed in docs/jobs.md. A backup never is `ready` or `standby`;
//! they are here since clients know the tables as a whole.

use std::fmt;

/// Where a job is in its life. The names are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Not there yet; never shown.
    Undefined,
    /// Made, not begun.
    Created,
    /// At work.
    Running,
    /// At rest, by command or after an error that `stop` was asked for.
    Paused,
    /// Done but for an order to complete (jobs that mirror).
    Ready,
    /// `Ready`, and paused.
    Standby,
    /// Its work is done and durable; others of its transaction are not there yet.
    Waiting,
    /// All of its transaction have done their work; only finalizing is left.
    Pending,
    /// Failed or cancelled, on its way out.
    Aborting,
    /// Over, with its result to be read.
    Concluded,
    /// Gone.
    Null,
}

/// What a command asks of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// End it as a failure.
    Cancel,
    /// Rest.
    Pause,
    /// Go on.
    Resume,
    /// Bound the bytes a second.
    SetSpeed,
    /// End a job that is ready.
    Complete,
    /// Make the result stand.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
    /// Begin a concluded job again whose point in time was kept.
    Retry,
    /// Change its options.
    Change,
}

use Status::{Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting};

/// What may follow.
const FOLLOWERS: [(Status, &[Status]); 11] = [
    (Undefined, &[Created]),
    (Created, &[Running, Aborting, Null]),
    (Running, &[Paused, Ready, Waiting, Aborting]),
    (Paused, &[Running]),
    (Ready, &[Standby, Waiting, Aborting]),
    (Standby, &[Ready]),
    (Waiting, &[Pending, Aborting]),
    (Pending, &[Aborting, Concluded]),
    (Aborting, &[Aborting, Concluded]),
    (Concluded, &[Created, Null]),
    (Null, &[]),
];

/// States in which a job can be steered.
const ALIVE: &[Status] = &[Created, Running, Paused, Ready, Standby];

/// Where a command is accepted.
const ACCEPTED_IN: [(Verb, &[Status]); 9] = [
    (Verb::Cancel, &[Created, Running, Paused, Ready, Standby, Waiting, Pending]),
    (Verb::Pause, ALIVE),
    (Verb::Resume, ALIVE),
    (Verb::SetSpeed, ALIVE),
    (Verb::Complete, &[Ready]),
    (Verb::Finalize, &[Pending]),
    (Verb::Dismiss, &[Concluded]),
    (Verb::Retry, &[Concluded]),
    (Verb::Change, ALIVE),
];

impl Status {
    /// All of them, in the order of the tables.
    pub fn all() -> impl Iterator<Item = Status> {
        FOLLOWERS.iter().map(|(status, _)| *status)
    }

    /// QEMU's name.
    pub const fn name(self) -> &'static str {
        match self {
            Undefined => "undefined",
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        }
    }

    /// Whether `next` may follow.
    pub fn may_become(self, next: Status) -> bool {
        FOLLOWERS.iter().any(|(status, followers)| *status == self && followers.contains(&next))
    }

    /// Whether a job in this state accepts `verb`.
    pub fn accepts(self, verb: Verb) -> bool {
        ACCEPTED_IN.iter().any(|(v, states)| *v == verb && states.contains(&self))
    }
}

impl Verb {
    /// All of them, in the order of the table.
    pub fn all() -> impl Iterator<Item = Verb> {
        ACCEPTED_IN.iter().map(|(verb, _)| *verb)
    }

    /// QEMU's name, where QEMU has it.
    pub const fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
            Verb::Retry => "retry",
            Verb::Change => "change",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, cells: impl Iterator<Item = bool>) -> String {
        let cells: Vec<&str> = cells.map(|yes| if yes { "x" } else { " " }).collect();
        format!("| {name} | {} |\n", cells.join(" | "))
    }

    fn table(corner: &str, rows: impl Iterator<Item = String>) -> String {
        let heads: Vec<&str> = Status::all().map(Status::name).collect();
        let mut text = format!("| {corner} | {} |\n|{}\n", heads.join(" | "), "---|".repeat(heads.len() + 1));
        text.extend(rows);
        text
    }

    /// The promise to readers of the docs: what is printed there is what is consulted here, cell by cell.
    #[test]
    fn the_docs_show_both_tables_whole() {
        let docs = include_str!("../../../docs/jobs.md");
        let transitions = table(
            "from \\ to",
            Status::all().map(|from| row(from.name(), Status::all().map(move |to| from.may_become(to)))),
        );
        assert!(docs.contains(&transitions), "docs/jobs.md should contain:\n{transitions}");
        let verbs = table(
            "verb \\ state",
            Verb::all().map(|verb| row(verb.name(), Status::all().map(move |status| status.accepts(verb)))),
        );
        assert!(docs.contains(&verbs), "docs/jobs.md should contain:\n{verbs}");
    }

    #[test]
    fn every_way_leads_to_null() {
        for status in Status::all() {
            let mut reached = vec![status];
            let mut i = 0;
            while i < reached.len() {
                let here = reached[i];
                reached
                    .extend(Status::all().filter(|s| here.may_become(*s) && !reached.contains(s)).collect::<Vec<_>>());
                i += 1;
            }
            assert!(reached.contains(&Null), "{status} leads nowhere");
        }
    }

    #[test]
    fn nothing_can_be_asked_of_a_job_that_is_aborting_or_gone() {
        for verb in Verb::all() {
            assert!(![Undefined, Aborting, Null].iter().any(|status| status.accepts(verb)), "{verb}");
        }
    }
}
