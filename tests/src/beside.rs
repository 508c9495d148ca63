//! Tells a story while others keep working beside it: guests that write while a backup is ordered.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, anyhow};

/// Says whether the story has ended. However it ends: a panic must not leave the others working for ever.
#[derive(Debug, Default)]
pub struct Stop(AtomicBool);

impl Stop {
    /// Whether it is time to stop.
    pub fn is_due(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct StopAtEnd<'a>(&'a Stop);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// What works beside the story until it is told to stop.
pub type Worker<'a> = Box<dyn FnOnce(&Stop) -> Result<()> + Send + 'a>;

/// Runs the workers, each on a thread of its own, until `story` has ended; gives the story's result if all went well.
pub fn beside<T>(workers: Vec<Worker<'_>>, story: impl FnOnce() -> Result<T>) -> Result<T> {
    let stop = Stop::default();
    std::thread::scope(|scope| {
        let stop = &stop;
        let workers: Vec<_> = workers.into_iter().map(|work| scope.spawn(move || work(stop))).collect();
        let told = {
            let _stop = StopAtEnd(stop);
            story()
        };
        let mut trouble = None;
        for worker in workers {
            let ended = worker.join().unwrap_or_else(|_| Err(anyhow!("a worker panicked")));
            trouble = trouble.or(ended.err());
        }
        match (told, trouble) {
            (told, None) => told,
            (Ok(_), Some(trouble)) => Err(trouble.context("beside the story")),
            // A story often fails because a worker did: both are told.
            (Err(error), Some(trouble)) => Err(error.context(format!("beside the story: {trouble:#}"))),
        }
    })
}
