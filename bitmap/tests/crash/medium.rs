//! A directory that loses what was not synced: each 512-byte sector and each new name on its own, in any order. It can also
//! fail: an error of a write leaves part of it done, an error of a sync leaves it open what became durable, for ever.

use blkmark_bitmap::store::Medium;
use blkmark_bitmap::store::maps::{FoundMap, FoundMaps, MapHead, Maps};
use blkmark_bitmap::{Bits, LiveMap};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use uuid::Uuid;

/// Splitmix64: the same numbers for the same seed.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

#[derive(Clone, Default)]
struct File {
    /// As everybody reads it while the machine runs.
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Writes and growth since the last sync.
    pending: Vec<(u64, Vec<u8>)>,
}

impl File {
    fn put(bytes: &mut Vec<u8>, at: u64, data: &[u8]) {
        let (at, end) = (at as usize, at as usize + data.len());
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at..end].copy_from_slice(data);
    }

    /// Some of what is pending becomes durable.
    fn settle(&mut self, random: &mut Random) {
        // All, nothing, or each sector on its own.
        let mood = random.below(4);
        for (at, data) in std::mem::take(&mut self.pending) {
            for (i, sector) in data.chunks(512).enumerate() {
                if mood == 0 || mood > 1 && random.one_in(2) {
                    Self::put(&mut self.durable, at + i as u64 * 512, sector);
                }
            }
        }
    }
}

/// What the directory holds.
#[derive(Clone, Default)]
pub struct Files {
    there: bool,
    files: BTreeMap<u64, File>,
    next: u64,
    names: BTreeMap<String, u64>,
    durable_names: BTreeMap<String, u64>,
    changed_names: Vec<String>,
    /// Bytes of files that were taken away.
    room: u64,
}

impl Files {
    /// The machine loses power now.
    pub fn power_cut(&self, random: &mut Random) -> Files {
        let mut left = self.clone();
        for name in std::mem::take(&mut left.changed_names) {
            if random.one_in(2) {
                match self.names.get(&name) {
                    Some(file) => left.durable_names.insert(name, *file),
                    None => left.durable_names.remove(&name),
                };
            }
        }
        for file in left.files.values_mut() {
            file.settle(random);
            file.current.clone_from(&file.durable);
        }
        left.names.clone_from(&left.durable_names);
        left
    }

    pub fn bytes_of(&mut self, name: &str) -> Option<&mut Vec<u8>> {
        let file = self.names.get(name)?;
        self.files.get_mut(file).map(|file| &mut file.current)
    }

    pub fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }
}

/// What goes wrong, and how often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Faults {
    None,
    /// One call in so many fails; those after it do not.
    Errors(u64),
    /// No space for new bytes, now and then.
    Full,
    /// None at all, but for what is taken away.
    NoRoom,
}

thread_local! {
    static QUIET: Cell<u64> = const { Cell::new(0) };
    static NAMED: RefCell<BTreeMap<String, Weak<SimMedium>>> = const { RefCell::new(BTreeMap::new()) };
}

pub struct SimMedium {
    pub name: String,
    pub state: Mutex<Files>,
    pub random: Mutex<Random>,
    pub faults: Faults,
    /// Called before each change, with the name of the file.
    pub hook: fn(&str),
    pub hooked: bool,
    /// A call failed for a file without which nobody knows what is in force: a slot, or the table.
    pub hurt: AtomicBool,
    /// There is no room for anything more.
    pub full: AtomicBool,
}

impl SimMedium {
    pub fn new(files: Files, seed: u64, faults: Faults, hook: Option<fn(&str)>) -> Arc<Self> {
        Self::named("simulated", files, seed, faults, hook)
    }

    /// The same, to be found by others under a name.
    pub fn named(name: &str, files: Files, seed: u64, faults: Faults, hook: Option<fn(&str)>) -> Arc<Self> {
        let medium = Arc::new(Self {
            name: name.to_owned(),
            state: Mutex::new(files),
            random: Mutex::new(Random(seed)),
            faults,
            hook: hook.unwrap_or(|_| {}),
            hooked: hook.is_some(),
            hurt: AtomicBool::new(false),
            full: AtomicBool::new(false),
        });
        NAMED.with_borrow_mut(|named| named.insert(name.to_owned(), Arc::downgrade(&medium)));
        medium
    }

    /// Is found by its name again, after another had it.
    pub fn make_known(self: &Arc<Self>) {
        NAMED.with_borrow_mut(|named| named.insert(self.name.clone(), Arc::downgrade(self)));
    }

    /// A point at which the machine may stop; answers whether this call is to fail.
    fn point(&self, file: &str, grows: bool) -> Option<io::Error> {
        if self.hooked {
            (self.hook)(file);
        }
        self.fault(grows)
    }

