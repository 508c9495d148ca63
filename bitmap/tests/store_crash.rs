//! Promise: whenever the process is killed or the machine loses power, the store opens, each consistent bitmap that records has
//! every block that changed since its point in time, and one that does not record is exactly what it was.
//!
//! A simulated disk whose cache a power cut takes back or tears as it likes, a directory that drops, tears and reorders what was
//! not synced (`crash/medium.rs`), and the real store: random writes, flushes, freezes, searches, ends of both, disables, enables, clears,
//! checkpoints, resizes and coolings, with writes going on in the middle of each. At every call that changes the directory, and
//! then some, the world is stopped in two ways, opened again and compared with a plain model; a crash may hit the recovery from
//! a crash too. After a kill, freezes of jobs may go on: what is frozen is what it was, and what was written since is there, in a disabled
//! bitmap too where a job searches. What a power cut takes back of the disk counts as changed then: all that was not flushed, so it holds for
//! whatever part of that is really lost.
//!
//! `BLKMARK_CRASH_POINTS=100000 BLKMARK_CRASH_SEED=1 cargo test --release -p blkmark-bitmap --test store_crash -- --nocapture`
#![cfg(not(any(loom, shuttle)))]

#[path = "crash/medium.rs"]
#[allow(dead_code, reason = "the tests of formats and groups use the rest")]
mod medium;

use blkmark_bitmap::flip::{commit_regardless, commit_then};
use blkmark_bitmap::named::Draft;
use blkmark_bitmap::store::{Place, Stamp};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{Bits, ByteRange, CheckpointMark, Granularity, Lane, Mask, Tracker, Verdict, commit};
use medium::{Faults, Files, Random, SimDisk, SimMaps, SimMedium};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const UNIT: u64 = 64 << 10;
const SIZES: [u64; 3] = [256 * MIB, 192 * MIB, 320 * MIB];
const SLOTS: usize = 8;
const NAMES: [&str; 3] = ["a", "b", "c"];

/// What a bitmap should hold, in units of the finest granularity.
#[derive(Clone, Debug, PartialEq)]
struct Expected {
    granularity: Granularity,
    recording: bool,
    blocks: BTreeSet<u64>,
    frozen: Option<(Uuid, BTreeSet<u64>)>,
    /// What is written since is recorded for the job that searches, and for nobody else.
    for_job: bool,
}

impl Expected {
    /// What it holds if the freeze ends.
    fn all(&self) -> BTreeSet<u64> {
        let frozen = self.frozen.iter().flat_map(|(_, blocks)| blocks);
        self.blocks.iter().filter(|_| !self.for_job).chain(frozen).copied().collect()
    }
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    bitmaps: BTreeMap<String, Expected>,
    /// Name and segment, oldest first.
    checkpoints: Vec<(String, BTreeSet<u64>)>,
    size: u64,
}

#[derive(Clone, Debug)]
enum Op {
    Add(String, Granularity, bool),
    Remove(String),
    Clear(String),
    Enable(String),
    Disable(String),
    Freeze(String),
    Search(String),
    /// What was found is in the first block.
    Fill(String, Uuid),
    Abdicate(String, Uuid),
    /// And whether what was recorded for a job ends with it.
    Reclaim(String, Uuid, bool),
    Checkpoint(String),
    Forget(String),
    Resize(u64),
}

impl Op {
    fn cuts(&self) -> bool {
        !matches!(self, Op::Abdicate(..) | Op::Reclaim(_, _, false))
    }

    fn draft(&self, draft: &mut Draft, freeze: &Cell<Option<Uuid>>) -> Result<(), blkmark_bitmap::BitmapError> {
        match self {
            Op::Add(name, granularity, disabled) => {
                draft.add(name, *granularity, *disabled)?;
                draft.keep(name)
            }
            Op::Remove(name) => draft.remove(name),
            Op::Clear(name) => draft.clear(name),
            Op::Enable(name) => draft.enable(name),
            Op::Disable(name) => draft.disable(name),
            Op::Freeze(name) => draft.freeze(name).map(|frozen| freeze.set(Some(frozen.id()))),
            Op::Search(name) => draft.freeze_recording(name).map(|frozen| freeze.set(Some(frozen.id()))),
            Op::Fill(name, id) => draft.fill(name, *id, &first_block(draft.size()), Mask::Union),
            Op::Abdicate(name, id) => draft.abdicate(name, *id),
            Op::Reclaim(name, id, _) => draft.reclaim(name, *id),
            Op::Checkpoint(name) => {
                let mark = CheckpointMark { name: name.clone(), id: Uuid::new_v4(), created: 0 };
                draft.add_checkpoint(mark, Granularity::DEFAULT)
            }
            Op::Forget(name) => draft.remove_checkpoint(name),
            Op::Resize(size) => draft.resize(*size),
        }
    }

