//! One virtqueue's thread: takes requests from the ring, admits changes, moves bytes, answers.
//!
//! What an earlier process has left unanswered comes first, found in the inflight region (see `session::inflight`).
//!
//! A round: take what has completed, what other threads said, what the guest made available; admit all changes of the
//! round in one critical section; queue the operations; answer what is finished with one signal; then one system call
//! submits everything and waits.
//!
//! Invariants. Every chain that is taken is answered exactly once. A change is submitted only after the tracker admitted
//! it, and its in-flight slot is cleared only at its final result (I1). Nothing the guest puts into the ring makes this
//! thread panic, spin or touch memory outside the guest's; a ring that makes no sense ends the connection.

use super::inbox::{Inbox, Message};
use super::served::Shared;
use super::stage::{Outcome, Rules};
use super::table::Table;
use crate::device::chain::SavedChain;
use crate::device::request::{self as device, Bounds, Kind, Parsed, StatusPlace};
use crate::disk::{Completion, Engine};
use crate::memory::{GuestMemory, MemorySnapshot};
use crate::session::{Hangup, InflightQueue, RingParts};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Gate, Lane, Verdict};
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};

const KICK: u64 = u64::MAX;
const INBOX: u64 = u64::MAX - 1;

/// What a queue thread owns.
pub(super) struct QueueThread {
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    engine: Engine,
    lane: Lane,
    index: usize,
    table: Table,
    ring: Queue,
    /// What the front end keeps for the process after this one: every chain that is taken is noted there until it is answered.
    inflight: Option<InflightQueue>,
    /// Heads that the process before has left; the last one comes first.
    resubmit: Vec<u16>,
    memory: GuestMemory,
    memory_lost: Arc<AtomicBool>,
    /// The snapshot that new requests get, renewed when the front end changes its memory.
    snapshot: Rc<MemorySnapshot>,
    kick: OwnedFd,
    call: Option<OwnedFd>,
    hangup: Hangup,
    rules: Rules,
    enabled: bool,
    stopping: bool,
    /// The ring makes no sense; no more requests are taken from it.
    broken: bool,
    /// Changes that ask for admission in this round.
    changes: Vec<usize>,
    /// Requests whose operation is to be queued in this round.
    ready: Vec<usize>,
    /// Answers were put into the ring since the last look at whether to signal.
    answered: bool,
    completions: Vec<Completion>,
}

impl QueueThread {
    pub(super) fn new(shared: Arc<Shared>, inbox: Arc<Inbox>, lane: Lane, parts: RingParts) -> io::Result<Self> {
        let places = usize::from(parts.queue.size()).min(lane.slots());
        let engine = Engine::new(&shared.disk, places as u32).map_err(io::Error::other)?;
        let snapshot = Rc::new(parts.memory.memory());
        let rules = Rules {
            memory_alignment: shared.disk.memory_alignment(),
            write_through: parts.features & (1 << VIRTIO_BLK_F_FLUSH) == 0,
        };
        let mut resubmit = parts.resubmit;
        resubmit.reverse();
        Ok(Self {
            rules,
            engine,
            lane,
            index: usize::from(parts.index),
            table: Table::new(places),
            ring: parts.queue,
            inflight: parts.inflight,
            resubmit,
            snapshot,
            memory: parts.memory,
            memory_lost: parts.memory_lost,
            kick: parts.kick,
            call: parts.call,
            hangup: parts.hangup,
            enabled: parts.enabled,
            stopping: false,
            broken: false,
            changes: Vec::with_capacity(places),
            ready: Vec::with_capacity(places),
            answered: false,
            completions: Vec::with_capacity(places * 2),
            shared,
            inbox,
        })
    }

