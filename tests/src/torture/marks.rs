//! Bitmaps that come and go, and what each must at least contain.
//!
//! A bitmap that records must contain every change that began after it did; one that was disabled must stay exactly what
//! it is, whatever dies. The other bitmaps, of the chain and the mirror, prove themselves by what is restored.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::content::SECTOR;
use super::model::Certain;
use super::recognise::Shown;
use crate::random::Random;

/// A bitmap as it must be.
#[derive(Clone, Debug, Default)]
pub struct Mark {
    /// Bytes of a bit.
    pub granularity: u64,
    /// Whether it outlives the daemon.
    pub persistent: bool,
    /// Whether changes are to be found in it.
    pub recording: bool,
    /// The place in the journal from which on changes are certain to be in it.
    pub since: u64,
    /// Granules that it must contain.
    pub must: BTreeSet<u64>,
    /// The hash of its bits while it does not record.
    pub hash: Option<String>,
    /// An order is under way that concerns it.
    unsure: bool,
}

impl Mark {
    fn add(&mut self, sectors: impl Iterator<Item = u32>) {
        let per_granule = self.granularity / SECTOR as u64;
        self.must.extend(sectors.map(|sector| u64::from(sector) / per_granule));
    }

    fn counts(&self, begun: u64) -> bool {
        self.recording && !self.unsure && begun >= self.since
    }
}

/// A change of bitmaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A new one.
    Add {
        /// Its name.
        name: String,
        /// Bytes of a bit.
        granularity: u64,
        /// Whether it outlives the daemon.
        persistent: bool,
        /// Whether it does not record.
        disabled: bool,
    },
    /// Gone.
    Remove(String),
    /// Records.
    Enable(String),
    /// Does not.
    Disable(String),
    /// Empty.
    Clear(String),
    /// What others have, too.
    Merge {
        /// The one.
        target: String,
        /// The others.
        sources: Vec<String>,
    },
}

impl Op {
    /// The bitmap that it changes.
    pub fn name(&self) -> &str {
        match self {
            Op::Add { name, .. } | Op::Remove(name) | Op::Enable(name) | Op::Disable(name) | Op::Clear(name) => name,
            Op::Merge { target, .. } => target,
        }
    }

    /// The bitmap that it changes and those that it reads.
    fn concerned(&self) -> impl Iterator<Item = &str> {
        let sources = if let Op::Merge { sources, .. } = self { &sources[..] } else { &[] };
        sources.iter().map(String::as_str).chain([self.name()])
    }

    /// As an action of a transaction.
    pub fn action(&self, node: &str) -> Value {
        let plain = |kind: &str, name: &String| json!({ "type": kind, "data": { "node": node, "name": name } });
        match self {
            Op::Add { name, granularity, persistent, disabled } => json!({
                "type": "block-dirty-bitmap-add",
                "data": {
                    "node": node, "name": name, "granularity": granularity, "persistent": persistent, "disabled": disabled,
                },
            }),
            Op::Remove(name) => plain("block-dirty-bitmap-remove", name),
            Op::Enable(name) => plain("block-dirty-bitmap-enable", name),
            Op::Disable(name) => plain("block-dirty-bitmap-disable", name),
            Op::Clear(name) => plain("block-dirty-bitmap-clear", name),
            Op::Merge { target, sources } => json!({
                "type": "block-dirty-bitmap-merge", "data": { "node": node, "target": target, "bitmaps": sources },
            }),
        }
    }
}

/// All bitmaps of one disk that come and go.
#[derive(Clone, Debug, Default)]
pub struct Marks(pub BTreeMap<String, Mark>);

impl Marks {
    /// Some change that fits what there is.
    pub fn any_op(&self, random: &mut Random, persistent: bool) -> Op {
        let name = format!("r{}", random.below(6));
        let disabled = random.below(4) == 0;
        let granularity = 512 << random.below(12);
        let persistent = persistent && random.below(4) != 0;
        let (kind, sources) = (random.below(8), 1 + random.below(2));
        let names: Vec<&String> = self.0.keys().collect();
        let sources = (0..sources).filter_map(|_| names.get(random.below(names.len().max(1) as u64) as usize));
        let sources: Vec<String> = sources.map(|name| (*name).clone()).collect();
        if !self.0.contains_key(&name) {
            return Op::Add { name, granularity, persistent, disabled };
        }
        match kind {
            0 => Op::Remove(name),
            1 | 2 => Op::Enable(name),
            3 | 4 => Op::Disable(name),
            5 => Op::Clear(name),
            _ => Op::Merge { target: name, sources },
        }
    }

    /// Whether the bitmap records, if it is one that outlives the daemon.
    pub fn outlives(&self, name: &str) -> Option<bool> {
        self.0.get(name).filter(|mark| mark.persistent).map(|mark| mark.recording)
    }

    /// Something became certain.
    pub fn certain(&mut self, certain: Option<Certain>) {
        let (begun, sectors): (u64, Vec<u32>) = match certain {
            None => return,
            Some(Certain::Done(change)) => (change.begun, change.sectors().collect()),
            Some(Certain::Landed { sectors, begun }) => (begun, sectors),
        };
        for mark in self.0.values_mut().filter(|mark| mark.counts(begun)) {
            mark.add(sectors.iter().copied());
        }
    }

    /// Orders about these are given now. Until they are answered nothing is counted for bitmaps that they change, nor for
    /// those that they read: what comes after a merge, and before its answer, is not in its target.
    pub fn unsure(&mut self, ops: &[Op]) {
        self.set_unsure(ops, true);
    }

    /// They came to nothing. What was answered meanwhile was not counted, which only asks for less.
    pub fn refused(&mut self, ops: &[Op]) {
        self.set_unsure(ops, false);
    }

