//! The promise: a kept point in time is a disk that does not change: any range of it, read at any time, by anybody, is what
//! stood there at its instant, holes too; and a point that broke gives errors, never what stands there now.
#![cfg(not(shuttle))]

use blkmark_backup::node::Node;
use blkmark_backup::point::{Point, PointOptions, PointSource, Wanted};
use blkmark_backup::scratch::ScratchSettings;
use blkmark_backup::source::{BlockStatus, FileId, Source};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Granularity, Lane, Tracker, Verdict, commit};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

/// Not whole units: the last one is cut.
const SIZE: u64 = (2 << 20) + 4096;
/// Long enough for any machine; it only ends a test that hangs.
const GIVE_UP: std::time::Duration = std::time::Duration::from_secs(60);

const UNIT: u64 = 65536;
const BLOCK: u64 = 4096;

/// A disk in memory, with holes of whole blocks.
struct Memory(Mutex<Image>, Mutex<Option<Meanwhile>>);

/// What is done once, in the middle of the next look at the disk.
type Meanwhile = Box<dyn FnOnce() + Send>;

impl Memory {
    fn interrupted(&self) {
        let meanwhile = self.1.lock().unwrap().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
    }
}

#[derive(Clone)]
struct Image {
    bytes: Vec<u8>,
    holes: Vec<bool>,
}

impl Source for Memory {
    fn size(&self) -> u64 {
        SIZE
    }
    fn alignment(&self) -> u32 {
        512
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(512) && (buf.len() as u64).is_multiple_of(512), "{offset} {}", buf.len());
        self.interrupted();
        buf.copy_from_slice(&self.0.lock().unwrap().bytes[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        self.interrupted();
        let image = self.0.lock().unwrap();
        let hole = image.holes[(offset / BLOCK) as usize];
        let mut end = (offset / BLOCK + 1) * BLOCK;
        while end < SIZE && image.holes[(end / BLOCK) as usize] == hole {
            end += BLOCK;
        }
        Ok((if hole { BlockStatus::Hole } else { BlockStatus::Data }, (end - offset).min(limit)))
    }
    fn file_id(&self) -> Option<FileId> {
        None
    }
}

struct Lab {
    node: Arc<Node>,
    memory: Arc<Memory>,
    lane: Mutex<Lane>,
}

impl Lab {
    fn new(dir: &Path, scratch: u64) -> Self {
        let holes = vec![true; (SIZE / BLOCK) as usize];
        let memory = Arc::new(Memory(Mutex::new(Image { bytes: vec![0; SIZE as usize], holes }), Mutex::default()));
        let tracker = Tracker::new(SIZE, 1, 4);
        let lane = Mutex::new(tracker.lane(0).unwrap());
        let settings = ScratchSettings { directory: dir.to_owned(), cap: scratch, memory: 1 << 20 };
        let source: Arc<dyn Source> = memory.clone();
        Self { node: Arc::new(Node::new("d", "d.raw", false, tracker, source, settings)), memory, lane }
    }

    fn change(&self, range: ByteRange, change: impl FnOnce(&mut Image)) {
        let mut lane = self.lane.lock().unwrap();
        loop {
            let admitted = lane.enter().admit(0, range);
            match admitted {
                Admitted::Go => break,
                Admitted::Beyond => panic!("beyond the end"),
                Admitted::Held(gate) => {
                    let (tx, rx) = mpsc::channel();
                    gate.hold(range, Instant::now(), Box::new(move |verdict| tx.send(verdict).unwrap()));
                    assert_eq!(rx.recv().unwrap(), Verdict::Again);
                }
            }
        }
        change(&mut self.memory.0.lock().unwrap());
        lane.finish(0);
    }

    fn write(&self, block: u64, blocks: u64, byte: u8) {
        self.change(ByteRange::new(block * BLOCK, blocks * BLOCK), |image| {
            image.bytes[(block * BLOCK) as usize..((block + blocks) * BLOCK) as usize].fill(byte);
            image.holes[block as usize..(block + blocks) as usize].fill(false);
        });
    }

    fn discard(&self, block: u64, blocks: u64) {
        self.change(ByteRange::new(block * BLOCK, blocks * BLOCK), |image| {
            image.bytes[(block * BLOCK) as usize..((block + blocks) * BLOCK) as usize].fill(0);
            image.holes[block as usize..(block + blocks) as usize].fill(true);
        });
    }

    fn point(&self) -> (Arc<Point>, Image) {
        let options = PointOptions { keep: true, ..PointOptions::default() };
        let point = Point::prepare(&self.node, Wanted::All, Granularity::DEFAULT, options).unwrap();
        let mut change = self.node.tracker.begin();
        change.arm(point.gate());
        let cuts = commit(vec![change]).unwrap();
        point.begin(Arc::clone(&cuts[0].pre_cut));
        (point, self.memory.0.lock().unwrap().clone())
    }

