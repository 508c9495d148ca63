//! Answering: the status, the used ring in batches, the signal.
//!
//! An answer is written behind the used index and shown with the others of its round: one store of the index, one batch in
//! the inflight region, one look at whether the guest wants a signal.

use super::QueueThread;
use crate::device::request::{self as device, StatusPlace};
use std::convert::Infallible;

impl QueueThread {
    /// The request is over: status, slot, used ring, place.
    pub(super) fn finish(&mut self, index: usize, code: u8) {
        let place = self.table.place(index);
        let (head, registered) = (place.head, place.registered);
        if let Some(begun) = place.begun {
            self.shared.disk.guest_pulse().end(self.index, begun);
        }
        // The view goes with this place, after the status.
        if let (Some(request), Some(_view)) = (place.request.take(), place.memory.take()) {
            let status: StatusPlace = request.status;
            // SAFETY: the place has kept the view that the request was parsed with.
            unsafe { status.write(code) };
            if registered {
                self.lane.finish(index);
            }
            let used_len = if code == device::OK { request.used_len } else { 1 };
            self.answer(head, used_len);
        }
        self.table.release(index);
    }

    /// Writes a chain's answer into the used ring, where the guest does not see it yet.
    pub(super) fn answer(&mut self, head: u16, used_len: u32) {
        // No more entries may wait than the ring has; a guest that makes one head available again and again can ask for it.
        if self.unshown.len() >= usize::from(self.ring.size()) {
            self.publish();
        }
        self.ring.push(head, used_len);
        self.unshown.push(head);
    }

    /// Shows all answers to the guest: a batch for it and for the inflight region.
    fn publish(&mut self) {
        if self.unshown.is_empty() {
            return;
        }
        let ring = &mut self.ring;
        let mut show = || Ok::<u16, Infallible>(ring.publish());
        let Ok(_) = match &mut self.inflight {
            Some(inflight) => inflight.answer(&self.unshown, show),
            None => show(),
        };
        self.unshown.clear();
        self.shown = true;
    }

    /// Shows all answers, and tells the guest once for all of them, if it wants to be told.
    pub(super) fn show(&mut self) {
        self.publish();
        if std::mem::take(&mut self.shown) && self.ring.needs_signal() {
            self.notify_guest();
        }
    }

    /// In a long round the guest gets on meanwhile.
    #[inline]
    pub(super) fn show_if_many(&mut self) {
        if self.unshown.len() >= self.show_at {
            self.show();
        }
    }

    pub(super) fn notify_guest(&self) {
        if let Some(call) = &self.call {
            // Full means that the guest has not looked at the last 2^64 signals: it will see this one with them.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}