    /// Serves until told to stop and nothing is in flight; answers `next_avail`.
    pub(super) fn run(mut self) -> u16 {
        match self.serve() {
            Ok(()) => self.ring.next_avail(),
            Err(error) => {
                // Only the ring onto the disk can fail here, and without it nothing more can be done or waited for.
                self.hangup.hang_up(&format_args!("queue thread of '{}': {error}", self.shared.id));
                let next_avail = self.ring.next_avail();
                if self.table.in_flight() > 0 {
                    // The kernel may still be at work on memory that the table keeps, and nobody will hear when it is done:
                    // nothing of this queue may be submitted again in this process. Without its lane it does not start.
                    std::mem::forget(self);
                }
                next_avail
            }
        }
    }

    fn serve(&mut self) -> io::Result<()> {
        let inbox = Arc::clone(&self.inbox);
        self.engine.watch(inbox.wake(), INBOX)?;
        self.engine.watch(&self.kick, KICK)?;
        loop {
            self.read_inbox();
            self.take_requests();
            self.look_after_memory();
            self.admit();
            self.queue_operations()?;
            let left_over = !self.resubmit.is_empty() && !self.broken;
            if self.stopping && self.table.in_flight() == 0 && !left_over {
                self.signal();
                return Ok(());
            }
            self.signal();
            // What `take_requests` left in the ring for want of a place is looked at again at the next completion.
            self.engine.wait(1)?;
            self.handle_completions()?;
        }
    }

    fn read_inbox(&mut self) {
        for message in self.inbox.take() {
            match message {
                Message::Call(call) => {
                    self.call = call;
                    // What was answered while there was nowhere to signal must not be forgotten.
                    self.notify_guest();
                }
                Message::Enabled(on) => self.enabled = on,
                Message::Decided(index, Verdict::Again) => self.changes.push(index),
                Message::Decided(index, Verdict::Refused) => self.finish(index, device::IOERR),
                Message::Stop => self.stopping = true,
            }
        }
    }

    /// Memory that is gone reads as zeroes by now: nothing may be made of it.
    fn look_after_memory(&mut self) {
        if self.broken || !self.memory_lost.load(Ordering::Relaxed) {
            return;
        }
        self.broken = true;
        self.hangup.hang_up(&format_args!("'{}': the front end cut its memory short", self.shared.id));
        // What was just taken has not been submitted yet: of its data nobody knows what is left.
        for index in self.changes.drain(..).chain(self.ready.drain(..)).collect::<Vec<_>>() {
            self.finish(index, device::IOERR);
        }
    }

    fn takes_requests(&self) -> bool {
        self.enabled && !self.stopping && !self.broken
    }

    /// Takes what an earlier process has left, then all that is available, as far as there are places.
    fn take_requests(&mut self) {
        // What was taken once is in flight, and finishes also on a ring that is stopped.
        let left_over = !self.resubmit.is_empty() && !self.broken && (self.enabled || self.stopping);
        if !left_over && !self.takes_requests() {
            return;
        }
        let fresh = self.memory.memory();
        if !std::ptr::eq(&raw const **self.snapshot, &raw const *fresh) {
            self.snapshot = Rc::new(fresh);
        }
        let snapshot = Rc::clone(&self.snapshot);
        if left_over {
            self.take_left_over(&snapshot);
        }
        if !self.takes_requests() {
            return;
        }
        if let Err(error) = self.take_all(&snapshot) {
            self.broken = true;
            self.hangup.hang_up(&format_args!("'{}': the guest's ring makes no sense: {error}", self.shared.id));
        }
    }

    #[cold]
    fn take_left_over(&mut self, snapshot: &Rc<MemorySnapshot>) {
        let bounds = self.shared.bounds();
        while let Some(place) = self.table.free() {
            let Some(head) = self.resubmit.pop() else { return };
            let table = GuestAddress(self.ring.desc_table());
            let chain = SavedChain::new(snapshot, table, self.ring.size(), head);
            self.take_chain(place, head, chain, snapshot, &bounds);
        }
    }

