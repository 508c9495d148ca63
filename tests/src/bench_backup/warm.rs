//! Memory that the machine has to get from its host first.
//!
//! In a virtual machine whose host gives memory at first use, and takes back what is free, a page costs microseconds to
//! milliseconds when it is touched again, and all that other processors wait for meanwhile costs as much. That is the host's affair,
//! and hits whichever contender comes to such pages.

use std::io;
use std::ptr::null_mut;

use anyhow::{Result, ensure};

/// Takes so many bytes of memory, all of which the host has to give, and gives them back.
pub fn warm(bytes: u64) -> Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
    // SAFETY: a new mapping, at an address of the kernel's choice, which nobody looks into.
    let memory = unsafe { libc::mmap(null_mut(), bytes as usize, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    ensure!(memory != libc::MAP_FAILED, "no {bytes} bytes of memory to warm: {}", io::Error::last_os_error());
    // SAFETY: the whole mapping, to which there is no reference.
    unsafe { libc::munmap(memory, bytes as usize) };
    Ok(())
}
