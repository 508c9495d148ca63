//! How a ring calls the kernel: by the number under which its thread has registered it, where the kernel knows such numbers,
//! which spares each call the look-up of the descriptor and the count of its users.
//!
//! [`super::Engine`] makes one for its ring and is its only user, on one thread: the number is good on that thread alone. The
//! `io-uring` crate has the same, but in a place that lives no longer than a borrow of the ring.
//!
//! Invariant: the registration ends before the ring's descriptor is closed, so the number never names another ring.

use std::io;
use std::os::fd::RawFd;
use std::ptr;

// linux/io_uring.h
const REGISTER_RING_FDS: libc::c_uint = 20;
const UNREGISTER_RING_FDS: libc::c_uint = 21;
const ENTER_GETEVENTS: u32 = 1;
const ENTER_REGISTERED_RING: u32 = 1 << 4;
const ENTER_NO_IOWAIT: u32 = 1 << 7;

/// struct io_uring_rsrc_update
#[repr(C)]
struct Update {
    offset: u32,
    reserved: u32,
    data: u64,
}

/// One ring's way into the kernel.
#[derive(Debug)]
pub(super) struct Entrance {
    ring: RawFd,
    /// Among those that this thread has registered.
    number: Option<u32>,
    /// Whether a wait may be told not to count as one for a disk.
    idle_waits: bool,
}

impl Entrance {
    /// For the ring behind the descriptor `ring`, which stays open until this is dropped. A kernel that does not register
    /// rings is called by the descriptor.
    pub(super) fn new(ring: RawFd, idle_waits: bool) -> Self {
        let mut update = Update { offset: u32::MAX, reserved: 0, data: ring as u64 };
        // SAFETY: an open ring, one update, to which the kernel writes the number that it chose.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_register, ring, REGISTER_RING_FDS, &raw mut update, 1) };
        Self { ring, number: (done == 1).then_some(update.offset), idle_waits }
    }

    /// Hands over `submit` entries and waits for `want` completions; with `events`, those that are due are made although
    /// none are wanted. `idle`: no I/O is under way, so the wait is nobody's wait for a disk.
    ///
    /// # Errors
    /// The kernel's.
    #[inline]
    pub(super) fn enter(&self, submit: u32, want: u32, events: bool, idle: bool) -> io::Result<()> {
        let mut flags = if want > 0 || events { ENTER_GETEVENTS } else { 0 };
        if idle && self.idle_waits {
            flags |= ENTER_NO_IOWAIT;
        }
        let fd = match self.number {
            Some(number) => {
                flags |= ENTER_REGISTERED_RING;
                number as RawFd
            }
            None => self.ring,
        };
        let no_mask: *const libc::sigset_t = ptr::null();
        // SAFETY: the ring is open or registered on this thread (see the invariant), and no signal mask is given. What the
        // entries point to is the affair of whoever pushed them.
        let done = unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, submit, want, flags, no_mask, 0usize) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let update = Update { offset: number, reserved: 0, data: 0 };
        // SAFETY: the ring is still open, and the update names the number that was given for it. Should it fail, the
        // registration ends with the thread.
        unsafe { libc::syscall(libc::SYS_io_uring_register, self.ring, UNREGISTER_RING_FDS, &raw const update, 1) };
    }
}