    /// The same to the model; `in_flight`: what is marked again where a generation begins.
    fn apply(&self, model: &mut Model, freeze: Option<Uuid>, in_flight: &[ByteRange]) {
        let of = |model: &mut Model, name: &str, change: &dyn Fn(&mut Expected)| {
            change(model.bitmaps.get_mut(name).unwrap());
        };
        match self {
            Op::Add(name, granularity, disabled) => {
                let (granularity, recording) = (*granularity, !disabled);
                let blocks = BTreeSet::new();
                let expected = Expected { granularity, recording, blocks, frozen: None, for_job: false };
                model.bitmaps.insert(name.clone(), expected);
            }
            Op::Remove(name) => {
                model.bitmaps.remove(name);
            }
            Op::Clear(name) => of(model, name, &|bitmap| bitmap.blocks.clear()),
            Op::Enable(name) => of(model, name, &|bitmap| bitmap.recording = true),
            Op::Disable(name) => of(model, name, &|bitmap| bitmap.recording = false),
            Op::Freeze(name) | Op::Search(name) => of(model, name, &|bitmap| {
                bitmap.frozen = Some((freeze.unwrap(), std::mem::take(&mut bitmap.blocks)));
                bitmap.for_job = matches!(self, Op::Search(_)) && !bitmap.recording;
            }),
            Op::Fill(name, _) => of(model, name, &|bitmap| {
                bitmap.for_job = false;
                bitmap.blocks = bitmap.all();
                bitmap.blocks.insert(0);
                bitmap.frozen = None;
            }),
            Op::Abdicate(name, _) => of(model, name, &|bitmap| bitmap.frozen = None),
            Op::Reclaim(name, ..) => of(model, name, &|bitmap| {
                bitmap.blocks = bitmap.all();
                (bitmap.frozen, bitmap.for_job) = (None, false);
            }),
            Op::Checkpoint(name) => model.checkpoints.push((name.clone(), BTreeSet::new())),
            Op::Forget(name) => {
                let at = model.checkpoints.iter().position(|(there, _)| there == name).unwrap();
                let (_, gone) = model.checkpoints.remove(at);
                if let Some(before) = at.checked_sub(1) {
                    model.checkpoints[before].1.extend(gone);
                }
            }
            Op::Resize(size) => model.resize(*size),
        }
        if self.cuts() {
            in_flight.iter().for_each(|range| model.write(*range));
        }
    }
}

fn first_block(size: u64) -> Bits {
    let mut found = Bits::new(Granularity::DEFAULT, size);
    found.set(ByteRange::new(0, 1));
    found
}

fn blocks(range: ByteRange) -> impl Iterator<Item = u64> {
    range.start() / UNIT..(range.end() - 1) / UNIT + 1
}

impl Model {
    fn write(&mut self, range: ByteRange) {
        // A write that was in flight when the disk became smaller may lie beyond its end.
        let range = range.intersection(ByteRange::new(0, self.size));
        if range.is_empty() {
            return;
        }
        let recording = self.bitmaps.values_mut().filter(|bitmap| bitmap.recording || bitmap.for_job);
        recording.for_each(|bitmap| bitmap.blocks.extend(blocks(range)));
        if let Some((_, segment)) = self.checkpoints.last_mut() {
            segment.extend(blocks(range));
        }
    }

    fn resize(&mut self, size: u64) {
        let end = size / UNIT;
        for bitmap in self.bitmaps.values_mut() {
            bitmap.blocks.retain(|block| *block < end);
            if bitmap.recording && size > self.size {
                bitmap.blocks.extend(self.size / UNIT..end);
            }
        }
        let last = self.checkpoints.len().saturating_sub(1);
        for (at, (_, segment)) in self.checkpoints.iter_mut().enumerate() {
            segment.retain(|block| *block < end);
            if at == last && size > self.size {
                segment.extend(self.size / UNIT..end);
            }
        }
        self.size = size;
    }
}

fn dirty_blocks(bits: &Bits) -> BTreeSet<u64> {
    bits.runs().flat_map(|run| run.start() / UNIT..run.end().div_ceil(UNIT)).collect()
}

