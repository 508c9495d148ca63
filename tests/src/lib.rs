//! The harness in which the promises of blkmark are tested with real parts.
//!
//! A test reads like a story: make a [`lab::Lab`], start a [`daemon::Daemon`] over its disks, attach a
//! [`guest::Guest`] (Linux under QEMU) or another front end, write, give orders over [`qmp::Qmp`], compare. The tests
//! live in `tests/tests/`, one file a promise. `qemu-storage-daemon` can stand where blkmark stands: it speaks the
//! same two protocols, so what a test believes about them is checked against it.
//!
//! Nothing here skips: what is missing on the machine ends a test at once with the name of the missing part.

pub mod bench;
pub mod bench_backup;
pub mod beside;
pub mod blkio_client;
pub mod daemon;
pub mod ext4;
pub mod guest;
pub mod images;
pub mod lab;
pub mod loop_device;
pub mod loop_fs;
pub mod numbers;
pub mod page_cache;
pub mod process;
pub mod qmp;
pub mod random;
pub mod small_fs;
pub mod tools;
pub mod torture;
pub mod versions;
