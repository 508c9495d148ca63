//! What other threads tell a queue thread: the session (call descriptor, enable, stop) and gates (a held write may try
//! again). One eventfd wakes it, on the same ring that its I/O is on.

use blkmark_bitmap::Verdict;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
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
    /// There may be messages: a round without any costs its thread one load.
    waiting: AtomicBool,
    wake: EventFd,
}

impl Inbox {
    pub(super) fn new() -> io::Result<Self> {
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self { messages: Mutex::default(), waiting: AtomicBool::new(false), wake })
    }

    /// What to watch for messages.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    pub(super) fn send(&self, message: Message) {
        let mut messages = self.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        messages.push(message);
        // Before the lock goes and before the signal: whoever is woken finds it set, and who clears it takes the message.
        self.waiting.store(true, Ordering::Release);
        // Nobody reads the eventfd, its signal alone counts. Its counter takes 2^64 of them.
        let _ = self.wake.write(1);
    }

    /// Whether there are messages to take.
    #[inline]
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// Takes all messages, in the order in which they came.
    pub(super) fn take(&self) -> Vec<Message> {
        let mut messages = self.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.waiting.store(false, Ordering::Relaxed);
        std::mem::take(&mut *messages)
    }
}