    /// After this nobody knows what is in force, or what is hot.
    fn hurts(&self, file: &str, error: &Option<io::Error>) {
        if error.is_some() && (file.starts_with("slot") || file.starts_with("intent")) {
            self.hurt.store(true, Ordering::SeqCst);
        }
    }

    fn fault(&self, grows: bool) -> Option<io::Error> {
        let mut random = self.random.lock().unwrap();
        match self.faults {
            Faults::None => None,
            Faults::Errors(n) => {
                let quiet = QUIET.get();
                QUIET.set(quiet.saturating_sub(1));
                if quiet == 0 && random.one_in(n) {
                    // What is done about it works.
                    QUIET.set(12);
                    return Some(io::Error::from_raw_os_error(if random.one_in(3) { 28 } else { 5 }));
                }
                None
            }
            Faults::Full => (grows && random.one_in(6)).then(|| io::Error::from_raw_os_error(28)),
            Faults::NoRoom => None,
        }
    }
}

impl Medium for SimMedium {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn is_there(&self) -> bool {
        self.state.lock().unwrap().there
    }

    fn make(&self) -> io::Result<()> {
        if let Some(error) = self.point("", true) {
            return Err(error);
        }
        self.state.lock().unwrap().there = true;
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.state.lock().unwrap().names())
    }

    fn read(&self, file: &str, _: u64) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock().unwrap();
        state.bytes_of(file).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn allocate(&self, file: &str, len: u64) -> io::Result<()> {
        if let Some(error) = self.point(file, true) {
            return Err(error);
        }
        let mut state = self.state.lock().unwrap();
        let number = match state.names.get(file) {
            Some(number) => *number,
            None => {
                state.next += 1;
                let number = state.next;
                state.names.insert(file.to_owned(), number);
                state.changed_names.push(file.to_owned());
                state.files.insert(number, File::default());
                number
            }
        };
        let there = state.files[&number].current.len();
        if self.full.load(Ordering::SeqCst) && (there as u64) < len {
            return Err(io::Error::from_raw_os_error(28));
        }
        if self.faults == Faults::NoRoom && (there as u64) < len {
            let left = state.room.checked_sub(len - there as u64);
            state.room = left.ok_or(io::Error::from_raw_os_error(28))?;
        }
        let file = state.files.get_mut(&number).unwrap();
        if there < len as usize {
            file.current.resize(len as usize, 0);
            file.pending.push((there as u64, vec![0; len as usize - there]));
        }
        Ok(())
    }

    fn write(&self, file: &str, at: u64, data: &[u8]) -> io::Result<()> {
        let error = self.point(file, false);
        if file != "slot.0" {
            self.hurts(file, &error);
        }
        let mut state = self.state.lock().unwrap();
        let number = *state.names.get(file).ok_or(io::ErrorKind::NotFound)?;
        let file = state.files.get_mut(&number).unwrap();
        assert!(at as usize + data.len() <= file.current.len(), "a write that takes room may fail for lack of it");
        let done = match &error {
            Some(_) => {
                // Any part of it was done, or all.
                let mut random = self.random.lock().unwrap();
                let all = random.one_in(3);
                &data[..if all { data.len() } else { random.below(data.len() as u64) as usize }]
            }
            None => data,
        };
        File::put(&mut file.current, at, done);
        file.pending.push((at, done.to_vec()));
        error.map_or(Ok(()), Err)
    }

    fn sync(&self, file: &str) -> io::Result<()> {
        let error = self.point(file, false);
        self.hurts(file, &error);
        let mut state = self.state.lock().unwrap();
        let number = *state.names.get(file).ok_or(io::ErrorKind::NotFound)?;
        let file = state.files.get_mut(&number).unwrap();
        match error {
            Some(error) => {
                // Some of it is durable, the rest never will be, and reads show it as if nothing had happened.
                file.settle(&mut self.random.lock().unwrap());
                Err(error)
            }
            None => {
                for (at, data) in std::mem::take(&mut file.pending) {
                    File::put(&mut file.durable, at, &data);
                }
                Ok(())
            }
        }
    }

    fn sync_dir(&self) -> io::Result<()> {
        if let Some(error) = self.point("", false) {
            return Err(error);
        }
        let mut state = self.state.lock().unwrap();
        state.durable_names = state.names.clone();
        state.changed_names.clear();
        Ok(())
    }

    fn remove(&self, file: &str) -> io::Result<()> {
        if let Some(error) = self.point(file, false) {
            return Err(error);
        }
        let mut state = self.state.lock().unwrap();
        let number = state.names.remove(file).ok_or(io::ErrorKind::NotFound)?;
        state.room += state.files[&number].current.len() as u64;
        state.changed_names.push(file.to_owned());
        Ok(())
    }

    fn put_aside(&self) -> io::Result<String> {
        *self.state.lock().unwrap() = Files::default();
        Ok("aside".to_owned())
    }

    fn read_elsewhere(&self, directory: &str, file: &str, limit: u64) -> io::Result<Vec<u8>> {
        let other = NAMED.with_borrow(|named| named.get(directory).and_then(Weak::upgrade));
        other.ok_or(io::ErrorKind::NotFound)?.read(file, limit)
    }
}

