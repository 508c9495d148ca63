//! What runs over a disk: points in time, backups, jobs, targets and the control socket.

pub mod buffer;
pub mod cbw;
pub mod compare;
pub mod control;
pub mod copy;
pub mod file_lock;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod job;
pub mod nbd;
pub mod node;
pub mod point;
pub mod pulse;
pub mod qmp;
pub mod resume;
pub mod scratch;
pub mod source;
pub mod target;
pub mod turns;
