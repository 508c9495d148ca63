//! Promise: bits of any granularity say exactly what a plain list of dirty bytes says, rounded outward.
#![cfg(not(any(loom, shuttle)))]

use blkmark_bitmap::{Bits, ByteRange, Granularity, LiveMap};
use proptest::prelude::*;
use std::collections::BTreeSet;

/// The model: a set of dirty units of 512 bytes; granules are derived from it.
fn granules(ranges: &[ByteRange], granularity: Granularity, size: u64) -> BTreeSet<u64> {
    let mut dirty = BTreeSet::new();
    for range in ranges {
        let end = range.end().min(size);
        let mut byte = range.start();
        while byte < end {
            dirty.insert(byte / granularity.bytes());
            byte = (byte / granularity.bytes() + 1) * granularity.bytes();
        }
    }
    dirty
}

fn of_bits(bits: &Bits) -> BTreeSet<u64> {
    let g = bits.granularity().bytes();
    bits.runs().flat_map(|run| run.start() / g..run.end().div_ceil(g)).collect()
}

prop_compose! {
    fn disk()(size in 1u64..8_000_000, shift in 9u32..24, other in 9u32..24) -> (u64, Granularity, Granularity) {
        (size, Granularity::new(1 << shift).unwrap(), Granularity::new(1 << other).unwrap())
    }
}

prop_compose! {
    /// Large enough for many summaries, with little in it.
    fn large_disk()(size in 1u64..8 << 30, shift in 9u32..13) -> (u64, Granularity) {
        (size, Granularity::new(1 << shift).unwrap())
    }
}

fn scattered() -> impl Strategy<Value = Vec<ByteRange>> {
    prop::collection::vec((0u64..8 << 30, 0u64..100_000).prop_map(|(start, len)| ByteRange::new(start, len)), 0..12)
}

/// Some of them so long that blocks of 4096 bits are whole.
fn ranges() -> impl Strategy<Value = Vec<ByteRange>> {
    let len = prop_oneof![4 => 0u64..300_000, 1 => 0u64..8_000_000];
    prop::collection::vec((0u64..5_000_000, len).prop_map(|(start, len)| ByteRange::new(start, len)), 0..12)
}

proptest! {
    #[test]
    fn set_marks_what_it_touches_and_no_more((size, g, _) in disk(), ranges in ranges()) {
        let mut bits = Bits::new(g, size);
        let live = LiveMap::new(g, size);
        for range in &ranges {
            bits.set(*range);
            live.mark(*range);
        }
        let model = granules(&ranges, g, size);
        prop_assert_eq!(of_bits(&bits), model.clone());
        prop_assert_eq!(bits.set_bits(), model.len() as u64);
        prop_assert_eq!(bits.dirty_bytes(), model.len() as u64 * g.bytes());
        prop_assert_eq!(bits.is_empty(), model.is_empty());
        prop_assert_eq!(live.to_bits(), bits);
    }

    #[test]
    fn a_large_and_sparse_set_is_walked_whole(
        (size, g) in large_disk(), ours in scattered(), theirs in scattered(), gone in scattered(),
    ) {
        let (mut bits, live) = (Bits::new(g, size), LiveMap::new(g, size));
        for range in &ours {
            bits.set(*range);
            live.mark(*range);
        }
        prop_assert_eq!(of_bits(&bits), granules(&ours, g, size));
        prop_assert_eq!(&live.to_bits(), &bits);
        prop_assert_eq!(&bits.clone(), &bits);
        let mut other = Bits::new(g, size);
        theirs.iter().for_each(|range| other.set(*range));
        prop_assert_eq!(bits == other, granules(&ours, g, size) == granules(&theirs, g, size));
        bits.union(&other);
        gone.iter().for_each(|range| bits.clear(*range));
        let all: BTreeSet<u64> = granules(&ours, g, size).union(&granules(&theirs, g, size)).copied().collect();
        let left: BTreeSet<u64> = all.difference(&granules(&gone, g, size)).copied().collect();
        prop_assert_eq!((bits.set_bits(), bits.is_empty()), (left.len() as u64, left.is_empty()));
        prop_assert_eq!(of_bits(&bits), left);
    }

    #[test]
    fn runs_are_maximal_ascending_and_inside_the_disk((size, g, _) in disk(), ranges in ranges()) {
        let mut bits = Bits::new(g, size);
        ranges.iter().for_each(|range| bits.set(*range));
        let mut last = None;
        for run in bits.runs() {
            prop_assert!(!run.is_empty() && run.end() <= size);
            if let Some(last) = last {
                prop_assert!(run.start() > last);
            }
            last = Some(run.end());
        }
    }

    #[test]
    fn runs_asked_for_one_after_another_cover_the_disk((size, g, _) in disk(), ranges in ranges()) {
        let mut bits = Bits::new(g, size);
        ranges.iter().for_each(|range| bits.set(*range));
        let (mut at, mut dirty, mut last) = (0, Vec::new(), None);
        while let Some((set, end)) = bits.run_at(at) {
            prop_assert!(end > at && end <= size && last != Some(set));
            if set {
                dirty.push(ByteRange::between(at, end));
            }
            (at, last) = (end, Some(set));
        }
        prop_assert_eq!(at, size);
        prop_assert_eq!(dirty, bits.runs().collect::<Vec<_>>());
    }

    #[test]
    fn any_and_all_agree_with_the_model((size, g, _) in disk(), ranges in ranges(), asked in ranges()) {
        let mut bits = Bits::new(g, size);
        let live = LiveMap::new(g, size);
        for range in &ranges {
            bits.set(*range);
            live.mark(*range);
        }
        let model = granules(&ranges, g, size);
        for ask in asked {
            let touched = granules(&[ask], g, size);
            prop_assert_eq!(bits.any(ask), touched.iter().any(|i| model.contains(i)));
            prop_assert_eq!(live.any(ask), touched.iter().any(|i| model.contains(i)));
            prop_assert_eq!(live.all(ask), touched.iter().all(|i| model.contains(i)));
        }
    }

    #[test]
    fn clear_takes_what_it_touches((size, g, _) in disk(), ranges in ranges(), gone in ranges()) {
        let mut bits = Bits::new(g, size);
        ranges.iter().for_each(|range| bits.set(*range));
        gone.iter().for_each(|range| bits.clear(*range));
        let left: BTreeSet<u64> =
            granules(&ranges, g, size).difference(&granules(&gone, g, size)).copied().collect();
        prop_assert_eq!(of_bits(&bits), left);
    }

    #[test]
    fn what_is_set_bit_by_bit_equals_what_is_set_at_once((size, g, _) in disk(), ranges in ranges(), gone in ranges()) {
        let (mut whole, mut parts) = (Bits::new(g, size), Bits::new(g, size));
        for range in &ranges {
            whole.set(*range);
            for granule in granules(&[*range], g, size) {
                parts.set(ByteRange::new(granule * g.bytes(), 1));
            }
        }
        prop_assert_eq!(&whole, &parts);
        prop_assert_eq!(whole.sha256(), parts.sha256());
        let mut taken = Bits::new(g, size);
        gone.iter().for_each(|range| taken.set(*range));
        let left: BTreeSet<u64> =
            granules(&ranges, g, size).difference(&granules(&gone, g, size)).copied().collect();
        for bits in [&mut whole, &mut parts] {
            bits.subtract(&taken);
            prop_assert_eq!(of_bits(bits), left.clone());
            bits.union(&taken);
            bits.subtract(&taken.clone());
            prop_assert_eq!(of_bits(bits), left.clone());
        }
        prop_assert_eq!(whole.sha256(), parts.sha256());
    }

    #[test]
    fn union_over_granularities_rounds_outward((size, g, other) in disk(), ours in ranges(), theirs in ranges()) {
        let mut bits = Bits::new(g, size);
        ours.iter().for_each(|range| bits.set(*range));
        let mut add = Bits::new(other, size);
        theirs.iter().for_each(|range| add.set(*range));
        let theirs: Vec<ByteRange> = add.runs().collect();
        bits.union(&add);
        let model: BTreeSet<u64> = granules(&ours, g, size).union(&granules(&theirs, g, size)).copied().collect();
        prop_assert_eq!(of_bits(&bits), model);
        let live = LiveMap::new(other, size);
        theirs.iter().for_each(|range| live.mark(*range));
        let mut folded = Bits::new(g, size);
        live.fold_into(&mut folded);
        prop_assert_eq!(folded, add.at(g));
    }
}

