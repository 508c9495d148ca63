//! Promise: the changes between two checkpoints are what was written in between, whatever else is made, deleted, or done to
//! bitmaps; and a freeze that a client made is ended by clients alone, one of a job by that job alone.
#![cfg(not(any(loom, shuttle)))]

use blkmark_bitmap::named::Owner;
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{BitmapError, ByteRange, CheckpointMark, Granularity, Tracker, commit};
use std::collections::BTreeSet;
use std::sync::Arc;
use uuid::Uuid;

const G: Granularity = Granularity::DEFAULT;
const UNIT: u64 = 65536;
const SIZE: u64 = 4 << 20;

fn mark(name: &str) -> CheckpointMark {
    CheckpointMark { name: name.to_owned(), id: Uuid::new_v4(), created: 1 }
}

fn write(tracker: &Arc<Tracker>, unit: u64) {
    let mut lane = tracker.lane(0).unwrap();
    assert!(matches!(lane.enter().admit(0, ByteRange::new(unit * UNIT + 512, 512)), Admitted::Go));
    lane.finish(0);
}

fn change<T>(tracker: &Tracker, change: impl FnOnce(&mut blkmark_bitmap::named::Draft) -> Result<T, BitmapError>) -> T {
    let mut commits = tracker.begin();
    let done = change(&mut commits.draft).unwrap();
    commit(vec![commits]).unwrap();
    done
}