/// Where a bitmap records when the machine goes down, what a power cut takes back changes then.
fn with(blocks: &BTreeSet<u64>, also: &BTreeSet<u64>, recording: bool, size: u64) -> BTreeSet<u64> {
    let also = also.iter().filter(|block| recording && **block < size / UNIT);
    blocks.iter().chain(also).copied().collect()
}

/// Whether `found` is at least what is expected, and no more where nothing is recorded.
fn agrees(found: &Bits, expected: &BTreeSet<u64>, granularity: Granularity, exact: bool) -> Result<(), String> {
    if let Some(lost) = expected.iter().find(|block| !found.any(ByteRange::new(*block * UNIT, UNIT))) {
        return Err(format!("block {lost} is lost"));
    }
    if exact {
        let mut bits = Bits::new(granularity, found.size());
        expected.iter().for_each(|block| bits.set(ByteRange::new(block * UNIT, UNIT)));
        if bits != *found {
            return Err("it does not record, and changed".to_owned());
        }
    }
    Ok(())
}

/// Compares an opened store with one outcome. `taken_back`: blocks that a power cut may have taken back.
fn compare(tracker: &Tracker, model: &Model, lossy: bool, taken_back: &BTreeSet<u64>) -> Result<(), String> {
    let list = tracker.list();
    if !lossy && list.iter().any(|info| info.inconsistent) {
        return Err(format!("inconsistent: {list:?}"));
    }
    for info in &list {
        let Some(expected) = model.bitmaps.get(&info.name) else {
            return Err(format!("bitmap {} is not expected", info.name));
        };
        if info.inconsistent {
            continue;
        }
        if (info.granularity, info.recording, info.persistent) != (expected.granularity, expected.recording, true) {
            return Err(format!("{info:?} where {expected:?} is expected"));
        }
        let found = tracker.bits(&info.name).map_err(|error| error.to_string())?;
        let blocks = with(&expected.all(), taken_back, expected.recording, model.size);
        agrees(&found, &blocks, expected.granularity, !expected.recording)
            .map_err(|reason| format!("bitmap {}: {reason}", info.name))?;
    }
    if !lossy && list.len() != model.bitmaps.len() {
        return Err(format!("{} bitmaps where {} are expected", list.len(), model.bitmaps.len()));
    }
    let checkpoints = tracker.checkpoints();
    if checkpoints.is_empty() && lossy {
        return Ok(());
    }
    let names: Vec<&str> = checkpoints.iter().map(|checkpoint| checkpoint.mark.name.as_str()).collect();
    if names != model.checkpoints.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>() {
        return Err(format!("checkpoints {names:?} where {:?} are expected", model.checkpoints));
    }
    for (at, (name, segment)) in model.checkpoints.iter().enumerate() {
        let next = model.checkpoints.get(at + 1).map(|(next, _)| next.as_str());
        let found = tracker.changes(name, next).map_err(|error| error.to_string())?;
        let segment = with(segment, taken_back, next.is_none(), model.size);
        agrees(&found, &segment, Granularity::DEFAULT, next.is_some())
            .map_err(|reason| format!("checkpoint {name}: {reason}"))?;
    }
    Ok(())
}

/// What a daemon begins with: files, maps, what may be found in them, whether a store has failed before, and the disk's cache.
type Life = (Files, SimMaps, Vec<Model>, bool, Arc<SimDisk>);

type Held = (ByteRange, usize, Arc<AtomicBool>);

/// One run of a daemon over the simulated disk.
struct World {
    medium: Arc<SimMedium>,
    maps: SimMaps,
    disk: Arc<SimDisk>,
    tracker: Arc<Tracker>,
    lane: RefCell<Lane>,
    random: RefCell<Random>,
    /// What may be found: what is in force and, while a command is under way, what it may have come to.
    outcomes: RefCell<Vec<Model>>,
    in_flight: RefCell<Vec<(usize, ByteRange)>>,
    held: RefCell<Vec<Held>>,
    file_size: Cell<u64>,
    /// An answer is awaited; crashes may find the disk's size changed, or the store not made yet.
    resizing: Cell<bool>,
    faults: Faults,
    failed: Cell<bool>,
    /// The log's thread has met an error of the table.
    broken: Cell<bool>,
    busy: Cell<bool>,
    /// No queue is served any more.
    closing: Cell<bool>,
    /// The table is being written.
    logging: Cell<bool>,
    points: Cell<u64>,
    /// Go on from here instead.
    crash: RefCell<Option<Life>>,
    log: RefCell<Vec<String>>,
    context: String,
}