    fn end(&self, point: &Arc<Point>) {
        let mut change = self.node.tracker.begin();
        change.disarm(point.gate());
        commit(vec![change]).unwrap();
        point.end();
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn check(random: &mut Random, source: &PointSource, then: &Image) {
    let start = random.below(SIZE / 512) * 512;
    let most = if random.below(2) == 0 { 8 } else { 600 };
    let len = ((1 + random.below(most)) * 512).min(SIZE - start);
    let mut buf = vec![0xee; len as usize];
    source.read_at(&mut buf, start).unwrap();
    assert!(buf == then.bytes[start as usize..][..len as usize], "{start:#x}+{len:#x}");
    let (status, run) = source.block_status(start, len).unwrap();
    assert!((1..=len).contains(&run), "{run} of {len}");
    if status == BlockStatus::Hole {
        // A hole reads as zeroes. What held zeroes may have become one, for it was kept as none.
        assert!(then.bytes[start as usize..][..run as usize].iter().all(|byte| *byte == 0), "{start:#x}+{run:#x}");
    } else {
        let whole_units_are_data = |at: u64| {
            let unit = at / UNIT * UNIT;
            let blocks = unit / BLOCK..((unit + UNIT) / BLOCK).min(SIZE / BLOCK);
            blocks.clone().any(|block| !then.holes[block as usize])
        };
        assert!((start..start + run).step_by(512).all(whole_units_are_data), "{start:#x}+{run:#x} is said to be data");
    }
}

/// Points of different instants, read beside writes, discards and other readers.
#[test]
fn any_range_at_any_time_is_what_stood_there() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::new(dir.path(), 1 << 30);
    let over = AtomicBool::new(false);
    let over = &over;
    let blocks = SIZE / BLOCK;
    let mut random = Random(1);
    for _ in 0..20 {
        lab.write(random.below(blocks - 40), 1 + random.below(40), 1 + random.below(255) as u8);
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(2);
            while !over.load(Ordering::Relaxed) {
                let (block, len) = (random.below(blocks - 40), 1 + random.below(40));
                match random.below(4) {
                    0 => lab.discard(block, len),
                    1 => lab.write(block, len, 0),
                    _ => lab.write(block, len, 1 + random.below(255) as u8),
                }
            }
        });
        // However the readers end, the writer does.
        let _end = AtLast(over);
        for round in 0..12 {
            // The writer is between two changes only while its lane is ours: nothing is in flight at the instant.
            let quiet = |lab: &Lab| {
                let held = lab.lane.lock().unwrap();
                let point = lab.point();
                drop(held);
                point
            };
            let points = [quiet(&lab), quiet(&lab)];
            std::thread::scope(|readers| {
                for (n, (point, then)) in points.iter().enumerate() {
                    for reader in 0..2 {
                        readers.spawn(move || {
                            let source = PointSource::new(Arc::clone(point));
                            let mut random = Random(round * 100 + n as u64 * 10 + reader);
                            for _ in 0..200 {
                                check(&mut random, &source, then);
                            }
                        });
                    }
                }
            });
            for (point, _) in &points {
                lab.end(point);
            }
        }
    });
}

struct AtLast<'a>(&'a AtomicBool);

impl Drop for AtLast<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The guest's write comes behind the reader's first look at the index, and is over before it has read the disk.
#[test]
fn what_is_overwritten_while_it_is_read_is_still_what_stood_there() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Arc::new(Lab::new(dir.path(), 1 << 30));
    lab.write(0, 64, 7);
    let (point, _) = lab.point();
    let source = PointSource::new(Arc::clone(&point));
    let meanwhile = |change: fn(&Lab)| {
        let guest = Arc::clone(&lab);
        *lab.memory.1.lock().unwrap() = Some(Box::new(move || change(&guest)));
    };
    // A part of a unit; whole units; the status of a hole to be, of data to be, and of what comes behind.
    let mut buf = vec![0; BLOCK as usize];
    meanwhile(|lab| lab.write(2, 1, 8));
    source.read_at(&mut buf, 2 * BLOCK).unwrap();
    assert!(buf.iter().all(|byte| *byte == 7));
    let mut buf = vec![0; 2 * UNIT as usize];
    meanwhile(|lab| lab.write(17, 1, 8));
    source.read_at(&mut buf, UNIT).unwrap();
    assert!(buf.iter().all(|byte| *byte == 7));
    meanwhile(|lab| lab.discard(48, 16));
    assert_eq!(source.block_status(3 * UNIT, UNIT).unwrap().0, BlockStatus::Data);
    meanwhile(|lab| lab.write(80, 1, 8));
    assert_eq!(source.block_status(5 * UNIT, UNIT).unwrap(), (BlockStatus::Hole, UNIT));
    // The guest makes a longer hole of one: the answer may only speak of the part before.
    lab.write(8 * 16, 16, 7);
    lab.write(10 * 16, 16, 7);
    let (later, _) = lab.point();
    let source = PointSource::new(Arc::clone(&later));
    meanwhile(|lab| lab.discard(10 * 16, 16));
    assert_eq!(source.block_status(9 * UNIT, 4 * UNIT).unwrap(), (BlockStatus::Hole, UNIT));
    meanwhile(|lab| lab.discard(8 * 16, 16));
    assert_eq!(source.block_status(8 * UNIT, 4 * UNIT).unwrap(), (BlockStatus::Data, UNIT));
    for point in [point, later] {
        lab.end(&point);
    }
}

