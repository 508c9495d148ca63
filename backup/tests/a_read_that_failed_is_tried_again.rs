//! The promise: a piece of a point in time that could not be read is read again as of the point, and whoever decides about errors is
//! asked each time; also where the guest has overwritten some of the piece meanwhile, and nothing outlives the process.

mod control_common;

use blkmark_backup::copy::{self, Action, CopyControl};
use blkmark_backup::point::{Point, PointOptions, Wanted};
use blkmark_backup::target::{self, CreateOptions, Format, Policy};
use blkmark_bitmap::{Bits, Granularity, commit};
use control_common::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Copies a MiB whose first cluster was saved before the guest overwrote it, and whose sixth cannot be read `errors` times.
fn copied_after(errors: u32) -> u32 {
    let lab = Lab::with_scratch(&[MIB], 4 * MIB);
    let (disk, cluster) = (&lab.disks[0], Granularity::new(CLUSTER).unwrap());
    disk.dirty(0..16, 1);
    let instant = disk.image();
    let point = Point::prepare(&disk.node, Wanted::All, cluster, PointOptions::default()).unwrap();
    let mut begun = disk.node.tracker.begin();
    begun.arm(point.gate());
    point.begin(Arc::clone(&commit(vec![begun]).unwrap()[0].pre_cut));
    disk.write(0, CLUSTER, 2);

    disk.source.fail_at(5 * CLUSTER, errors);
    let path = lab.path("t.raw");
    let target = target::create(path.as_ref(), Format::Raw, &CreateOptions::new(MIB), &Policy::default()).unwrap();
    let told = AtomicU32::new(0);
    let decide = |_, _: &std::io::Error| {
        told.fetch_add(1, Ordering::Relaxed);
        // While somebody thinks about it, the guest goes on.
        disk.write(2 * CLUSTER, CLUSTER, 3);
        Action::Retry
    };
    copy::run(&point, &Bits::full(cluster, MIB), &*target, &CopyControl::default(), &decide).unwrap();
    assert_same(&std::fs::read(&path).unwrap(), &instant);
    assert_eq!(disk.node.load().memory, 0, "what was copied is kept no longer");

    let mut over = disk.node.tracker.begin();
    over.disarm(point.gate());
    commit(vec![over]).unwrap();
    point.end();
    told.into_inner()
}

#[test]
fn no_error_and_nobody_is_asked() {
    assert_eq!(copied_after(0), 0);
}

#[test]
fn every_error_is_told_and_the_image_is_of_the_point() {
    for errors in 1..4 {
        assert_eq!(copied_after(errors), errors);
    }
}
