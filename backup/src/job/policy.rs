//! What becomes of a job when a read or a write fails: `on-source-error` and `on-target-error`.

use std::io;

/// What the client asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The same bytes are tried again at once.
    Ignore,
    /// `Stop` when the target is full, else `Report`.
    Enospc,
    /// The job pauses; resuming it tries the same bytes again.
    Stop,
    /// QEMU's choice for a backup: as `Enospc`.
    Auto,
}

/// What becomes of a failed job's point in time: `on-failure`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// It goes, and the bitmap is as if there had been no job.
    #[default]
    Reclaim,
    /// It stays, with its bitmap frozen, until the job is tried again with success or dismissed.
    Keep,
}

/// What is done about one error; its name is the `action` of BLOCK_JOB_ERROR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// The job fails.
    Report,
    /// Tried again.
    Ignore,
    /// Paused.
    Stop,
}

/// `io-status` of a job, as queries show it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoStatus {
    /// No error stopped it.
    #[default]
    Ok,
    /// An error stopped it.
    Failed,
    /// Lack of space stopped it.
    NoSpace,
}

impl OnError {
    /// What to do about `error`.
    pub fn reaction(self, error: &io::Error) -> Reaction {
        match self {
            OnError::Report => Reaction::Report,
            OnError::Ignore => Reaction::Ignore,
            OnError::Stop => Reaction::Stop,
            OnError::Enospc | OnError::Auto if is_no_space(error) => Reaction::Stop,
            OnError::Enospc | OnError::Auto => Reaction::Report,
        }
    }
}

impl Reaction {
    /// QEMU's name.
    pub const fn name(self) -> &'static str {
        match self {
            Reaction::Report => "report",
            Reaction::Ignore => "ignore",
            Reaction::Stop => "stop",
        }
    }
}

impl IoStatus {
    /// The status that `error` leaves behind.
    pub fn of(error: &io::Error) -> Self {
        if is_no_space(error) { IoStatus::NoSpace } else { IoStatus::Failed }
    }

    /// QEMU's name.
    pub const fn name(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }
}

/// A quota that is used up is lack of space too, for the operator who has to make room.
fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_target_stops_an_enospc_job() {
        let full = io::Error::from_raw_os_error(libc::ENOSPC);
        let broken = io::Error::from_raw_os_error(libc::EIO);
        for policy in [OnError::Enospc, OnError::Auto] {
            assert_eq!(policy.reaction(&full), Reaction::Stop);
            assert_eq!(policy.reaction(&broken), Reaction::Report);
        }
        assert_eq!(OnError::Stop.reaction(&broken), Reaction::Stop);
        assert_eq!(OnError::Ignore.reaction(&full), Reaction::Ignore);
        assert_eq!(OnError::Report.reaction(&full), Reaction::Report);
        assert_eq!((IoStatus::of(&full), IoStatus::of(&broken)), (IoStatus::NoSpace, IoStatus::Failed));
    }
}