thread_local! {
    static WORLD: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
    /// Freezes that went on.
    static GONE_ON: Cell<u64> = const { Cell::new(0) };
    /// While a crash is looked into: what has to hold at each point of the recovery.
    static RECOVERING: RefCell<Option<Rc<Recovering>>> = const { RefCell::new(None) };
}

struct Recovering {
    medium: RefCell<Option<Arc<SimMedium>>>,
    maps: SimMaps,
    disk: Arc<SimDisk>,
    taken_back: BTreeSet<u64>,
    outcomes: Vec<Model>,
    lossy: bool,
    size: u64,
    random: RefCell<Random>,
    points: Cell<u64>,
    context: String,
}

fn stamp(size: u64) -> Stamp {
    Stamp { block_device: false, device: 1, inode: 2, size, changed: 3, touched: 4, boot: Uuid::nil(), name: 0 }
}

fn open(medium: &Arc<SimMedium>, maps: &SimMaps, size: u64, disk: &Arc<SimDisk>) -> Arc<Tracker> {
    open_to_resume(medium, maps, size, disk, Vec::new())
}

fn open_to_resume(
    medium: &Arc<SimMedium>,
    maps: &SimMaps,
    size: u64,
    disk: &Arc<SimDisk>,
    resume: Vec<Uuid>,
) -> Arc<Tracker> {
    let (medium, maps, disk) = (Arc::clone(medium) as _, Box::new(maps.clone()), Arc::clone(disk));
    let flush = Arc::new(move || disk.flush());
    Tracker::open_idle(Place { medium, maps, disk: stamp(size), flush, resume }, 1, SLOTS)
}

/// Goes on with the freezes that a killed process left. Each bitmap that is in one still has what it should, frozen and since. Tells how
/// many.
fn go_on(left: &Left, outcomes: &[Model], context: &str) -> u64 {
    let frozen = |expected: &Expected| expected.frozen.as_ref().map(|(id, _)| *id);
    let resume: Vec<Uuid> = outcomes.iter().flat_map(|model| model.bitmaps.values().filter_map(frozen)).collect();
    let medium = SimMedium::new(left.files.clone(), left.seed, Faults::None, None);
    let tracker = open_to_resume(&medium, &left.maps.killed(), left.size, &left.disk.killed(), resume);
    let mut gone_on = 0;
    for info in tracker.list() {
        let Some(id) = info.frozen else { continue };
        let shown = tracker.bits(&info.name).unwrap();
        let mut begun = tracker.begin();
        begun.draft.fill(&info.name, id, &first_block(left.size), Mask::Union).unwrap();
        commit(vec![begun]).unwrap();
        let filled = tracker.bits(&info.name).unwrap();
        let expected = outcomes.iter().filter_map(|model| model.bitmaps.get(&info.name));
        let results: Vec<Result<(), String>> = expected
            .filter_map(|expected| expected.frozen.as_ref().map(|(_, frozen)| (expected, frozen)))
            .map(|(expected, frozen)| {
                agrees(&shown, frozen, expected.granularity, true)?;
                agrees(&filled, &frozen.union(&expected.blocks).copied().collect(), expected.granularity, false)
            })
            .collect();
        assert!(results.iter().any(Result::is_ok), "{context}, gone on with: {}: {results:?}", info.name);
        gone_on += 1;
    }
    gone_on
}

/// What a crash leaves, and with which numbers to look into it.
struct Left {
    files: Files,
    maps: SimMaps,
    disk: Arc<SimDisk>,
    /// Of the disk's blocks, those that a power cut may have taken back.
    taken_back: BTreeSet<u64>,
    lossy: bool,
    /// Every process so far: what was on tmpfs is there.
    killed: bool,
    size: u64,
    seed: u64,
}

/// Opens what is left, and compares; crashes within that are looked into too.
fn examine(left: Left, outcomes: &[Model], deep: bool, context: &str) -> u64 {
    if left.killed && !left.lossy {
        GONE_ON.set(GONE_ON.get() + go_on(&left, outcomes, context));
    }
    let Left { files, maps, disk, taken_back, lossy, size, seed, .. } = left;
    let medium = SimMedium::new(files, seed, Faults::None, deep.then_some(recovery_point as fn(&str)));
    let recovering = Rc::new(Recovering {
        medium: RefCell::new(Some(Arc::clone(&medium))),
        maps: maps.clone(),
        disk: Arc::clone(&disk),
        taken_back: taken_back.clone(),
        outcomes: outcomes.to_vec(),
        lossy,
        size,
        random: RefCell::new(Random(seed)),
        points: Cell::new(0),
        context: context.to_owned(),
    });
    if deep {
        RECOVERING.set(Some(Rc::clone(&recovering)));
    }
    let tracker = open(&medium, &maps, size, &disk);
    RECOVERING.set(None);
    let results: Vec<_> = outcomes.iter().map(|model| compare(&tracker, model, lossy, &taken_back)).collect();
    assert!(results.iter().any(Result::is_ok), "{context}: {results:?}");
    recovering.points.get() + 1
}

