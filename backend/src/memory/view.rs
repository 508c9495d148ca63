//! Guest memory as a short table of host addresses: what a queue thread looks a guest address up in, several times a
//! request.
//!
//! `vm-memory` answers the same questions through layers that cost some ten nanoseconds each; here a lookup is a
//! comparison with one or a few spans. A view is made once for each state of guest memory, not once a request.
//!
//! Invariant: every span lies in a mapping that the view keeps alive, so a pointer it hands out is good for as long as the
//! view is.

use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::MemorySnapshot;

/// One region: where it begins for the guest and here, and its bytes.
#[derive(Clone, Copy, Debug)]
struct Span {
    guest: u64,
    len: u64,
    host: *mut u8,
}

/// The regions of one state of guest memory, by guest address. Reached through a [`View`], which keeps them mapped.
#[derive(Debug)]
pub struct Spans(Box<[Span]>);

/// One state of guest memory, with what keeps it mapped.
#[derive(Debug)]
pub struct View<M = MemorySnapshot> {
    spans: Spans,
    memory: M,
}

impl View {
    /// The view of a snapshot.
    pub fn new(snapshot: MemorySnapshot) -> Self {
        Self { spans: Spans::of(&snapshot), memory: snapshot }
    }

    /// The memory itself.
    #[cfg(any(test, fuzzing))]
    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Whether it is of this very state.
    pub fn is_of(&self, snapshot: &MemorySnapshot) -> bool {
        std::ptr::eq(&raw const *self.memory, &raw const **snapshot)
    }
}

impl<'a> View<&'a GuestMemoryMmap> {
    /// The view of memory that lives elsewhere.
    pub fn over(memory: &'a GuestMemoryMmap) -> Self {
        Self { spans: Spans::of(memory), memory }
    }
}

impl<M> View<M> {
    /// Where guest addresses lie.
    #[inline]
    pub fn spans(&self) -> &Spans {
        &self.spans
    }
}

impl Spans {
    fn of(memory: &GuestMemoryMmap) -> Self {
        let span = |region: &vm_memory::GuestRegionMmap| Span {
            guest: region.start_addr().raw_value(),
            len: region.len(),
            host: region.as_ptr(),
        };
        Self(memory.iter().map(span).collect())
    }

    #[inline]
    fn find(&self, guest: u64) -> Option<&Span> {
        let within = |span: &&Span| guest.wrapping_sub(span.guest) < span.len;
        match &*self.0 {
            // A guest has one to four regions, unless its memory was hot-plugged in pieces.
            spans if spans.len() <= 4 => spans.iter().find(within),
            spans => {
                let after = spans.partition_point(|span| span.guest <= guest);
                spans[..after].last().filter(within)
            }
        }
    }

    /// Where a guest address lies here, and how many bytes of its region follow, itself included.
    #[inline]
    pub fn at(&self, guest: u64) -> Option<(*mut u8, u64)> {
        let span = self.find(guest)?;
        let skip = guest - span.guest;
        // In bounds of the span: `find` has compared.
        Some((span.host.wrapping_add(skip as usize), span.len - skip))
    }

    /// Where `len` bytes lie, if they lie in one region.
    #[inline]
    pub fn range(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let (host, follow) = self.at(guest)?;
        (len <= follow).then_some(host)
    }

    /// Copies bytes out of guest memory, across regions if need be. `None` if some of them are outside; what was copied
    /// until then stays.
    #[inline]
    pub fn read(&self, mut guest: u64, mut out: &mut [u8]) -> Option<()> {
        while !out.is_empty() {
            let (host, follow) = self.at(guest)?;
            let n = out.len().min(usize::try_from(follow).unwrap_or(usize::MAX));
            let (now, later) = out.split_at_mut(n);
            for (i, byte) in now.iter_mut().enumerate() {
                // SAFETY: `i` is below `follow`, so the byte lies in the span, which the view keeps mapped. Atomic, since
                // the guest may write there at the same time; no reference to it outlives the load.
                *byte = unsafe { AtomicU8::from_ptr(host.wrapping_add(i)) }.load(Ordering::Relaxed);
            }
            out = later;
            if !out.is_empty() {
                guest = guest.checked_add(n as u64)?;
            }
        }
        Some(())
    }

