//! What the guest does: which blocks its next request is for, and of what kind. Pure, and the same in every run.
//!
//! Like a real machine it has habits: most requests go to a small hot region, some to a log that is written one piece
//! after another, a few anywhere, and now and then a file of a third region goes away. The regions move from epoch to
//! epoch, so that the maps of two increments differ.
//!
//! Invariant: each stripe of the disk has one owner, and a request stays within a stripe. So the writers need no locks
//! between them.

use super::model::{BLOCK, mix};

/// Blocks of a stripe: 1 MiB.
pub const STRIPE: u64 = (1 << 20) / BLOCK as u64;

/// Parts of the disk: the guest uses every second one, and every fourth holds data from the start.
const PARTS: u64 = 64;

/// Largest write, in blocks.
pub const LONGEST_WRITE: u64 = (64 << 10) / BLOCK as u64;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Writes data.
    Write,
    /// Tells that nobody needs the blocks any more.
    Discard,
    /// Makes them read as zeroes.
    WriteZeroes,
}

/// A request to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// What it does.
    pub kind: Kind,
    /// The first block.
    pub first: u64,
    /// How many.
    pub blocks: u64,
}

impl Step {
    /// Whether the two share a block.
    pub fn overlaps(&self, other: &Step) -> bool {
        self.first < other.first + other.blocks && other.first < self.first + self.blocks
    }
}

/// How the disk is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Stripes of the disk, at least [`Plan::MIN_STRIPES`].
    pub stripes: u64,
    /// Whether a discarded block is sure to read as zeroes.
    pub discards: bool,
}

impl Plan {
    /// One a part.
    pub const MIN_STRIPES: u64 = PARTS;

    fn part(&self, stripe: u64) -> u64 {
        stripe * PARTS / self.stripes
    }

    /// Whether a stripe holds data before the guest begins.
    pub fn is_filled(&self, stripe: u64) -> bool {
        self.part(stripe).is_multiple_of(4)
    }

    /// Whether the guest ever writes to a stripe.
    pub fn is_used(&self, stripe: u64) -> bool {
        self.part(stripe).is_multiple_of(2)
    }

    /// How many stripes hold data at first, and how many may ever.
    pub fn filled_and_used(&self) -> (u64, u64) {
        let count =
            |test: fn(&Plan, u64) -> bool| (0..self.stripes).filter(|stripe| test(self, *stripe)).count() as u64;
        (count(Plan::is_filled), count(Plan::is_used))
    }
}

/// The requests of one of several writers.
pub struct Workload {
    plan: Plan,
    /// The used stripes that this writer owns.
    stripes: Vec<u64>,
    random: u64,
    /// How far the log is, in pieces.
    log: u64,
}

impl Workload {
    /// Of writer `index` of `writers`, which are few: each has to own a used stripe.
    pub fn new(plan: Plan, index: u64, writers: u64) -> Self {
        let used = (0..plan.stripes).filter(|stripe| plan.is_used(*stripe));
        let stripes: Vec<u64> = used.skip(index as usize).step_by(writers as usize).collect();
        Workload { plan, stripes, random: mix(index + 1), log: 0 }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        // The bias is a billionth: bounds are small.
        ((u128::from(mix(self.random)) * u128::from(bound)) >> 64) as u64
    }

    /// The `at`th stripe of a region that begins somewhere else in each epoch.
    fn stripe(&self, epoch: u64, region: u64, at: u64) -> u64 {
        let count = self.stripes.len() as u64;
        let start = (epoch * 5 + region * 11) * count / 32;
        self.stripes[((start + at) % count) as usize]
    }

    /// The next request.
    pub fn next(&mut self, epoch: u64) -> Step {
        let count = self.stripes.len() as u64;
        let (hot, log, files) = ((count / 12).max(1), (count / 8).max(1), (count / 16).max(1));
        match self.below(256) {
            0..176 => {
                // The product of two even distributions crowds at the region's start.
                let edge = self.below(hot) + 1;
                let at = self.below(edge);
                let stripe = self.stripe(epoch, 0, at);
                let blocks = 1 + self.below(4);
                self.write(stripe, blocks)
            }
            176..240 => {
                let pieces = STRIPE / LONGEST_WRITE;
                let at = self.log % (log * pieces);
                self.log += 1;
                let first = self.stripe(epoch, 1, at / pieces) * STRIPE + at % pieces * LONGEST_WRITE;
                Step { kind: Kind::Write, first, blocks: LONGEST_WRITE }
            }
            240..252 => {
                let at = self.below(files);
                let stripe = self.stripe(epoch, 2, at);
                let blocks = 1 + self.below(LONGEST_WRITE);
                self.write(stripe, blocks)
            }
            kind @ 252..254 => {
                let at = self.below(files);
                let stripe = self.stripe(epoch, 2, at);
                let blocks = LONGEST_WRITE << self.below(4);
                let first = stripe * STRIPE + self.below(STRIPE / blocks) * blocks;
                let kind = if kind == 252 && self.plan.discards { Kind::Discard } else { Kind::WriteZeroes };
                Step { kind, first, blocks }
            }
            _ => {
                let at = self.below(count);
                let blocks = 1 + self.below(LONGEST_WRITE);
                self.write(self.stripes[at as usize], blocks)
            }
        }
    }

    fn write(&mut self, stripe: u64, blocks: u64) -> Step {
        let first = stripe * STRIPE + self.below(STRIPE - blocks + 1);
        Step { kind: Kind::Write, first, blocks }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn writers_never_meet_and_no_request_leaves_its_stripe() {
        for stripes in [Plan::MIN_STRIPES, 100, 1024] {
            let plan = Plan { stripes, discards: true };
            let [one, other] = [0, 1].map(|index| {
                let mut workload = Workload::new(plan, index, 2);
                let mut touched = HashSet::new();
                for n in 0..40_000 {
                    let step = workload.next(n / 5000);
                    let stripe = step.first / STRIPE;
                    assert!(step.blocks > 0 && (step.first + step.blocks - 1) / STRIPE == stripe, "{step:?}");
                    assert!(stripe < stripes && plan.is_used(stripe), "{step:?}");
                    assert!(step.kind != Kind::Write || step.blocks <= LONGEST_WRITE, "{step:?}");
                    touched.insert(stripe);
                }
                touched
            });
            assert!(one.is_disjoint(&other));
            assert!(one.len() > 10 && other.len() > 10, "of {stripes}: {} and {}", one.len(), other.len());
        }
    }

    #[test]
    fn all_kinds_of_requests_come_and_discards_only_where_they_are_sure() {
        for discards in [true, false] {
            let mut workload = Workload::new(Plan { stripes: 256, discards }, 0, 2);
            let steps: Vec<Step> = (0..10_000).map(|_| workload.next(0)).collect();
            let has = |kind| steps.iter().any(|step| step.kind == kind);
            assert!(has(Kind::Write) && has(Kind::WriteZeroes));
            assert_eq!(has(Kind::Discard), discards);
        }
    }

    #[test]
    fn half_of_the_disk_is_used_and_a_quarter_is_filled() {
        assert_eq!(Plan { stripes: 1024, discards: true }.filled_and_used(), (256, 512));
        assert_eq!(Plan { stripes: 64, discards: true }.filled_and_used(), (16, 32));
    }
}
