//! The promise: a target that takes blocks from the disk by itself gets the disk as of the instant, also where the guest writes
//! between the taking and the second look, where it takes only half, and where what was there was zero.

mod control_common;

use blkmark_backup::copy::{self, Action, CopyControl, CopyError};
use blkmark_backup::point::{Point, PointOptions, Wanted};
use blkmark_backup::source::FileId;
use blkmark_backup::target::Target;
use blkmark_bitmap::{Granularity, commit};
use control_common::*;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const SIZE: u64 = MIB;

/// What happens while the target takes a range.
#[derive(Clone, Copy, Debug)]
enum Taking {
    /// The guest overwrites it first.
    Late,
    /// The guest overwrites it first, and only half of it is taken.
    HalfAndLate,
    /// The guest overwrites it afterwards, which comes to the same for whoever looks at the index.
    Early,
}

/// A fresh image in memory.
struct Image<'a> {
    disk: &'a Disk,
    taking: Taking,
    bytes: Mutex<Vec<u8>>,
    taken: AtomicU64,
}

impl Target for Image<'_> {
    fn size(&self) -> u64 {
        SIZE
    }
    fn cluster_size(&self) -> u64 {
        4096
    }
    fn reads_zero(&self) -> bool {
        true
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
    fn take_from(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
        let file = File::from(file.try_clone_to_owned().unwrap());
        // One cluster in the middle of what is taken.
        let write = || self.disk.write(offset + len / 2, CLUSTER, 0xee);
        let part = match self.taking {
            Taking::HalfAndLate => len * 3 / 4,
            Taking::Late | Taking::Early => len,
        };
        if !matches!(self.taking, Taking::Early) {
            write();
        }
        file.read_exact_at(&mut self.bytes.lock().unwrap()[offset as usize..][..part as usize], offset).unwrap();
        if matches!(self.taking, Taking::Early) {
            write();
        }
        self.taken.fetch_add(1, Ordering::Relaxed);
        part == len
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn conclude(&self) -> io::Result<()> {
        Ok(())
    }
    fn abandon(&self) -> io::Result<()> {
        Ok(())
    }
    fn file_ids(&self) -> &[FileId] {
        &[]
    }
    fn format_name(&self) -> &'static str {
        "raw"
    }
    fn name(&self) -> String {
        "image".to_owned()
    }
}

/// A copy of a disk of `byte`s into an image that takes by itself; the image and how often it took.
fn copy(byte: u8, taking: Taking, sharing: bool, keep: bool) -> (Vec<u8>, u64) {
    let lab = Lab::sized(&[SIZE]);
    let disk = &lab.disks[0];
    disk.write(0, SIZE, byte);
    let options = PointOptions { keep, ..PointOptions::default() };
    let point = Point::prepare(&disk.node, Wanted::All, Granularity::new(CLUSTER).unwrap(), options).unwrap();
    let mut begun = disk.node.tracker.begin();
    begun.arm(point.gate());
    let cut = commit(vec![begun]).unwrap().remove(0);
    point.begin(cut.pre_cut);
    let image = Image { disk, taking, bytes: Mutex::new(vec![0; SIZE as usize]), taken: AtomicU64::new(0) };
    let control = CopyControl::default();
    control.set_sharing(sharing);
    let result = copy::run(&point, &point.clusters(), &image, &control, &|_, _| Action::Report);
    assert!(matches!(result, Ok::<(), CopyError>(())), "{result:?}");
    assert_eq!(control.progress(), (SIZE, SIZE), "counted once");
    assert_eq!(control.uncopied().unwrap().set_bits(), 0);
    let mut begun = disk.node.tracker.begin();
    begun.disarm(point.gate());
    commit(vec![begun]).unwrap();
    point.end();
    (image.bytes.into_inner().unwrap(), image.taken.into_inner())
}

#[test]
fn what_was_taken_too_late_is_written_again() {
    for taking in [Taking::Late, Taking::HalfAndLate, Taking::Early] {
        for byte in [7, 0] {
            for keep in [false, true] {
                let (image, taken) = copy(byte, taking, true, keep);
                assert!(taken > 0, "nothing was taken");
                assert!(
                    image.iter().all(|b| *b == byte),
                    "{taking:?} over {byte}, keep {keep}: newer than the instant"
                );
            }
        }
    }
}

#[test]
fn nothing_is_taken_unless_asked_for() {
    let (image, taken) = copy(7, Taking::Late, false, false);
    assert_eq!(taken, 0);
    assert!(image.iter().all(|byte| *byte == 7));
}
