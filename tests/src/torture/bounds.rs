//! What an image may hold that is of an instant nobody knows exactly: after the order was given, before it was answered.
//!
//! What was acknowledged before the order must be in, what began after its answer must not, what fell between may. And it
//! is one instant, for all disks of the order: if a write is in, whatever was acknowledged before that one began is in too.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::content::{self, SECTOR, Version};
use super::journal::{Record, Word};
use super::model::{Change, Model};

/// The bounds of one disk's image.
#[derive(Debug)]
pub struct Bounds {
    disk: u8,
    known: Vec<Version>,
    open: BTreeMap<u32, Vec<Version>>,
    /// Under way at the order, or begun until its answer; with the place at which each was answered.
    window: Vec<(Change, Option<u64>)>,
}

/// What an image turned out to hold where the window left it open.
#[derive(Debug, Default)]
pub struct Found(HashMap<u32, Version>);

impl Bounds {
    /// Bounds that begin now.
    pub fn begin(disk: u8, model: &Model) -> Bounds {
        let window = model.pending().map(|change| (*change, None)).collect();
        Bounds { disk, known: model.known().to_vec(), open: model.open(), window }
    }

    /// Takes a record of this disk that came before the answer.
    pub fn apply(&mut self, at: u64, record: &Record) {
        if let Some(change) = Change::begun_by(at, record) {
            self.window.push((change, None));
        } else if record.word == Word::Done
            && let Some((_, done)) = self.window.iter_mut().find(|(change, _)| change.number == record.number)
        {
            *done = Some(at);
        }
    }

    /// Bytes of the disk at the instant.
    pub fn bytes(&self) -> u64 {
        (self.known.len() * SECTOR) as u64
    }

    /// Fails unless the raw file is within the bounds.
    pub fn check(&self, image: &Path) -> Result<Found> {
        let mut file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
        let len = file.metadata()?.len();
        ensure!(len == self.bytes(), "{} has {len} bytes, the disk had {}", image.display(), self.bytes());
        let mut window: HashMap<u32, Vec<&Change>> = HashMap::new();
        for (change, _) in &self.window {
            for sector in change.sectors() {
                window.entry(sector).or_default().push(change);
            }
        }
        let mut found = Found::default();
        let mut chunk = vec![0; 1 << 20];
        for first in (0..self.known.len()).step_by(chunk.len() / SECTOR) {
            let sectors = (self.known.len() - first).min(chunk.len() / SECTOR);
            let bytes = &mut chunk[..sectors * SECTOR];
            file.read_exact(bytes)?;
            for (sector, bytes) in (first as u32..).zip(bytes.chunks_exact(SECTOR)) {
                let known = self.known[sector as usize];
                let Ok(version) = content::version(self.disk, sector, bytes) else {
                    bail!("{}: sector {sector} (byte {}) holds what nobody wrote", image.display(), byte(sector));
                };
                let between = window.get(&sector);
                let allowed = version == known
                    || self.open.get(&sector).is_some_and(|open| open.contains(&version))
                    || between.is_some_and(|changes| changes.iter().any(|change| change.version == version));
                ensure!(
                    allowed,
                    "{}: sector {sector} (byte {}) holds version {version:#x}; {known:#x} was acknowledged last before \
                     the order; possible besides: {:x?}, {:x?}",
                    image.display(),
                    byte(sector),
                    self.open.get(&sector),
                    between.map(|changes| changes.iter().map(|change| change.version).collect::<Vec<_>>()),
                );
                if between.is_some() {
                    found.0.insert(sector, version);
                }
            }
        }
        Ok(found)
    }
}

fn byte(sector: u32) -> u64 {
    u64::from(sector) * SECTOR as u64
}