fn recovery_point(_: &str) {
    let Some(recovering) = RECOVERING.with_borrow(Option::clone) else { return };
    let Some(medium) = recovering.medium.borrow().clone() else { return };
    RECOVERING.set(None);
    let (seed, kill, files) = {
        let mut random = recovering.random.borrow_mut();
        let (seed, kill) = (random.next(), random.one_in(3));
        let state = medium.state.lock().unwrap();
        (seed, kill, if kill { state.clone() } else { state.power_cut(&mut random) })
    };
    let maps = if kill { recovering.maps.killed() } else { SimMaps::default() };
    let (disk, mut taken_back) = (recovering.disk.killed(), recovering.taken_back.clone());
    let disk = if kill { disk } else { Arc::default() };
    if !kill {
        taken_back.extend(recovering.disk.unflushed());
    }
    let context = format!("{}, then {} in the recovery", recovering.context, if kill { "killed" } else { "power cut" });
    // The start before has ended the freezes, for nobody went on with them.
    let killed = false;
    let left = Left { files, maps, disk, taken_back, lossy: recovering.lossy, killed, size: recovering.size, seed };
    let n = examine(left, &recovering.outcomes, false, &context);
    recovering.points.set(recovering.points.get() + n);
    RECOVERING.set(Some(recovering));
}

/// Called before each change of the directory.
fn at_point(file: &str) {
    let Some(world) = WORLD.with_borrow(Option::clone) else { return };
    if world.busy.replace(true) {
        return;
    }
    // The log's thread is at the table itself: who waits for it waits on.
    world.logging.set(file.starts_with("intent"));
    if !world.closing.get() && world.random.borrow_mut().one_in(2) {
        world.write();
    }
    world.look();
    world.logging.set(false);
    world.busy.set(false);
}

impl World {
    fn begin(
        (files, maps, disk): (Files, SimMaps, Arc<SimDisk>),
        model: Model,
        seed: u64,
        faults: Faults,
        lossy: bool,
        context: String,
    ) -> Rc<Self> {
        WORLD.set(None);
        let size = model.size;
        let medium = SimMedium::new(files, seed, faults, Some(at_point));
        let tracker = open(&medium, &maps, size, &disk);
        let lane = RefCell::new(tracker.lane(0).unwrap());
        let world = Rc::new(Self {
            medium,
            maps,
            disk,
            tracker,
            lane,
            random: RefCell::new(Random(seed)),
            outcomes: RefCell::new(vec![model]),
            in_flight: RefCell::default(),
            held: RefCell::default(),
            file_size: Cell::new(size),
            resizing: Cell::new(false),
            faults,
            failed: Cell::new(lossy),
            broken: Cell::new(false),
            busy: Cell::new(false),
            logging: Cell::new(false),
            closing: Cell::new(false),
            points: Cell::new(0),
            crash: RefCell::new(None),
            log: RefCell::default(),
            context,
        });
        world.learn();
        WORLD.set(Some(Rc::clone(&world)));
        world
    }

    /// A crash may have widened bitmaps: from here on they are what they are.
    fn learn(&self) {
        let mut model = Model { size: self.tracker.size(), ..Model::default() };
        for info in self.tracker.list() {
            if info.inconsistent {
                self.failed.set(true);
            }
            let blocks = self.tracker.bits(&info.name).map(|bits| dirty_blocks(&bits)).unwrap_or_default();
            let (granularity, recording) = (info.granularity, info.recording);
            model.bitmaps.insert(info.name, Expected { granularity, recording, blocks, frozen: None, for_job: false });
        }
        let checkpoints = self.tracker.checkpoints();
        for (at, checkpoint) in checkpoints.iter().enumerate() {
            let next = checkpoints.get(at + 1).map(|next| next.mark.name.as_str());
            let bits = self.tracker.changes(&checkpoint.mark.name, next).unwrap();
            model.checkpoints.push((checkpoint.mark.name.clone(), dirty_blocks(&bits)));
        }
        *self.outcomes.borrow_mut() = vec![model];
    }

    fn is_lossy(&self) -> bool {
        self.failed.get() || self.faults != Faults::None || self.resizing.get()
    }

