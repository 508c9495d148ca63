//! What runs over a disk: points in time, backups, jobs, targets and the control socket.

pub mod file_lock;
pub mod source;
pub mod target;
pub mod buffer;
pub mod cbw;
pub mod copy;
pub mod node;
pub mod point;
pub mod scratch;
pub mod qmp;
pub mod job;
pub mod control;
pub mod nbd;
