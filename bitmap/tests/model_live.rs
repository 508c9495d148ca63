//! Loom model of a live map's places, on the real code, under the C11 memory model: threads that mark blocks for the first time
//! lose no mark of each other, and set no bit that nobody marked, as two blocks in one place would. Leaving out the look behind
//! the newest pair, the second look at the block, or the acquire of that pair makes it fail. In a model a block has 64 bits.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p blkmark-bitmap --test model_live`
#![cfg(loom)]

use blkmark_bitmap::{ByteRange, Granularity, LiveMap};
use loom::sync::Arc;
use loom::thread;

/// Bytes of a block of the map.
const BLOCK: u64 = 64 * 512;

/// Marks each of `marks` (block, bit in it).
fn mark(map: &LiveMap, marks: &[(u64, u64)]) {
    for (block, bit) in marks {
        map.mark(ByteRange::new(block * BLOCK + bit * 512, 512));
        assert!(map.any(ByteRange::new(block * BLOCK + bit * 512, 512)), "whoever marked sees his mark");
    }
}

fn threads_mark(bound: usize, marks: &'static [&'static [(u64, u64)]]) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(bound);
    model.check(move || {
        let map = Arc::new(LiveMap::new(Granularity::MIN, 3 * BLOCK));
        let others: Vec<_> = marks[1..]
            .iter()
            .map(|marks| {
                let map = Arc::clone(&map);
                thread::spawn(move || mark(&map, marks))
            })
            .collect();
        mark(&map, marks[0]);
        others.into_iter().for_each(|other| other.join().unwrap());
        let mut expected: Vec<(u64, u64)> = marks.iter().copied().flatten().copied().collect();
        expected.sort_unstable();
        let runs = map.to_bits().runs().map(|run| (run.start() / BLOCK, run.start() % BLOCK / 512)).collect::<Vec<_>>();
        assert_eq!(runs, expected);
    });
}

#[test]
fn two_threads_give_places_to_the_same_blocks() {
    threads_mark(3, &[&[(0, 1), (2, 3)], &[(2, 7), (0, 9)]]);
}

#[test]
fn three_threads_give_places_at_once() {
    threads_mark(2, &[&[(0, 1)], &[(1, 5)], &[(0, 5)]]);
}
