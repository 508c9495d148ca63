//! Where live maps are, so that a killed process loses none of their bits.
//!
//! [`Shm`](super::shm::Shm) has them in files on tmpfs. Without it ([`NoMaps`]) they are memory of the process, and a killed
//! process leaves what a power cut does: what was synced, and all of the extents that were hot.

use crate::bits::Bits;
use crate::live::LiveMap;
use crate::units::Granularity;
use std::io;
use std::sync::Arc;
use uuid::Uuid;

/// What a map is, as its header tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapHead {
    /// The store that it belongs to.
    pub store: Uuid,
    /// The process that marked in it.
    pub run: Uuid,
    /// Number of the generation.
    pub generation: u64,
    /// The sequence of the record that was in force when it was made.
    pub sequence: u64,
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// Bytes of the disk.
    pub size: u64,
}

/// A map that an earlier process left.
#[derive(Debug)]
pub struct FoundMap {
    /// Which one.
    pub head: MapHead,
    /// The generation that was made after it, if one was; 0 otherwise. It has to be there too.
    pub next: u64,
    /// What was marked in it.
    pub bits: Bits,
}

/// What was found of a store.
#[derive(Debug, Default)]
pub struct FoundMaps {
    /// Its maps.
    pub maps: Vec<FoundMap>,
    /// A daemon could not write down that the bitmaps are not to be trusted, and said so here.
    pub distrusted: bool,
}

/// Makes, finds and removes live maps.
pub trait Maps: Send {
    /// A map with no bit set, whose memory is taken in full. The map of the generation before it learns of it.
    fn create(&mut self, head: &MapHead) -> io::Result<Arc<LiveMap>>;

    /// All maps of a store, whole and of this user; what is not is left out.
    fn find(&mut self, store: Uuid) -> io::Result<FoundMaps>;

    /// Takes all maps of a store away but those of `run` from `generation` on, and what [`Maps::distrust`] left.
    fn keep(&mut self, store: Uuid, run: Uuid, generation: u64);

    /// Leaves word that the bitmaps of a store are not to be trusted.
    fn distrust(&mut self, store: Uuid);
}

/// Maps end with the process.
#[derive(Debug, Default)]
pub struct NoMaps;

impl Maps for NoMaps {
    fn create(&mut self, head: &MapHead) -> io::Result<Arc<LiveMap>> {
        Ok(Arc::new(LiveMap::new(head.granularity, head.size)))
    }

    fn find(&mut self, _: Uuid) -> io::Result<FoundMaps> {
        Ok(FoundMaps::default())
    }

    fn keep(&mut self, _: Uuid, _: Uuid, _: u64) {}

    fn distrust(&mut self, _: Uuid) {}
}
