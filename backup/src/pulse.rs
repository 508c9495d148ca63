//! How the guest fares: a meter of its requests' latency, on while somebody watches.
//!
//! Queue threads feed it, each into cells of its own; a copy watches it, to leave the disk to the guest. Without a watcher
//! a request costs one relaxed load. Figures are for steering and for queries: counts may be a moment late, and no
//! other memory is ordered by them.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Queues beyond this many share cells, which costs speed and no count.
const LANES: usize = 16;

/// Four buckets an octave of microseconds, up to more than a minute.
const BUCKETS: usize = 108;

/// On its own cache lines, so that queue threads do not slow each other down.
#[repr(align(128))]
struct Lane {
    begun: AtomicU64,
    ended: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

/// The meter of one disk.
pub struct Pulse {
    watchers: AtomicUsize,
    lanes: Box<[Lane]>,
}

impl Default for Pulse {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        let lane = || Lane { begun: zero(), ended: zero(), buckets: std::array::from_fn(|_| zero()) };
        Self { watchers: AtomicUsize::new(0), lanes: (0..LANES).map(|_| lane()).collect() }
    }
}

impl std::fmt::Debug for Pulse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pulse").field("watchers", &self.watchers).finish_non_exhaustive()
    }
}

fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    if micros < 4 {
        return micros as usize;
    }
    let octave = micros.ilog2() as usize;
    let quarter = (micros >> (octave - 2)) as usize & 3;
    ((octave - 1) * 4 + quarter).min(BUCKETS - 1)
}

/// The longest latency that falls into a bucket, nearly.
fn upper(bucket: usize) -> Duration {
    if bucket < 4 {
        return Duration::from_micros(bucket as u64 + 1);
    }
    let (octave, quarter) = (bucket / 4 + 1, bucket as u64 % 4);
    Duration::from_micros((5 + quarter) << (octave - 2))
}

impl Pulse {
    /// A read or write of queue `lane` begins. The answer goes to [`Pulse::end`]; `None` while nobody watches.
    #[inline]
    pub fn begin(&self, lane: usize) -> Option<Instant> {
        if self.watchers.load(Relaxed) == 0 {
            return None;
        }
        self.lanes[lane % LANES].begun.fetch_add(1, Relaxed);
        Some(Instant::now())
    }

    /// It is over.
    #[inline]
    pub fn end(&self, lane: usize, begun: Instant) {
        let lane = &self.lanes[lane % LANES];
        lane.buckets[bucket(begun.elapsed())].fetch_add(1, Relaxed);
        lane.ended.fetch_add(1, Relaxed);
    }

    /// Watches until the answer is dropped.
    pub fn watch(&self) -> Watch<'_> {
        self.watchers.fetch_add(1, Relaxed);
        Watch { pulse: self, before: self.total() }
    }

    fn total(&self) -> Total {
        let mut total = Total::default();
        for lane in &self.lanes {
            // `ended` first: what ends meanwhile counts as in flight once more, and not as a negative number.
            total.ended += lane.ended.load(Relaxed);
            total.begun += lane.begun.load(Relaxed);
            for (sum, bucket) in total.buckets.iter_mut().zip(&lane.buckets) {
                *sum += bucket.load(Relaxed);
            }
        }
        total
    }
}

struct Total {
    begun: u64,
    ended: u64,
    buckets: [u64; BUCKETS],
}

impl Default for Total {
    fn default() -> Self {
        Self { begun: 0, ended: 0, buckets: [0; BUCKETS] }
    }
}

/// Somebody who watches a [`Pulse`].
pub struct Watch<'a> {
    pulse: &'a Pulse,
    before: Total,
}

/// What happened between two looks.
pub struct Beat {
    /// Requests that ended.
    pub ended: u64,
    /// Requests that have begun and not ended.
    pub in_flight: u64,
    buckets: [u64; BUCKETS],
}

impl Watch<'_> {
    /// What happened since the last call, or since the watch began. If `keep`, the next call begins where this one did.
    pub fn beat(&mut self, keep: bool) -> Beat {
        let now = self.pulse.total();
        let mut buckets = now.buckets;
        for (bucket, before) in buckets.iter_mut().zip(&self.before.buckets) {
            *bucket = bucket.saturating_sub(*before);
        }
        let beat = Beat { ended: buckets.iter().sum(), in_flight: now.begun.saturating_sub(now.ended), buckets };
        if !keep {
            self.before = now;
        }
        beat
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.pulse.watchers.fetch_sub(1, Relaxed);
    }
}

impl Beat {
    /// The latency that `share` (0 to 1) of the requests did not exceed, a quarter too long at most; `None` if none ended.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let rank = (self.ended as f64 * share).ceil().max(1.0) as u64;
        let mut seen = 0;
        let at = self.buckets.iter().position(|count| {
            seen += count;
            seen >= rank
        });
        at.map(upper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_in_order_and_at_most_a_quarter_wide() {
        let mut last = 0;
        for micros in 0..100_000 {
            let latency = Duration::from_micros(micros);
            let bucket = bucket(latency);
            assert!(bucket == last || bucket == last + 1, "{micros}");
            last = bucket;
            assert!(upper(bucket) > latency, "{micros}");
            assert!(upper(bucket).as_micros() as u64 <= micros + micros / 4 + 1, "{micros}");
        }
        assert_eq!(bucket(Duration::from_secs(1 << 40)), BUCKETS - 1);
    }

    #[test]
    fn only_what_begins_under_a_watch_is_counted() {
        let pulse = Pulse::default();
        assert!(pulse.begin(0).is_none());
        let mut watch = pulse.watch();
        let (first, second) = (pulse.begin(3).unwrap(), pulse.begin(LANES + 3).unwrap());
        pulse.end(3, first);
        let beat = watch.beat(false);
        assert_eq!((beat.ended, beat.in_flight), (1, 1));
        assert!(beat.quantile(0.9).is_some());
        let beat = watch.beat(false);
        assert_eq!((beat.ended, beat.in_flight), (0, 1));
        assert!(beat.quantile(0.9).is_none());
        pulse.end(LANES + 3, second);
        assert_eq!(watch.beat(true).ended, 1);
        assert_eq!(watch.beat(false).ended, 1);
        drop(watch);
        assert!(pulse.begin(0).is_none());
    }
}
