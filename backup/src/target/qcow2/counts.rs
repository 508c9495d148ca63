//! How many users each cluster of a file has, and which have none: two containers, for `space`.

use std::collections::BTreeMap;

const CHUNK: u64 = 4096;

/// Where nothing is compressed all have one user, which takes no memory.
#[derive(Clone)]
enum Chunk {
    /// Every cluster has this many.
    All(u16),
    /// Each its own; and how many of them have one.
    Each(Box<[u16; CHUNK as usize]>, u64),
}

/// Users of clusters, by number. Nobody uses what was never named.
#[derive(Clone, Default)]
pub(in crate::target) struct Counts(Vec<Chunk>);

impl Counts {
    pub fn get(&self, cluster: u64) -> u16 {
        match self.0.get((cluster / CHUNK) as usize) {
            None => 0,
            Some(Chunk::All(count)) => *count,
            Some(Chunk::Each(counts, _)) => counts[(cluster % CHUNK) as usize],
        }
    }

    /// One user more.
    pub fn add(&mut self, cluster: u64) {
        self.change(cluster, |count| count.saturating_add(1));
    }

    /// One user less. Answers how many are left.
    pub fn sub(&mut self, cluster: u64) -> u16 {
        self.change(cluster, |count| count.saturating_sub(1));
        self.get(cluster)
    }

    fn change(&mut self, cluster: u64, change: impl Fn(u16) -> u16) {
        let index = (cluster / CHUNK) as usize;
        if index >= self.0.len() {
            self.0.resize(index + 1, Chunk::All(0));
        }
        let chunk = &mut self.0[index];
        if let Chunk::All(count) = chunk {
            *chunk = Chunk::Each(Box::new([*count; CHUNK as usize]), if *count == 1 { CHUNK } else { 0 });
        }
        if let Chunk::Each(counts, ones) = chunk {
            let count = &mut counts[(cluster % CHUNK) as usize];
            *ones -= u64::from(*count == 1);
            *count = change(*count);
            *ones += u64::from(*count == 1);
            if *ones == CHUNK {
                *chunk = Chunk::All(1);
            }
        }
    }

    /// One more than the last cluster with a user.
    pub fn end(&self) -> u64 {
        for (index, chunk) in self.0.iter().enumerate().rev() {
            let last = match chunk {
                Chunk::All(0) => None,
                Chunk::All(_) => Some(CHUNK - 1),
                Chunk::Each(counts, _) => counts.iter().rposition(|count| *count != 0).map(|last| last as u64),
            };
            if let Some(last) = last {
                return index as u64 * CHUNK + last + 1;
            }
        }
        0
    }
}

/// Clusters without a user, as runs: first to length.
#[derive(Default)]
pub(super) struct Free(BTreeMap<u64, u64>);

impl Free {
    pub fn insert(&mut self, cluster: u64) {
        let (mut first, mut count) = (cluster, 1);
        if let Some((before, len)) = self.0.range(..cluster).next_back()
            && before + len == cluster
        {
            (first, count) = (*before, len + 1);
        }
        if let Some(after) = self.0.remove(&(cluster + 1)) {
            count += after;
        }
        self.0.insert(first, count);
    }

    /// Takes this very cluster, if it is one.
    pub fn take_this(&mut self, cluster: u64) -> bool {
        let Some((first, count)) = self.0.range(..=cluster).next_back().map(|(first, count)| (*first, *count)) else {
            return false;
        };
        if cluster >= first + count {
            return false;
        }
        self.0.remove(&first);
        if cluster > first {
            self.0.insert(first, cluster - first);
        }
        if cluster + 1 < first + count {
            self.0.insert(cluster + 1, first + count - cluster - 1);
        }
        true
    }

    /// Takes the first run, or the beginning of it: at most `want` clusters.
    pub fn take(&mut self, want: u64) -> Option<(u64, u64)> {
        let (first, count) = self.0.pop_first()?;
        if count > want {
            self.0.insert(first + want, count - want);
        }
        Some((first, count.min(want)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_kept_where_all_are_one_and_where_not() {
        let mut counts = Counts::default();
        (0..3 * CHUNK).for_each(|cluster| counts.add(cluster));
        assert!(counts.0.iter().all(|chunk| matches!(chunk, Chunk::All(1))));
        counts.add(CHUNK);
        assert_eq!(counts.sub(2 * CHUNK), 0);
        assert_eq!([0, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK].map(|i| counts.get(i)), [1, 2, 1, 0, 0]);
        assert_eq!(counts.end(), 3 * CHUNK);
        (2 * CHUNK + 1..3 * CHUNK).for_each(|cluster| assert_eq!(counts.sub(cluster), 0));
        assert_eq!(counts.end(), 2 * CHUNK);
        counts.sub(CHUNK);
        assert!(matches!(counts.0[1], Chunk::All(1)));
    }

    #[test]
    fn free_neighbours_become_one_run() {
        let mut free = Free::default();
        for cluster in [5, 9, 7, 6, 8, 1] {
            free.insert(cluster);
        }
        assert_eq!(free.take(10), Some((1, 1)));
        assert_eq!(free.take(2), Some((5, 2)));
        assert!(!free.take_this(6) && !free.take_this(10));
        assert!(free.take_this(8));
        assert_eq!(free.take(10), Some((7, 1)));
        assert_eq!(free.take(10), Some((9, 1)));
        assert_eq!(free.take(1), None);
    }
}
