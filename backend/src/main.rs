//! The daemon and its clients.
fn main() {}