    /// Copies 16 bytes, a descriptor or a header, as two little-endian words.
    #[inline]
    pub fn read_pair(&self, guest: u64) -> Option<Pair> {
        if let Some(host) = self.range(guest, 16) {
            // SAFETY: the 16 bytes lie in the span, which the view keeps mapped.
            return Some(unsafe { read_pair(host) });
        }
        let mut bytes = [0; 16];
        self.read(guest, &mut bytes)?;
        Some(pair(&bytes))
    }
}

/// 16 bytes as two words, the first bytes in the low end of the first one.
pub type Pair = (u64, u64);

fn pair(bytes: &[u8; 16]) -> Pair {
    let whole = u128::from_le_bytes(*bytes);
    (whole as u64, (whole >> 64) as u64)
}

/// Copies 16 bytes that somebody else may write at the same time; each is then its old or its new value.
///
/// # Safety
/// 16 bytes from `host` on are mapped.
#[inline]
pub unsafe fn read_pair(host: *const u8) -> Pair {
    if host.addr().is_multiple_of(8) {
        let words = host.cast::<u64>();
        // SAFETY: our caller's promise, and aligned. Volatile, since another process may write there: no reference.
        let (low, high) = unsafe { (words.read_volatile(), words.add(1).read_volatile()) };
        return (u64::from_le(low), u64::from_le(high));
    }
    // SAFETY: our caller's promise.
    unsafe { read_unaligned_pair(host) }
}

/// # Safety
/// As for [`read_pair`].
#[cold]
unsafe fn read_unaligned_pair(host: *const u8) -> Pair {
    let mut bytes = [0; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: our caller's promise; a byte is always aligned. Volatile, as above.
        *byte = unsafe { host.add(i).read_volatile() };
    }
    pair(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    proptest! {
        #[test]
        fn addresses_are_found_where_vm_memory_finds_them(
            gaps in prop::collection::vec((0u64..3, 1u64..4), 1..9), address in 0u64..0x30_0000, len in 0u64..0x6000,
        ) {
            let mut at = 0x1000;
            let mut ranges = Vec::new();
            for (gap, pages) in gaps {
                at += gap * 0x1000;
                ranges.push((GuestAddress(at), pages as usize * 0x1000));
                at += pages * 0x1000;
            }
            let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
            let address = address % (at + 0x2000);
            let view = View::over(&memory);
            let spans = view.spans();
            let oracle = memory.get_host_address(GuestAddress(address)).ok();
            prop_assert_eq!(spans.at(address).map(|(host, _)| host), oracle);
            let one = memory.get_slice(GuestAddress(address), len as usize).ok().filter(|_| oracle.is_some());
            prop_assert_eq!(spans.range(address, len).is_some(), one.is_some());
            let (mut ours, mut theirs) = (vec![0; len as usize], vec![0; len as usize]);
            let pattern: Vec<u8> = (0..0x1000).map(|i| i as u8).collect();
            for (start, bytes) in &ranges {
                for page in 0..bytes / 0x1000 {
                    memory.write_slice(&pattern, GuestAddress(start.0 + page as u64 * 0x1000)).unwrap();
                }
            }
            let there = memory.read_slice(&mut theirs, GuestAddress(address)).is_ok();
            prop_assert_eq!(spans.read(address, &mut ours).is_some(), there || len == 0);
            if there {
                prop_assert_eq!(ours, theirs);
            }
            let mut sixteen = [0; 16];
            let there = memory.read_slice(&mut sixteen, GuestAddress(address)).is_ok();
            prop_assert_eq!(spans.read_pair(address), there.then_some(pair(&sixteen)));
        }
    }
}
