//! What is heard: guests by their journal, the daemon by its events.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use blkmark_backup::qmp::Event;

use super::bounds::Bounds;
use super::model::Certain;
use super::world::Torture;

impl Torture {
    /// Takes everything in the journal up to now.
    pub fn catch_up(&mut self) -> Result<()> {
        self.take(&mut [])
    }

    /// The same, for bounds that are not closed yet too.
    pub fn take(&mut self, bounds: &mut [(usize, Bounds)]) -> Result<()> {
        let end = self.journal.end()?;
        loop {
            let (first, records) = self.journal.next(end)?;
            if records.is_empty() {
                return Ok(());
            }
            for (at, record) in (first..).zip(&records) {
                let disk = usize::from(record.disk);
                let served = self.served.get_mut(disk).context("a disk that does not exist")?;
                match served.model.apply(at, record) {
                    Ok(certain) => {
                        if let Some(Certain::Done(_)) = &certain {
                            self.log.count("guests", "changes", 1);
                        }
                        served.marks.certain(certain);
                    }
                    Err(wrong) => bail!("LOSS: {wrong}"),
                }
                for (of, bounds) in bounds.iter_mut().filter(|(of, _)| *of == disk) {
                    debug_assert_eq!(*of, disk);
                    bounds.apply(at, record);
                }
            }
        }
    }

    /// Where the journal ends.
    pub fn now(&self) -> Result<u64> {
        self.journal.end()
    }

    /// Listens to the daemon for a while.
    pub fn listen(&mut self, pause: Duration) -> Result<()> {
        let deadline = Instant::now() + pause.max(Duration::from_millis(1));
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut events: Vec<Event> = Vec::new();
            if let Some(qmp) = self.qmp.as_mut() {
                let heard = qmp.client().wait_event(left.max(Duration::from_millis(1)), |event| {
                    events.push(event.clone());
                    true
                });
                if let Err(error) = heard {
                    self.all_live()?;
                    return Err(error).context("listening to the daemon");
                }
            }
            let none = events.is_empty();
            for event in events {
                self.heard(&event)?;
            }
            self.catch_up()?;
            if none {
                return self.all_live();
            }
        }
    }
}
