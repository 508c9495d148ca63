//! Taking requests from the ring, what an earlier process has left first.

use super::QueueThread;
use crate::device::chain::Chain;
use crate::device::request::{self as device, Bounds, Kind, Parsed};
use crate::memory::MemorySnapshot;
use crate::memory::view::View;
use crate::vring::RingError;
use std::rc::Rc;
use vm_memory::GuestAddressSpace;

impl QueueThread {
    pub(super) fn takes_requests(&self) -> bool {
        self.enabled && !self.stopping && !self.broken
    }

    /// Takes what an earlier process has left, then all that is available, as far as there are places.
    pub(super) fn take_requests(&mut self) {
        // What was taken once is in flight, and finishes also on a ring that is stopped.
        let left_over = !self.resubmit.is_empty() && !self.broken && (self.enabled || self.stopping);
        if !left_over && !self.takes_requests() {
            return;
        }
        let fresh = self.memory.memory();
        if !self.view.is_of(&fresh) {
            self.renew_view(fresh);
        }
        let view = Rc::clone(&self.view);
        if left_over {
            self.take_left_over(&view);
        }
        if !self.takes_requests() {
            return;
        }
        if let Err(error) = self.take_all(&view) {
            self.broken = true;
            self.hangup.hang_up(&format_args!("'{}': the guest's ring makes no sense: {error}", self.shared.id));
        }
    }

    #[cold]
    fn renew_view(&mut self, fresh: MemorySnapshot) {
        let view = Rc::new(View::new(fresh));
        match self.ring.move_to(&view) {
            Ok(()) => self.view = view,
            // The session stops rings that lose their place; this one is not stopped yet.
            Err(error) => {
                self.broken = true;
                self.hangup.hang_up(&format_args!("'{}': the ring: {error}", self.shared.id));
            }
        }
    }

    #[cold]
    fn take_left_over(&mut self, view: &Rc<View>) {
        let bounds = self.shared.bounds();
        while let Some(place) = self.table.free() {
            let Some(head) = self.resubmit.pop() else { return };
            self.take_chain(place, head, view, &bounds);
        }
    }

    /// Takes what is available and has a place: at most a ring's worth, so that a guest which goes on adding does not keep
    /// this thread from all else.
    fn take_all(&mut self, view: &Rc<View>) -> Result<(), RingError> {
        let bounds = self.shared.bounds();
        for _ in 0..self.ring.size() {
            let Some(index) = self.table.free() else { return Ok(()) };
            let Some(head) = self.ring.pop()? else { return Ok(()) };
            if let Some(inflight) = &mut self.inflight {
                inflight.begin(head);
            }
            self.take_chain(index, head, view, &bounds);
        }
        Ok(())
    }

    /// One chain into the place that [`Table::free`] named, or an answer at once.
    fn take_chain(&mut self, index: usize, head: u16, view: &Rc<View>, bounds: &Bounds) {
        let chain = Chain::new(view.spans(), self.ring.table(), self.ring.size(), head);
        let place = self.table.place(index);
        match device::parse(chain, view.spans(), bounds, &mut place.iovecs) {
            Parsed::Request(request) => {
                place.head = head;
                place.memory = Some(Rc::clone(view));
                let kind = request.kind;
                place.request = Some(request);
                self.table.take();
                self.route(index, kind);
            }
            Parsed::Answer { status, code, used_len } => {
                // SAFETY: `view` is what `parse` was given, and it is alive.
                unsafe { status.write(code) };
                self.answer(head, used_len);
            }
            Parsed::Broken => self.answer(head, 0),
        }
    }

    fn route(&mut self, index: usize, kind: Kind) {
        if matches!(kind, Kind::Read | Kind::Write) {
            self.table.place(index).begun = self.shared.disk.guest_pulse().begin(self.index);
        }
        match kind {
            Kind::Write | Kind::Discard | Kind::WriteZeroes { .. } => self.changes.push(index),
            Kind::Read | Kind::Flush => self.ready.push(index),
            Kind::GetId => {
                let place = self.table.place(index);
                // SAFETY: the iovecs come from `parse` with the view that this place keeps.
                unsafe { device::put_id(&place.iovecs, &self.shared.serial) };
                self.finish(index, device::OK);
            }
        }
    }
}