    /// The world stops here, in two ways.
    fn look(&self) {
        let outcomes = self.outcomes.borrow().clone();
        for kill in [false, true] {
            let (seed, files, deep, stay) = {
                let mut random = self.random.borrow_mut();
                let state = self.medium.state.lock().unwrap();
                let files = if kill { state.clone() } else { state.power_cut(&mut random) };
                (random.next(), files, random.one_in(8), random.one_in(150))
            };
            let maps = if kill { self.maps.killed() } else { SimMaps::default() };
            let disk = if kill { self.disk.killed() } else { Arc::default() };
            let taken_back = if kill { BTreeSet::new() } else { self.disk.unflushed() };
            if stay && self.crash.borrow().is_none() && !self.resizing.get() {
                *self.crash.borrow_mut() =
                    Some((files.clone(), maps.clone(), outcomes.clone(), self.failed.get(), disk.killed()));
            }
            let log = self.log.borrow();
            let last = &log[log.len().saturating_sub(30)..];
            let context = format!("{}, {last:?}, {}", self.context, if kill { "killed" } else { "power cut" });
            drop(log);
            let (lossy, killed, size) = (self.is_lossy(), kill, self.file_size.get());
            let left = Left { files, maps, disk, taken_back, lossy, killed, size, seed };
            let n = examine(left, &outcomes, deep, &context);
            self.points.set(self.points.get() + n);
        }
    }

    /// A guest's write, as the write path makes it.
    fn write(&self) {
        let (slot, range) = {
            let mut random = self.random.borrow_mut();
            let used = |slot: &usize| {
                self.in_flight.borrow().iter().any(|(other, _)| other == slot)
                    || self.held.borrow().iter().any(|(_, other, _)| other == slot)
            };
            let Some(slot) = (0..SLOTS).find(|slot| !used(slot)) else {
                drop(random);
                return self.complete();
            };
            // A few places, so that extents are written to again, and some that cross from one to the next.
            let extent = random.below(self.file_size.get().div_ceil(32 * MIB)) * 32 * MIB;
            let offset = (extent + random.below(4) * MIB).saturating_sub(random.below(2) * 4096);
            (slot, ByteRange::new(offset, 8192))
        };
        self.ask(slot, range);
        if self.random.borrow_mut().one_in(2) {
            self.complete();
        }
    }

    fn ask(&self, slot: usize, range: ByteRange) {
        let admitted = self.lane.borrow_mut().enter().admit(slot, range);
        match admitted {
            Admitted::Go => {
                // From here on its bytes may be on the disk.
                self.log.borrow_mut().push(format!("write {}", range.start() / UNIT));
                self.outcomes.borrow_mut().iter_mut().for_each(|model| model.write(range));
                self.disk.submit(slot, blocks(range));
                self.in_flight.borrow_mut().push((slot, range));
            }
            Admitted::Beyond => {}
            Admitted::Held(gate) => {
                let go = Arc::new(AtomicBool::new(false));
                let there = Arc::clone(&go);
                gate.hold(
                    range,
                    Instant::now(),
                    Box::new(move |verdict| there.store(verdict == Verdict::Again, Ordering::SeqCst)),
                );
                self.held.borrow_mut().push((range, slot, go));
                self.serve();
            }
        }
    }

    /// The log's thread gets to run.
    fn serve(&self) {
        if self.logging.get() {
            return;
        }
        if self.tracker.serve_store() {
            self.resume();
        } else {
            self.failed.set(true);
            self.broken.set(true);
        }
    }

    fn resume(&self) {
        let held = std::mem::take(&mut *self.held.borrow_mut());
        let (ready, held) = held.into_iter().partition(|(.., go)| go.load(Ordering::SeqCst));
        *self.held.borrow_mut() = held;
        let ready: Vec<Held> = ready;
        ready.into_iter().for_each(|(range, slot, _)| self.ask(slot, range));
    }

    fn complete(&self) {
        let mut in_flight = self.in_flight.borrow_mut();
        if !in_flight.is_empty() {
            let at = self.random.borrow_mut().below(in_flight.len() as u64) as usize;
            let (slot, _) = in_flight.swap_remove(at);
            self.disk.complete(slot);
            self.lane.borrow_mut().finish(slot);
        }
    }

    fn finish_all(&self) {
        while !self.in_flight.borrow().is_empty() {
            self.complete();
        }
    }

    /// What a failed table asks for, once no command is under way.
    fn mend(&self) {
        if !self.held.borrow().is_empty() {
            self.busy.set(true);
            if self.broken.take() || !self.tracker.serve_store() {
                self.failed.set(true);
                self.busy.set(false);
                self.tracker.distrust("the table failed");
                self.busy.set(true);
            }
            self.resume();
            self.busy.set(false);
        }
    }

