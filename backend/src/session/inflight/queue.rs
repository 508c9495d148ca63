//! One queue's part of the inflight region.
//!
//! Taking a request stores its counter, then its mark. Answering a batch links its heads into a list that begins at
//! `last_batch_head`; then the used ring's index moves (the batch is the guest's from that store on), then the marks go, and
//! last `used_idx` follows. So whoever comes after a crash finds either that `used_idx` is the ring's index, and the marks
//! are right; or that it is not, and the list names those whose marks may be left over.
//!
//! A process is killed between two of its instructions, and what it stored before is there for all. So it is the order
//! in the program that counts: stores are relaxed, with compiler fences between them, which cost nothing at run time.
//!
//! Owned by one queue thread, called for each request: no allocation, no lock; a request touches its entry and the header.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, compiler_fence};

use vm_memory::MmapRegion;

use super::{ENTRY, HEADER, InflightError, stride};

/// The only version there is; 0 is memory that nobody has used yet.
const VERSION: u16 = 1;

// The header: u64 features, u16 version, u16 desc_num, u16 last_batch_head, u16 used_idx.
const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const DESC_NUM: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;
// An entry: u8 inflight, u8 padding[5], u16 next, u64 counter.
const INFLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Notes which of a ring's requests are on their way, by head.
#[derive(Debug)]
pub struct InflightQueue {
    map: Arc<MmapRegion>,
    /// Where this queue's part begins in `map`; a multiple of 64.
    at: usize,
    entries: u16,
    /// The next request's number: what is left over is submitted again in this order.
    counter: u64,
    last_batch_head: u16,
    #[cfg(test)]
    pub(super) fuse: Option<super::tests::Fuse>,
}

impl InflightQueue {
    /// The part of `map` from byte `at` on, which has `stride(entries)` bytes.
    pub(super) fn new(map: Arc<MmapRegion>, at: usize, entries: u16) -> Self {
        assert!(at.is_multiple_of(8) && at + stride(entries) <= map.size(), "checked when the region was mapped");
        Self {
            map,
            at,
            entries,
            counter: 0,
            last_batch_head: 0,
            #[cfg(test)]
            fuse: None,
        }
    }

    /// The request with this head was taken from the available ring. Called in that ring's order, before anything is done
    /// about the request.
    pub fn begin(&mut self, head: u16) {
        if let Some(entry) = self.entry(head) {
            self.store_u64(entry + COUNTER, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.store_u8(entry + INFLIGHT, 1);
        }
    }

    /// Answers a batch: `show` puts all of it into the used ring with one store of the ring's index, and tells the new
    /// index. That it happens between the list and the marks is what makes the batch found after a crash.
    ///
    /// # Errors
    /// Those of `show`; the batch then counts as not shown.
    pub fn answer<E>(&mut self, batch: &[u16], show: impl FnOnce() -> Result<u16, E>) -> Result<u16, E> {
        for head in batch {
            if let Some(entry) = self.entry(*head) {
                self.store_u16(entry + NEXT, self.last_batch_head);
                self.store_u16(self.at + LAST_BATCH_HEAD, *head);
                self.last_batch_head = *head;
            }
        }
        let used_idx = show()?;
        for head in batch {
            if let Some(entry) = self.entry(*head) {
                self.store_u8(entry + INFLIGHT, 0);
            }
        }
        self.store_u16(self.at + USED_IDX, used_idx);
        Ok(used_idx)
    }

    /// At the start of a ring of `size` entries whose used index is `ring_used`: the heads that an earlier process took and
    /// did not answer, in the order in which it took them. The ring goes on at `ring_used` plus their number, whatever the
    /// front end says. `None` if nobody has used the region yet: then it is made ready, and the front end's word counts.
    pub(in crate::session) fn recover(&mut self, size: u16, ring_used: u16) -> Result<Option<Vec<u16>>, InflightError> {
        let entries = self.entries;
        if size > entries {
            return Err(InflightError::Entries { entries, size });
        }
        let version = self.load_u16(self.at + VERSION_AT);
        if version == 0 {
            self.store_u16(self.at + DESC_NUM, entries);
            self.store_u16(self.at + LAST_BATCH_HEAD, 0);
            self.store_u16(self.at + USED_IDX, ring_used);
            // Last, so that a region with a version is complete.
            self.store_u16(self.at + VERSION_AT, VERSION);
            return Ok(None);
        }
        let features = self.load_u64(self.at + FEATURES);
        if version != VERSION || features != 0 {
            return Err(InflightError::Version { version, features });
        }
        let told = self.load_u16(self.at + DESC_NUM);
        if told < size {
            return Err(InflightError::Entries { entries: told, size });
        }
        // The counters of what is marked.
        let mut marked = vec![None; usize::from(size)];
        for (head, counter) in marked.iter_mut().enumerate() {
            let entry = self.at + HEADER + ENTRY * head;
            if self.load_u8(entry + INFLIGHT) != 0 {
                *counter = Some(self.load_u64(entry + COUNTER));
            }
        }
        self.settle_last_batch(&mut marked, size, ring_used)?;
        let mut left: Vec<(u64, u16)> = (0..size).zip(marked).filter_map(|(head, c)| Some((c?, head))).collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Some(left.into_iter().map(|(_, head)| head).collect()))
    }

