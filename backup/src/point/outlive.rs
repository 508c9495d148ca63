//! Points in time that outlive the process: what is written down for the next one, and how that one goes on.
//!
//! A point has a ledger, kept by `cbw` (what is saved) and by [`Point::release`] (what the target holds). A view of a point has one of its
//! own, in which nothing is saved: the point is whole without it, so all that is of interest is what need not be copied any more,
//! whether the target holds it or it was never asked for.

use super::{Point, PointOptions, View, Wanted};
use crate::cbw::{CopyBeforeWrite, Saved};
use crate::node::Node;
use crate::resume::{Ledger, Loaded, Place, Plan};
use crate::scratch::Blocks;
use blkmark_bitmap::sync::lock;
use blkmark_bitmap::{Bits, ByteRange, Granularity};
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// What a killed process left of a point.
#[derive(Default)]
pub(super) struct Left {
    /// What was saved, until the point begins.
    pub(super) index: BTreeMap<u64, Saved>,
    /// Clusters that need not be copied any more.
    in_target: Option<Bits>,
}

/// The same in whole clusters, if it consists of them; `None` if there are none.
fn whole_clusters(units: &Bits, cluster: Granularity) -> Result<Option<Bits>, &'static str> {
    let mut missing = Bits::full(units.granularity(), units.size());
    missing.subtract(units);
    let (missing, clusters) = (missing.at(cluster), units.at(cluster));
    let mut whole = clusters.clone();
    whole.subtract(&missing);
    if whole.dirty_bytes() != clusters.dirty_bytes() {
        return Err("its ledger knows of half a cluster");
    }
    Ok((!clusters.is_empty()).then_some(clusters))
}

/// A new ledger, where the disk has a place for one. Without one, a point ends with the process.
pub(super) fn new_ledger(node: &Node, cbw: &CopyBeforeWrite) -> Option<Arc<Ledger>> {
    let (haven, scratch) = cbw.scratch_name()?;
    let (disk, size, unit) = (haven.disk(), cbw.size(), cbw.unit());
    Ledger::create(haven, Plan { scratch, disk, size, unit })
        .inspect_err(|error| {
            tracing::warn!(disk = node.id, %error, "a point in time will end with the process: no ledger");
        })
        .ok()
        .map(Arc::new)
}

