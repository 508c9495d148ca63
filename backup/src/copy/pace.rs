//! Leaves the disk to the guest: how much of a copy may be under way at once, found out from how the guest fares.
//!
//! Workers ask before each hand and say when they are through. The bound, in bytes, follows the guest's own latency:
//! while the slowest tenth of its requests takes longer than the limit, the bound shrinks by a third a window; while it does not,
//! the bound grows by a step; while the guest asks for nothing, it doubles. It never falls below one small request at a
//! time, so a copy always gets on. It begins as if there were no guest, and within a millisecond of the guest's first request
//! as if there had always been one. A disk that is slow by itself must not hold a backup up for ever: if the guest waits
//! longer than the limit although the bound is at its floor, the copy is not to blame, and the limit becomes that
//! latency and a half for as long as it is so.
//!
//! With a limit of zero, or a disk that does not tell how its guest fares, nothing is measured and nothing bounded. The limit
//! may change at any moment.

use super::CopyControl;
use crate::pulse::{Pulse, Watch};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Least bytes that may always be under way.
const FLOOR: u64 = 128 << 10;

/// What a good window adds.
const STEP: u64 = 128 << 10;

/// How long to look at the guest between two decisions.
const WINDOW: Duration = Duration::from_millis(10);

/// How soon the first request of a guest is noticed that asked for nothing when the copy began.
const FIRST_WINDOW: Duration = Duration::from_millis(1);

/// A decision about a guest that does little may take this long.
const LONG_WINDOW: Duration = Duration::from_millis(50);

/// So many requests tell how a guest fares.
const ENOUGH: u64 = 10;

/// The share of requests that has to keep to the limit.
const SHARE: f64 = 0.9;

/// A small request occupies a disk much longer than its bytes say.
const LEAST_COST: u64 = 64 << 10;

/// The bound on one copy.
pub(crate) struct Pace<'a> {
    /// Bytes of the largest request.
    chunk: u64,
    /// Bytes under way at most, whatever the guest does.
    ceiling: u64,
    pulse: Option<&'a Pulse>,
    control: &'a CopyControl,
    state: Mutex<State<'a>>,
    changed: Condvar,
}

struct State<'a> {
    /// Bytes under way that were counted when they began.
    busy: u64,
    /// There while a limit is in force.
    governor: Option<Governor<'a>>,
}

struct Governor<'a> {
    watch: Watch<'a>,
    /// What was asked for.
    budget: Duration,
    /// What is held to; above the budget while the disk is too slow for it by itself.
    limit: Duration,
    bound: u64,
    /// Whether the guest was seen to ask for anything since the watch began.
    heard: bool,
    since: Instant,
}

/// The right to have up to `bytes` under way, until it is given back to [`Pace::leave`].
#[derive(Clone, Copy)]
pub(crate) struct Permit {
    pub(crate) bytes: u64,
    cost: u64,
}

