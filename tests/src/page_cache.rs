//! What of a file or block device is in the host's page cache.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::null_mut;

use anyhow::{Context, Result, ensure};

const PAGE: usize = 4096;

/// How many of its bytes are. Nothing is read.
pub fn cached_bytes(path: &Path) -> Result<u64> {
    let mut file = File::open(path)?;
    let len = file.seek(SeekFrom::End(0))? as usize;
    ensure!(len > 0, "{} is empty", path.display());
    // SAFETY: a new mapping, at an address of the kernel's choice, which nobody looks into.
    let mapping = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    ensure!(mapping != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    let mut pages = vec![0_u8; len.div_ceil(PAGE)];
    // SAFETY: the range is the mapping, and there is a byte for each of its pages.
    let result = unsafe { libc::mincore(mapping, len, pages.as_mut_ptr()) };
    let result = if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    // SAFETY: the whole mapping, to which there is no reference.
    unsafe { libc::munmap(mapping, len) };
    result.context("mincore")?;
    Ok((pages.iter().filter(|page| **page & 1 == 1).count() * PAGE) as u64)
}