    fn choose(&self) -> Option<Op> {
        let model = self.outcomes.borrow()[0].clone();
        let mut random = self.random.borrow_mut();
        let name = NAMES[random.below(3) as usize].to_owned();
        let granularity = [UNIT, MIB, 4096][random.below(3) as usize].max(UNIT);
        let Some(bitmap) = model.bitmaps.get(&name) else {
            return Some(Op::Add(name, Granularity::new(granularity).unwrap(), random.one_in(4)));
        };
        if let Some((id, _)) = &bitmap.frozen {
            return Some(match random.below(3) {
                // What a job searches ends in one of the two other ways.
                0 if !bitmap.for_job => Op::Abdicate(name, *id),
                1 => Op::Fill(name, *id),
                _ => Op::Reclaim(name, *id, bitmap.for_job),
            });
        }
        Some(match random.below(16) {
            0 => Op::Remove(name),
            1 => Op::Clear(name),
            2 | 3 => Op::Enable(name),
            4 | 5 => Op::Disable(name),
            6 if model.bitmaps.values().all(|bitmap| bitmap.frozen.is_none()) => {
                Op::Resize(SIZES[random.below(3) as usize])
            }
            7 if model.checkpoints.len() < 3 => Op::Checkpoint(format!("p{}", random.next())),
            8 if !model.checkpoints.is_empty() => {
                Op::Forget(model.checkpoints[random.below(model.checkpoints.len() as u64) as usize].0.clone())
            }
            9..=11 => Op::Search(name),
            _ => Op::Freeze(name),
        })
    }

    /// One command, answered or not.
    fn command(&self, op: &Op) {
        if let Op::Resize(size) = op {
            self.resizing.set(true);
            if *size > self.file_size.get() {
                self.file_size.set(*size);
            }
        }
        self.log.borrow_mut().push(format!("{op:?}"));
        let freeze = Cell::new(None);
        let mut begun = self.tracker.begin();
        if let Err(error) = op.draft(&mut begun.draft, &freeze) {
            let lost = self.tracker.list().iter().any(|info| info.inconsistent);
            assert!(self.failed.get() || lost && self.faults != Faults::None, "{}: {op:?}: {error}", self.context);
            drop(begun);
            self.settle(false);
            return;
        }
        let in_force = |_: &[_]| {
            // Both outcomes are possible until it is answered.
            let in_flight: Vec<ByteRange> = self.in_flight.borrow().iter().map(|(_, range)| *range).collect();
            let mut outcomes = self.outcomes.borrow_mut();
            let mut after = outcomes[0].clone();
            op.apply(&mut after, freeze.get(), &in_flight);
            outcomes.push(after);
        };
        let result = match op {
            Op::Reclaim(..) if self.random.borrow_mut().one_in(2) => {
                in_force(&[]);
                commit_regardless(vec![begun])
            }
            _ => commit_then(vec![begun], in_force),
        };
        if let Err(error) = &result {
            assert!(self.faults != Faults::None, "{}: {op:?}: {error}", self.context);
        }
        self.log.borrow_mut().push(format!("{:?}", result.as_ref().map(|_| ())));
        self.settle(result.is_ok());
    }

    fn settle(&self, done: bool) {
        let mut outcomes = self.outcomes.borrow_mut();
        let last = outcomes.len() - 1;
        let there = outcomes.swap_remove(if done { last } else { 0 });
        if self.tracker.list().iter().any(|info| info.inconsistent) && !self.failed.replace(true) {
            let hurt = self.medium.hurt.load(Ordering::SeqCst);
            assert!(hurt, "{}: a refused command cost the bitmaps: {:?}", self.context, self.log.borrow());
        }
        self.file_size.set(there.size);
        *outcomes = vec![there];
        self.resizing.set(false);
    }

    fn step(&self) {
        let what = self.random.borrow_mut().below(10);
        match what {
            0 | 1 => {
                self.log.borrow_mut().push("cool".to_owned());
                self.tracker.cool()
            }
            2 => drop(self.disk.flush()),
            3 => {
                // A write that takes longer than its extent is in use.
                self.log.borrow_mut().push("cool twice".to_owned());
                self.tracker.cool();
                self.tracker.cool();
                self.finish_all();
                let free = |(name, bitmap): (&String, &Expected)| bitmap.frozen.is_none().then(|| name.clone());
                let name = self.outcomes.borrow()[0].bitmaps.iter().find_map(free);
                name.map(Op::Clear).iter().for_each(|op| self.command(op));
            }
            4 | 5 => {}
            _ => self.choose().iter().for_each(|op| self.command(op)),
        }
    }
}