fn changes(tracker: &Tracker, from: &str, to: Option<&str>) -> BTreeSet<u64> {
    let bits = tracker.changes(from, to).unwrap();
    bits.runs().flat_map(|run| run.start() / UNIT..run.end().div_ceil(UNIT)).collect()
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

/// The oracle is a log of all writes: a checkpoint is a place in it.
#[test]
fn changes_between_any_two_are_what_was_written_in_between() {
    for seed in 0..20 {
        let mut random = Random(seed);
        let t = Tracker::new(SIZE, 1, 8);
        let mut log: Vec<u64> = Vec::new();
        let mut chain: Vec<(String, usize)> = Vec::new();
        for step in 0..300 {
            match random.below(10) {
                0 => {
                    let name = format!("c{step}");
                    // Finer and coarser ones in one chain: each answers whole units all the same.
                    let granularity = if random.below(4) == 0 { Granularity::new(4096).unwrap() } else { G };
                    change(&t, |draft| draft.add_checkpoint(mark(&name), granularity));
                    chain.push((name, log.len()));
                }
                1 if !chain.is_empty() => {
                    let (name, _) = chain.remove(random.below(chain.len() as u64) as usize);
                    change(&t, |draft| draft.remove_checkpoint(&name));
                }
                2 => {
                    // What else flips generations.
                    let name = format!("b{step}");
                    change(&t, |draft| draft.add(&name, Granularity::MIN, random.below(2) == 0));
                }
                _ => {
                    let unit = random.below(SIZE / UNIT);
                    write(&t, unit);
                    log.push(unit);
                }
            }
        }
        for (at, (from, begin)) in chain.iter().enumerate() {
            let now: BTreeSet<u64> = log[*begin..].iter().copied().collect();
            assert_eq!(changes(&t, from, None), now, "seed {seed}, {from} until now");
            for (to, end) in &chain[at + 1..] {
                let between: BTreeSet<u64> = log[*begin..*end].iter().copied().collect();
                assert_eq!(changes(&t, from, Some(to)), between, "seed {seed}, {from} to {to}");
            }
        }
        assert_eq!(t.checkpoints().iter().map(|c| c.mark.name.clone()).collect::<Vec<_>>().len(), chain.len());
    }
}

/// I1: a write that is in flight at the instant belongs to both sides of it.
#[test]
fn a_write_in_flight_at_a_checkpoint_is_in_the_changes_before_and_after() {
    let t = Tracker::new(SIZE, 1, 8);
    change(&t, |draft| draft.add_checkpoint(mark("a"), G));
    let mut lane = t.lane(0).unwrap();
    assert!(matches!(lane.enter().admit(0, ByteRange::new(7 * UNIT, 512)), Admitted::Go));
    change(&t, |draft| draft.add_checkpoint(mark("b"), G));
    lane.finish(0);
    change(&t, |draft| draft.add_checkpoint(mark("c"), G));
    assert_eq!(changes(&t, "a", Some("b")), [7].into());
    assert_eq!(changes(&t, "b", Some("c")), [7].into());
    assert_eq!(changes(&t, "c", None), [].into());
}

#[test]
fn a_resize_cuts_the_changes_and_counts_what_was_added() {
    let t = Tracker::new(SIZE, 1, 8);
    change(&t, |draft| draft.add_checkpoint(mark("a"), G));
    write(&t, 1);
    write(&t, 63);
    change(&t, |draft| draft.add_checkpoint(mark("b"), G));
    change(&t, |draft| draft.resize(SIZE / 2));
    assert_eq!(changes(&t, "a", Some("b")), [1].into());
    change(&t, |draft| draft.resize(SIZE));
    write(&t, 2);
    // What was cut off reads as zeroes now: it changed after b.
    let added = 32..64;
    assert_eq!(changes(&t, "b", None), [2].into_iter().chain(added.clone()).collect());
    assert_eq!(changes(&t, "a", None), [1, 2].into_iter().chain(added).collect());
    assert_eq!(t.changes("a", None).unwrap().size(), SIZE);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let t = Tracker::new(SIZE, 1, 8);
    change(&t, |draft| draft.add_checkpoint(mark("a"), G));
    change(&t, |draft| draft.add_checkpoint(mark("b"), G));
    let mut draft = t.begin();
    let refused = |result: Result<(), BitmapError>| result.unwrap_err().to_string();
    assert_eq!(refused(draft.draft.add_checkpoint(mark("a"), G)), "Checkpoint already exists: a");
    assert_eq!(refused(draft.draft.add_checkpoint(mark(""), G)), "Checkpoint name cannot be empty");
    let long = "x".repeat(1024);
    assert_eq!(refused(draft.draft.add_checkpoint(mark(&long), G)), format!("Checkpoint name too long: {long}"));
    assert_eq!(refused(draft.draft.remove_checkpoint("z")), "Checkpoint 'z' not found");
    drop(draft);
    for (from, to, text) in [
        ("b", Some("a"), "Checkpoint 'a' is not later than 'b'"),
        ("a", Some("a"), "Checkpoint 'a' is not later than 'a'"),
        ("z", None, "Checkpoint 'z' not found"),
        ("a", Some("z"), "Checkpoint 'z' not found"),
    ] {
        assert_eq!(t.changes(from, to).unwrap_err().to_string(), text);
    }
}

#[test]
fn who_froze_a_bitmap_ends_that_and_nobody_else() {
    let t = Tracker::new(SIZE, 1, 8);
    change(&t, |draft| draft.add("b", G, false));
    let refused = |operation: &dyn Fn(&mut blkmark_bitmap::named::Draft) -> Result<(), BitmapError>| {
        operation(&mut t.begin().draft).unwrap_err()
    };
    assert_eq!(refused(&|draft| draft.client_abdicate("b", None)), BitmapError::NothingToAbdicate);
    assert_eq!(refused(&|draft| draft.client_reclaim("b", None)), BitmapError::NothingToReclaim);
    assert_eq!(refused(&|draft| draft.client_reclaim("z", None)), BitmapError::NotFound("z".into()));
    // A job's.
    write(&t, 1);
    let job = change(&t, |draft| draft.freeze("b"));
    assert_eq!(t.list()[0].owner, Some(Owner::Job));
    for id in [None, Some(job.id())] {
        assert_eq!(refused(&|draft| draft.client_abdicate("b", id)), BitmapError::Busy("b".into()));
        assert_eq!(refused(&|draft| draft.client_reclaim("b", id)), BitmapError::Busy("b".into()));
        assert_eq!(refused(&|draft| draft.create_successor("b").map(drop)), BitmapError::Busy("b".into()));
    }
    change(&t, |draft| draft.reclaim("b", job.id()));
    // A client's.
    let client = change(&t, |draft| draft.create_successor("b"));
    assert_eq!(t.list()[0].owner, Some(Owner::Client));
    assert_eq!(refused(&|draft| draft.abdicate("b", job.id())), BitmapError::NotFrozen("b".into()));
    assert_eq!(refused(&|draft| draft.freeze("b").map(drop)), BitmapError::Busy("b".into()));
    let other = BitmapError::OtherFreeze { name: "b".into(), freeze: client.id() };
    assert_eq!(refused(&|draft| draft.client_abdicate("b", Some(job.id()))), other);
    write(&t, 2);
    change(&t, |draft| draft.client_abdicate("b", Some(client.id())));
    let dirty = || t.bits("b").unwrap().runs().map(|run| run.start() / UNIT).collect::<Vec<_>>();
    assert_eq!((dirty(), t.list()[0].owner), (vec![2], None));
    assert_eq!(refused(&|draft| draft.client_abdicate("b", Some(client.id()))), BitmapError::NothingToAbdicate);
    change(&t, |draft| draft.create_successor("b"));
    write(&t, 5);
    change(&t, |draft| draft.client_reclaim("b", None));
    assert_eq!(dirty(), [2, 5]);
}
