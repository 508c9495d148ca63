//! Looking around for a moment before going to sleep.
//!
//! To sleep and to be woken costs a queue thread some microseconds, and a guest that has to wake it a trap into its host.
//! Where the next thing to do is about to come, it is cheaper to wait for it awake. Where it is not, waiting takes a processor from
//! others, the guest itself among them.
//!
//! So a thread spins only while that pays: each time that nothing came in time doubles the number of rests that are
//! slept through at once, up to [`PATIENCE`]; a spin that found something halves it.

use std::time::{Duration, Instant};

/// Rests that are slept through at once after spinning has failed again and again: of requests that take 3 us, a spin in vain
/// of 100 us costs one in a hundred.
const PATIENCE: u32 = 4096;

/// Looks between two looks at the clock.
const LOOKS: u32 = 16;

/// One thread's spinning.
pub(super) struct Spin {
    limit: Duration,
    /// Rests to sleep through after the next failure.
    penalty: u32,
    /// Rests to sleep through now.
    sleeps: u32,
}

impl Spin {
    /// Spins for at most `limit` at a time; never, if that is zero.
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, penalty: 1, sleeps: 0 }
    }

    /// Whether to spin before this rest.
    #[inline]
    pub(super) fn is_worth_it(&mut self) -> bool {
        if self.limit.is_zero() {
            return false;
        }
        if self.sleeps > 0 {
            self.sleeps -= 1;
            return false;
        }
        true
    }

    /// Spins until `found` says so; `false` if it did not in time.
    pub(super) fn until(&mut self, mut found: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                if found() {
                    self.penalty = (self.penalty / 2).max(1);
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= self.limit {
                self.sleeps = self.penalty;
                self.penalty = (self.penalty * 2).min(PATIENCE);
                return false;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_nanos(1);

    /// How often it spins in so many rests, in each of which `found` happens or not.
    fn spins(spin: &mut Spin, rests: u32, found: bool) -> u32 {
        let mut spun = 0;
        for _ in 0..rests {
            if spin.is_worth_it() {
                assert_eq!(spin.until(|| found), found);
                spun += 1;
            }
        }
        spun
    }

    #[test]
    fn spinning_that_does_not_pay_stops() {
        let mut spin = Spin::new(SHORT);
        let in_vain = spins(&mut spin, 10_000, false);
        assert!((10..40).contains(&in_vain), "{in_vain}");
    }

    #[test]
    fn spinning_that_pays_comes_back() {
        let mut spin = Spin::new(SHORT);
        spins(&mut spin, 10_000, false);
        // What is slept through already stays so; from then on no spin is left out.
        let paid = spins(&mut spin, 10_000, true);
        assert!(paid >= 10_000 - PATIENCE, "{paid}");
    }

    #[test]
    fn no_limit_no_spin() {
        let mut spin = Spin::new(Duration::ZERO);
        assert_eq!(spins(&mut spin, 100, true), 0);
    }
}
