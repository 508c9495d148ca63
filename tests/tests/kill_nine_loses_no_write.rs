//! The promise: a blkmark that is killed under load and started again is a pause to its guest: no error, no lost write, no
//! doubled one.
//!
//! Two queues keep requests of all kinds and lengths in flight, so that they end out of order. The daemon is killed with
//! SIGKILL at random moments and started again on the same socket. Every request gets exactly one completion, and it says
//! OK; reads give what was last written there, while it all goes on; at the end the disk equals the model.
//! The other story is told by a Linux guest under QEMU, which reconnects by itself.
//!
//! `BLKMARK_SEED` and `BLKMARK_KILLS` replay a run and make it longer. Bitmaps are the matter of
//! `bitmaps_survive`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use blkmark::frontend::{Buffer, FrontendError, Guest, Options, Queue, Request, Wait};
use blkmark_tests::beside::{Stop, Worker, beside};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::guest::Guest as LinuxGuest;
use blkmark_tests::lab::Lab;
use blkmark_tests::process::GIVE_UP;
use sha2::{Digest, Sha256};

const QUEUES: usize = 2;
const DEPTH: usize = 30;
/// Each slot has a part of the disk for itself, so that the model knows what is where.
const PART: usize = 256 << 10;
/// The longest request.
const LONGEST: usize = 128 << 10;

#[test]
fn kill_nine_is_a_pause_with_direct_io() -> Result<()> {
    kill_nine_is_a_pause(true)
}

#[test]
fn kill_nine_is_a_pause_through_the_page_cache() -> Result<()> {
    kill_nine_is_a_pause(false)
}

fn number(name: &str, default: u64) -> Result<u64> {
    std::env::var(name).map_or(Ok(default), |text| text.parse().with_context(|| format!("{name} is no number")))
}

fn kill_nine_is_a_pause(direct: bool) -> Result<()> {
    let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos() as u64;
    let seed = number("BLKMARK_SEED", clock)?;
    let kills = number("BLKMARK_KILLS", 25)?;
    println!("BLKMARK_SEED={seed} BLKMARK_KILLS={kills}");
    let lab = Lab::new()?;
    let disk =
        lab.filled_disk("drive0", (QUEUES * DEPTH * PART) as u64)?.with_queues(QUEUES as u16).with_direct(direct);
    let before = disk.content()?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let options = Options { inflight: true, data_size: DEPTH * LONGEST, ..Options::default() }.queues(QUEUES);
    let mut guest = Guest::connect(&disk.socket, options)?;
    let reborn = Reborn::default();
    let done = AtomicU64::new(0);

    let models: Vec<Mutex<Vec<u8>>> = before.chunks(DEPTH * PART).map(|part| Mutex::new(part.to_vec())).collect();
    let writers = guest.take_queues().into_iter().map(|queue| {
        let (reborn, done, model) = (&reborn, &done, &models[queue.index()]);
        Box::new(move |stop: &Stop| {
            let mut model = model.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
            Load::new(queue, seed, &mut model).run(stop, reborn, done)
        }) as Worker<'_>
    });
    let mut random = Random::new(seed ^ 0x5eed);
    let resubmitted = beside(writers.collect(), || {
        let mut resubmitted = 0;
        for kill in 0..kills {
            // Not before it is at work again, and then at any moment.
            let (from, more) = (done.load(Ordering::Relaxed), 1 + random.below(400));
            let deadline = Instant::now() + GIVE_UP;
            while done.load(Ordering::Relaxed) < from + more {
                ensure!(Instant::now() < deadline, "no progress after {kill} kills\n{}", daemon.process().log_tail());
                std::thread::yield_now();
            }
            for _ in 0..random.below(20_000) {
                std::hint::spin_loop();
            }
            daemon.process().kill()?;
            resubmitted += resubmitted_by(&mut daemon)?;
            daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
            guest.reconnect(&disk.socket)?;
            reborn.announce();
        }
        Ok(resubmitted)
    })?;
    drop(guest);
    let resubmitted = resubmitted + resubmitted_by(&mut daemon)?;
    daemon.stop()?;
    println!("{kills} kills, {} requests, {resubmitted} of them submitted again", done.load(Ordering::Relaxed));
    ensure!(resubmitted > kills / 2, "hardly a request was in flight when the daemon was killed: {resubmitted}");

    let after = disk.content()?;
    for (queue, model) in models.iter().enumerate() {
        let model = model.lock().map_err(|_| anyhow::anyhow!("poisoned"))?;
        let on_disk = &after[queue * DEPTH * PART..][..DEPTH * PART];
        if let Some(at) = model.iter().zip(on_disk).position(|(a, b)| a != b) {
            bail!("seed {seed}: the disk differs from what was written at byte {}", queue * DEPTH * PART + at);
        }
    }
    Ok(())
}

/// How many requests this daemon found and submitted again, as its log says.
fn resubmitted_by(daemon: &mut Daemon) -> Result<u64> {
    let log = daemon.process().log();
    let found = log.lines().filter(|line| line.contains("resubmitting after a crash"));
    found
        .map(|line| {
            let count = line.split("requests=").nth(1).and_then(|rest| rest.split_whitespace().next());
            count.and_then(|count| count.parse::<u64>().ok()).with_context(|| format!("no count in: {line}"))
        })
        .sum()
}

