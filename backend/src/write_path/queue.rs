//! One virtqueue's thread: takes requests from the ring, admits changes, moves bytes, answers.
//!
//! What an earlier process has left unanswered comes first, found in the inflight region (see `session::inflight`).
//!
//! A round: take what has completed, what other threads said, what the guest made available (`take`); admit all changes of
//! the round in one critical section; begin the operations; show what is finished to the guest at once, with one signal
//! (`answer`); hand held changes to their gates; then one system call submits everything and waits, unless a short look around
//! (`spin`) finds something to do.
//!
//! Invariants. Every chain that is taken is answered exactly once. A change is submitted only after the tracker admitted
//! it, and its in-flight slot is cleared only at its final result (I1). Nothing the guest puts into the ring makes this
//! thread panic, spin or touch memory outside the guest's; a ring that makes no sense ends the connection.

use super::inbox::{Inbox, Message};
use super::served::Shared;
use super::spin::Spin;
use super::stage::{Outcome, Rules};
use super::table::Table;
use crate::device::request as device;
use crate::disk::{Completion, Engine};
use crate::memory::GuestMemory;
use crate::memory::view::View;
use crate::session::{Hangup, InflightQueue, RingParts};
use crate::vring::SplitRing;
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Gate, Lane, Verdict};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::GuestAddressSpace;

mod answer;
mod take;

const KICK: u64 = u64::MAX;
const INBOX: u64 = u64::MAX - 1;

/// With more than this in flight a thread does not look around: a wake-up is shared by several completions then, and time
/// that is slept through is time that others have.
const SPIN_BELOW: usize = 4;

/// So many answers are shown at the latest: what a batch saves it has saved by then.
const SHOW_AT_MOST: usize = 64;

/// Fewer are not shown before the end of a round: a signal costs as much as some copies.
const SHOW_AT_LEAST: usize = 16;

/// For so long held writes are handed to their gates before answers are looked after again: a gate may do at once what it needs.
const HAND_OVER_FOR: Duration = Duration::from_micros(200);

/// What a queue thread owns.
pub(super) struct QueueThread {
    shared: Arc<Shared>,
    inbox: Arc<Inbox>,
    engine: Engine,
    lane: Lane,
    index: usize,
    table: Table,
    ring: SplitRing,
    /// What the front end keeps for the process after this one: every chain that is taken is noted there until it is answered.
    inflight: Option<InflightQueue>,
    /// Heads that the process before has left; the last one comes first.
    resubmit: Vec<u16>,
    memory: GuestMemory,
    memory_lost: Arc<AtomicBool>,
    /// Guest memory as new requests see it, renewed when the front end changes it.
    view: Rc<View>,
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
    /// Changes that a gate holds, and that it has not been told of yet.
    held: VecDeque<(usize, ByteRange, Instant, Arc<dyn Gate>)>,
    /// Requests whose operation is to be queued in this round.
    ready: Vec<usize>,
    /// Heads whose answers stand in the used ring and are not shown yet.
    unshown: Vec<u16>,
    /// Answers were shown since the last look at whether to signal.
    shown: bool,
    /// So many answers are shown in this round before it is over: half of it, so that the guest puts them to use while the
    /// other half is copied.
    show_at: usize,
    completions: Vec<Completion>,
    /// Whether looking around pays is another question for a disk that is quick than for a guest that is busy.
    spin_for_disk: Spin,
    spin_for_guest: Spin,
}

