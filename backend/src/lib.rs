//! stub
pub mod frontend;
pub mod device;
pub mod memory;
pub mod session;
