//! Views: how a job reads a kept point that belongs to somebody else.
//!
//! A view is a [`Point`] to whoever reads it, with clusters and a plan of its own, and shares all else with the point that it is of: it
//! can neither be ended nor dropped by way of the view. Made by `control` for backups of points with names, and by whoever goes on
//! with those after a kill (`outlive`).

use super::outlive::Left;
use super::{Point, lock};
use crate::resume::Ledger;
use blkmark_bitmap::sync::Mutex;
use blkmark_bitmap::{Bits, Granularity};
use std::any::Any;
use std::sync::Arc;

/// What makes a view of a point.
pub(super) struct View {
    /// Whose drop ends the point.
    pub(super) of: Arc<Point>,
    /// The clusters that the reader takes; all if there is none.
    pub(super) plan: Option<Bits>,
    /// What the reader has brought to its target is noted for the next process.
    pub(super) once: bool,
    /// Goes when the reader is done.
    lease: Mutex<Option<Box<dyn Any + Send + Sync>>>,
}

impl View {
    pub(super) fn new(of: &Arc<Point>, plan: Option<Bits>, once: bool, lease: Box<dyn Any + Send + Sync>) -> Self {
        debug_assert!(of.keep && of.view.is_none(), "only a kept point can be read by several");
        Self { of: Arc::clone(of), plan, once, lease: Mutex::new(Some(lease)) }
    }

    /// The reader is done.
    pub(super) fn end(&self) {
        drop(lock(&self.lease).take());
    }
}

impl Point {
    /// The same point for a reader that takes clusters of its own, all of them or those of `plan`. It can neither be ended nor
    /// dropped by way of the view; the point stays for as long as there is one. `lease` is let go when the reader is done. It ends
    /// with the process.
    pub fn view(
        self: &Arc<Self>,
        cluster: Granularity,
        plan: Option<Bits>,
        lease: Box<dyn Any + Send + Sync>,
    ) -> Arc<Self> {
        // Whole units are kept.
        let cluster = cluster.max(self.cbw.unit());
        self.seen_by(cluster, None, Left::default(), View::new(self, plan, false, lease))
    }

    /// This point for one reader.
    pub(super) fn seen_by(
        &self,
        cluster: Granularity,
        ledger: Option<Arc<Ledger>>,
        left: Left,
        view: View,
    ) -> Arc<Self> {
        Arc::new(Self {
            node: Arc::clone(&self.node),
            cbw: Arc::clone(&self.cbw),
            face: Arc::clone(&self.face),
            cluster,
            keep: self.keep,
            ledger,
            left: Mutex::new(left),
            pre_cut: Mutex::default(),
            view: Some(view),
        })
    }

    /// Whether it is a reader's view of a point that belongs to somebody else.
    pub fn is_view(&self) -> bool {
        self.view.is_some()
    }

    /// The point itself.
    pub(super) fn owner(&self) -> &Self {
        self.view.as_ref().map_or(self, |view| &view.of)
    }
}