/// Runs until `points` crash points were looked at; answers how many there were.
fn run(seed: u64, points: u64, faults: Faults) -> u64 {
    let mut random = Random(seed);
    let mut seen = 0;
    while seen < points {
        let world_seed = random.next();
        let model = Model { size: SIZES[0], ..Model::default() };
        let context = |n: u32| format!("seed {seed}, {faults:?}, world {world_seed}, life {n}");
        let nothing = (Files::default(), SimMaps::default(), SimDisk::new(world_seed, faults));
        let mut world = World::begin(nothing, model, world_seed, faults, false, context(0));
        for life in 1..12 {
            for _ in 0..40 {
                world.step_with_writes();
                if world.crash.borrow().is_some() {
                    break;
                }
            }
            compare_live(&world);
            seen += world.points.take();
            let crash = world.crash.borrow_mut().take();
            let (files, maps, outcomes, lossy, disk) = match crash {
                Some(crash) => crash,
                None => world.end(),
            };
            let model = outcomes[0].clone();
            world = World::begin((files, maps, disk), model, random.next(), faults, lossy, context(life));
        }
        WORLD.set(None);
    }
    seen
}

/// What the daemon itself shows has to be true as well.
fn compare_live(world: &World) {
    let outcomes = world.outcomes.borrow();
    for info in world.tracker.list().iter().filter(|info| !info.inconsistent) {
        let expected = &outcomes[0].bitmaps[&info.name];
        let shown = match &expected.frozen {
            Some((_, frozen)) => frozen,
            None => &expected.blocks,
        };
        let found = world.tracker.bits(&info.name).unwrap();
        agrees(&found, shown, expected.granularity, true)
            .unwrap_or_else(|reason| panic!("{}: bitmap {} while served: {reason}", world.context, info.name));
    }
}

impl World {
    fn step_with_writes(&self) {
        self.mend();
        self.step();
        self.busy.set(true);
        let writes = self.random.borrow_mut().below(4);
        for _ in 0..writes {
            self.write();
        }
        self.look();
        self.busy.set(false);
    }

    /// A clean end: what is found afterwards is exactly what there was.
    fn end(&self) -> Life {
        self.mend();
        self.finish_all();
        self.resume();
        self.finish_all();
        let mut model = self.outcomes.borrow()[0].clone();
        self.closing.set(true);
        let flushed = self.disk.flush().is_ok();
        let closed = if flushed { self.tracker.close(stamp(self.file_size.get())) } else { Ok(()) };
        assert!(closed.is_ok() || self.faults != Faults::None, "{}: {closed:?}", self.context);
        let files = self.medium.state.lock().unwrap().clone();
        if flushed && closed.is_ok() && !self.failed.get() {
            WORLD.set(None);
            let medium = SimMedium::new(files.clone(), 1, Faults::None, None);
            let tracker = open(&medium, &SimMaps::default(), self.file_size.get(), &self.disk);
            for (name, expected) in &model.bitmaps {
                let found = tracker.bits(name).unwrap_or_else(|error| panic!("{}: {error}", self.context));
                agrees(&found, &expected.all(), expected.granularity, true)
                    .unwrap_or_else(|reason| panic!("{}: bitmap {name} after a clean end: {reason}", self.context));
            }
        }
        for bitmap in model.bitmaps.values_mut() {
            bitmap.blocks = bitmap.all();
            (bitmap.frozen, bitmap.for_job) = (None, false);
        }
        (files, self.maps.killed(), vec![model], self.failed.get() || closed.is_err(), self.disk.killed())
    }
}

fn number(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn crash(faults: Faults) {
    let (seed, points) = (number("BLKMARK_CRASH_SEED", 1), number("BLKMARK_CRASH_POINTS", 3000));
    let seen = run(seed, points, faults);
    let gone_on = GONE_ON.get();
    assert!(gone_on > 0 || faults != Faults::None, "no freeze went on");
    println!("{seen} crash points, {gone_on} freezes gone on with, seed {seed}, {faults:?}");
}

#[test]
fn no_crash_loses_a_bit() {
    crash(Faults::None);
}

#[test]
fn no_crash_after_an_io_error_makes_a_bitmap_lie() {
    crash(Faults::Errors(60));
}

#[test]
fn a_full_file_system_refuses_commands_and_loses_nothing() {
    crash(Faults::Full);
}
