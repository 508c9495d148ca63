//! Events: told once by whoever has something to tell, heard by every client and in-process subscriber.
//!
//! [`Events::emit`] is called from job threads and queue threads, so it never blocks on a reader: each has a bounded
//! queue, and one that does not read is disconnected. All hear events in the same order.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use serde_json::Value;

use super::outbox::{End, Link, Outbox};
use super::{lock, wire};

/// One event, as an in-process subscriber gets it.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, for instance `JOB_STATUS_CHANGE`.
    pub name: String,
    /// Its data; null where the event has none.
    pub data: Value,
}

#[derive(Default)]
struct Hearers {
    clients: Vec<Weak<Link>>,
    subscribers: Vec<Weak<Outbox<Event>>>,
}

/// The place where events are told. Cheap to clone: all clones are the same place.
#[derive(Clone, Default)]
pub struct Events {
    hearers: Arc<Mutex<Hearers>>,
}

impl Events {
    /// A place with no hearers yet.
    pub fn new() -> Events {
        Events::default()
    }

    /// Tells everybody, with the wall clock's time. Never waits for a hearer.
    pub fn emit(&self, name: &str, data: Value) {
        // The stamp is taken and the event queued under one lock: everyone sees one order, with times that agree.
        let mut hearers = lock(&self.hearers);
        let event = Event { name: name.to_owned(), data };
        let bytes: Arc<[u8]> = wire::line(&wire::event(&event.name, event.data.clone())).into();
        let size = bytes.len();
        hearers.clients.retain(|client| client.upgrade().is_some_and(|link| push(&link, &bytes)));
        let event = Arc::new(event);
        hearers.subscribers.retain(|hearer| {
            hearer.upgrade().is_some_and(|outbox| outbox.push_event(Arc::clone(&event), size).is_ok())
        });
        tracing::debug!(event = name, "event");
    }

    /// Hears all events from now on, in this process. The queue is bounded like a client's.
    pub fn subscribe(&self) -> Subscription {
        let outbox = Arc::new(Outbox::new(true));
        lock(&self.hearers).subscribers.push(Arc::downgrade(&outbox));
        Subscription { outbox }
    }

    pub(super) fn add_client(&self, link: &Arc<Link>) {
        let mut hearers = lock(&self.hearers);
        hearers.clients.retain(|client| client.strong_count() > 0);
        hearers.clients.push(Arc::downgrade(link));
    }
}

/// Queues an event to a client; one that does not read its events is disconnected. False: it is gone.
fn push(link: &Link, bytes: &Arc<[u8]>) -> bool {
    match link.outbox.push_event(Arc::clone(bytes), bytes.len()) {
        Ok(()) => true,
        Err(End::Closed) => false,
        Err(End::Overflowed) => {
            tracing::warn!("a control client did not read its events and was disconnected");
            link.hang_up();
            false
        }
    }
}

/// The subscriber let more events pile up than its queue holds, and hears no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too many events piled up unread")]
pub struct SubscriptionEnd;

/// An in-process hearer of events; dropping it ends the subscription.
pub struct Subscription {
    outbox: Arc<Outbox<Event>>,
}

impl Subscription {
    /// The next event, or `None` when there was none within `limit`.
    pub fn next_within(&self, limit: Duration) -> Result<Option<Event>, SubscriptionEnd> {
        match self.outbox.pop_within(limit) {
            Ok(event) => Ok(event.map(Arc::unwrap_or_clone)),
            Err(End::Closed | End::Overflowed) => Err(SubscriptionEnd),
        }
    }

    /// The next event for which `wanted` holds, or `None` when there was none within `limit`; the others are passed
    /// over.
    pub fn wait(
        &self,
        limit: Duration,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> Result<Option<Event>, SubscriptionEnd> {
        let give_up = std::time::Instant::now() + limit;
        loop {
            let left = give_up.saturating_duration_since(std::time::Instant::now());
            match self.next_within(left)? {
                None => return Ok(None),
                Some(event) if wanted(&event) => return Ok(Some(event)),
                Some(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_subscriber_hears_every_event_in_order() {
        let events = Events::new();
        let (one, two) = (events.subscribe(), events.clone().subscribe());
        for number in 0..10 {
            events.emit("TICK", json!({ "n": number }));
        }
        for hearer in [one, two] {
            for number in 0..10 {
                let event = hearer.next_within(Duration::ZERO).unwrap().unwrap();
                assert_eq!(event, Event { name: "TICK".into(), data: json!({ "n": number }) });
            }
            assert_eq!(hearer.next_within(Duration::ZERO), Ok(None));
        }
    }

    #[test]
    fn a_subscriber_that_never_reads_is_ended_and_holds_nobody_up() {
        let events = Events::new();
        let (idle, busy) = (events.subscribe(), events.subscribe());
        for number in 0..5000 {
            events.emit("TICK", json!(number));
            assert_eq!(busy.next_within(Duration::ZERO).unwrap().unwrap().data, json!(number));
        }
        assert_eq!(idle.next_within(Duration::ZERO), Err(SubscriptionEnd));
    }
}
