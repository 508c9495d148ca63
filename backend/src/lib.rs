//! stub
pub mod frontend;
