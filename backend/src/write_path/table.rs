//! The requests of one queue that are in flight: as many places as the ring has entries, all made at the start.
//!
//! A place keeps all that the kernel was given pointers to, and the view of guest memory those point into, so that
//! a request in flight owns its memory map whatever the front end does meanwhile.

use super::stage::Stage;
use crate::device::request::Request;
use crate::memory::view::View;
use libc::iovec;
use std::rc::Rc;
use std::time::Instant;

/// One request in flight.
pub(super) struct Place {
    pub(super) head: u16,
    /// There from the moment the place is taken until it is given back.
    pub(super) request: Option<Request>,
    pub(super) iovecs: Vec<iovec>,
    pub(super) memory: Option<Rc<View>>,
    pub(super) stage: Stage,
    /// Whether it stands in the tracker's in-flight slot of the same number.
    pub(super) registered: bool,
    /// When it was taken from the ring, while somebody watches the disk's pulse.
    pub(super) begun: Option<Instant>,
}

/// All places of one queue.
pub(super) struct Table {
    places: Vec<Place>,
    free: Vec<usize>,
}

impl Table {
    pub(super) fn new(size: usize) -> Self {
        let place = || Place {
            head: 0,
            request: None,
            iovecs: Vec::with_capacity(8),
            memory: None,
            stage: Stage::idle(),
            registered: false,
            begun: None,
        };
        Self { places: std::iter::repeat_with(place).take(size).collect(), free: (0..size).rev().collect() }
    }

    /// A free place, which is taken only by [`Table::take`].
    pub(super) fn free(&self) -> Option<usize> {
        self.free.last().copied()
    }

    /// Takes the place that [`Table::free`] named.
    pub(super) fn take(&mut self) {
        self.free.pop();
    }

    /// Gives a place back.
    pub(super) fn release(&mut self, index: usize) {
        let place = &mut self.places[index];
        place.request = None;
        place.memory = None;
        place.registered = false;
        place.begun = None;
        place.iovecs.clear();
        place.stage.end();
        self.free.push(index);
    }

    /// Requests in flight.
    pub(super) fn in_flight(&self) -> usize {
        self.places.len() - self.free.len()
    }

    pub(super) fn place(&mut self, index: usize) -> &mut Place {
        &mut self.places[index]
    }
}
