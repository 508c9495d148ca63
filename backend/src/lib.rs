//! blkmark: the process that serves disks. See `ARCHITECTURE.md` for the rooms and what may import what.
pub mod frontend;
pub mod config;
pub mod device;
pub mod memory;
pub mod session;
pub mod disk;
pub mod write_path;
pub mod cli;
pub mod daemon;
pub mod demo;
