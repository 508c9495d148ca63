//! The threads of a disk's copy-before-write: savers, and the watch over the writes that they let wait.
//!
//! There are a few savers to begin with, which is enough where a save is a copy in memory. Where it is slow, because a disk is, a
//! write would wait for those before it and not only for its own save; so the last idle saver that takes a write has one more
//! employed first. All end with the last point in time of the disk.

use super::{CopyBeforeWrite, State};
use crate::buffer::AlignedBuffer;
use crate::turns::come_soon;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// How many there are to begin with.
const SAVERS: usize = 4;

/// Most of them: more requests of 64 KiB at a time make no disk faster.
const MOST: usize = 32;

/// A save that takes longer waits for a disk, not for a processor that more threads would only fight for.
const SLOW: Duration = Duration::from_micros(150);

/// How many savers there are, and what they are at.
#[derive(Default)]
pub(super) struct Crew {
    employed: usize,
    idle: usize,
    /// How long the last save took.
    pub(super) last_save: Duration,
}

impl State {
    /// Whether it takes one more saver so that all held writes have one, and the next write too: once all are at a disk that
    /// stands still, nobody is there to employ any. If so, it counts as employed from here on. Asked by a saver that has not taken
    /// its write yet.
    fn takes_one_more(&mut self) -> bool {
        let wait = self.crew.idle < self.queue.len() && self.crew.last_save > SLOW;
        let more = wait && self.crew.employed < MOST && !self.closed;
        self.crew.employed += usize::from(more);
        more
    }
}

impl CopyBeforeWrite {
    /// Starts the savers and the watch over the writes that they let wait. They end with the last user.
    pub(super) fn employ(self: &Arc<Self>) -> io::Result<()> {
        let result = self.start_threads();
        if result.is_err() {
            self.close();
        }
        result
    }

    fn start_threads(self: &Arc<Self>) -> io::Result<()> {
        self.state().crew.employed = SAVERS;
        for _ in 0..SAVERS {
            self.start_saver()?;
        }
        let cbw = Arc::clone(self);
        std::thread::Builder::new().name(format!("watch-{}", self.disk)).spawn(move || {
            come_soon();
            cbw.watch();
        })?;
        Ok(())
    }

    fn start_saver(self: &Arc<Self>) -> io::Result<()> {
        let cbw = Arc::clone(self);
        std::thread::Builder::new().name(format!("save-{}", self.disk)).spawn(move || {
            come_soon();
            let mut buffer = AlignedBuffer::new(cbw.unit.bytes() as usize);
            while let Some(more) = cbw.wait_for_work() {
                if more && let Err(error) = cbw.start_saver() {
                    tracing::warn!(disk = cbw.disk, %error, "held writes have one saver less");
                }
                cbw.save_one(&mut buffer);
            }
        })?;
        Ok(())
    }

    /// Blocks until there is work, and says whether it is too much for who is there; `None`: until the end.
    fn wait_for_work(&self) -> Option<bool> {
        let mut state = self.state();
        while !state.has_work() && state.spent.is_empty() && !state.closed {
            state.crew.idle += 1;
            state = self.work.wait(state).unwrap_or_else(|poisoned| poisoned.into_inner());
            state.crew.idle -= 1;
        }
        let (spent, goes_on, more) = (std::mem::take(&mut state.spent), !state.closed, state.takes_one_more());
        drop(state);
        // Gives its space back, which may take long where scratch hangs.
        drop(spent);
        goes_on.then_some(more)
    }
}
