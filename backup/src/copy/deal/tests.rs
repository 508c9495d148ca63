//! What a deal hands out: everything of the plan once and nothing else, in order, in pieces that a worker can take, holes whole.

use super::*;
use crate::node::Node;
use crate::point::{PointOptions, Wanted};
use crate::scratch::ScratchSettings;
use crate::source::{FileId, Source};
use blkmark_bitmap::{Granularity, Tracker};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// A disk that tells where it has data, and counts how often it was asked.
struct Map {
    data: Vec<(u64, u64)>,
    asked: AtomicUsize,
    fails: bool,
}

impl Source for Map {
    fn size(&self) -> u64 {
        SIZE
    }
    fn alignment(&self) -> u32 {
        512
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        unreachable!("a deal reads nothing")
    }
    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if self.fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let found = match self.data.iter().find(|(start, len)| offset < start + len) {
            Some((start, len)) if *start <= offset => (BlockStatus::Data, start + len - offset),
            Some((start, _)) => (BlockStatus::Hole, start - offset),
            None => (BlockStatus::Hole, SIZE - offset),
        };
        Ok((found.0, found.1.min(limit)))
    }
    fn file_id(&self) -> Option<FileId> {
        None
    }
}

struct Scene {
    map: Arc<Map>,
    point: Arc<Point>,
    plan: Bits,
    stride: u64,
}

impl Scene {
    fn new(cluster: u64, data: &[(u64, u64)], plan: &[(u64, u64)]) -> Self {
        Self::over(Map { data: data.to_vec(), asked: AtomicUsize::new(0), fails: false }, cluster, plan)
    }

    fn over(map: Map, cluster: u64, plan: &[(u64, u64)]) -> Self {
        let (map, cluster) = (Arc::new(map), Granularity::new(cluster).unwrap());
        let scratch = ScratchSettings { directory: std::env::temp_dir(), cap: MIB, memory: MIB };
        let source = Arc::clone(&map) as Arc<dyn Source>;
        let node = Arc::new(Node::new("d", "d", false, Tracker::new(SIZE, 1, 1), source, scratch));
        let point = Point::prepare(&node, Wanted::All, cluster, PointOptions::default()).unwrap();
        let mut bits = Bits::new(cluster, SIZE);
        plan.iter().for_each(|(start, len)| bits.set(ByteRange::new(*start, *len)));
        Self { map, point, plan: bits, stride: 0 }
    }

    /// All hands in order: each a hole, or its pieces.
    fn hands(&self, most: u64, count: usize) -> Vec<(bool, Vec<(u64, u64)>)> {
        let mut deal = Deal::new(&self.point, &self.plan, self.stride);
        let (mut pieces, mut hands) = (Vec::new(), Vec::new());
        let plain = |range: &ByteRange| (range.start(), range.len());
        loop {
            match deal.next(most, count, &mut pieces) {
                Hand::Nothing => break,
                Hand::Hole(hole) => hands.push((true, vec![plain(&hole)])),
                Hand::Data => {
                    assert!(!pieces.is_empty() && pieces.len() <= count);
                    hands.push((false, pieces.iter().map(plain).collect()));
                }
            }
        }
        assert!(matches!(deal.next(most, count, &mut pieces), Hand::Nothing), "nothing stays nothing");
        self.covers_the_plan(&hands);
        hands
    }

    /// Every cluster of the plan is dealt once, from front to back, and nothing besides.
    fn covers_the_plan(&self, hands: &[(bool, Vec<(u64, u64)>)]) {
        let mut dealt = Bits::new(self.plan.granularity(), SIZE);
        let mut last = 0;
        for (start, len) in hands.iter().flat_map(|(_, pieces)| pieces) {
            assert!(*start >= last, "dealt twice or out of order at {start:#x}");
            assert!(start.is_multiple_of(self.point.cluster().bytes()), "not a whole cluster at {start:#x}");
            last = start + len;
            dealt.set(ByteRange::new(*start, *len));
        }
        assert_eq!(dealt.sha256(), self.plan.sha256(), "not what was planned");
    }
}

#[test]
fn long_runs_come_in_large_pieces_and_short_ones_in_bundles() {
    let scene = Scene::new(64 * KIB, &[(0, SIZE)], &[(0, 2 * MIB + 64 * KIB)]);
    let pieces = |hands: &[(bool, Vec<(u64, u64)>)]| hands.iter().map(|(_, pieces)| pieces.clone()).collect::<Vec<_>>();
    assert_eq!(pieces(&scene.hands(MIB, 64)), [[(0, MIB)], [(MIB, MIB)], [(2 * MIB, 64 * KIB)]]);
    assert_eq!(scene.map.asked.load(Ordering::Relaxed), 1, "one extent is asked about once");

    let scattered: Vec<(u64, u64)> = (0..5).map(|n| (n * MIB, 4 * KIB)).collect();
    let scene = Scene::new(4 * KIB, &[(0, SIZE)], &scattered);
    assert_eq!(pieces(&scene.hands(MIB, 3)), [scattered[..3].to_vec(), scattered[3..].to_vec()]);
    // By bytes too.
    assert_eq!(pieces(&scene.hands(8 * KIB, 64)), [&scattered[..2], &scattered[2..4], &scattered[4..]]);
    assert_eq!(scene.map.asked.load(Ordering::Relaxed), 0, "reading them is as cheap as asking");
}