/// Tells the queues that there is a back end again.
#[derive(Default)]
struct Reborn {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Reborn {
    fn count(&self) -> u64 {
        *self.count.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn announce(&self) {
        *self.count.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
        self.changed.notify_all();
    }

    fn wait_past(&self, seen: u64, stop: &Stop) -> Result<()> {
        let mut count = self.count.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let deadline = Instant::now() + GIVE_UP;
        while *count == seen {
            ensure!(!stop.is_due() && Instant::now() < deadline, "the back end did not come back");
            let (now, _) = self
                .changed
                .wait_timeout(count, Duration::from_secs(1))
                .unwrap_or_else(|poisoned| poisoned.into_inner());
            count = now;
        }
        Ok(())
    }
}

/// What a slot waits for.
enum Pending {
    /// Nothing to look at: a flush.
    Nothing,
    /// These bytes are in the model's part from there on once it is done.
    Change { at: usize, bytes: Vec<u8> },
    /// A discard: the range may hold anything that it held, or zeroes, sector by sector; which is found by reading.
    Discard { at: usize, len: usize },
    /// The model's bytes have to come back.
    Read { at: usize, len: usize },
}

struct Load<'a> {
    queue: Queue,
    random: Random,
    model: &'a mut [u8],
    slots: Vec<Option<Pending>>,
    /// Ranges that a discard left open, to be read next by their slot.
    open: Vec<Option<(usize, usize)>>,
}

impl<'a> Load<'a> {
    fn new(queue: Queue, seed: u64, model: &'a mut [u8]) -> Self {
        let random = Random::new(seed ^ (queue.index() as u64 + 1) << 32);
        Self {
            queue,
            random,
            model,
            slots: std::iter::repeat_with(|| None).take(DEPTH).collect(),
            open: vec![None; DEPTH],
        }
    }

