//! What is done for a disk's store while the disk is served: extents are made hot and cool again, and a clean end is written
//! down.
//!
//! Two threads a store: one makes hot what writes wait for, the other lets extents cool that nobody writes to. Neither is ever
//! waited for by a queue thread; a write that waits for heat is held like one that a gate holds.

use crate::admission::NotQuiescent;
use crate::flip::hold;
use crate::inflight::Slots;
use crate::named::Draft;
#[cfg(not(any(loom, shuttle)))]
use crate::store::heat::Heat;
use crate::store::heat::Served;
use crate::store::keeper::{Failure, Keeper, State};
use crate::store::{Stamp, StoreError};
use crate::sync::lock;
use crate::tracker::{Control, Tracker, View};
use std::sync::PoisonError;
#[cfg(not(any(loom, shuttle)))]
use std::sync::{Arc, Weak};
#[cfg(not(any(loom, shuttle)))]
use std::time::Duration;

/// Time between two looks at what nobody writes to: what a power cut widens a bitmap by is what was written to for this long, or
/// twice as long.
#[cfg(not(any(loom, shuttle)))]
const COOLING: Duration = Duration::from_secs(60);

impl Tracker {
    /// Starts the threads. If there are none to be had, nothing may be persistent.
    #[cfg(not(any(loom, shuttle)))]
    pub(crate) fn employ(self: &Arc<Self>) {
        let Some(heat) = &self.heat else { return };
        let spawn = |name: &str, task: fn(&Heat, &Weak<Tracker>)| {
            let (heat, tracker) = (Arc::clone(heat), Arc::downgrade(self));
            std::thread::Builder::new().name(name.to_owned()).spawn(move || task(&heat, &tracker))
        };
        let log = spawn("store-log", |heat, tracker| {
            loop {
                match heat.serve(true) {
                    Served::Done => {}
                    Served::Closed => return,
                    Served::Failed(error) => match tracker.upgrade() {
                        Some(tracker) => tracker.distrust(&format!("the intent table: {error}")),
                        None => return heat.give_up(),
                    },
                }
            }
        });
        let cooling = spawn("store-cool", |heat, tracker| {
            while heat.rest(COOLING) {
                match tracker.upgrade() {
                    Some(tracker) => tracker.cool(),
                    None => return,
                }
            }
        });
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in [log, cooling] {
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => self.distrust(&format!("could not start a thread: {error}")),
            }
        }
    }

    /// Makes hot what writes wait for; does not wait for such. `false`: the table cannot be written, and
    /// [`Tracker::distrust`] is to be called.
    pub fn serve_store(&self) -> bool {
        self.heat.as_ref().is_none_or(|heat| !matches!(heat.serve(false), Served::Failed(_)))
    }

    /// Nobody knows any more what the bitmaps of the store should hold. That is durable, if there is any way to make it so,
    /// before a write goes that was held for the sake of the store.
    pub fn distrust(&self, reason: &str) {
        let mut control = lock(&self.control);
        let Control { keeper, bitmaps, live, .. } = &mut *control;
        if let Some(keeper) = keeper {
            keeper.distrust(bitmaps, reason);
            *lock(&self.view) = View { bitmaps: bitmaps.clone(), live: live.clone() };
            keeper.heat.give_up();
        }
    }

    /// Makes cold what nobody wrote to since the last call, its bytes and its bits durable first; then forgets what is hot, so that the next
    /// call knows what was written to meanwhile.
    ///
    /// Under the control lock: no generation begins while this is under way, and all generations but the live one are in
    /// objects that the record names. So the live one is all there is to make durable.
    pub fn cool(&self) {
        // What is idle now was written to before the last call, and stays hot if anybody writes to it from now on. So the flush,
        // which may take long, needs no lock.
        let idle = self.heat.as_ref().is_some_and(|heat| !heat.idle().is_empty());
        let flush = lock(&self.control).keeper.as_ref().filter(|_| idle).map(Keeper::flush);
        if let Some(Err(error)) = flush.map(|flush| flush()) {
            tracing::warn!(%error, "the disk could not be flushed: extents stay hot");
            return;
        }
        let mut control = lock(&self.control);
        let Control { keeper, bitmaps, live, generation, .. } = &mut *control;
        let (Some(keeper), Some(map)) = (keeper.as_mut(), live.as_ref()) else { return };
        if keeper.has_failed() || bitmaps.kept_granularity().is_none() {
            return;
        }
        let idle = if idle { keeper.heat.idle() } else { Vec::new() };
        if !idle.is_empty() {
            if let Err(error) = keeper.sync_live(*generation, map) {
                tracing::warn!(%error, "extents stay hot");
                return;
            }
            let state = State {
                draft: bitmaps,
                generation: *generation,
                live: Some(map),
                prepared: None,
                decides: None,
                clean: None,
            };
            let torn = match keeper.record(&state) {
                Ok(()) => keeper.heat.cool(&idle).err().map(|error| format!("the intent table: {error}")),
                Err(Failure::Before(error)) => {
                    tracing::warn!(%error, "extents stay hot");
                    return;
                }
                Err(Failure::Torn(error)) => Some(error.to_string()),
            };
            if let Some(reason) = torn {
                keeper.distrust(bitmaps, &reason);
                *lock(&self.view) = View { bitmaps: bitmaps.clone(), live: live.clone() };
                keeper.heat.give_up();
                return;
            }
        }
        let mut in_flight = Vec::with_capacity(self.lanes.slots.iter().map(Slots::count).sum());
        match hold(&[&self.admission]) {
            Ok((held, _)) => {
                self.lanes.in_flight(|range| in_flight.push(range));
                keeper.heat.forget(&mut in_flight);
                drop(held);
            }
            Err(NotQuiescent) => tracing::debug!("nothing cools this time"),
        }
    }

    /// The disk is served no more, its bytes are durable, and it is as `disk` says: writes down that this is a clean end. No lane
    /// may be in use. Call it once.
    pub fn close(&self, disk: Stamp) -> Result<(), StoreError> {
        if let Some(heat) = &self.heat {
            heat.close();
        }
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            // A panic there was told of when it happened.
            let _ = thread.join();
        }
        let mut control = lock(&self.control);
        let Control { keeper, bitmaps, live, generation, .. } = &mut *control;
        let Some(keeper) = keeper.as_mut().filter(|keeper| keeper.is_open()) else { return Ok(()) };
        if let Ok((mut held, _)) = hold(&[&self.admission])
            && let Some(held) = held.first_mut()
        {
            let gone = held.with(|hot| (hot.live.take(), hot.heat.take()));
            drop(gone);
        }
        bitmaps.settle(true, live.take().as_ref());
        *generation += 1;
        let clean = Some(disk);
        let mut record = |bitmaps: &Draft| {
            let state =
                State { draft: bitmaps, generation: *generation, live: None, prepared: None, decides: None, clean };
            keeper.record(&state).map_err(|failure| (failure, keeper.take_reserve()))
        };
        let recorded = match record(bitmaps) {
            Err((Failure::Before(_), true)) => {
                bitmaps.fold();
                record(bitmaps)
            }
            recorded => recorded,
        };
        let recorded = recorded.map_err(|(failure, _)| failure);
        recorded.map_err(|(Failure::Before(error) | Failure::Torn(error))| error)
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Some(heat) = &self.heat {
            heat.close();
        }
    }
}
