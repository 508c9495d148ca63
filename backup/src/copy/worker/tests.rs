//! Short runs go to a target whose writers take turns in bundles: each block once and in its place, whatever fails in between.

use super::super::{self as copy};
use super::*;
use crate::node::Node;
use crate::point::{PointOptions, Wanted};
use crate::scratch::ScratchSettings;
use crate::source::{BlockStatus, FileId};
use blkmark_bitmap::{Bits, Granularity, Tracker};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const BLOCK: u64 = 4096;
const SIZE: u64 = 8 << 20;
/// What an image holds where nothing was written.
const BEFORE: u8 = 0xa5;

/// What stands in a block; some are zero.
fn byte(block: u64) -> u8 {
    if block % 5 == 3 { 0 } else { 1 + (block % 100) as u8 }
}

/// A disk of which one block cannot be read for a while.
struct Disk {
    bad: Option<u64>,
    errors: AtomicU32,
}

impl Source for Disk {
    fn size(&self) -> u64 {
        SIZE
    }
    fn alignment(&self) -> u32 {
        512
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let less = |errors: u32| errors.checked_sub(1);
        if self.bad.is_some_and(|bad| (offset..offset + buf.len() as u64).contains(&(bad * BLOCK)))
            && self.errors.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        {
            buf.fill(0xff);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        for (at, block) in (offset / BLOCK..).zip(buf.chunks_mut(BLOCK as usize)) {
            block.fill(byte(at));
        }
        Ok(())
    }
    fn block_status(&self, _: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        Ok((BlockStatus::Data, limit))
    }
    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// An image in memory. One block cannot be written for a while.
struct Image {
    bytes: Mutex<Vec<u8>>,
    /// How often each block was written.
    written: Mutex<Vec<u32>>,
    bad: Option<u64>,
    errors: AtomicU32,
    /// The most that was handed over together.
    most: Mutex<usize>,
}

impl Target for Image {
    fn size(&self) -> u64 {
        SIZE
    }
    fn cluster_size(&self) -> u64 {
        BLOCK
    }
    fn reads_zero(&self) -> bool {
        false
    }
    fn writes_in_turns(&self) -> bool {
        true
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let less = |errors: u32| errors.checked_sub(1);
        if self.bad.is_some_and(|bad| (offset..offset + buf.len() as u64).contains(&(bad * BLOCK)))
            && self.errors.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.bytes.lock().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        let blocks = offset / BLOCK..(offset + buf.len() as u64) / BLOCK;
        blocks.for_each(|block| self.written.lock().unwrap()[block as usize] += 1);
        Ok(())
    }
    fn write_all_at(&self, pieces: &[(u64, &[u8])]) -> Result<(), (usize, io::Error)> {
        let mut most = self.most.lock().unwrap();
        *most = most.max(pieces.len());
        for (done, (offset, buf)) in pieces.iter().enumerate() {
            self.write_at(buf, *offset).map_err(|error| (done, error))?;
        }
        Ok(())
    }
    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_at(&vec![0; len as usize], offset)
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

struct Scene {
    point: Arc<Point>,
    plan: Bits,
    image: Image,
    control: CopyControl,
}

impl Scene {
    /// Runs of one to three blocks with gaps; `read` and `write`: a block that fails so many times.
    fn new(read: Option<(u64, u32)>, write: Option<(u64, u32)>) -> Self {
        let block = Granularity::new(BLOCK).unwrap();
        let disk = Disk { bad: read.map(|(bad, _)| bad), errors: read.map_or(0, |(_, errors)| errors).into() };
        let scratch = ScratchSettings { directory: std::env::temp_dir(), cap: SIZE, memory: SIZE };
        let tracker = Tracker::new(SIZE, 1, 1);
        let node = Arc::new(Node::new("d", "d", false, Arc::clone(&tracker), Arc::new(disk), scratch));
        let mut plan = Bits::new(block, SIZE);
        (0..SIZE / BLOCK)
            .filter(|at| at % 4 != 1 || at % 3 == 0)
            .for_each(|at| plan.set(ByteRange::new(at * BLOCK, BLOCK)));
        let point = Point::prepare(&node, Wanted::All, block, PointOptions::default()).unwrap();
        let mut begun = tracker.begin();
        begun.arm(point.gate());
        let cut = blkmark_bitmap::commit(vec![begun]).unwrap().remove(0);
        point.begin(cut.pre_cut);
        let image = Image {
            bytes: Mutex::new(vec![BEFORE; SIZE as usize]),
            written: Mutex::new(vec![0; (SIZE / BLOCK) as usize]),
            bad: write.map(|(bad, _)| bad),
            errors: write.map_or(0, |(_, errors)| errors).into(),
            most: Mutex::new(0),
        };
        let control = CopyControl::default();
        control.keep_account();
        Self { point, plan, image, control }
    }

    fn run(&self, on_error: &(dyn Fn(Side, &io::Error) -> Action + Sync)) -> Result<(), CopyError> {
        copy::run(&self.point, &self.plan, &self.image, &self.control, on_error)
    }

    fn is_planned(&self, block: u64) -> bool {
        self.plan.any(ByteRange::new(block * BLOCK, BLOCK))
    }

    /// All that was planned is there, once, and nothing else.
    fn is_whole(&self) {
        let (bytes, written) = (self.image.bytes.lock().unwrap(), self.image.written.lock().unwrap());
        for block in 0..SIZE / BLOCK {
            let expected = if self.is_planned(block) { byte(block) } else { BEFORE };
            let found = &bytes[(block * BLOCK) as usize..][..BLOCK as usize];
            assert!(found.iter().all(|byte| *byte == expected), "block {block}");
            assert_eq!(written[block as usize], u32::from(self.is_planned(block)), "block {block}");
        }
        assert_eq!(self.control.uncopied().unwrap().set_bits(), 0);
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        self.point.end();
    }
}

#[test]
fn short_runs_are_written_together_each_in_its_place() {
    let scene = Scene::new(None, None);
    scene.run(&|side, error| panic!("{side:?}: {error}")).unwrap();
    scene.is_whole();
    assert!(*scene.image.most.lock().unwrap() > 10, "nothing was bundled");
}

#[test]
fn what_was_read_does_not_wait_for_a_block_that_cannot_be() {
    // In the middle of the first hand, and in a run.
    let scene = Scene::new(Some((40, 4)), None);
    let told = AtomicU32::new(0);
    scene
        .run(&|side, _| {
            assert_eq!(side, Side::Source);
            told.fetch_add(1, Ordering::Relaxed);
            let written = scene.image.written.lock().unwrap();
            (0..38).filter(|block| scene.is_planned(*block)).for_each(|block| assert_eq!(written[block as usize], 1));
            Action::Retry
        })
        .unwrap();
    assert_eq!(told.into_inner(), 4, "each error is told");
    scene.is_whole();
}

#[test]
fn a_block_that_cannot_be_written_is_tried_again_alone() {
    let scene = Scene::new(None, Some((40, 3)));
    let told = AtomicU32::new(0);
    scene
        .run(&|side, _| {
            assert_eq!(side, Side::Target);
            told.fetch_add(1, Ordering::Relaxed);
            Action::Retry
        })
        .unwrap();
    assert_eq!(told.into_inner(), 3);
    scene.is_whole();
}

#[test]
fn what_is_not_in_the_target_is_not_reported_as_copied() {
    for (read, write) in [(Some((40, u32::MAX)), None), (None, Some((40, u32::MAX)))] {
        let scene = Scene::new(read, write);
        let error = scene.run(&|_, _| Action::Report).unwrap_err();
        match error {
            CopyError::Target { offset, .. } if write.is_some() => assert!((36..=40).contains(&(offset / BLOCK))),
            CopyError::Point(PointError::Source { .. }) if read.is_some() => {}
            error => panic!("{error}"),
        }
        let (uncopied, written) = (scene.control.uncopied().unwrap(), scene.image.written.lock().unwrap());
        assert!(uncopied.any(ByteRange::new(40 * BLOCK, BLOCK)));
        for block in (0..SIZE / BLOCK).filter(|block| scene.is_planned(*block)) {
            let left = uncopied.any(ByteRange::new(block * BLOCK, BLOCK));
            assert!(left || written[block as usize] == 1, "block {block} is reported, and is not there");
        }
    }
}