impl<'a> Pace<'a> {
    /// For requests of up to `chunk` bytes from `workers` threads. The limit is the control's, at any moment.
    pub(crate) fn new(pulse: Option<&'a Pulse>, control: &'a CopyControl, chunk: u64, workers: u64) -> Self {
        let ceiling = chunk.saturating_mul(workers);
        let state = Mutex::new(State { busy: 0, governor: None });
        Self { chunk, ceiling, pulse, control, state, changed: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State<'a>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Waits until there is room.
    pub(crate) fn enter(&self) -> Permit {
        let Some(pulse) = self.pulse else { return Permit { bytes: self.chunk, cost: 0 } };
        let mut state = self.state();
        loop {
            let budget = self.control.guest_latency();
            if budget.is_zero() {
                state.governor = None;
                return Permit { bytes: self.chunk, cost: 0 };
            }
            let State { busy, governor } = &mut *state;
            let governor = governor.get_or_insert_with(|| Governor::new(pulse, budget, self.ceiling));
            governor.decide(budget, self.ceiling);
            // Two at a time, where possible: one reads while the other writes.
            let bytes = (governor.bound / 2).clamp(FLOOR.min(self.chunk), self.chunk);
            let cost = bytes.max(LEAST_COST);
            if *busy == 0 || *busy + cost <= governor.bound {
                *busy += cost;
                return Permit { bytes, cost };
            }
            state = self.changed.wait_timeout(state, WINDOW).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
        }
    }

    /// What was permitted is over.
    pub(crate) fn leave(&self, permit: Permit) {
        if permit.cost > 0 {
            self.state().busy -= permit.cost;
            self.changed.notify_one();
        }
    }
}

impl<'a> Governor<'a> {
    fn new(pulse: &'a Pulse, budget: Duration, ceiling: u64) -> Self {
        Self { watch: pulse.watch(), budget, limit: budget, bound: ceiling, heard: false, since: Instant::now() }
    }

    fn decide(&mut self, budget: Duration, ceiling: u64) {
        if self.budget != budget {
            (self.budget, self.limit) = (budget, budget);
        }
        let passed = self.since.elapsed();
        if passed < if self.heard { WINDOW } else { FIRST_WINDOW } {
            return;
        }
        let beat = self.watch.beat(true);
        let busy = beat.ended + beat.in_flight > 0;
        if !self.heard {
            // Until then the disk is the copy's alone.
            self.heard = busy;
            self.bound = if busy { (4 * FLOOR).min(ceiling) } else { ceiling };
            self.since = Instant::now();
            return;
        }
        if busy && beat.ended < ENOUGH && passed < LONG_WINDOW {
            return;
        }
        self.watch.beat(false);
        self.since = Instant::now();
        // Nothing that ends although something is under way is as slow as it gets.
        let latency = beat.quantile(SHARE).or(busy.then_some(passed));
        let floor = FLOOR.min(ceiling);
        (self.bound, self.limit) = next(self.bound, self.limit, budget, latency, floor..=ceiling);
    }
}

/// The decision: bound and limit after a window in which the guest saw `latency` (`None`: it asked for nothing).
fn next(
    bound: u64,
    limit: Duration,
    budget: Duration,
    latency: Option<Duration>,
    within: std::ops::RangeInclusive<u64>,
) -> (u64, Duration) {
    let (floor, ceiling) = (*within.start(), *within.end());
    let Some(latency) = latency else { return ((bound * 2).min(ceiling), budget) };
    if latency <= limit {
        // Back towards the budget, in case the disk has recovered.
        let limit = budget.max(limit - limit / 16);
        return ((bound + STEP).min(ceiling), limit);
    }
    if bound <= floor {
        return (floor, limit.max(latency + latency / 2));
    }
    ((bound - bound / 3).max(floor), limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(1);
    const ALL: std::ops::RangeInclusive<u64> = FLOOR..=4 << 20;

    fn windows(
        mut state: (u64, Duration),
        latency: impl Fn(u64) -> Option<Duration>,
        windows: usize,
    ) -> (u64, Duration) {
        for _ in 0..windows {
            state = next(state.0, state.1, BUDGET, latency(state.0), ALL);
        }
        state
    }

    #[test]
    fn without_a_guest_it_is_at_full_speed_within_six_windows() {
        assert_eq!(windows((FLOOR, BUDGET), |_| None, 6).0, 4 << 20);
    }

    #[test]
    fn a_guest_that_suffers_gets_the_disk_within_nine_windows() {
        assert_eq!(windows((4 << 20, BUDGET), |_| Some(2 * BUDGET), 9).0, FLOOR);
    }

    #[test]
    fn it_settles_where_the_guest_is_at_its_limit() {
        // A disk on which the guest waits a millisecond for each MiB of ours.
        let disk = |bound: u64| Some(Duration::from_nanos(bound * 1000 / 1049));
        for windows_passed in 100..120 {
            let (bound, limit) = windows((FLOOR, BUDGET), disk, windows_passed);
            assert!((600 << 10..=1200 << 10).contains(&bound), "{bound}");
            assert_eq!(limit, BUDGET);
        }
    }

    #[test]
    fn a_disk_that_is_slow_by_itself_does_not_stop_a_backup() {
        let disk = |bound: u64| Some(Duration::from_millis(5) + Duration::from_nanos(bound * 2));
        let (bound, _) = windows((FLOOR, BUDGET), disk, 100);
        assert!(bound > 2 * FLOOR, "{bound}");
        // And its owner's limit holds again as soon as the disk is as quick as that needs.
        let (_, limit) = windows((FLOOR, 9 * BUDGET), |_| Some(BUDGET / 2), 60);
        assert_eq!(limit, BUDGET);
    }

    fn control(limit: Duration) -> CopyControl {
        let control = CopyControl::default();
        control.set_guest_latency(limit);
        control
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let (pulse, control) = (Pulse::default(), control(Duration::ZERO));
        let pace = Pace::new(Some(&pulse), &control, 1 << 20, 4);
        for _ in 0..1000 {
            assert_eq!(pace.enter().bytes, 1 << 20);
        }
        assert!(pulse.begin(0).is_none(), "nobody watches");
    }

    #[test]
    fn beside_nobody_a_copy_has_the_whole_disk_at_once() {
        let (pulse, control) = (Pulse::default(), control(BUDGET));
        let pace = Pace::new(Some(&pulse), &control, 1 << 20, 4);
        let permits: Vec<Permit> = (0..4).map(|_| pace.enter()).collect();
        assert!(permits.iter().all(|permit| permit.bytes == 1 << 20));
        permits.into_iter().for_each(|permit| pace.leave(permit));
        // The first request is noticed, and what is under way then shrinks.
        let begun = pulse.begin(0).unwrap();
        std::thread::sleep(FIRST_WINDOW);
        assert_eq!(pace.enter().bytes, 2 * FLOOR);
        pulse.end(0, begun);
    }

    #[test]
    fn one_request_is_always_under_way_and_not_more_than_the_bound() {
        let (pulse, control) = (Pulse::default(), control(BUDGET));
        let pace = Pace::new(Some(&pulse), &control, 1 << 20, 4);
        pace.state().governor =
            Some(Governor { heard: true, bound: 4 * FLOOR, ..Governor::new(&pulse, BUDGET, 4 << 20) });
        let first = pace.enter();
        assert_eq!(first.bytes, 2 * FLOOR);
        let second = pace.enter();
        pace.leave(first);
        let third = pace.enter();
        pace.leave(second);
        pace.leave(third);
        assert_eq!(pace.state().busy, 0);
    }

    #[test]
    fn the_limit_may_change_while_requests_are_under_way() {
        let (pulse, control) = (Pulse::default(), control(BUDGET));
        let pace = Pace::new(Some(&pulse), &control, 1 << 20, 4);
        let governed = pace.enter();
        control.set_guest_latency(Duration::ZERO);
        let free = pace.enter();
        assert!(pulse.begin(0).is_none(), "nobody watches any more");
        control.set_guest_latency(BUDGET / 2);
        let again = pace.enter();
        assert!(pulse.begin(0).is_some());
        assert_eq!(pace.state().governor.as_ref().unwrap().limit, BUDGET / 2);
        [governed, free, again].into_iter().for_each(|permit| pace.leave(permit));
        assert_eq!(pace.state().busy, 0);
    }
}