impl Point {
    /// A point that a killed process left, to be armed before the first request of the guest: `cbw` has its scratch, and `blocks`
    /// are what of that it keeps. An error: what was left contradicts itself.
    ///
    /// What the disk holds of a unit that is neither saved nor in the target is the point's value, and stays so. Every write that came
    /// after the instant was submitted only after its units were in the ledger, before and after the kill. A write that was in
    /// flight at the instant may have been in flight at the kill still: it was not acknowledged at the instant, so that any
    /// part of it may be in the image, as after a power cut; nobody has read its units, since readers wait for it; and what of it
    /// lands at all has landed, for this process has the disk's lock (`session/inflight`). Submitted again, it is a write like
    /// any other, and its units are saved first.
    pub(crate) fn restore(
        node: &Arc<Node>,
        cbw: Arc<CopyBeforeWrite>,
        wanted: Wanted,
        cluster: Granularity,
        options: PointOptions,
        loaded: Loaded,
        blocks: &Blocks,
    ) -> Result<Arc<Self>, &'static str> {
        let unit = cbw.unit();
        let units = loaded.in_target();
        let in_target = whole_clusters(&units, cluster)?;
        let mut index = BTreeMap::new();
        for (start, place) in &loaded.saved {
            let saved = match place {
                Place::Zero => None,
                block => Some(Arc::clone(blocks.get(block).ok_or("a block of its scratch is gone")?)),
            };
            index.insert(*start, saved);
        }
        let saved: Vec<ByteRange> =
            index.keys().map(|start| unit.range(unit.index(*start)..unit.index(*start) + 1, cbw.size())).collect();
        let ledger = cbw.scratch_name().map(|(haven, _)| Arc::new(Ledger::reopen(haven, loaded)));
        let left = Left { index, in_target };
        let point = Self::new(node, cbw, wanted, cluster, options, ledger, left);
        saved.into_iter().chain(units.runs()).for_each(|range| point.face.settle(range));
        Ok(point)
    }

    /// [`Point::view`], so that another process can go on with its reader if this one is killed. `once`: the reader brings it to one
    /// target, and what that holds need not be copied again; if not, all of it is.
    pub(crate) fn lasting_view(
        self: &Arc<Self>,
        cluster: Granularity,
        plan: Option<Bits>,
        once: bool,
        lease: Box<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        let cluster = cluster.max(self.cbw.unit());
        // Without its point it is of no use to anybody.
        let ledger = self.ledger.as_ref().and_then(|_| new_ledger(&self.node, &self.cbw));
        if let (Some(ledger), Some(plan)) = (&ledger, &plan) {
            let mut unwanted = Bits::full(cluster, self.size());
            unwanted.subtract(&plan.at(cluster));
            if let Err(error) = ledger.hold_all(&unwanted) {
                tracing::error!(disk = self.node.id, %error, "a ledger can be neither written nor removed");
            }
        }
        self.seen_by(cluster, ledger, Left::default(), View::new(self, plan, once, lease))
    }

    /// A view of this point, which a process before this one has left, for whoever goes on with its reader. An error: what was left
    /// of it does not belong to this point.
    pub(crate) fn restore_view(
        self: &Arc<Self>,
        cluster: Granularity,
        loaded: Loaded,
        once: bool,
        lease: Box<dyn Any + Send + Sync>,
    ) -> Result<Arc<Self>, &'static str> {
        let (unit, size) = (self.cbw.unit(), self.cbw.size());
        let fits = loaded.plan.unit == unit && loaded.plan.size == size && cluster >= unit && loaded.saved.is_empty();
        let haven = self.cbw.scratch_name().map(|(haven, _)| haven).filter(|_| fits);
        let haven = haven.ok_or("its ledger does not belong to its point in time")?;
        let in_target = whole_clusters(&loaded.in_target(), cluster)?;
        let ledger = Some(Arc::new(Ledger::reopen(haven, loaded)));
        let left = Left { index: BTreeMap::new(), in_target };
        Ok(self.seen_by(cluster, ledger, left, View::new(self, None, once, lease)))
    }

    /// Where it is written down for the next process, if it is.
    pub(crate) fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.ledger.as_ref()
    }

    /// Of a view, which point the next process has to go on with first.
    pub(crate) fn ledger_of_owner(&self) -> Option<Uuid> {
        self.view.as_ref()?.of.ledger.as_ref().map(|ledger| ledger.id())
    }

    /// Of the wanted clusters, those that a process before this one has not brought to the target yet; `None` if there was none, so
    /// that it is all of them.
    pub fn remaining(&self, clusters: &Bits) -> Option<Bits> {
        let left = lock(&self.left);
        let in_target = left.in_target.as_ref()?;
        let mut remaining = clusters.clone();
        remaining.subtract(in_target);
        Some(remaining)
    }

    /// Whether a process before this one brought some of it to a target, so that it is there alone.
    pub(crate) fn has_released(&self) -> bool {
        lock(&self.left).in_target.is_some()
    }

    /// Whether what is read has to be released, or is the reader's at once.
    pub(super) fn waits_for_release(&self) -> bool {
        self.keep || self.ledger.is_some()
    }

    /// Whether [`Point::release`] does anything.
    pub fn is_released(&self) -> bool {
        self.ledger.is_some() && self.view.as_ref().map_or(!self.keep, |view| view.once)
    }

    /// The target holds these ranges, which consist of whole clusters, and a killed process would take nothing of them away: what
    /// the point keeps of them goes, and the guest may write there without any more ado. Nothing goes of a point that is kept; a
    /// view of one notes it for whoever comes after a kill.
    pub fn release(&self, ranges: &[ByteRange]) {
        let Some(ledger) = self.ledger.as_ref().filter(|_| self.is_released()) else { return };
        for range in ranges {
            // Before anything of it goes: whoever comes after a kill must not look for it.
            if let Err(error) = ledger.held(*range) {
                // What is kept stays kept, which costs space alone.
                tracing::error!(disk = self.node.id, %error, "the ledger of a point in time can be neither written nor removed");
                continue;
            }
            if self.is_view() {
                continue;
            }
            let mut gone = Vec::new();
            let mut state = self.cbw.state();
            let saving = state.saving_in(*range);
            let Some(kept) = state.points.get_mut(&self.face.key) else { return };
            let starts: Vec<u64> = kept.index.range(range.start()..range.end()).map(|(start, _)| *start).collect();
            gone.extend(starts.iter().map(|start| kept.index.remove(start)));
            // What a saver is reading, it settles itself: a write must not slip in under it.
            let mut at = range.start();
            for unit in saving {
                self.face.settle(ByteRange::between(at, unit.start()));
                at = unit.end();
            }
            self.face.settle(ByteRange::between(at, range.end()));
            drop(state);
            // Gives its space back, without the lock.
            drop(gone);
        }
    }
}
