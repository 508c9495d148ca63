//! What other threads tell a queue thread: the session (call descriptor, enable, stop) and gates (a held write may try
//! again). One eventfd wakes it, on the same ring that its I/O is on.

use blkmark_bitmap::Verdict;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// One message.
pub(super) enum Message {
    /// Signal completions there from now on.
    Call(Option<OwnedFd>),
    /// Take requests, or leave them in the ring.
    Enabled(bool),
    /// What becomes of the held write in this place.
    Decided(usize, Verdict),
    /// Finish what is in flight, then end.
    Stop,
}

/// A queue thread's inbox.
pub(super) struct Inbox {
    messages: Mutex<Vec<Message>>,
    wake: EventFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { messages: Mutex::default(), wake: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)? })
    }

    /// What to watch for messages.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn send(&self, message: Message) {
        let mut messages = self.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        messages.push(message);
        // Nobody reads the eventfd, its signal alone counts. Its counter takes 2^64 of them.
        let _ = self.wake.write(1);
    }

    /// Takes all messages, in the order in which they came.
    pub(super) fn take(&self) -> Vec<Message> {
        std::mem::take(&mut *self.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }
}
