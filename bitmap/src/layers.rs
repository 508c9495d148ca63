//! What a bitmap consists of (I2): a base, closed immutable generations, and, while it records, the current one.
//!
//! A layer is shared, never copied: 64 recording bitmaps hold 64 references to one closed generation. `compact` folds
//! them into a new base later, off the hot path. Each generation is seen at a granularity of the bitmap that recorded
//! it, so a coarse bitmap merged into a fine one gives coarse dirty cells, as it does in QEMU.

use crate::bits::Bits;
use crate::live::LiveMap;
use crate::units::{ByteRange, Granularity};
use std::sync::Arc;

/// How many closed generations may pile up before they are folded.
const FOLD_AT: usize = 8;

/// Below so many bytes it does not matter what generations take.
const FOLD_FROM: u64 = 8 << 20;

/// A closed generation, and at which granularity it counts.
pub(crate) type Closed = (Arc<LiveMap>, Granularity);

/// A set of dirty bytes, written as a union.
#[derive(Clone, Debug)]
pub(crate) struct Layers {
    granularity: Granularity,
    size: u64,
    base: Option<Arc<Bits>>,
    closed: Vec<Closed>,
    /// At which granularities the generation that is still being written belongs to this set; empty: not at all.
    current: Vec<Granularity>,
}

impl Layers {
    pub(crate) fn empty(granularity: Granularity, size: u64) -> Self {
        Self { granularity, size, base: None, closed: Vec::new(), current: Vec::new() }
    }

    pub(crate) fn granularity(&self) -> Granularity {
        self.granularity
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether the current generation belongs to this set from now on.
    pub(crate) fn record(&mut self, on: bool) {
        self.current.clear();
        if on {
            self.current.push(self.granularity);
        }
    }

    /// What it holds but for the current generation: a base, and closed generations with the granularity of each.
    pub(crate) fn parts(&self) -> (Option<&Arc<Bits>>, &[Closed]) {
        (self.base.as_ref(), &self.closed)
    }

    /// Nothing but `base`.
    pub(crate) fn of(base: Arc<Bits>) -> Self {
        Self { base: Some(Arc::clone(&base)), ..Self::empty(base.granularity(), base.size()) }
    }

    /// The current generation is closed, and named here if it belongs to this set.
    pub(crate) fn close(&mut self, generation: Option<&Arc<LiveMap>>) {
        for granularity in self.current.drain(..) {
            if let Some(generation) = generation {
                self.closed.push((Arc::clone(generation), granularity));
            }
        }
    }

    /// Adds all of `other`.
    pub(crate) fn absorb(&mut self, other: &Layers) {
        if let Some(theirs) = &other.base {
            match &self.base {
                Some(ours) if Arc::ptr_eq(ours, theirs) => {}
                None if theirs.granularity() == self.granularity => self.base = Some(Arc::clone(theirs)),
                ours => {
                    let mut base = match ours {
                        Some(ours) => (**ours).clone(),
                        None => Bits::new(self.granularity, self.size),
                    };
                    base.union(theirs);
                    self.base = Some(Arc::new(base));
                }
            }
        }
        for (generation, granularity) in &other.closed {
            if !self.closed.iter().any(|(ours, at)| Arc::ptr_eq(ours, generation) && at == granularity) {
                self.closed.push((Arc::clone(generation), *granularity));
            }
        }
        for granularity in &other.current {
            if !self.current.contains(granularity) {
                self.current.push(*granularity);
            }
        }
    }

    /// Adds plain bits.
    pub(crate) fn add(&mut self, bits: &Bits) {
        let mut layer = Layers::empty(bits.granularity(), self.size);
        layer.base = Some(Arc::new(bits.clone()));
        self.absorb(&layer);
    }

    /// The disk has another size. What lies beyond it is cut off; if `mark`, what was added is dirty, and so is the last
    /// granule of a disk that became smaller, which is not whole any more. Closed generations keep their size: only what
    /// is within this set's counts.
    pub(crate) fn resize(&mut self, size: u64, mark: bool) {
        let mut base = Bits::new(self.granularity, size);
        if let Some(old) = &self.base {
            base.union(old);
        }
        if mark && size > self.size {
            base.set(ByteRange::new(self.size, size - self.size));
        } else if mark && !size.is_multiple_of(self.granularity.bytes()) {
            base.set(ByteRange::new(size - 1, 1));
        }
        self.base = Some(Arc::new(base));
        self.size = size;
    }

    /// Whether any byte of `range` is dirty, the current generation left out. Allocates nothing.
    pub(crate) fn any(&self, range: ByteRange) -> bool {
        self.base.as_ref().is_some_and(|base| base.any(range))
            || self
                .closed
                .iter()
                .any(|(generation, granularity)| generation.any(granularity.range(granularity.cover(range), self.size)))
    }

    /// All of it as plain bits; `live` is the current generation, counted if it belongs to this set.
    pub(crate) fn bits(&self, live: Option<&Arc<LiveMap>>) -> Bits {
        let mut bits = match &self.base {
            Some(base) => (**base).clone(),
            None => Bits::new(self.granularity, self.size),
        };
        let current = self.current.iter().filter_map(|granularity| Some((live?, granularity)));
        for (generation, granularity) in self.closed.iter().map(|(generation, at)| (generation, at)).chain(current) {
            if *granularity > self.granularity {
                bits.union(&generation.to_bits().into_at(*granularity));
            } else {
                generation.fold_into(&mut bits);
            }
        }
        bits
    }

    /// Folds closed generations into a new base once there are many, or much memory is in them, or if one is of another size: what a disk loses at its end must
    /// not be back when it grows again. The old record stays whole until it is replaced.
    pub(crate) fn compact(&mut self) {
        let resized = |(generation, _): &Closed| generation.size() != self.size;
        // A base takes no memory where everything is dirty, generations do.
        let weight: u64 = self.closed.iter().map(|(generation, _)| generation.weight()).sum();
        let full = self.granularity.bits_for(self.size) / 8;
        let heavy = self.closed.len() > 1 && weight > full.max(FOLD_FROM);
        if self.closed.len() >= FOLD_AT || heavy || self.closed.iter().any(resized) {
            self.fold();
        }
    }

    /// Folds whatever closed generations there are.
    pub(crate) fn fold(&mut self) {
        if !self.closed.is_empty() {
            let current = std::mem::take(&mut self.current);
            let base = self.bits(None);
            *self = Self {
                base: Some(Arc::new(base)),
                closed: Vec::new(),
                current,
                ..Self::empty(self.granularity, self.size)
            };
        }
    }
}
