//! stub

pub mod file_lock;
pub mod source;
pub mod target;