    fn run(mut self, stop: &Stop, reborn: &Reborn, done: &AtomicU64) -> Result<()> {
        let mut completions = Vec::new();
        loop {
            let stopping = stop.is_due();
            for slot in 0..DEPTH {
                if self.slots[slot].is_none() && (!stopping || self.open[slot].is_some()) {
                    self.submit(slot)?;
                }
            }
            if self.queue.in_flight() == 0 {
                return Ok(());
            }
            self.queue.kick()?;
            let seen = reborn.count();
            match self.queue.wait(Some(GIVE_UP)) {
                Ok(Wait::Ready) => {}
                Ok(Wait::TimedOut) => bail!("{} requests were not answered", self.queue.in_flight()),
                Err(FrontendError::BackendGone) => {
                    reborn.wait_past(seen, stop)?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            // An answer to nothing in flight, a second one among them, is an error here.
            self.queue.completions(&mut completions)?;
            for completion in completions.drain(..) {
                ensure!(completion.status.is_ok(), "a request ended with {}", completion.status);
                self.settle(completion.token as usize)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn submit(&mut self, slot: usize) -> Result<()> {
        // Short ones more often than long ones.
        let shift = self.random.below(8);
        let len = 512 * (1 + self.random.below((LONGEST as u64 / 512) >> shift)) as usize;
        let at = slot * PART + 512 * self.random.below(((PART - len) / 512) as u64) as usize;
        let sector = ((self.queue.index() * DEPTH * PART + at) / 512) as u64;
        let (sectors, buffer) = ((len / 512) as u32, Buffer { offset: slot * LONGEST, len });
        let (request, pending) = match self.random.below(32) {
            _ if self.open[slot].is_some() => {
                let (at, len) = self.open[slot].unwrap_or_default();
                let sector = ((self.queue.index() * DEPTH * PART + at) / 512) as u64;
                (Request::Read { sector, buffer: Buffer { len, ..buffer } }, Pending::Read { at, len })
            }
            0 => (Request::Flush, Pending::Nothing),
            1 => (Request::Discard { sector, sectors }, Pending::Discard { at, len }),
            2 => {
                let unmap = self.random.below(2) == 0;
                (Request::WriteZeroes { sector, sectors, unmap }, Pending::Change { at, bytes: vec![0; len] })
            }
            3..8 => (Request::Read { sector, buffer }, Pending::Read { at, len }),
            _ => {
                let bytes: Vec<u8> = (0..len / 8).flat_map(|_| self.random.next().to_le_bytes()).collect();
                self.queue.write_data(buffer.offset, &bytes)?;
                (Request::Write { sector, buffer }, Pending::Change { at, bytes })
            }
        };
        self.queue.submit(request, slot as u64)?;
        self.slots[slot] = Some(pending);
        Ok(())
    }

    fn settle(&mut self, slot: usize) -> Result<()> {
        match self.slots[slot].take().context("a completion of a slot without a request")? {
            Pending::Nothing => {}
            Pending::Change { at, bytes } => self.model[at..][..bytes.len()].copy_from_slice(&bytes),
            Pending::Discard { at, len } => self.open[slot] = Some((at, len)),
            Pending::Read { at, len } => {
                let mut bytes = vec![0; len];
                self.queue.read_data(slot * LONGEST, &mut bytes)?;
                let discarded = self.open[slot].take().is_some();
                for (n, (read, known)) in bytes.chunks(512).zip(self.model[at..].chunks_mut(512)).enumerate() {
                    if discarded && read.iter().all(|byte| *byte == 0) {
                        known.fill(0);
                    }
                    ensure!(read == known, "a read gave other than was last written at byte {}", at + 512 * n);
                }
            }
        }
        Ok(())
    }
}

/// Xorshift, after a seed that is stirred.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

const WRITERS: usize = 4;
/// What a writer writes at a time, in requests of a megabyte at most.
const BLOCK: usize = 8 << 20;
/// Blocks of each writer.
const BLOCKS: usize = 2;

/// What runs in the guest, past its page cache: each writer goes over its own blocks with one of three patterns, reads
/// them back now and then, and notes what it did and what went wrong.
const WRITER: &str = "n=$1; round=0
while [ ! -e /tmp/stop ]; do
  round=$((round + 1))
  for i in 0 1; do
    at=$((n * 2 + i)); noise=$(((round + at) % 3))
    dd if=/tmp/noise$noise of=/dev/vda bs=1M seek=$((at * 8)) conv=notrunc oflag=direct 2>/dev/null || echo write $at >>/tmp/failed
    echo $noise >/tmp/last$at
    if [ $((round % 4)) = 0 ]; then
      dd if=/dev/vda bs=1M skip=$((at * 8)) count=8 iflag=direct 2>/dev/null | cmp -s - /tmp/noise$noise || echo differs $at >>/tmp/failed
    fi
    echo x >>/tmp/progress
  done
done
echo $n >>/tmp/ended";

#[test]
fn a_linux_guest_sees_a_pause() -> Result<()> {
    const KILLS: u32 = 4;
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", (WRITERS * BLOCKS * BLOCK) as u64)?.with_queues(2);
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut guest = LinuxGuest::boot(&lab, std::slice::from_ref(&disk))?;
    guest.run(&format!(
        "for i in 0 1 2; do dd if=/dev/urandom of=/tmp/noise$i bs=1M count=8 2>/dev/null || exit 1; done
touch /tmp/progress; cat >/tmp/writer <<'END'
{WRITER}
END
for n in $(seq 0 {}); do sh /tmp/writer $n >/dev/null 2>&1 & done",
        WRITERS - 1
    ))?;
    let (mut kills, mut resubmitted) = (0, 0);
    // Now and then nothing is in flight when the daemon dies.
    while kills < KILLS || resubmitted == 0 {
        ensure!(kills < 40, "never was a request in flight when the daemon was killed");
        more_blocks(&mut guest)?;
        daemon.process().kill()?;
        kills += 1;
        daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
        more_blocks(&mut guest)?;
        resubmitted += resubmitted_by(&mut daemon)?;
    }
    guest.run(&format!(
        "touch /tmp/stop; until [ $(cat /tmp/ended 2>/dev/null | wc -l) = {WRITERS} ]; do usleep 20000; done"
    ))?;
    let failed = guest.answer("cat /tmp/failed")?;
    ensure!(failed.status != 0, "the guest complains:\n{}", failed.output);
    let errors = guest.answer("dmesg | grep -i -e 'i/o error' -e 'blocked for more' -e 'not a head' -e 'is broken'")?;
    ensure!(errors.status == 1, "the guest's kernel complains:\n{}", errors.output);
    guest.assert_no_disk_errors()?;
    let sums = guest.run("cd /tmp; for i in $(seq 0 7); do sha256sum noise$(cat last$i); done")?;
    let blocks = progress(&mut guest)?;
    guest.poweroff()?;
    daemon.stop()?;
    println!("{kills} kills, {blocks} blocks of {BLOCK} bytes, {resubmitted} requests submitted again");

    // On the host the blocks are what the guest wrote last.
    let content = disk.content()?;
    ensure!(sums.lines().count() == WRITERS * BLOCKS, "sums of all blocks:\n{sums}");
    for (at, (block, sum)) in content.chunks(BLOCK).zip(sums.lines()).enumerate() {
        let found: String = Sha256::digest(block).iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(sum.starts_with(&found), "block {at} is not what the guest wrote last: {found} is not {sum}");
    }
    Ok(())
}

/// Blocks written so far.
fn progress(guest: &mut LinuxGuest) -> Result<u64> {
    Ok(guest.run("wc -l </tmp/progress")?.trim().parse()?)
}

/// Waits until the writers have got on.
fn more_blocks(guest: &mut LinuxGuest) -> Result<()> {
    let from = progress(guest)?;
    let deadline = Instant::now() + GIVE_UP;
    while progress(guest)? < from + 6 {
        ensure!(Instant::now() < deadline, "the writers stand still\n{}", guest.console());
    }
    Ok(())
}