#[test]
fn a_point_tells_what_it_costs_and_gives_it_back() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::new(dir.path(), 1 << 30);
    lab.write(0, 16, 7);
    let (point, _) = lab.point();
    assert_eq!((point.cost().overwritten, point.cost().scratch), (0, 0));
    lab.write(3, 1, 8);
    // It was zero.
    lab.write(16, 1, 9);
    assert_eq!((point.cost().overwritten, point.cost().scratch), (2 * UNIT, UNIT));
    assert_eq!(lab.node.load().memory, UNIT);
    let view = point.view(Granularity::MIN, None, Box::new(()));
    lab.end(&point);
    drop(point);
    // A reader has it still, and can neither end nor disarm it.
    view.end();
    assert_eq!(lab.node.load().memory, UNIT);
    let mut buf = vec![0; UNIT as usize];
    view.read(&mut buf, 0).unwrap();
    assert!(buf.iter().all(|byte| *byte == 7));
    drop(view);
    assert_eq!(lab.node.load().memory, 0);
}

/// A view is made while the point still waits for a write that was in flight at its instant: whatever is read of it is what that leaves.
#[test]
fn a_view_waits_for_what_was_in_flight_as_its_point_does() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::new(dir.path(), 1 << 30);
    let range = ByteRange::new(0, UNIT);
    let mut lane = lab.lane.lock().unwrap();
    assert!(matches!(lane.enter().admit(0, range), Admitted::Go));
    let (point, _) = lab.point();
    let view = point.view(Granularity::MIN, None, Box::new(()));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buf = vec![0; UNIT as usize];
            view.take(range, &mut buf).unwrap();
            assert!(buf.iter().all(|byte| *byte == 9));
        });
        // Time for a reader that does not wait.
        std::thread::sleep(std::time::Duration::from_millis(50));
        lab.memory.0.lock().unwrap().bytes[..UNIT as usize].fill(9);
        lane.finish(0);
    });
    lab.end(&point);
}

/// The last point of a disk lets go of a write that it holds, and while it does, another one comes: it has savers of its own.
#[test]
fn a_point_that_comes_while_the_last_one_goes_saves_what_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Arc::new(Lab::new(dir.path(), 1 << 30));
    lab.write(0, 64, 7);
    let (last, _) = lab.point();
    // A saver is at it until the end, so that the write is still held when the point goes.
    let (end, ended) = mpsc::channel::<()>();
    let (reading, is_reading) = mpsc::channel();
    *lab.memory.1.lock().unwrap() = Some(Box::new(move || {
        reading.send(()).unwrap();
        ended.recv().unwrap_err();
    }));
    let (come, comes) = mpsc::channel();
    let beside = Arc::clone(&lab);
    last.gate().hold(ByteRange::new(0, BLOCK), Instant::now(), Box::new(move |_| come.send(beside.point().0).unwrap()));
    is_reading.recv().unwrap();
    let mut change = lab.node.tracker.begin();
    change.disarm(last.gate());
    commit(vec![change]).unwrap();
    drop(last);
    let point = comes.recv().unwrap();
    let (wrote, is_written) = mpsc::channel();
    let guest = Arc::clone(&lab);
    std::thread::spawn(move || {
        guest.write(20, 1, 8);
        wrote.send(()).unwrap();
    });
    is_written.recv_timeout(std::time::Duration::from_secs(10)).expect("the write is held for ever");
    drop(end);
    let mut buf = vec![0; BLOCK as usize];
    point.read(&mut buf, 20 * BLOCK).unwrap();
    assert!(buf.iter().all(|byte| *byte == 7));
    lab.end(&point);
}

#[test]
fn a_point_that_broke_gives_errors_and_nothing_of_today() {
    let dir = tempfile::tempdir().unwrap();
    let lab = Lab::new(dir.path(), 4 * UNIT);
    lab.write(0, SIZE / BLOCK, 7);
    let (point, _) = lab.point();
    let source = PointSource::new(Arc::clone(&point));
    for unit in 0..4 {
        lab.write(unit * 16, 1, 8);
    }
    let mut buf = vec![0; 4096];
    source.read_at(&mut buf, 0).unwrap();
    assert!(buf.iter().all(|byte| *byte == 7));
    // One more than there is room for: the guest goes on.
    lab.write(4 * 16, 1, 8);
    for offset in [0, 4 * UNIT, 20 * UNIT] {
        let error = source.read_at(&mut buf, offset).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains("its limit of 262144 bytes"), "{error}");
        assert!(source.block_status(offset, 4096).is_err());
    }
    let mut large = vec![0; 10 * UNIT as usize];
    assert!(source.read_at(&mut large, 512).is_err());
    assert_eq!(point.cost().scratch, 0);
    // A saver gives it back, when the guest has gone on.
    let began = std::time::Instant::now();
    while lab.node.load().memory != 0 {
        assert!(began.elapsed() < GIVE_UP, "a broken point keeps nothing");
        std::thread::yield_now();
    }
}