#[test]
fn granularity_is_a_power_of_two_from_512_to_2_gib() {
    for shift in 0..64 {
        assert_eq!(Granularity::new(1 << shift).is_some(), (9..=31).contains(&shift), "2^{shift}");
        assert!(Granularity::new((1 << shift) + 1).is_none() || shift == 0);
    }
    assert!(Granularity::new(0).is_none());
}

/// What QEMU 10.0.2 answers to `x-debug-block-dirty-bitmap-sha256` for a 1 MiB disk at 64 KiB granularity: an empty
/// bitmap, and one with the blocks at 64 KiB and 960 KiB dirty. See `tests/` for the same comparison made live.
#[test]
fn sha256_is_over_the_words_of_bits() {
    let mut bits = Bits::new(Granularity::DEFAULT, 1 << 20);
    assert_eq!(bits.sha256(), "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc");
    bits.set(ByteRange::new(65536, 1));
    bits.set(ByteRange::new(983_040, 512));
    let mut words = [0u8; 8];
    words[..2].copy_from_slice(&0x8002u16.to_le_bytes());
    use sha2::Digest;
    let expect: String = sha2::Sha256::digest(words).iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(bits.sha256(), expect);
}

/// Bytes of memory that this process has.
fn memory() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap();
    text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// 128 MiB of bits each, if they had to stand somewhere.
#[test]
fn what_is_dirty_everywhere_takes_no_memory() {
    let (g, size) = (Granularity::DEFAULT, 64 << 40);
    let before = memory();
    let live = LiveMap::new(g, 1 << 40);
    live.mark(ByteRange::new(0, 1 << 40));
    let mut all = vec![Bits::full(g, size), Bits::full(g, size).clone(), Bits::full(g, size).at(g)];
    all.push(Bits::full(Granularity::new(1 << 20).unwrap(), size).at(g));
    all.push(Bits::new(g, size));
    all[4].union(&Bits::full(g, size));
    all[4].clear(ByteRange::new(1 << 40, 1));
    assert_eq!(live.to_bits().dirty_bytes(), 1 << 40);
    assert_eq!(all.iter().map(Bits::dirty_bytes).sum::<u64>(), 5 * size - g.bytes());
    assert_eq!(all[4].runs().count(), 2);
    let taken = memory().saturating_sub(before);
    assert!(taken < 64 << 20, "{taken} bytes");
}
