//! stub
pub mod frontend;
pub mod config;
pub mod device;
pub mod memory;
pub mod session;