/// The disk, as far as its cache goes: which blocks a power cut may take back or tear, and may not.
#[derive(Default)]
pub struct SimDisk(Mutex<Cache>);

#[derive(Clone, Default)]
struct Cache {
    /// Written to since the last flush began, or in flight when it did.
    unflushed: BTreeSet<u64>,
    /// Writes in flight, by their slot.
    flying: BTreeMap<usize, Vec<u64>>,
    /// One flush in so many fails.
    fails: Option<(Random, u64)>,
}

impl SimDisk {
    pub fn new(seed: u64, faults: Faults) -> Arc<Self> {
        let fails = matches!(faults, Faults::Errors(_)).then_some((Random(seed), 30));
        Arc::new(Self(Mutex::new(Cache { fails, ..Cache::default() })))
    }

    /// The process is killed: what it wrote, and what it had in flight, is in caches still.
    pub fn killed(&self) -> Arc<Self> {
        let Cache { unflushed, fails, .. } = self.0.lock().unwrap().clone();
        Arc::new(Self(Mutex::new(Cache { unflushed, fails, ..Cache::default() })))
    }

    /// The blocks that may be found as they were at the last flush, or before.
    pub fn unflushed(&self) -> BTreeSet<u64> {
        self.0.lock().unwrap().unflushed.clone()
    }

    pub fn submit(&self, slot: usize, blocks: impl Iterator<Item = u64>) {
        let (mut cache, blocks) = (self.0.lock().unwrap(), Vec::from_iter(blocks));
        cache.unflushed.extend(&blocks);
        cache.flying.insert(slot, blocks);
    }

    pub fn complete(&self, slot: usize) {
        self.0.lock().unwrap().flying.remove(&slot);
    }

    /// What a guest asks for, and the store.
    pub fn flush(&self) -> io::Result<()> {
        let mut cache = self.0.lock().unwrap();
        if cache.fails.as_mut().is_some_and(|(random, n)| random.one_in(*n)) {
            return Err(io::Error::from_raw_os_error(5));
        }
        cache.unflushed = cache.flying.values().flatten().copied().collect();
        Ok(())
    }
}

/// Maps that outlive a killed process, as those on tmpfs do.
#[derive(Clone, Default)]
pub struct SimMaps(pub Arc<Mutex<SimShm>>);

#[derive(Default)]
pub struct SimShm {
    left: Vec<(MapHead, u64, Bits)>,
    made: Vec<(MapHead, Option<u64>, Arc<LiveMap>)>,
    distrusted: bool,
}

impl SimMaps {
    /// The process is killed now: somebody else finds what is there.
    pub fn killed(&self) -> SimMaps {
        let shm = self.0.lock().unwrap();
        let made = shm.made.iter().map(|(head, next, map)| (*head, next.unwrap_or(0), map.to_bits()));
        let left = shm.left.iter().cloned().chain(made).collect();
        SimMaps(Arc::new(Mutex::new(SimShm { left, made: Vec::new(), distrusted: shm.distrusted })))
    }
}

impl Maps for SimMaps {
    fn create(&mut self, head: &MapHead) -> io::Result<Arc<LiveMap>> {
        let map = Arc::new(LiveMap::new(head.granularity, head.size));
        let mut shm = self.0.lock().unwrap();
        shm.made.retain(|(other, ..)| other.generation != head.generation);
        if let Some((_, next, _)) = shm.made.last_mut() {
            *next = Some(head.generation);
        }
        shm.made.push((*head, None, Arc::clone(&map)));
        Ok(map)
    }

    fn find(&mut self, store: Uuid) -> io::Result<FoundMaps> {
        let shm = self.0.lock().unwrap();
        let mine = shm.left.iter().filter(|(head, ..)| head.store == store);
        let maps = mine.map(|(head, next, bits)| FoundMap { head: *head, next: *next, bits: bits.clone() }).collect();
        Ok(FoundMaps { maps, distrusted: shm.distrusted })
    }

    fn keep(&mut self, _: Uuid, run: Uuid, generation: u64) {
        let mut shm = self.0.lock().unwrap();
        shm.left.retain(|(head, ..)| head.run == run && head.generation >= generation);
        shm.made.retain(|(head, ..)| head.run == run && head.generation >= generation);
        shm.distrusted = false;
    }

    fn distrust(&mut self, _: Uuid) {
        self.0.lock().unwrap().distrusted = true;
    }
}
