//! What waits to be sent to one client: its replies, and the events it has yet to read.
//!
//! Filled by the client's session (replies) and by [`super::event::Events`] (events), emptied by the client's writer
//! thread or by an in-process subscriber. Invariants: adding an event never blocks; what is queued is bounded; lines
//! leave in the order in which they came. A client that lets its events pile up is dropped, since losing single
//! events would let it wait forever for one that was sent; a client that does not read its replies only stalls itself.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::lock;

/// Events that may wait for one client.
pub(super) const MAX_EVENTS: usize = 1024;
/// Bytes of events that may wait for one client, and bytes of replies after which its commands wait.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// How a queue ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Nothing more will come.
    Closed,
    /// The reader let too many events pile up.
    Overflowed,
}

struct Queued<T: ?Sized> {
    line: Arc<T>,
    size: usize,
    is_event: bool,
}

struct State<T: ?Sized> {
    queue: VecDeque<Queued<T>>,
    events: usize,
    event_bytes: usize,
    reply_bytes: usize,
    listening: bool,
    end: Option<End>,
}

/// A bounded queue of lines. `T` is bytes for a client and an event for an in-process subscriber.
pub(super) struct Outbox<T: ?Sized> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

impl<T: ?Sized> Outbox<T> {
    /// An empty outbox; events are taken only once it listens.
    pub(super) fn new(listening: bool) -> Outbox<T> {
        let state = State { queue: VecDeque::new(), events: 0, event_bytes: 0, reply_bytes: 0, listening, end: None };
        Outbox { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Queues an event without ever waiting. An error: this outbox has ended and need not be told of any more.
    pub(super) fn push_event(&self, line: Arc<T>, size: usize) -> Result<(), End> {
        let mut state = lock(&self.state);
        if let Some(end) = state.end {
            return Err(end);
        }
        if !state.listening {
            return Ok(());
        }
        if state.events >= MAX_EVENTS || state.event_bytes + size > MAX_BYTES {
            state.end = Some(End::Overflowed);
            self.changed.notify_all();
            return Err(End::Overflowed);
        }
        state.events += 1;
        state.event_bytes += size;
        state.queue.push_back(Queued { line, size, is_event: true });
        self.changed.notify_all();
        Ok(())
    }

    /// The next line. What was queued before a close still comes; an overflow ends at once.
    pub(super) fn pop(&self) -> Result<Arc<T>, End> {
        loop {
            match self.pop_until(None) {
                Ok(Some(line)) => return Ok(line),
                Ok(None) => {}
                Err(end) => return Err(end),
            }
        }
    }

    /// As [`Outbox::pop`], or `None` when nothing came within `limit`.
    pub(super) fn pop_within(&self, limit: Duration) -> Result<Option<Arc<T>>, End> {
        self.pop_until(Instant::now().checked_add(limit))
    }

    fn pop_until(&self, deadline: Option<Instant>) -> Result<Option<Arc<T>>, End> {
        let mut state = lock(&self.state);
        loop {
            if state.end == Some(End::Overflowed) {
                state.queue = VecDeque::new();
                return Err(End::Overflowed);
            }
            if let Some(queued) = state.queue.pop_front() {
                if queued.is_event {
                    state.events -= 1;
                    state.event_bytes -= queued.size;
                } else {
                    state.reply_bytes -= queued.size;
                }
                self.changed.notify_all();
                return Ok(Some(queued.line));
            }
            if let Some(end) = state.end {
                return Err(end);
            }
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(None);
                    }
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    /// Takes no more; what is queued can still be popped.
    pub(super) fn close(&self) {
        lock(&self.state).end.get_or_insert(End::Closed);
        self.changed.notify_all();
    }

    /// Takes no more and forgets what is queued: the client is gone.
    pub(super) fn abandon(&self) {
        let mut state = lock(&self.state);
        state.end.get_or_insert(End::Closed);
        state.queue = VecDeque::new();
        self.changed.notify_all();
    }
}

impl Outbox<[u8]> {
    /// Queues a reply, and waits while earlier ones take too much. False: the client is gone.
    ///
    /// With `then_listen`, events are taken from this reply on: no event comes before it, and none that happens after
    /// the client has read it is missed.
    pub(super) fn push_reply(&self, line: Arc<[u8]>, then_listen: bool) -> bool {
        self.push_reply_and(line, then_listen, Vec::new)
    }

    /// The same, and right behind the reply what `first` gives: it is asked at the instant from which on events are taken.
    pub(super) fn push_reply_and(
        &self,
        line: Arc<[u8]>,
        then_listen: bool,
        first: impl FnOnce() -> Vec<Arc<[u8]>>,
    ) -> bool {
        let mut state = lock(&self.state);
        while state.end.is_none() && state.reply_bytes >= MAX_BYTES {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.end.is_some() {
            return false;
        }
        state.listening |= then_listen;
        // They are bounded like replies: the client's commands wait until it has read them.
        for line in std::iter::once(line).chain(first()) {
            let size = line.len();
            state.reply_bytes += size;
            state.queue.push_back(Queued { line, size, is_event: false });
        }
        self.changed.notify_all();
        true
    }
}

/// A client's connection and what waits to be sent over it.
pub(super) struct Link {
    pub(super) outbox: Outbox<[u8]>,
    pub(super) stream: UnixStream,
}

impl Link {
    /// A link that takes replies, and events once its outbox listens.
    pub(super) fn new(stream: UnixStream) -> Link {
        Link { outbox: Outbox::new(false), stream }
    }

    /// Ends the connection at once: wakes whoever reads, writes or waits on it. Never blocks.
    pub(super) fn hang_up(&self) {
        self.outbox.abandon();
        // It fails if the client was faster.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_lets_events_pile_up_is_ended_and_the_emitter_never_waits() {
        let outbox = Outbox::new(true);
        for _ in 0..MAX_EVENTS {
            assert_eq!(outbox.push_event(Arc::new(0), 1), Ok(()));
        }
        assert_eq!(outbox.push_event(Arc::new(0), 1), Err(End::Overflowed));
        assert_eq!(outbox.pop().unwrap_err(), End::Overflowed);
    }

    #[test]
    fn large_events_are_bounded_by_their_bytes() {
        let outbox = Outbox::new(true);
        assert_eq!(outbox.push_event(Arc::new(0), MAX_BYTES), Ok(()));
        assert_eq!(outbox.push_event(Arc::new(0), 1), Err(End::Overflowed));
    }

    fn reply(length: usize) -> Arc<[u8]> {
        vec![b'r'; length].into()
    }

    #[test]
    fn what_was_queued_before_a_close_is_still_delivered() {
        let outbox = Outbox::<[u8]>::new(false);
        assert_eq!(outbox.push_event(reply(1), 1), Ok(()), "not listening yet: passed over");
        assert!(outbox.push_reply(reply(2), false));
        outbox.close();
        assert!(!outbox.push_reply(reply(3), false));
        assert_eq!(outbox.pop().unwrap().len(), 2);
        assert_eq!(outbox.pop().unwrap_err(), End::Closed);
    }

    #[test]
    fn replies_wait_for_room_and_go_on_when_there_is_some() {
        let outbox = Arc::new(Outbox::<[u8]>::new(false));
        assert!(outbox.push_reply(reply(MAX_BYTES), false));
        let other = Arc::clone(&outbox);
        let pusher = std::thread::spawn(move || other.push_reply(reply(1), false));
        assert_eq!(outbox.pop().unwrap().len(), MAX_BYTES);
        assert!(pusher.join().unwrap());
        assert_eq!(outbox.pop().unwrap().len(), 1);
    }

    #[test]
    fn a_reply_that_waits_for_room_gives_up_when_the_client_is_gone() {
        let outbox = Arc::new(Outbox::<[u8]>::new(false));
        assert!(outbox.push_reply(reply(MAX_BYTES), false));
        let other = Arc::clone(&outbox);
        let pusher = std::thread::spawn(move || other.push_reply(reply(1), false));
        outbox.abandon();
        assert!(!pusher.join().unwrap());
    }

    #[test]
    fn what_is_told_first_comes_between_that_reply_and_the_first_event() {
        let outbox = Outbox::<[u8]>::new(false);
        assert!(outbox.push_reply_and(reply(2), true, || vec![reply(3), reply(4)]));
        assert_eq!(outbox.push_event(reply(5), 5), Ok(()));
        for length in 2..=5 {
            assert_eq!(outbox.pop().unwrap().len(), length);
        }
    }

    #[test]
    fn events_come_from_the_reply_on_that_ends_negotiation() {
        let outbox = Outbox::<[u8]>::new(false);
        assert_eq!(outbox.push_event(reply(1), 1), Ok(()));
        assert!(outbox.push_reply(reply(2), true));
        assert_eq!(outbox.push_event(reply(3), 3), Ok(()));
        assert_eq!(outbox.pop().unwrap().len(), 2);
        assert_eq!(outbox.pop().unwrap().len(), 3);
    }
}
