//! Ctrl-C: the demo ends its work in order, removes its files, and says so. A second Ctrl-C ends it at once.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use super::error::DemoError;

/// Whether the demo is to end.
#[derive(Clone, Default)]
pub struct Signals {
    state: Arc<(Mutex<bool>, Condvar)>,
}

impl Signals {
    /// Catches SIGINT, SIGTERM and SIGHUP from now on.
    pub fn catch() -> io::Result<Self> {
        let signals = Signals::default();
        let mut caught = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM, libc::SIGHUP])?;
        let copy = signals.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in caught.forever() {
                if std::mem::replace(&mut *copy.come(), true) {
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
                copy.state.1.notify_all();
            }
        })?;
        Ok(signals)
    }

    fn come(&self) -> MutexGuard<'_, bool> {
        self.state.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// An error once a signal has come.
    pub fn check(&self) -> Result<(), DemoError> {
        if *self.come() { Err(DemoError::Interrupted) } else { Ok(()) }
    }

    /// Lets time pass, until a signal comes.
    pub fn pass(&self, time: Duration) -> Result<(), DemoError> {
        let come = self.come();
        let (come, _) =
            self.state.1.wait_timeout_while(come, time, |come| !*come).unwrap_or_else(|poisoned| poisoned.into_inner());
        if *come { Err(DemoError::Interrupted) } else { Ok(()) }
    }
}