/// Fails unless the images of all disks of one order can be of one instant.
pub fn one_instant(images: &[(&Bounds, &Found)]) -> Result<()> {
    // The instant is after the last write of which something is in began.
    let begun = |change: &Change| (change.version, change.begun);
    let numbered = images.iter().map(|(bounds, found)| {
        let begun: HashMap<Version, u64> = bounds.window.iter().map(|(change, _)| begun(change)).collect();
        let places = found.0.values().filter(|version| **version != 0);
        places.filter_map(|version| begun.get(version).copied()).max()
    });
    let Some(instant) = numbered.flatten().max() else { return Ok(()) };
    for (bounds, found) in images {
        let before =
            bounds.window.iter().filter(|(change, done)| !change.discard && done.is_some_and(|at| at < instant));
        for (change, _) in before {
            for sector in change.sectors() {
                let version = found.0.get(&sector).copied().unwrap_or(change.version);
                let later = |(other, _): &&(Change, Option<u64>)| {
                    other.begun > change.begun && other.version == version && other.sectors().contains(&sector)
                };
                ensure!(
                    version == change.version || bounds.window.iter().any(|other| later(&other)),
                    "no instant: disk {} sector {sector} (byte {}) holds version {version:#x}, but {:#x} was \
                     acknowledged before another write began that is in",
                    bounds.disk,
                    byte(sector),
                    change.version
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn record(word: Word, sector: u32, count: u16, number: u64) -> Record {
        Record { word, disk: 0, count, sector, number }
    }

    fn image(versions: &[Version]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for (sector, version) in versions.iter().enumerate() {
            let mut bytes = [0; SECTOR];
            if *version != 0 {
                content::fill(0, sector as u32, *version, &mut bytes);
            }
            file.write_all(&bytes).unwrap();
        }
        file
    }

    /// 5 was acknowledged before, 6 is under way, 7 begins and ends, 8 begins after that; 9 begins after the answer.
    fn bounds() -> Bounds {
        let mut model = Model::new(4);
        let mut take = |at: u64, bounds: Option<&mut Bounds>, record: Record| {
            model.apply(at, &record).unwrap();
            if let Some(bounds) = bounds {
                bounds.apply(at, &record);
            }
            model.clone()
        };
        take(0, None, record(Word::Write, 0, 4, 5));
        take(1, None, record(Word::Done, 0, 0, 5));
        let model = take(2, None, record(Word::Write, 0, 2, 6));
        let mut bounds = Bounds::begin(0, &model);
        take(3, Some(&mut bounds), record(Word::Write, 2, 1, 7));
        take(4, Some(&mut bounds), record(Word::Done, 0, 0, 7));
        take(5, Some(&mut bounds), record(Word::Write, 3, 1, 8));
        bounds
    }

    #[test]
    fn an_image_holds_what_the_instant_allows() {
        let bounds = bounds();
        for (versions, well) in [
            ([5, 5, 5, 5], true),
            ([6, 5, 5, 5], true),
            ([6, 6, 7, 8], true),
            ([0, 5, 5, 5], false),
            ([5, 5, 9, 5], false),
            ([5, 5, 6, 5], false),
            ([5, 5, 7, 7], false),
        ] {
            assert_eq!(bounds.check(image(&versions).path()).is_ok(), well, "{versions:?}");
        }
        assert!(bounds.check(image(&[5, 5, 5]).path()).is_err(), "too short");
    }

    #[test]
    fn what_was_acknowledged_before_something_that_is_in_is_in() {
        let bounds = bounds();
        for (versions, well) in
            [([5, 5, 7, 5], true), ([5, 5, 7, 8], true), ([5, 5, 5, 8], false), ([5, 5, 5, 5], true)]
        {
            let found = bounds.check(image(&versions).path()).unwrap();
            assert_eq!(one_instant(&[(&bounds, &found)]).is_ok(), well, "{versions:?}");
        }
        // The same over two disks, one of which holds the later write.
        let mut model = Model::new(1);
        let mut other = Bounds::begin(1, &model);
        for (at, record) in [(6, record(Word::Write, 0, 1, 11)), (7, record(Word::Done, 0, 0, 11))] {
            model.apply(at, &record).unwrap();
            other.apply(at, &record);
        }
        let in_it = Found([(0, 11)].into());
        let found = bounds.check(image(&[5, 5, 5, 5]).path()).unwrap();
        assert!(one_instant(&[(&bounds, &found), (&other, &in_it)]).is_err(), "7 is missing");
        let found = bounds.check(image(&[5, 5, 7, 5]).path()).unwrap();
        assert!(one_instant(&[(&bounds, &found), (&other, &in_it)]).is_ok());
    }
}