    /// The process may have ended between showing a batch to the guest and taking its marks away.
    fn settle_last_batch(
        &mut self,
        marked: &mut [Option<u64>],
        size: u16,
        ring_used: u16,
    ) -> Result<(), InflightError> {
        let region = self.load_u16(self.at + USED_IDX);
        let last = self.load_u16(self.at + LAST_BATCH_HEAD);
        self.last_batch_head = last;
        let batch = ring_used.wrapping_sub(region);
        // Without a mark nothing can be left over, wherever the index stands: a driver that was reset begins at 0.
        if batch != 0 && marked.iter().any(Option::is_some) {
            if batch > size {
                return Err(InflightError::UsedIndex { ring: ring_used, region });
            }
            let mut head = last;
            for _ in 0..batch {
                let missing = InflightError::Head { head, size };
                let (Some(mark), Some(entry)) = (marked.get_mut(usize::from(head)), self.entry(head)) else {
                    return Err(missing);
                };
                *mark = None;
                self.store_u8(entry + INFLIGHT, 0);
                head = self.load_u16(entry + NEXT);
            }
        }
        self.store_u16(self.at + USED_IDX, ring_used);
        Ok(())
    }

    /// Where a head's entry lies, if it has one.
    #[inline]
    fn entry(&self, head: u16) -> Option<usize> {
        (head < self.entries).then(|| self.at + HEADER + ENTRY * usize::from(head))
    }

    /// A place in the region.
    #[inline]
    fn place(&self, at: usize) -> *mut u8 {
        debug_assert!(at + 8 <= self.at + stride(self.entries));
        // In bounds: `new` has checked the part against the mapping, and every caller adds a field's offset to the header's
        // or to that of an entry below `entries`.
        self.map.as_ptr().wrapping_add(at)
    }

    #[inline]
    fn load_u8(&self, at: usize) -> u8 {
        // SAFETY: in bounds (see `place`), mapped for as long as `map` is; this process uses it through atomics alone.
        unsafe { AtomicU8::from_ptr(self.place(at)) }.load(Ordering::Relaxed)
    }

    #[inline]
    fn load_u16(&self, at: usize) -> u16 {
        // SAFETY: as in `load_u8`; aligned, since the part begins on a multiple of 8 and the field on one of 2.
        unsafe { AtomicU16::from_ptr(self.place(at).cast()) }.load(Ordering::Relaxed)
    }

    #[inline]
    fn load_u64(&self, at: usize) -> u64 {
        // SAFETY: as in `load_u16`, with a field on a multiple of 8.
        unsafe { AtomicU64::from_ptr(self.place(at).cast()) }.load(Ordering::Relaxed)
    }

    #[inline]
    fn store_u8(&self, at: usize, value: u8) {
        self.in_order(|| {
            // SAFETY: as in `load_u8`.
            unsafe { AtomicU8::from_ptr(self.place(at)) }.store(value, Ordering::Relaxed);
        });
    }

    #[inline]
    fn store_u16(&self, at: usize, value: u16) {
        self.in_order(|| {
            // SAFETY: as in `load_u16`.
            unsafe { AtomicU16::from_ptr(self.place(at).cast()) }.store(value, Ordering::Relaxed);
        });
    }

    #[inline]
    fn store_u64(&self, at: usize, value: u64) {
        self.in_order(|| {
            // SAFETY: as in `load_u64`.
            unsafe { AtomicU64::from_ptr(self.place(at).cast()) }.store(value, Ordering::Relaxed);
        });
    }

    /// One store where it stands in the program, neither before nor after.
    #[inline]
    fn in_order(&self, store: impl FnOnce()) {
        #[cfg(test)]
        if self.fuse.as_ref().is_some_and(super::tests::Fuse::is_blown) {
            return;
        }
        compiler_fence(Ordering::SeqCst);
        store();
        compiler_fence(Ordering::SeqCst);
    }
}
