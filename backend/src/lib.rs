//! blkmark: the process that serves disks. See `ARCHITECTURE.md` for the rooms and what may import what.
pub mod cli;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod device;
pub mod disk;
pub mod frontend;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod lockdown;
pub mod memory;
pub mod persistence;
pub mod session;
pub mod vring;
pub mod write_path;
