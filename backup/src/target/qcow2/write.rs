//! How bytes get into clusters: whole ones as they are or deflated, parts of them, and zeroes.
//!
//! Called by the target (`mod`) from many threads, on ranges that do not overlap. Room is taken under the lock; what is written
//! is entered under the lock again, once it is in the file. In between nobody waits for anybody, except for those who
//! complete parts of clusters.

use super::super::bytes::Bytes;
use super::super::deflate::{deflate, inflate};
use super::entry::{Entry, Geometry, Packed};
use super::space::Run;
use super::tables::Tables;
use super::{Qcow2Target, State};
use crate::source::Source;
use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// Zeroes are entered so many clusters at a time, so that others get the lock too.
const ZEROES_AT_ONCE: u64 = 8192;

impl Qcow2Target {
    /// Cuts a range where clusters begin: part of the first, whole ones, part of the last. What reaches the end of the disk is
    /// whole there.
    pub(super) fn cut(&self, offset: u64, len: u64) -> [(u64, u64); 3] {
        let (end, cluster) = (offset + len, self.geometry.cluster());
        let first = offset.next_multiple_of(cluster).min(end);
        let last = if end == self.geometry.size { end } else { (end & !(cluster - 1)).max(first) };
        [(offset, first), (first, last), (last, end)]
    }

    /// Writes whole clusters, the last of the disk cut short.
    pub(super) fn write_whole(&self, buf: &[u8], first: u64) -> io::Result<()> {
        if !self.compress.load(Ordering::Relaxed) {
            return self.write_plain(buf, first);
        }
        let cluster_size = self.geometry.cluster() as usize;
        self.deflate.with(|compressor| {
            let (mut packed, mut lens, mut padded) = (Vec::new(), Vec::new(), Vec::new());
            // What did not shrink and is not written yet.
            let mut plain = 0..0;
            for (i, data) in buf.chunks(cluster_size).enumerate() {
                let (at, cluster) = (i * cluster_size, first + i as u64);
                let mut whole = data;
                if data.len() < cluster_size {
                    padded.extend_from_slice(data);
                    padded.resize(cluster_size, 0);
                    whole = &padded;
                }
                match deflate(compressor, whole, &mut packed) {
                    Some(len) => {
                        let before = std::mem::replace(&mut plain, 0..0);
                        self.write_plain(&buf[before.clone()], first + (before.start / cluster_size) as u64)?;
                        lens.push(len as u64);
                    }
                    None => {
                        self.write_packed(&packed, &lens, cluster - lens.len() as u64)?;
                        packed.clear();
                        lens.clear();
                        plain = if plain.is_empty() { at } else { plain.start }..at + data.len();
                    }
                }
            }
            self.write_plain(&buf[plain.clone()], first + (plain.start / cluster_size) as u64)?;
            let end = first + buf.len().div_ceil(cluster_size) as u64;
            self.write_packed(&packed, &lens, end - lens.len() as u64)
        })
    }

    /// Writes clusters as they are: in place where they have a place.
    fn write_plain(&self, buf: &[u8], first: u64) -> io::Result<()> {
        let cluster_size = self.geometry.cluster() as usize;
        let (mut at, mut cluster) = (0, first);
        while at < buf.len() {
            let want = (buf.len() - at).div_ceil(cluster_size) as u64;
            let mut state = self.state()?;
            let (run, new) = state.place(self.bytes(), cluster, want, self.geometry)?;
            drop(state);
            let part = &buf[at..buf.len().min(at + run.count as usize * cluster_size)];
            let written = self.pour.write_at(self.bytes(), part, self.host(run.first)).and_then(|()| {
                // What lies behind the disk's end is nobody's secret.
                let rest = run.count * self.geometry.cluster() - part.len() as u64;
                self.bytes().fill_zero(self.host(run.first) + part.len() as u64, rest)
            });
            let mut state = self.state()?;
            if let Err(error) = written {
                if new {
                    state.space.release_run(run);
                }
                return Err(error);
            }
            for i in 0..run.count {
                let entry = Entry::Plain(self.host(run.first + i));
                if let Err(error) = state.enter(self.bytes(), cluster + i, entry, self.geometry) {
                    if new {
                        state.space.release_run(Run { first: run.first + i, count: run.count - i });
                    }
                    return Err(error);
                }
            }
            at += part.len();
            cluster += run.count;
        }
        Ok(())
    }

    /// Writes clusters that were deflated, one behind the other, each with its length.
    fn write_packed(&self, packed: &[u8], lens: &[u64], first: u64) -> io::Result<()> {
        if lens.is_empty() {
            return Ok(());
        }
        let mut places = Vec::with_capacity(lens.len());
        let taken = {
            let mut state = self.state()?;
            lens.iter().try_for_each(|len| {
                places.push(state.space.pack(self.bytes(), *len)?);
                Ok(())
            })
        };
        let written = taken.and_then(|()| self.write_places(packed, &places));
        let mut state = self.state()?;
        let entered = written.map_or_else(
            |error| (0, Err(error)),
            |()| {
                for (i, place) in places.iter().enumerate() {
                    let entry = Entry::Compressed(*place);
                    if let Err(error) = state.enter(self.bytes(), first + i as u64, entry, self.geometry) {
                        return (i, Err(error));
                    }
                }
                (places.len(), Ok(()))
            },
        );
        places[entered.0..].iter().for_each(|place| state.space.release_packed(*place));
        entered.1
    }