#[test]
fn long_pieces_end_where_the_target_likes_them_to() {
    let pieces = |scene: &Scene, most| scene.hands(most, 64).into_iter().flat_map(|hand| hand.1).collect::<Vec<_>>();
    let plan = [(MIB, 6 * MIB + 64 * KIB), (10 * MIB - 64 * KIB, 128 * KIB)];
    let scene = Scene { stride: 2 * MIB, ..Scene::new(64 * KIB, &[(0, SIZE)], &plan) };
    let long = [(MIB, MIB), (2 * MIB, 2 * MIB), (4 * MIB, 2 * MIB), (6 * MIB, MIB + 64 * KIB)];
    assert_eq!(pieces(&scene, 2 * MIB), [&long[..], &plan[1..]].concat());
    // Small ones, as beside a guest, are not made smaller.
    let small: Vec<_> = (0..4).map(|n| (MIB + n * 3 * MIB / 2, 3 * MIB / 2)).collect();
    assert_eq!(pieces(&scene, 3 * MIB / 2)[..4], small);
}

#[test]
fn neighbours_are_one_run() {
    let neighbours: Vec<(u64, u64)> = (0..16).map(|n| (MIB + n * 4 * KIB, 4 * KIB)).collect();
    let hands = Scene::new(4 * KIB, &[(0, SIZE)], &neighbours).hands(MIB, 64);
    assert_eq!(hands, [(false, vec![(MIB, 64 * KIB)])]);
}

#[test]
fn holes_are_dealt_whole_and_data_up_to_the_next_hole() {
    let scene = Scene::new(64 * KIB, &[(8 * MIB, 3 * MIB), (40 * MIB, 64 * KIB)], &[(0, SIZE)]);
    let hands = scene.hands(2 * MIB, 64);
    let expect = [
        (true, vec![(0, 8 * MIB)]),
        (false, vec![(8 * MIB, 2 * MIB)]),
        (false, vec![(10 * MIB, MIB)]),
        (true, vec![(11 * MIB, 29 * MIB)]),
        (false, vec![(40 * MIB, 64 * KIB)]),
        (true, vec![(40 * MIB + 64 * KIB, 24 * MIB - 64 * KIB)]),
    ];
    assert_eq!(hands, expect);
}

#[test]
fn a_hole_that_covers_no_whole_cluster_is_data() {
    // Data ends and begins again within a cluster; the hole between is dealt without its edges.
    let scene = Scene::new(MIB, &[(0, MIB + 4 * KIB), (4 * MIB - 4 * KIB, 4 * KIB)], &[(0, 5 * MIB)]);
    let hands = scene.hands(MIB, 64);
    let expect = [
        (false, vec![(0, MIB)]),
        (false, vec![(MIB, MIB)]),
        (true, vec![(2 * MIB, MIB)]),
        (false, vec![(3 * MIB, MIB)]),
        (true, vec![(4 * MIB, MIB)]),
    ];
    assert_eq!(hands, expect);
}

#[test]
fn a_hand_smaller_than_a_cluster_is_a_cluster() {
    let scene = Scene::new(MIB, &[(0, SIZE)], &[(0, 2 * MIB)]);
    for most in [0, 1, MIB - 1] {
        assert_eq!(scene.hands(most, 64).len(), 2);
    }
}

#[test]
fn where_the_disk_cannot_tell_everything_is_read() {
    let map = Map { data: Vec::new(), asked: AtomicUsize::new(0), fails: true };
    let hands = Scene::over(map, 64 * KIB, &[(MIB, 2 * MIB)]).hands(MIB, 64);
    assert_eq!(hands, [(false, vec![(MIB, MIB)]), (false, vec![(2 * MIB, MIB)])]);
}

#[test]
fn a_closed_deal_has_nothing_left() {
    let scene = Scene::new(64 * KIB, &[(0, SIZE)], &[(0, SIZE)]);
    let mut deal = Deal::new(&scene.point, &scene.plan, 0);
    let mut pieces = Vec::new();
    assert!(matches!(deal.next(MIB, 64, &mut pieces), Hand::Data));
    deal.close();
    assert!(matches!(deal.next(MIB, 64, &mut pieces), Hand::Nothing));
}
