//! The guest: a process of its own, so that it can be killed, with two queues that write, zero, discard and read at random.
//!
//! Started by the torturer with `torture guest`. It looks first at what a guest before it was not answered, then it works
//! until its standard input ends, says in the journal whatever it does, and attaches again whenever the daemon is gone. Two
//! requests of its own never overlap, so that each sector has one version at a time. Anything but success ends it.

use std::collections::VecDeque;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Barrier, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkmark::frontend::{Buffer, FrontendError, Guest, Options, Queue, Request, Wait};
use clap::Args;

use super::content::{self, SECTOR};
use super::geometry::{LONGEST, any_range, windows};
use super::journal::{Record, Word, Writer};
use crate::beside::{Stop, Worker, beside};
use crate::process::GIVE_UP;
use crate::random::Random;

/// Queues of a guest.
pub const QUEUES: u16 = 2;
const DEPTH: usize = 16;
const SLOT: usize = LONGEST as usize * SECTOR;

/// What the torturer tells a guest.
#[derive(Clone, Debug, Args)]
pub struct GuestArgs {
    /// The disk's vhost-user socket.
    #[arg(long)]
    socket: PathBuf,
    /// The journal of all guests.
    #[arg(long)]
    journal: PathBuf,
    /// The disk's number.
    #[arg(long)]
    disk: u8,
    /// How many guests there were before it, of all disks.
    #[arg(long)]
    life: u32,
    /// Where its random numbers begin.
    #[arg(long)]
    seed: u64,
    /// The disk's size.
    #[arg(long)]
    sectors: u32,
    /// Ranges to look at first, `FIRST+COUNT`.
    #[arg(long, value_delimiter = ',')]
    look: Vec<String>,
}

impl GuestArgs {
    /// The words of the command line.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec!["guest".to_owned()];
        let mut option = |name: &str, value: String| words.extend([format!("--{name}"), value]);
        option("socket", self.socket.display().to_string());
        option("journal", self.journal.display().to_string());
        option("disk", self.disk.to_string());
        option("life", self.life.to_string());
        option("seed", self.seed.to_string());
        option("sectors", self.sectors.to_string());
        if !self.look.is_empty() {
            option("look", self.look.join(","));
        }
        words
    }

    /// For a guest of `disk` that looks at `look` first.
    pub fn new(
        socket: PathBuf,
        journal: PathBuf,
        disk: u8,
        life: u32,
        seed: u64,
        sectors: u32,
        look: &[(u32, u32)],
    ) -> Self {
        let look = look.iter().map(|(first, count)| format!("{first}+{count}")).collect();
        GuestArgs { socket, journal, disk, life, seed, sectors, look }
    }

    fn looks(&self) -> Result<VecDeque<(u32, u32)>> {
        let range = |text: &String| {
            let (first, count) = text.split_once('+')?;
            Some((first.parse().ok()?, count.parse().ok()?))
        };
        self.look.iter().map(|text| range(text).with_context(|| format!("`{text}` is no range"))).collect()
    }
}

/// What both queues share.
struct Shared {
    journal: Writer,
    busy: Vec<(u32, u32)>,
    requests: u64,
}

/// The daemon as it is seen from here: whose connection is lost waits for the next one.
#[derive(Default)]
struct Link {
    state: Mutex<LinkState>,
    changed: Condvar,
}

