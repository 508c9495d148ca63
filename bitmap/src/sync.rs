//! The one place that chooses where atomics, locks and cells come from: the standard library, or a model checker.
//!
//! `--cfg loom` explores every interleaving with weak memory, `--cfg shuttle` many random ones of larger scenes. Both
//! run the very code that serves guests; nothing else in the workspace names a model checker outside its tests.

#[cfg(loom)]
mod chosen {
    pub use loom::cell::UnsafeCell;
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    pub use loom::sync::{Condvar, Mutex, MutexGuard};
    pub use loom::thread::yield_now;
    /// A spin hint; a model checker must be told that nothing happens until another thread runs.
    pub fn spin() {
        loom::thread::yield_now();
    }
}

#[cfg(all(shuttle, not(loom)))]
mod chosen {
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    pub use shuttle::sync::{Condvar, Mutex, MutexGuard};
    pub use shuttle::thread::yield_now;
    /// A spin hint; a model checker must be told that nothing happens until another thread runs.
    pub fn spin() {
        shuttle::thread::yield_now();
    }
}

#[cfg(not(any(loom, shuttle)))]
mod chosen {
    pub use std::hint::spin_loop as spin;
    pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
    pub use std::sync::{Condvar, Mutex, MutexGuard};
    pub use std::thread::yield_now;
}

pub use chosen::*;

/// `std::cell::UnsafeCell` with the interface of loom's, which checks every access in a model.
#[cfg(not(loom))]
#[derive(Debug)]
pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(not(loom))]
impl<T> UnsafeCell<T> {
    /// Wraps a value.
    pub fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    /// Shared access through a raw pointer; the caller argues why no one writes meanwhile.
    pub fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    /// Exclusive access through a raw pointer; the caller argues why no one else looks meanwhile.
    pub fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}

/// Locks, and goes on with the data of a thread that panicked: every critical section here leaves its data whole at
/// each step, and one dead client must not take the daemon with it.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