impl QueueThread {
    pub(super) fn new(shared: Arc<Shared>, inbox: Arc<Inbox>, lane: Lane, parts: RingParts) -> io::Result<Self> {
        let view = Rc::new(View::new(parts.memory.memory()));
        let ring = SplitRing::new(parts.ring, &view).map_err(io::Error::other)?;
        let places = usize::from(ring.size()).min(lane.slots());
        let engine = Engine::new(&shared.disk, places as u32).map_err(io::Error::other)?;
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
            ring,
            inflight: parts.inflight,
            resubmit,
            view,
            memory: parts.memory,
            memory_lost: parts.memory_lost,
            kick: parts.kick,
            call: parts.call,
            hangup: parts.hangup,
            enabled: parts.enabled,
            stopping: false,
            broken: false,
            changes: Vec::with_capacity(places),
            held: VecDeque::new(),
            ready: Vec::with_capacity(places),
            unshown: Vec::with_capacity(SHOW_AT_MOST),
            shown: false,
            show_at: SHOW_AT_MOST,
            completions: Vec::with_capacity(places * 2),
            spin_for_disk: Spin::new(shared.threads.spin),
            spin_for_guest: Spin::new(shared.threads.spin),
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
            if self.inbox.is_waiting() {
                self.read_inbox();
            }
            self.take_requests();
            self.look_after_memory();
            self.admit();
            self.begin_operations()?;
            self.show();
            self.hand_over();
            let left_over = !self.resubmit.is_empty() && !self.broken;
            if self.stopping && self.table.in_flight() == 0 && !left_over {
                return Ok(());
            }
            self.rest()?;
            self.handle_completions()?;
        }
    }

    /// Hands over what was queued, and returns when there may be something to do.
    fn rest(&mut self) -> io::Result<()> {
        if !self.held.is_empty() || self.inbox.is_waiting() {
            return self.engine.flush();
        }
        // What stays in the ring for want of a place is looked at again at the next completion.
        let takes = self.takes_requests() && self.table.free().is_some();
        if takes && self.ring.has_more() {
            return self.engine.flush();
        }
        let in_flight = self.table.in_flight();
        let spin = if in_flight == 0 { &mut self.spin_for_guest } else { &mut self.spin_for_disk };
        if in_flight <= SPIN_BELOW && spin.is_worth_it() {
            self.engine.flush()?;
            let (ring, engine, inbox) = (&self.ring, &mut self.engine, &self.inbox);
            if spin.until(|| takes && ring.has_more() || engine.stirs() || inbox.is_waiting()) {
                return self.engine.flush();
            }
        }
        if takes && self.ring.ask_for_kick() {
            self.ring.forgo_kicks();
            return self.engine.flush();
        }
        self.engine.wait(1, self.table.in_flight() == 0)?;
        if takes {
            self.ring.forgo_kicks();
        }
        Ok(())
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
        if !self.memory_lost.load(Ordering::Relaxed) {
            return;
        }
        if !std::mem::replace(&mut self.broken, true) {
            self.hangup.hang_up(&format_args!("'{}': the front end cut its memory short", self.shared.id));
        }
        // What was just taken, or was held until now, has not been submitted yet: of its data nobody knows what is left.
        let held = self.held.drain(..).map(|(index, ..)| index);
        for index in self.changes.drain(..).chain(self.ready.drain(..)).chain(held).collect::<Vec<_>>() {
            self.finish(index, device::IOERR);
        }
    }

    /// One critical section for all changes of the round. Those that a gate holds leave it again and will come back
    /// through the inbox, to ask anew.
    fn admit(&mut self) {
        if self.changes.is_empty() {
            return;
        }
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
                Admitted::Held(gate) => self.held.push_back((index, range, Instant::now(), gate)),
                Admitted::Beyond => beyond.push(index),
            }
        }
        drop(passage);
        self.changes.clear();
        for index in beyond {
            self.finish(index, device::IOERR);
        }
    }

    /// Hands held writes to their gates, behind all that can be begun or answered without waiting.
    fn hand_over(&mut self) {
        let mut began = None;
        while let Some((index, range, since, gate)) = self.held.pop_front() {
            let began = *began.get_or_insert_with(Instant::now);
            let inbox = Arc::clone(&self.inbox);
            gate.hold(range, since, Box::new(move |verdict| inbox.send(Message::Decided(index, verdict))));
            if began.elapsed() >= HAND_OVER_FOR {
                break;
            }
        }
    }

    fn begin_operations(&mut self) -> io::Result<()> {
        let rules = self.rules;
        self.show_at = (self.ready.len() / 2).clamp(SHOW_AT_LEAST, SHOW_AT_MOST);
        for at in 0..self.ready.len() {
            let index = self.ready[at];
            let place = self.table.place(index);
            if let Some(request) = &place.request {
                let range = ByteRange::new(request.offset, request.len);
                place.stage.begin(request.kind, range, &place.iovecs, rules);
                self.operate(index)?;
            }
        }
        self.ready.clear();
        Ok(())
    }

    /// Begins the request's next operation; whatever the disk answers at once is followed up at once.
    fn operate(&mut self, index: usize) -> io::Result<()> {
        loop {
            let place = self.table.place(index);
            // SAFETY: the iovecs point into the view that the place keeps; place, iovecs and stage stay as they are
            // until the operation's result is there, since only that releases or changes them.
            let result = unsafe {
                let operation = place.stage.operation(&place.iovecs);
                self.engine.begin(operation, index as u64)?
            };
            match result {
                Some(result) if self.result_came(index, result) => {}
                Some(_) => {
                    self.show_if_many();
                    return Ok(());
                }
                None => return Ok(()),
            }
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
        if self.result_came(index, result) { self.operate(index) } else { Ok(()) }
    }

    /// Takes an operation's result; whether the request needs another one. If not, it is answered.
    fn result_came(&mut self, index: usize, result: i32) -> bool {
        let place = self.table.place(index);
        // SAFETY: as in `operate`; the view is still kept.
        match unsafe { place.stage.completed(result, &place.iovecs) } {
            Outcome::Again => return true,
            Outcome::Done => self.finish(index, device::OK),
            Outcome::Failed(errno) => {
                if let Some(request) = &place.request {
                    let error = io::Error::from_raw_os_error(errno);
                    self.shared.log_error(request.kind, request.offset, request.len, &error);
                }
                self.finish(index, device::IOERR);
            }
        }
        false
    }
}