#[derive(Default)]
struct LinkState {
    /// Connections that there were after the first.
    connections: u64,
    /// The connection that somebody found lost.
    lost: Option<u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the guest to its end.
pub fn run(args: &GuestArgs) -> Result<()> {
    let options = Options {
        inflight: true,
        data_size: DEPTH * SLOT,
        max_request: SLOT,
        answer_within: GIVE_UP,
        ..Options::default()
    };
    let options = options.queues(usize::from(QUEUES));
    let mut guest = until_attached(|| Guest::connect(&args.socket, options.clone()))?;
    let shared = Mutex::new(Shared { journal: Writer::open(&args.journal)?, busy: Vec::new(), requests: 0 });
    let link = Link::default();
    let looked = Barrier::new(usize::from(QUEUES));
    let looks = args.looks()?;
    let mut workers: Vec<Worker<'_>> = Vec::new();
    for queue in guest.take_queues() {
        let mut load = Load {
            random: Random((args.seed ^ (queue.index() as u64 + 1) << 48) | 1),
            looks: if queue.index() == 0 { looks.clone() } else { VecDeque::new() },
            windows: windows(args.sectors),
            slots: std::iter::repeat_with(|| None).take(DEPTH).collect(),
            queue,
            args,
            shared: &shared,
            link: &link,
        };
        let looked = &looked;
        workers.push(Box::new(move |stop: &Stop| {
            // A guest that cannot go on ends at once: its other threads may wait for things that do not come.
            if let Err(error) = load.look().and_then(|()| {
                looked.wait();
                load.run(stop)
            }) {
                eprintln!("guest of disk {}: {error:#}", load.args.disk);
                std::process::exit(1);
            }
            Ok(())
        }));
    }
    // The standard input ends when the torturer says so, or is gone.
    workers.push(Box::new(|stop| reconnect(&mut guest, args, &link, stop)));
    beside(workers, || Ok(std::io::stdin().read_to_end(&mut Vec::new()).map(drop)?))
}

fn until_attached<T>(mut attach: impl FnMut() -> Result<T, FrontendError>) -> Result<T> {
    let deadline = Instant::now() + GIVE_UP;
    loop {
        match attach() {
            Ok(attached) => return Ok(attached),
            Err(error) if Instant::now() > deadline => return Err(error).context("no daemon to attach to"),
            // A socket that nobody listens on yet tells nothing when that changes.
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Attaches again whenever a queue says that the daemon is gone.
fn reconnect(guest: &mut Guest, args: &GuestArgs, link: &Link, stop: &Stop) -> Result<()> {
    loop {
        let mut state = lock(&link.state);
        while state.lost != Some(state.connections) {
            if stop.is_due() {
                return Ok(());
            }
            let waited = link.changed.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        until_attached(|| guest.reconnect(&args.socket))?;
        lock(&link.state).connections += 1;
        link.changed.notify_all();
    }
}

/// What a slot waits for.
enum Pending {
    Nothing,
    Change { first: u32, number: u64 },
    Read { first: u32, count: u32 },
}

struct Load<'a> {
    args: &'a GuestArgs,
    shared: &'a Mutex<Shared>,
    link: &'a Link,
    queue: Queue,
    random: Random,
    looks: VecDeque<(u32, u32)>,
    windows: Vec<(u32, u32)>,
    slots: Vec<Option<Pending>>,
}

impl Load<'_> {
    /// Reads what the guest before was not answered, before anything is written.
    fn look(&mut self) -> Result<()> {
        while !self.looks.is_empty() || self.queue.in_flight() > 0 {
            for slot in 0..DEPTH {
                if self.slots[slot].is_none()
                    && let Some((first, count)) = self.looks.pop_front()
                {
                    lock(self.shared).busy.push((first, count));
                    self.read(slot, first, count)?;
                }
            }
            self.queue.kick()?;
            self.answers()?;
        }
        Ok(())
    }

    fn run(&mut self, stop: &Stop) -> Result<()> {
        loop {
            let stopping = stop.is_due();
            if stopping && self.queue.in_flight() == 0 {
                return Ok(());
            }
            if !stopping {
                // Now and then the guest thinks; now and then it asks for much at once.
                if self.random.below(3) == 0 {
                    std::thread::sleep(Duration::from_micros(self.random.below(6000)));
                }
                self.ask()?;
            }
            self.queue.kick()?;
            if self.queue.in_flight() > 0 {
                self.answers()?;
            }
        }
    }

    /// Puts requests into some of the free slots. The journal has them before the daemon can see them.
    fn ask(&mut self) -> Result<()> {
        let most = 1 + self.random.below(DEPTH as u64) as usize;
        let free: Vec<usize> = (0..DEPTH).filter(|slot| self.slots[*slot].is_none()).take(most).collect();
        let mut records = Vec::new();
        for slot in free {
            let kind = self.random.below(32);
            if kind == 0 {
                self.queue.submit(Request::Flush, slot as u64)?;
                self.slots[slot] = Some(Pending::Nothing);
                continue;
            }
            let (first, count) = any_range(&mut self.random, &self.windows);
            let mut shared = lock(self.shared);
            if shared.busy.iter().any(|(other, length)| first < other + length && *other < first + count) {
                continue;
            }
            shared.busy.push((first, count));
            shared.requests += 1;
            let number = u64::from(self.args.life + 1) << 32 | shared.requests;
            drop(shared);
            let (sector, buffer) = (u64::from(first), Buffer { offset: slot * SLOT, len: count as usize * SECTOR });
            let (word, request) = match kind {
                1..6 => {
                    self.read(slot, first, count)?;
                    continue;
                }
                6 => (Word::Discard, Request::Discard { sector, sectors: count }),
                7 | 8 => (Word::Zero, Request::WriteZeroes { sector, sectors: count, unmap: kind == 7 }),
                _ => {
                    let mut bytes = vec![0; buffer.len];
                    for (sector, bytes) in (first..).zip(bytes.chunks_exact_mut(SECTOR)) {
                        content::fill(self.args.disk, sector, number, bytes);
                    }
                    self.queue.write_data(buffer.offset, &bytes)?;
                    (Word::Write, Request::Write { sector, buffer })
                }
            };
            records.push(self.record(word, first, count, number));
            self.queue.submit(request, slot as u64)?;
            self.slots[slot] = Some(Pending::Change { first, number });
        }
        lock(self.shared).journal.say(&records)?;
        Ok(())
    }

    fn read(&mut self, slot: usize, first: u32, count: u32) -> Result<()> {
        let buffer = Buffer { offset: slot * SLOT, len: count as usize * SECTOR };
        self.queue.submit(Request::Read { sector: first.into(), buffer }, slot as u64)?;
        self.slots[slot] = Some(Pending::Read { first, count });
        Ok(())
    }

    fn record(&self, word: Word, sector: u32, count: u32, number: u64) -> Record {
        Record { word, disk: self.args.disk, count: count as u16, sector, number }
    }

    /// Waits for answers and says them; or for the daemon to be back.
    fn answers(&mut self) -> Result<()> {
        let seen = lock(&self.link.state).connections;
        match self.queue.wait(Some(GIVE_UP)) {
            Ok(Wait::Ready) => {}
            Ok(Wait::TimedOut) => bail!("{} requests were not answered within {GIVE_UP:?}", self.queue.in_flight()),
            Err(FrontendError::BackendGone) => return self.wait_for_daemon(seen),
            Err(error) => return Err(error.into()),
        }
        let mut done = Vec::new();
        self.queue.completions(&mut done)?;
        let (mut records, mut free, mut failed) = (Vec::new(), Vec::new(), None);
        for completion in done {
            let slot = completion.token as usize;
            let pending = self.slots.get_mut(slot).and_then(Option::take).context("an answer to nothing")?;
            let (first, number) = match pending {
                Pending::Nothing => (None, 0),
                Pending::Change { first, number } => (Some(first), number),
                Pending::Read { first, .. } => (Some(first), 0),
            };
            free.extend(first);
            if !completion.status.is_ok() {
                records.push(self.record(Word::Failed, first.unwrap_or_default(), 1, number));
                failed = Some(format!("a request at sector {first:?} ended with {}", completion.status));
                continue;
            }
            match pending {
                Pending::Nothing => {}
                Pending::Change { .. } => records.push(self.record(Word::Done, 0, 0, number)),
                Pending::Read { first, count } => self.say_what_is_there(slot, first, count, &mut records)?,
            }
        }
        let mut shared = lock(self.shared);
        shared.journal.say(&records)?;
        shared.busy.retain(|(first, _)| !free.contains(first));
        ensure!(failed.is_none(), "{}", failed.unwrap_or_default());
        Ok(())
    }

    fn say_what_is_there(&self, slot: usize, first: u32, count: u32, records: &mut Vec<Record>) -> Result<()> {
        let mut bytes = vec![0; count as usize * SECTOR];
        self.queue.read_data(slot * SLOT, &mut bytes)?;
        let mut run: Option<Record> = None;
        for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR)) {
            let (word, number) = match content::version(self.args.disk, sector, bytes) {
                Ok(version) => (Word::Seen, version),
                Err(content::Foreign) => (Word::Foreign, 0),
            };
            match &mut run {
                Some(run) if run.word == word && run.number == number => run.count += 1,
                _ => records.extend(run.replace(self.record(word, sector, 1, number))),
            }
        }
        records.extend(run);
        Ok(())
    }

    fn wait_for_daemon(&self, seen: u64) -> Result<()> {
        let mut state = lock(&self.link.state);
        if state.connections == seen {
            state.lost = Some(seen);
            self.link.changed.notify_all();
        }
        let deadline = Instant::now() + GIVE_UP;
        while state.connections == seen {
            ensure!(Instant::now() < deadline, "the daemon did not come back");
            let waited = self.link.changed.wait_timeout(state, Duration::from_secs(1));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}
