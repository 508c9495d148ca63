//! A log-linear histogram of durations: fixed size, no allocation while recording, relative error below 1/64.
//! The demo and the benchmark keep one a queue thread and merge them.

use std::time::Duration;

/// Sub-buckets of each power of two, as a power of two.
const SUB_BITS: u32 = 6;
const SUB: usize = 1 << SUB_BITS;
/// Values of 2^40 ns (18 minutes) and more share the last bucket.
const TOP_BITS: u32 = 40;
const BUCKETS: usize = ((TOP_BITS - SUB_BITS + 1) as usize) * SUB;

/// Counts of durations in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Box<[u64]>,
    count: u64,
    sum: u128,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: vec![0; BUCKETS].into_boxed_slice(), count: 0, sum: 0, max: 0 }
    }
}

/// Values below 2·SUB have a bucket each; above, each power of two has SUB buckets of equal width.
fn bucket(ns: u64) -> usize {
    let ns = ns.min((1 << TOP_BITS) - 1);
    let shift = (u64::BITS - ns.leading_zeros()).saturating_sub(SUB_BITS + 1);
    shift as usize * SUB + (ns >> shift) as usize
}

/// The largest value of a bucket.
fn upper(bucket: usize) -> u64 {
    let shift = (bucket / SUB).saturating_sub(1);
    let mantissa = (bucket - shift * SUB) as u64;
    ((mantissa + 1) << shift) - 1
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(ns)] += 1;
        self.count += 1;
        self.sum += u128::from(ns);
        self.max = self.max.max(ns);
    }

    /// Adds another histogram's counts.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.count += other.count;
        self.sum += other.sum;
        self.max = self.max.max(other.max);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.count, self.sum, self.max) = (0, 0, 0);
    }

    /// How many durations were counted.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest, exactly.
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max)
    }

    /// The mean, exactly; zero when nothing was counted.
    pub fn mean(&self) -> Duration {
        let mean = self.sum / u128::from(self.count.max(1));
        Duration::from_nanos(u64::try_from(mean).unwrap_or(u64::MAX))
    }

    /// The least value that at least `percent` of the durations do not exceed, rounded up to its bucket's end and
    /// never above the maximum; zero when nothing was counted.
    pub fn percentile(&self, percent: f64) -> Duration {
        let rank = (self.count as f64 * percent.clamp(0.0, 100.0) / 100.0).ceil() as u64;
        let rank = rank.clamp(1, self.count.max(1));
        let mut seen = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                // The last bucket has no upper end of its own.
                let end = if bucket + 1 == BUCKETS { self.max } else { upper(bucket).min(self.max) };
                return Duration::from_nanos(end);
            }
        }
        self.max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> impl Iterator<Item = u64> {
        (0..TOP_BITS).flat_map(|bits| {
            let base = 1u64 << bits;
            [base - 1, base, base + 1, base + base / 3, base + base / 2]
        })
    }

    #[test]
    fn buckets_are_ordered_and_tight() {
        for ns in values().filter(|&ns| ns < 1 << TOP_BITS) {
            let end = upper(bucket(ns));
            assert!(end >= ns, "{ns} is above its bucket's end {end}");
            assert!(end - ns <= ns / SUB as u64, "{ns} is told as {end}");
            assert_eq!(bucket(end), bucket(ns));
            assert_eq!(bucket(end + 1).min(BUCKETS - 1), (bucket(ns) + 1).min(BUCKETS - 1));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut h = Histogram::default();
        for us in 1..=1000 {
            h.record(Duration::from_micros(us));
        }
        for (percent, us) in [(50.0, 500u64), (99.0, 990), (99.9, 999), (100.0, 1000)] {
            let told = h.percentile(percent).as_nanos() as u64;
            assert!(told >= us * 1000 && told <= us * 1000 + us * 1000 / 64, "{percent}: {told}");
        }
        assert_eq!(h.percentile(0.0), Duration::from_nanos(upper(bucket(1000))));
        assert_eq!(h.max(), Duration::from_millis(1));
        assert_eq!(h.mean(), Duration::from_nanos(500_500));
        assert_eq!(h.count(), 1000);
    }

    #[test]
    fn an_empty_histogram_says_zero() {
        let h = Histogram::default();
        assert_eq!(h.percentile(99.0), Duration::ZERO);
        assert_eq!(h.mean(), Duration::ZERO);
    }

    #[test]
    fn merged_parts_are_the_whole() {
        let (mut a, mut b, mut whole) = (Histogram::default(), Histogram::default(), Histogram::default());
        for (i, ns) in values().enumerate() {
            let part = if i % 2 == 0 { &mut a } else { &mut b };
            part.record(Duration::from_nanos(ns));
            whole.record(Duration::from_nanos(ns));
        }
        a.merge(&b);
        assert_eq!(a.count(), whole.count());
        assert_eq!(a.max(), whole.max());
        for percent in [1.0, 25.0, 50.0, 75.0, 99.0, 99.9] {
            assert_eq!(a.percentile(percent), whole.percentile(percent));
        }
        a.clear();
        assert_eq!(a.count(), 0);
    }

    #[test]
    fn beyond_the_scale_the_maximum_is_still_exact() {
        let mut h = Histogram::default();
        h.record(Duration::from_secs(100_000));
        assert_eq!(h.percentile(50.0), Duration::from_secs(100_000));
    }
}