    /// Takes all that is available and has a place, and asks for a kick when more comes.
    fn take_all(&mut self, snapshot: &Rc<MemorySnapshot>) -> Result<(), virtio_queue::Error> {
        let memory = &***snapshot;
        let bounds = self.shared.bounds();
        loop {
            self.ring.disable_notification(memory)?;
            while let Some(index) = self.table.free() {
                // One chain at a time, since an answer without I/O needs the ring; the look at the index is one load.
                let Some(chain) = self.ring.iter(memory)?.next() else { break };
                let head = chain.head_index();
                if let Some(inflight) = &mut self.inflight {
                    inflight.begin(head);
                }
                self.take_chain(index, head, chain, snapshot, &bounds);
            }
            if self.table.free().is_none() || !self.ring.enable_notification(memory)? {
                return Ok(());
            }
        }
    }

    /// One chain into the place that [`Table::free`] named, or an answer at once.
    fn take_chain(
        &mut self,
        index: usize,
        head: u16,
        chain: impl Iterator<Item = Descriptor>,
        snapshot: &Rc<MemorySnapshot>,
        bounds: &Bounds,
    ) {
        let place = self.table.place(index);
        match device::parse(chain, snapshot, bounds, &mut place.iovecs) {
            Parsed::Request(request) => {
                place.head = head;
                place.memory = Some(Rc::clone(snapshot));
                let kind = request.kind;
                place.request = Some(request);
                self.table.take();
                self.route(index, kind);
            }
            Parsed::Answer { status, code, used_len } => {
                // SAFETY: `snapshot` is what `parse` was given, and it is alive.
                unsafe { status.write(code) };
                self.answer(snapshot, head, used_len);
            }
            Parsed::Broken => self.answer(snapshot, head, 0),
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
                // SAFETY: the iovecs come from `parse` with the snapshot that this place keeps.
                unsafe { device::put_id(&place.iovecs, &self.shared.serial) };
                self.finish(index, device::OK);
            }
        }
    }

    /// One critical section for all changes of the round. Those that a gate holds leave it again and will come back
    /// through the inbox, to ask anew.
    fn admit(&mut self) {
        if self.changes.is_empty() {
            return;
        }
        let mut held: Vec<(usize, ByteRange, Arc<dyn Gate>)> = Vec::new();
        let mut beyond: Vec<usize> = Vec::new();
        let passage = self.lane.enter();
        for &index in &self.changes {
            let place = self.table.place(index);
            let Some(request) = &place.request else { continue };
            let range = ByteRange::new(request.offset, request.len);
            match passage.admit(index, range) {
                Admitted::Go => {
                    place.registered = true;
                    self.ready.push(index);
                }
                Admitted::Held(gate) => held.push((index, range, gate)),
                Admitted::Beyond => beyond.push(index),
            }
        }
        drop(passage);
        self.changes.clear();
        for index in beyond {
            self.finish(index, device::IOERR);
        }
        for (index, range, gate) in held {
            let inbox = Arc::clone(&self.inbox);
            gate.hold(range, Box::new(move |verdict| inbox.send(Message::Decided(index, verdict))));
        }
    }

    fn queue_operations(&mut self) -> io::Result<()> {
        let rules = self.rules;
        for at in 0..self.ready.len() {
            let index = self.ready[at];
            let place = self.table.place(index);
            if let Some(request) = &place.request {
                let range = ByteRange::new(request.offset, request.len);
                place.stage.begin(request.kind, range, &place.iovecs, rules);
                self.queue_operation(index)?;
            }
        }
        self.ready.clear();
        Ok(())
    }

    fn queue_operation(&mut self, index: usize) -> io::Result<()> {
        let place = self.table.place(index);
        // SAFETY: the iovecs point into the snapshot that the place keeps; place, iovecs and stage stay as they are
        // until the completion of this token has been seen, since only that releases or changes them.
        unsafe {
            let operation = place.stage.operation(&place.iovecs);
            self.engine.submit(operation, index as u64)
        }
    }

    fn handle_completions(&mut self) -> io::Result<()> {
        let mut completions = std::mem::take(&mut self.completions);
        self.engine.completions(&mut completions);
        for completion in completions.drain(..) {
            match completion.token {
                KICK | INBOX => {
                    if completion.more {
                        continue;
                    }
                    self.watch_again(completion)?;
                }
                token => self.completed(token as usize, completion.result)?,
            }
        }
        self.completions = completions;
        Ok(())
    }

    #[cold]
    fn watch_again(&mut self, ended: Completion) -> io::Result<()> {
        let refused = ended.result < 0 && ended.result != -libc::ECANCELED;
        let error = io::Error::from_raw_os_error(ended.result.saturating_abs());
        match ended.token {
            // Without the inbox nobody could stop this thread.
            INBOX if refused => Err(error),
            INBOX => self.engine.watch(Arc::clone(&self.inbox).wake(), INBOX),
            _ if refused => {
                self.broken = true;
                self.hangup.hang_up(&format_args!("'{}': cannot watch the kick descriptor: {error}", self.shared.id));
                Ok(())
            }
            _ => self.engine.watch(&self.kick, KICK),
        }
    }

    fn completed(&mut self, index: usize, result: i32) -> io::Result<()> {
        let place = self.table.place(index);
        // SAFETY: as in `queue_operation`; the snapshot is still kept.
        let outcome = unsafe { place.stage.completed(result, &place.iovecs) };
        match outcome {
            Outcome::Again => self.queue_operation(index)?,
            Outcome::Done => self.finish(index, device::OK),
            Outcome::Failed(errno) => {
                if let Some(request) = &place.request {
                    let error = io::Error::from_raw_os_error(errno);
                    self.shared.log_error(request.kind, request.offset, request.len, &error);
                }
                self.finish(index, device::IOERR);
            }
        }
        Ok(())
    }

    /// The request is over: status, slot, used ring, place.
    fn finish(&mut self, index: usize, code: u8) {
        let place = self.table.place(index);
        let (head, registered) = (place.head, place.registered);
        if let Some(begun) = place.begun {
            self.shared.disk.guest_pulse().end(self.index, begun);
        }
        if let (Some(request), Some(memory)) = (place.request.take(), place.memory.take()) {
            let status: StatusPlace = request.status;
            // SAFETY: the place has kept the snapshot that the request was parsed with.
            unsafe { status.write(code) };
            if registered {
                self.lane.finish(index);
            }
            let used_len = if code == device::OK { request.used_len } else { 1 };
            self.answer(&memory, head, used_len);
        }
        self.table.release(index);
    }

    /// Puts a chain into the used ring. The ring shows it to the guest at once, so each is a batch of its own in the
    /// inflight region.
    fn answer(&mut self, snapshot: &MemorySnapshot, head: u16, used_len: u32) {
        let ring = &mut self.ring;
        let mut show = || ring.add_used(&**snapshot, head, used_len).map(|()| ring.next_used());
        let shown = match &mut self.inflight {
            Some(inflight) => inflight.answer(&[head], show),
            None => show(),
        };
        if let Err(error) = shown {
            self.broken = true;
            self.hangup.hang_up(&format_args!("'{}': cannot answer into the guest's ring: {error}", self.shared.id));
        }
        self.answered = true;
    }

    /// Tells the guest, once for all answers of the round, if it wants to be told.
    fn signal(&mut self) {
        if !std::mem::take(&mut self.answered) {
            return;
        }
        match self.ring.needs_notification(&**self.snapshot) {
            Ok(false) => {}
            // If it cannot be read, one signal too many does no harm.
            Ok(true) | Err(_) => self.notify_guest(),
        }
    }

    fn notify_guest(&self) {
        if let Some(call) = &self.call {
            // Full means that the guest has not looked at the last 2^64 signals: it will see this one with them.
            let _ = rustix::io::write(call, &1u64.to_ne_bytes());
        }
    }
}