    fn set_unsure(&mut self, ops: &[Op], unsure: bool) {
        for name in ops.iter().flat_map(Op::concerned) {
            if let Some(mark) = self.0.get_mut(name) {
                mark.unsure = unsure;
            }
        }
    }

    /// The disk has another size: what was cut is gone from the bitmaps too.
    pub fn resized(&mut self, sectors: u32) {
        for mark in self.0.values_mut() {
            mark.hash = None;
            mark.must.split_off(&(u64::from(sectors) * SECTOR as u64).div_ceil(mark.granularity));
        }
    }

    /// They were carried out; `now` is a place in the journal after that.
    pub fn done(&mut self, ops: &[Op], now: u64) {
        for op in ops {
            match op {
                Op::Add { name, granularity, persistent, disabled } => {
                    let (granularity, persistent, recording) = (*granularity, *persistent, !disabled);
                    let mark = Mark { granularity, persistent, recording, since: now, ..Mark::default() };
                    self.0.insert(name.clone(), mark);
                }
                Op::Remove(name) => drop(self.0.remove(name)),
                Op::Enable(name) => self.change(name, |mark| {
                    if !mark.recording {
                        mark.since = now;
                    }
                    mark.recording = true;
                }),
                Op::Disable(name) => self.change(name, |mark| mark.recording = false),
                Op::Clear(name) => self.change(name, |mark| {
                    mark.must.clear();
                    mark.since = now;
                }),
                Op::Merge { target, sources } => {
                    let merged: Vec<Mark> = sources.iter().filter_map(|name| self.0.get(name).cloned()).collect();
                    self.change(target, |mark| {
                        for source in merged {
                            let sectors = source.granularity / SECTOR as u64;
                            if source.granularity <= mark.granularity {
                                mark.add(source.must.iter().map(|granule| (granule * sectors) as u32));
                            } else {
                                let all = |granule: &u64| (granule * sectors) as u32..((granule + 1) * sectors) as u32;
                                mark.add(source.must.iter().flat_map(all));
                            }
                        }
                    });
                }
            }
        }
        self.set_unsure(ops, false);
    }

    fn change(&mut self, name: &str, change: impl FnOnce(&mut Mark)) {
        if let Some(mark) = self.0.get_mut(name) {
            mark.hash = None;
            change(mark);
        }
    }

    /// Nobody knows whether they were carried out; `shown` is what there is now, `now` a place in the
    /// journal. The bitmap that is gone, or there, for no reason.
    pub fn settle(&mut self, ops: &[Op], shown: &BTreeMap<String, Shown>, now: u64) -> Option<String> {
        self.set_unsure(ops, false);
        for op in ops {
            let name = op.name();
            let of_it = |wanted: fn(&Op) -> bool| ops.iter().any(|op| op.name() == name && wanted(op));
            let added = ops.iter().find_map(|op| match op {
                Op::Add { name: of, persistent, .. } if of == name => Some(*persistent),
                _ => None,
            });
            match (shown.get(name), self.0.get_mut(name)) {
                (None, Some(mark)) => {
                    if mark.persistent && !of_it(|op| matches!(op, Op::Remove(_))) {
                        return Some(name.to_owned());
                    }
                    self.0.remove(name);
                }
                (None, None) => {}
                (Some(bitmap), known) => {
                    let emptied = of_it(|op| matches!(op, Op::Clear(_) | Op::Add { .. } | Op::Remove(_)));
                    let mut mark = match (known.cloned(), added) {
                        (Some(mark), _) => mark,
                        (None, Some(persistent)) => Mark { persistent, ..Mark::default() },
                        (None, None) => return Some(name.to_owned()),
                    };
                    if emptied {
                        mark.must.clear();
                    }
                    let (recording, granularity) = (bitmap.recording, bitmap.granularity);
                    mark = Mark { recording, granularity, since: now, hash: None, unsure: false, ..mark };
                    self.0.insert(name.to_owned(), mark);
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::model::Change;

    fn add(name: &str) -> Op {
        Op::Add { name: name.into(), granularity: 512, persistent: true, disabled: false }
    }

    fn change(sector: u32, begun: u64) -> Option<Certain> {
        Some(Certain::Done(Change { number: begun, sector, count: 1, version: begun, discard: false, begun }))
    }

    #[test]
    fn a_merge_brings_what_was_certain_before_it_was_ordered() {
        let mut marks = Marks::default();
        marks.done(&[add("from"), add("to")], 0);
        let disabled = [Op::Disable("to".into())];
        marks.done(&disabled, 0);
        marks.certain(change(1, 1));
        let merge = [Op::Merge { target: "to".into(), sources: vec!["from".into()] }];
        marks.unsure(&merge);
        // Answered between the instant of the merge and its answer: nobody can tell.
        marks.certain(change(2, 2));
        marks.done(&merge, 3);
        marks.certain(change(4, 4));
        assert_eq!(marks.0["to"].must, [1].into());
        assert!(marks.0["from"].must.is_superset(&[1, 4].into()), "it counts again");
        for came_to_nothing in [true, false] {
            marks.unsure(&merge);
            if came_to_nothing {
                marks.refused(&merge);
            } else {
                let shown = |recording| Shown { granularity: 512, recording, busy: false, inconsistent: false };
                let shown = [("from".to_owned(), shown(true)), ("to".to_owned(), shown(false))].into();
                assert_eq!(marks.settle(&merge, &shown, 5), None);
            }
            marks.certain(change(6, 6));
            assert!(marks.0["from"].must.contains(&6), "it counts again");
            marks.0.get_mut("from").unwrap().must.remove(&6);
        }
    }
}
