//! Promise: what a job finds out gets into a bitmap by the rule that was asked for, and whatever was written meanwhile is in
//! it too, also if the bitmap is disabled; a job that fails leaves no trace.
#![cfg(not(any(loom, shuttle)))]

use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{BitmapError, Bits, ByteRange, Frozen, Granularity, Lane, Mask, Tracker, commit};
use std::sync::Arc;

const G: Granularity = Granularity::DEFAULT;
const CELL: u64 = 65536;
const SIZE: u64 = 100 * CELL;

struct Disk {
    tracker: Arc<Tracker>,
    lane: Lane,
}

impl Disk {
    /// With bitmap b, in which cells 1, 2 and 3 are dirty.
    fn new(disabled: bool) -> Self {
        let tracker = Tracker::new(SIZE, 1, 4);
        let mut disk = Self { lane: tracker.lane(0).unwrap(), tracker };
        disk.edit(|draft| draft.add("b", G, false)).unwrap();
        (1..4).for_each(|cell| disk.write(cell));
        if disabled {
            disk.edit(|draft| draft.disable("b")).unwrap();
        }
        disk
    }

    fn edit<T>(
        &self,
        change: impl FnOnce(&mut blkmark_bitmap::named::Draft) -> Result<T, BitmapError>,
    ) -> Result<T, BitmapError> {
        let mut begun = self.tracker.begin();
        let result = change(&mut begun.draft)?;
        commit(vec![begun]).unwrap();
        Ok(result)
    }

    fn admit(&mut self, slot: usize, cell: u64) {
        let admitted = self.lane.enter().admit(slot, ByteRange::new(cell * CELL, 512));
        assert!(matches!(admitted, Admitted::Go));
    }

    fn write(&mut self, cell: u64) {
        self.admit(0, cell);
        self.lane.finish(0);
    }

    fn freeze(&self) -> Frozen {
        self.edit(|draft| draft.freeze_recording("b")).unwrap()
    }

    fn fill(&self, frozen: &Frozen, found: &[u64], mask: Mask) {
        self.edit(|draft| draft.fill("b", frozen.id(), &cells(found), mask)).unwrap();
    }

    fn dirty(&self) -> Vec<u64> {
        let bits = self.tracker.bits("b").unwrap();
        bits.runs().flat_map(|run| run.start() / CELL..run.end() / CELL).collect()
    }
}

fn cells(found: &[u64]) -> Bits {
    let mut bits = Bits::new(G, SIZE);
    found.iter().for_each(|cell| bits.set(ByteRange::new(cell * CELL, 1)));
    bits
}

#[test]
fn each_mask_keeps_its_rule_and_all_that_was_written() {
    for disabled in [false, true] {
        for (mask, want) in [
            (Mask::Overwrite, vec![2, 7, 50, 60]),
            (Mask::Union, vec![1, 2, 3, 7, 50, 60]),
            (Mask::Difference, vec![1, 3, 50, 60]),
        ] {
            let mut disk = Disk::new(disabled);
            // In flight at both instants.
            disk.admit(1, 50);
            let frozen = disk.freeze();
            disk.write(60);
            disk.fill(&frozen, &[2, 7], mask);
            disk.lane.finish(1);
            assert_eq!(disk.dirty(), want, "{mask:?} disabled={disabled}");
            disk.write(70);
            assert_eq!(disk.dirty().contains(&70), !disabled, "it records as it did before");
            let info = disk.tracker.list().remove(0);
            assert_eq!((info.recording, info.busy), (!disabled, false));
        }
    }
}

#[test]
fn a_write_that_is_in_flight_throughout_is_in_the_bitmap() {
    let mut disk = Disk::new(true);
    disk.admit(1, 50);
    let frozen = disk.freeze();
    disk.fill(&frozen, &[], Mask::Overwrite);
    assert_eq!(disk.dirty(), [50]);
}

#[test]
fn meanwhile_the_bitmap_is_busy_and_shows_what_it_held() {
    let mut disk = Disk::new(false);
    let frozen = disk.freeze();
    disk.write(60);
    assert_eq!(disk.dirty(), [1, 2, 3]);
    let busy = Err(BitmapError::Busy("b".into()));
    assert_eq!(disk.edit(|draft| draft.freeze_recording("b").map(drop)), busy);
    assert_eq!(disk.edit(|draft| draft.clear("b")), busy);
    let other = uuid::Uuid::new_v4();
    let not_ours = Err(BitmapError::NotFrozen("b".into()));
    assert_eq!(disk.edit(|draft| draft.fill("b", other, &cells(&[]), Mask::Overwrite)), not_ours);
    disk.fill(&frozen, &[], Mask::Union);
    assert_eq!(disk.dirty(), [1, 2, 3, 60]);
}

#[test]
fn a_failure_leaves_what_was_there_and_what_a_recording_bitmap_would_have_recorded() {
    for (disabled, want) in [(false, vec![1, 2, 3, 60]), (true, vec![1, 2, 3])] {
        let mut disk = Disk::new(disabled);
        let frozen = disk.freeze();
        disk.write(60);
        disk.edit(|draft| draft.reclaim("b", frozen.id())).unwrap();
        assert_eq!(disk.dirty(), want);
        disk.write(70);
        assert_eq!(disk.dirty().contains(&70), !disabled);
    }
}

#[test]
fn a_bitmap_that_was_made_for_the_job_goes_with_it() {
    let disk = Disk::new(false);
    let frozen = disk.freeze();
    disk.edit(|draft| draft.await_fill("b")).unwrap();
    disk.edit(|draft| draft.reclaim("b", frozen.id())).unwrap();
    assert!(disk.tracker.list().is_empty());
}

#[test]
fn only_whole_cells_are_subtracted() {
    let size = SIZE + 512;
    let mut coarse = Bits::full(Granularity::new(4 * CELL).unwrap(), size);
    let mut fine = Bits::new(G, size);
    fine.set(ByteRange::new(CELL, 9 * CELL));
    fine.set(ByteRange::new(100 * CELL, 1));
    coarse.subtract(&fine);
    let runs: Vec<_> = coarse.runs().map(|run| (run.start() / CELL, run.end() / CELL)).collect();
    assert_eq!(runs, [(0, 4), (8, 100)], "the last cell, cut at the end of the disk, is whole");
    let mut same = fine.clone();
    same.subtract(&fine);
    assert!(same.is_empty());
}
