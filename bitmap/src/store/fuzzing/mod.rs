//! Stores made of arbitrary bytes, and true stores that were damaged.
//!
//! Promises: whatever lies in a store's directory and where its live maps are, opening it neither panics nor takes memory without
//! end; the disk is served, its writes are marked in all bitmaps that record and are shown as good; what a clean end leaves is
//! found again, bit by bit. And where a true store was damaged and no checksum was made to fit, no bitmap that is shown as
//! good has less than what was written while it recorded, for itself or for a job that froze it and goes on.

mod memory;
mod seal;

use super::reading::{self, Slots};
use super::{Maps, NoMaps, Place, Shm, Stamp};
use crate::bits::Bits;
use crate::fill::Mask;
use crate::flip::commit;
use crate::named::Draft;
use crate::tracker::{Admitted, Tracker};
use crate::units::{ByteRange, Granularity};
use memory::{Files, Memory};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use uuid::Uuid;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 256 * MIB;
/// Written while all bitmaps recorded; after "off" did not any more, nor "held" but for its job; and after that, in an extent that
/// is still hot.
const WRITTEN: [u64; 3] = [0, 33 * MIB, 255 * MIB];
const AFTER: u64 = 100 * MIB;
const LAST: u64 = 200 * MIB;
/// What is written when the store was opened.
const NOW: u64 = 150 * MIB;
/// Of the live map, so much is vouched for: the rest has no checksum, for tmpfs keeps what was stored into it.
const MAP_HEADER: usize = 88;

fn stamp() -> Stamp {
    Stamp { block_device: false, device: 1, inode: 2, size: SIZE, changed: 3, touched: 4, boot: Uuid::nil(), name: 0 }
}

