//! Admission: many queue threads pass through a value without a lock; one control thread may hold them all out and
//! change it.
//!
//! A reader-writer lock turned inside out: each reader owns a flag on a cache line of its own (`busy`), the writer owns
//! one that all may see (`hold`). A reader pays one store, one fence and one load to enter, one store to leave.
//!
//! **Invariant.** While a [`Held`] lives, no [`Section`] does. Argument: a reader stores `busy`, then a SeqCst fence,
//! then loads `hold`; the writer stores `hold`, then a SeqCst fence, then loads each `busy`. The fences are in one total
//! order. If the reader's is first, the writer sees `busy` and waits for the Release store that ends the section, so
//! all that the section did is visible to it. If the writer's is first, the reader sees `hold` and leaves. A reader that
//! finds `hold` clear after an earlier hold has acquired the writer's Release, so it sees all of the change. Without
//! either fence both may pass each other in their store buffers: `tests/model_admission.rs` shows that under loom.
//!
//! A reader that is held out spins and yields. Nobody sleeps or calls the kernel while holding, so that lasts a few
//! microseconds; a reader that is not about to enter is not touched at all.

use crate::sync::{AtomicBool, Mutex, MutexGuard, Ordering, UnsafeCell, fence, lock, spin, yield_now};

/// Keeps the flag of one reader off its neighbours' cache lines (128: adjacent lines are prefetched in pairs).
#[repr(align(128))]
struct Reader {
    busy: AtomicBool,
    taken: AtomicBool,
}

/// A value of which readers see one state at a time, and which one writer changes while no reader looks.
pub struct Admission<T> {
    hold: AtomicBool,
    value: UnsafeCell<T>,
    readers: Box<[Reader]>,
    writer: Mutex<()>,
}

// SAFETY: `value` is shared among readers (`T: Sync`) and handed to one writer at a time on any thread (`T: Send`), never
// both at once, by the invariant above.
unsafe impl<T: Send + Sync> Sync for Admission<T> {}
// SAFETY: nothing in it is bound to a thread.
unsafe impl<T: Send> Send for Admission<T> {}

/// The right of one thread to enter. There is one a reader index, so that a `busy` flag has one writer.
#[derive(Debug)]
pub struct Pass {
    reader: usize,
}

/// A critical section: no system call, no wait, no allocation belongs in it.
pub struct Section<'a, T> {
    admission: &'a Admission<T>,
    reader: usize,
}

/// Readers are being held out, but some may still be inside.
struct Announced<'a, T> {
    admission: &'a Admission<T>,
    _writer: MutexGuard<'a, ()>,
}

/// No reader is inside. Dropping it lets them in again.
pub struct Held<'a, T> {
    announced: Announced<'a, T>,
}

/// A reader stayed inside for longer than the writer would wait. Nothing was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a queue thread did not leave its critical section in time")]
pub struct NotQuiescent;

impl<T> Admission<T> {
    /// A value with room for `readers` readers.
    pub fn new(value: T, readers: usize) -> Self {
        let readers =
            (0..readers).map(|_| Reader { busy: AtomicBool::new(false), taken: AtomicBool::new(false) }).collect();
        Self { hold: AtomicBool::new(false), value: UnsafeCell::new(value), readers, writer: Mutex::new(()) }
    }

    /// The pass of reader `reader`, unless it is out already or there is no such reader.
    pub fn take_pass(&self, reader: usize) -> Option<Pass> {
        let taken = self.readers.get(reader)?.taken.swap(true, Ordering::AcqRel);
        (!taken).then_some(Pass { reader })
    }

    /// Gives a pass back, for the thread that serves this queue next.
    pub fn return_pass(&self, pass: Pass) {
        self.readers[pass.reader].taken.store(false, Ordering::Release);
    }

    /// Enters, waiting while a writer holds readers out. `pass` must be of this admission.
    #[inline]
    pub fn enter<'a>(&'a self, pass: &'a mut Pass) -> Section<'a, T> {
        let busy = &self.readers[pass.reader].busy;
        loop {
            busy.store(true, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            if !self.hold.load(Ordering::Acquire) {
                return Section { admission: self, reader: pass.reader };
            }
            busy.store(false, Ordering::Release);
            self.wait_for_release();
        }
    }

    #[cold]
    fn wait_for_release(&self) {
        let mut spins = 0;
        while self.hold.load(Ordering::Acquire) {
            if spins < 100 {
                spins += 1;
                spin();
            } else {
                yield_now();
            }
        }
    }

    /// Holds readers out of all `admissions` at one moment. `patience` is asked again and again whether to go on
    /// waiting for readers that are inside. Writers of the same admission exclude each other.
    pub fn hold_all<'a>(
        admissions: &[&'a Self],
        mut patience: impl FnMut() -> bool,
    ) -> Result<Vec<Held<'a, T>>, NotQuiescent> {
        // One order for everybody, so that two writers with overlapping sets cannot wait for each other.
        let mut order: Vec<usize> = (0..admissions.len()).collect();
        order.sort_by_key(|&i| std::ptr::from_ref(admissions[i]).addr());
        let mut announced: Vec<Option<Announced<'a, T>>> = admissions.iter().map(|_| None).collect();
        for i in order {
            announced[i] = Some(admissions[i].announce());
        }
        fence(Ordering::SeqCst);
        for admission in admissions {
            for reader in &admission.readers {
                while reader.busy.load(Ordering::Acquire) {
                    if !patience() {
                        return Err(NotQuiescent);
                    }
                    spin();
                }
            }
        }
        Ok(announced.into_iter().flatten().map(|announced| Held { announced }).collect())
    }

    fn announce(&self) -> Announced<'_, T> {
        let writer = lock(&self.writer);
        self.hold.store(true, Ordering::Relaxed);
        Announced { admission: self, _writer: writer }
    }
}

impl<T> Drop for Announced<'_, T> {
    fn drop(&mut self) {
        self.admission.hold.store(false, Ordering::Release);
    }
}

impl<T> Section<'_, T> {
    /// The value, in the state that no writer changes while this section lasts.
    #[inline]
    pub fn with<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        self.admission.value.with(|value| {
            // SAFETY: while this section lives no `Held` does (the invariant in the module's header), so nobody has a
            // mutable reference.
            look(unsafe { &*value })
        })
    }
}

impl<T> Drop for Section<'_, T> {
    #[inline]
    fn drop(&mut self) {
        self.admission.readers[self.reader].busy.store(false, Ordering::Release);
    }
}

impl<T> Held<'_, T> {
    /// The value, to look at and to change.
    pub fn with<R>(&mut self, change: impl FnOnce(&mut T) -> R) -> R {
        self.announced.admission.value.with_mut(|value| {
            // SAFETY: no section lives while this `Held` does, and the writer's mutex makes this the only `Held`.
            change(unsafe { &mut *value })
        })
    }
}
