//! Going on with backups of points in time that have names: each reads one that is gone on with, or ends with it.
//!
//! Of such a job nothing is armed and nothing was saved: its point is whole without it. It takes the right to read that once more, so that
//! nobody removes it, and copies what its own ledger does not name.

use super::super::Control;
use super::{Restored, Whole};
use crate::job::{Kind, OnFailure};
use crate::point::Point;
use crate::resume::Role;
use std::sync::Arc;

impl Control {
    /// Makes views of those `points` for them.
    pub(super) fn restore_readers(&self, readers: Vec<Whole<'_>>, points: &[Restored]) -> Vec<Restored> {
        readers.into_iter().filter_map(|found| self.restore_reader(found, points)).collect()
    }

    fn restore_reader(&self, found: Whole<'_>, points: &[Restored]) -> Option<Restored> {
        let disk = Arc::clone(found.disk);
        let (id, note) = (found.id, found.note.clone());
        match view(found, points) {
            Ok(view) => self.furnished(Restored::new(disk, id, note, view)),
            Err(reason) => {
                self.over_for(&disk, &note, reason);
                None
            }
        }
    }
}

fn view(found: Whole<'_>, points: &[Restored]) -> Result<Arc<Point>, &'static str> {
    let Role::Job(job) = &found.note.role else { return Err("it is no job") };
    let is_its = |one: &&Restored| Some(one.id) == job.point && Arc::ptr_eq(&one.disk, found.disk);
    let node = points.iter().find(is_its).and_then(|one| one.named.as_ref());
    let node = node.ok_or("the point in time that it copies did not go on")?;
    let lease = node.take_for(Kind::Backup).map_err(|_| "the point in time that it copies is being removed")?;
    let once = job.settings.on_failure == OnFailure::Reclaim;
    node.point.restore_view(found.note.cluster, found.loaded, once, Box::new(lease))
}