/// A directory on tmpfs, gone at the end.
struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None` where there is no tmpfs.
    fn new() -> Option<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = Path::new("/dev/shm").join(format!("blkmark-fuzz-store-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        let this = Self(path);
        Shm::new(&this.0)?;
        Some(this)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A store, and the live maps that go with it.
#[derive(Clone, Default)]
struct Left {
    files: Files,
    maps: Files,
}

/// Whatever is frozen there is gone on with, if it can be.
fn open(medium: &Arc<Memory>, maps: Box<dyn Maps>) -> Arc<Tracker> {
    let resume = match reading::slots(&**medium) {
        Slots::Found(record, _) => record.contents.bitmaps.iter().filter_map(|b| Some(b.frozen.as_ref()?.id)).collect(),
        _ => Vec::new(),
    };
    let place = Place { medium: Arc::clone(medium) as _, maps, disk: stamp(), flush: Arc::new(|| Ok(())), resume };
    Tracker::open_idle(place, 1, 4)
}

/// One write of a guest, from admission to its end. It is never refused and never hangs.
fn write(tracker: &Arc<Tracker>, offset: u64) {
    let mut lane = tracker.lane(0).unwrap();
    for _ in 0..3 {
        let admitted = lane.enter().admit(0, ByteRange::new(offset, 4096));
        match admitted {
            Admitted::Go => return lane.finish(0),
            Admitted::Held(gate) => {
                gate.hold(ByteRange::new(offset, 4096), Instant::now(), Box::new(|_| {}));
                if !tracker.serve_store() {
                    tracker.distrust("the fuzzer's table");
                }
            }
            Admitted::Beyond => panic!("the disk is {SIZE} bytes long"),
        }
    }
    panic!("a write does not go");
}

fn edit(tracker: &Arc<Tracker>, change: impl FnOnce(&mut Draft)) {
    let mut begun = tracker.begin();
    change(&mut begun.draft);
    commit(vec![begun]).unwrap();
}

/// A store with a bitmap that records and one that does not any more, ended cleanly; or killed, with one more, which records for a job
/// alone.
fn truth(clean: bool) -> Left {
    let tmpfs = Tmpfs::new();
    let shm = tmpfs.as_ref().and_then(|tmpfs| Shm::new(&tmpfs.0));
    let medium = Memory::new(Files::new());
    let tracker = open(&medium, shm.map_or_else(|| Box::new(NoMaps) as _, |shm| Box::new(shm) as _));
    let names = ["on", "off", "held"];
    let names = &names[..if clean { 2 } else { 3 }];
    edit(&tracker, |draft| {
        for name in names {
            draft.add(name, Granularity::DEFAULT, false).unwrap();
            draft.keep(name).unwrap();
        }
    });
    WRITTEN.iter().for_each(|offset| write(&tracker, *offset));
    edit(&tracker, |draft| {
        names[1..].iter().for_each(|name| draft.disable(name).unwrap());
        names[2..].iter().for_each(|name| drop(draft.freeze_recording(name).unwrap()));
    });
    write(&tracker, AFTER);
    tracker.cool();
    tracker.cool();
    write(&tracker, LAST);
    if clean {
        tracker.close(stamp()).unwrap();
    }
    let mut left = Left { files: medium.files().clone(), maps: Files::new() };
    for entry in tmpfs.iter().flat_map(|tmpfs| std::fs::read_dir(&tmpfs.0).unwrap()) {
        let entry = entry.unwrap();
        left.maps.insert(entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap());
    }
    left
}

/// What the bytes are made into, and whether the truth has to show.
enum Made {
    Invented(Left),
    Damaged(Left),
}

/// A byte that says how; then either files, each with two bytes that name it, its length and its content, or damage to a true
/// store, six bytes each.
pub fn store(data: &[u8]) {
    let Some((how, rest)) = data.split_first() else { return };
    let made = match how & 3 {
        0 | 1 => Made::Invented(invent(rest, how & 1 != 0)),
        how => damage(rest, how == 2),
    };
    let (left, truth) = match made {
        Made::Invented(left) => (left, false),
        Made::Damaged(left) => (left, true),
    };
    let tmpfs = if left.maps.is_empty() { None } else { Tmpfs::new() };
    let shm = tmpfs.as_ref().and_then(|tmpfs| {
        for (name, bytes) in &left.maps {
            std::fs::write(tmpfs.0.join(name), bytes).unwrap();
        }
        Shm::new(&tmpfs.0)
    });
    look(left.files, shm.map_or_else(|| Box::new(NoMaps) as _, |shm| Box::new(shm) as _), truth);
}

/// Files out of nothing. `bound`: the record names what lies there.
fn invent(mut data: &[u8], bound: bool) -> Left {
    let mut left = Left::default();
    while let Some(([kind, number, low, high], rest)) = data.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (content, rest) = rest.split_at(len);
        data = rest;
        let (mut bytes, number, sequence) = (content.to_vec(), u64::from(*number), kind >> 3 & 15);
        let name = match kind & 7 {
            0 => "slot.0".to_owned(),
            1 => "slot.1".to_owned(),
            2 => format!("intent.{number}"),
            3 => format!("bits.{number}-{sequence}"),
            4 => format!("bits.{}-{sequence}", u64::MAX - number),
            5 => format!("bits.{number}-{}", u64::MAX - u64::from(sequence)),
            6 => format!("intent.{}", u64::MAX - number),
            _ => {
                let ids = format!("{:032x}", number);
                if kind & 0x80 != 0 {
                    bytes.resize(4096 + (SIZE / Granularity::DEFAULT.bytes() / 8) as usize, 0);
                    seal::map(&mut bytes);
                }
                left.maps.insert(format!("blkmark.{ids}.{ids}.{number}"), bytes);
                continue;
            }
        };
        if kind & 0x80 != 0 {
            seal::seal(&name, &mut bytes);
        }
        left.files.insert(name, bytes);
    }
    if bound {
        seal::bind(&mut left.files, &mut left.maps);
    }
    left
}

/// A true store, and what was done to it.
fn damage(data: &[u8], clean: bool) -> Made {
    static TRUE: [OnceLock<Left>; 2] = [const { OnceLock::new() }; 2];
    let mut left = TRUE[usize::from(clean)].get_or_init(|| truth(clean)).clone();
    let mut sealed = false;
    for [what, file, low, high, value, other] in data.as_chunks().0 {
        let place = usize::from(u16::from_le_bytes([*low, *high]));
        let is_map = file & 0x80 != 0 && !left.maps.is_empty();
        let files = if is_map { &mut left.maps } else { &mut left.files };
        let Some(name) = files.keys().cycle().nth(usize::from(file & 15)).cloned() else { break };
        let Some(bytes) = files.get_mut(&name) else { break };
        match what & 7 {
            0 | 1 if !bytes.is_empty() => {
                let at = place % if is_map { bytes.len().min(MAP_HEADER) } else { bytes.len() };
                bytes[at] ^= value;
            }
            2 => bytes.truncate(place),
            3 => bytes.resize(bytes.len() + place % 1024, *value),
            4 => drop(files.remove(&name)),
            5 => {
                let Some(there) = files.keys().cycle().nth(usize::from(other & 15)).cloned() else { break };
                let copy = files[&name].clone();
                files.insert(there, copy);
            }
            6 => {
                sealed = true;
                if is_map { seal::map(bytes) } else { seal::seal(&name, bytes) }
            }
            7 => {
                sealed = true;
                seal::bind(&mut left.files, &mut left.maps);
            }
            _ => {}
        }
    }
    if sealed { Made::Invented(left) } else { Made::Damaged(left) }
}

fn look(files: Files, maps: Box<dyn Maps>, truth: bool) {
    let medium = Memory::new(files);
    let tracker = open(&medium, maps);
    for info in tracker.list().iter().filter(|info| !info.inconsistent && truth) {
        let bits = tracker.bits(&info.name).unwrap();
        let (name, recording) = (info.name.as_str(), info.recording);
        let has = |offset: &u64| bits.any(ByteRange::new(*offset, 1));
        assert!(WRITTEN.iter().all(has), "{name} lost what was written");
        assert!(!recording || [AFTER, LAST].iter().all(has), "{name} lost what was written last");
        assert_eq!(recording, name == "on", "{name}");
        assert!(recording || bits.set_bits() == WRITTEN.len() as u64, "{name} does not record and changed");
    }
    write(&tracker, NOW);
    for (name, freeze) in tracker.list().into_iter().filter_map(|info| Some((info.name, info.frozen?))) {
        let nothing = Bits::new(Granularity::DEFAULT, SIZE);
        edit(&tracker, |draft| draft.fill(&name, freeze, &nothing, Mask::Union).unwrap());
        let bits = tracker.bits(&name).unwrap();
        let has = |offset: &u64| bits.any(ByteRange::new(*offset, 1));
        assert!(!truth || WRITTEN.iter().chain(&[AFTER, LAST, NOW]).all(has), "{name} lost what was written for a job");
    }
    tracker.cool();
    tracker.cool();
    if tracker.persistence().is_ok() && tracker.list().iter().all(|info| info.name != "new") {
        edit(&tracker, |draft| {
            draft.add("new", Granularity::DEFAULT, false).unwrap();
            draft.keep("new").unwrap();
        });
        write(&tracker, NOW);
    }
    let bits = |tracker: &Tracker| -> Vec<_> {
        let list = tracker.list().into_iter();
        list.map(|info| (info.inconsistent, info.recording, tracker.bits(&info.name).ok(), info.name)).collect()
    };
    let before = bits(&tracker);
    for (_, _, bits, name) in before.iter().filter(|(inconsistent, recording, ..)| !inconsistent && *recording) {
        assert!(bits.as_ref().unwrap().any(ByteRange::new(NOW, 1)), "{name} missed a write");
    }
    for checkpoint in tracker.checkpoints() {
        tracker.changes(&checkpoint.mark.name, None).unwrap();
    }
    if tracker.persistence().is_ok() {
        tracker.close(stamp()).unwrap();
        drop(tracker);
        assert_eq!(bits(&open(&medium, Box::new(NoMaps))), before, "after a clean end");
    }
}