    fn write_places(&self, packed: &[u8], places: &[Packed]) -> io::Result<()> {
        let mut rest = packed;
        let mut places = places.iter().peekable();
        while let Some(place) = places.next() {
            if !place.fits(self.geometry) {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            let mut end = place.offset + place.len;
            while let Some(next) = places.next_if(|next| next.offset == end) {
                end += next.len;
            }
            let (part, others) = rest.split_at((end - place.offset) as usize);
            self.pour.write_at(self.bytes(), part, place.offset)?;
            rest = others;
        }
        Ok(())
    }

    /// Writes a part of one cluster.
    pub(super) fn write_part(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let _alone = self.partial.lock().unwrap_or_else(PoisonError::into_inner);
        let (cluster, inside) = (offset >> self.geometry.cluster_bits, offset & (self.geometry.cluster() - 1));
        let entry = self.state().and_then(|mut state| state.tables.get(self.bytes(), cluster))?;
        if let Entry::Plain(host) = entry {
            return self.pour.write_at(self.bytes(), buf, host + inside);
        }
        let mut whole = vec![0; self.geometry.cluster() as usize];
        self.read(entry, cluster, &mut whole)?;
        whole[inside as usize..][..buf.len()].copy_from_slice(buf);
        self.write_whole(&whole[..self.geometry.len_of(cluster) as usize], cluster)
    }

    /// What a cluster holds. `whole` is all zero.
    fn read(&self, entry: Entry, cluster: u64, whole: &mut [u8]) -> io::Result<()> {
        match entry {
            Entry::Zero(_) => Ok(()),
            Entry::Plain(host) => self.bytes().read_at(whole, host),
            Entry::Compressed(packed) => {
                let mut data = vec![0; packed.len as usize];
                self.bytes().read_at(&mut data, packed.offset)?;
                inflate(&data, whole)
            }
            Entry::Unmapped => match &self.backing {
                Some(backing) => {
                    let start = self.host(cluster);
                    let len = backing.size().saturating_sub(start).min(whole.len() as u64);
                    if len > 0 { backing.read_at(&mut whole[..len as usize], start) } else { Ok(()) }
                }
                None => Ok(()),
            },
        }
    }

    /// Whether the backing image has nothing to say of a cluster.
    fn nothing_below(&self, cluster: u64) -> bool {
        self.backing.as_ref().is_none_or(|backing| backing.size() <= self.host(cluster))
    }

    pub(super) fn zero_part(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let cluster = offset >> self.geometry.cluster_bits;
        let entry = self.state().and_then(|mut state| state.tables.get(self.bytes(), cluster))?;
        match entry {
            Entry::Zero(_) => Ok(()),
            Entry::Unmapped if self.nothing_below(cluster) => Ok(()),
            _ => self.write_part(&vec![0; len as usize], offset),
        }
    }

    /// Enters zeroes for the clusters in `first..end`.
    pub(super) fn zero_whole(&self, first: u64, end: u64) -> io::Result<()> {
        let mut cluster = first;
        while cluster < end {
            let mut state = self.state()?;
            let pause = end.min(cluster + ZEROES_AT_ONCE);
            while cluster < pause {
                let nothing_below = self.nothing_below(cluster);
                let skip = if nothing_below { state.tables.without_table(cluster) } else { 0 };
                if skip > 0 {
                    cluster += skip;
                    continue;
                }
                let zero = if nothing_below { Entry::Unmapped } else { Entry::Zero(None) };
                if state.tables.get(self.bytes(), cluster)? != zero {
                    state.enter(self.bytes(), cluster, zero, self.geometry)?;
                }
                cluster += 1;
            }
        }
        Ok(())
    }
}

impl State {
    /// Where clusters from `cluster` on are to be written: where they are, or (`true`) in new room.
    fn place(&mut self, bytes: &Bytes, cluster: u64, want: u64, geometry: Geometry) -> io::Result<(Run, bool)> {
        let at = |tables: &mut Tables, i| {
            tables.get(bytes, cluster + i).map(|entry| match entry {
                Entry::Plain(host) | Entry::Zero(Some(host)) => Some(host >> geometry.cluster_bits),
                _ => None,
            })
        };
        let here = at(&mut self.tables, 0)?;
        let mut count = 1;
        while count < want && at(&mut self.tables, count)? == here.map(|first| first + count) {
            count += 1;
        }
        match here {
            Some(first) => Ok((Run { first, count }, false)),
            None => Ok((self.space.take(bytes, count)?, true)),
        }
    }

    /// Enters where a cluster is, and gives back the room of what was there before.
    fn enter(&mut self, bytes: &Bytes, cluster: u64, entry: Entry, geometry: Geometry) -> io::Result<()> {
        let old = self.tables.set(bytes, &mut self.space, cluster, entry)?;
        match (old, entry) {
            (Entry::Plain(old) | Entry::Zero(Some(old)), Entry::Plain(new)) if old == new => {}
            (Entry::Plain(old) | Entry::Zero(Some(old)), _) => self.space.release(old >> geometry.cluster_bits),
            (Entry::Compressed(old), _) => self.space.release_packed(old),
            (Entry::Unmapped | Entry::Zero(None), _) => {}
        }
        Ok(())
    }
}
