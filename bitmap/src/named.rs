//! Named bitmaps and their states.
//!
//! A [`Draft`] is a private copy of one disk's bitmaps, cheap since layers are shared. Every operation works on a draft,
//! in the order of a transaction's actions, each seeing the effect of those before it; `flip::commit` puts it in force.
//! Whatever is refused leaves the bitmaps as they were, since only the draft is gone.
//!
//! | state | set by | may be |
//! |---|---|---|
//! | recording or not | add, enable, disable | all of the others at the same time |
//! | frozen (busy) | freeze, by a job or by a client | read; abdicate or reclaim by the same end it |
//! | persistent | keep, at its birth | all of the others |
//! | inconsistent | the store, when it cannot tell what was written | removed |
//!
//! A draft notes what its commit has to do: whether it needs a new generation (what counts from the commit on is not what
//! counted before it), and whether the store has to know.

use crate::bits::Bits;
use crate::checkpoints::Checkpoints;
use crate::layers::Layers;
use crate::live::LiveMap;
use crate::store::reading::Freeze;
use crate::units::{ByteRange, Granularity};
use std::fmt;
use std::sync::Arc;
use thiserror::Error;
use uuid::Uuid;

/// Longest name, as in QEMU.
pub(crate) const NAME_MAX: usize = 1023;

/// Bits that a bitmap may come to by a resize: a gigabyte of them.
pub(crate) const MOST_BITS: u64 = 8 << 30;

/// Why an operation on a bitmap was refused. The texts are QEMU's, since scripts match them.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BitmapError {
    /// No bitmap of this name on the node.
    #[error("Dirty bitmap '{0}' not found")]
    NotFound(String),
    /// A bitmap of this name exists.
    #[error("Bitmap already exists: {0}")]
    Exists(String),
    /// The empty string was given as a name.
    #[error("Bitmap name cannot be empty")]
    NameEmpty,
    /// The name has over 1023 bytes.
    #[error("Bitmap name too long: {0}")]
    NameTooLong(String),
    /// The granularity is no power of two of at least 512 (and at most 2 GiB).
    #[error("Granularity must be power of 2 and at least 512")]
    Granularity,
    /// A job or an export uses the bitmap.
    #[error("Bitmap '{0}' is currently in use by another operation and cannot be used")]
    Busy(String),
    /// Nobody knows any more what was written while it recorded.
    #[error("Bitmap '{0}' is inconsistent and cannot be used")]
    Inconsistent(String),
    /// The two bitmaps belong to disks of different sizes.
    #[error(
        "Bitmaps are of different sizes (destination size is {destination}, source size is {source_size}) and can't be merged"
    )]
    Sizes {
        /// Bytes of the disk merged into.
        destination: u64,
        /// Bytes of the disk merged from.
        source_size: u64,
    },
    /// The disk would be so large that the bits would take over a gigabyte.
    #[error("Bitmap '{0}' would become too large")]
    TooLarge(String),
    /// Abdicate or reclaim of a bitmap that is not frozen, or that somebody else froze.
    #[error("Bitmap '{0}' is not frozen by this operation")]
    NotFrozen(String),
    /// A client ends a freeze, in success, that does not exist.
    #[error("Cannot relinquish control if there's no successor present")]
    NothingToAbdicate,
    /// A client ends a freeze, in failure, that does not exist.
    #[error("Cannot reclaim a successor when none is present")]
    NothingToReclaim,
    /// The client means another freeze than the one that is.
    #[error("Bitmap '{name}' is in another freeze: {freeze}")]
    OtherFreeze {
        /// The bitmap.
        name: String,
        /// The freeze that it is in.
        freeze: Uuid,
    },
    /// No checkpoint of this name on the disk.
    #[error("Checkpoint '{0}' not found")]
    CheckpointNotFound(String),
    /// A checkpoint of this name exists.
    #[error("Checkpoint already exists: {0}")]
    CheckpointExists(String),
    /// The empty string was given as a name.
    #[error("Checkpoint name cannot be empty")]
    CheckpointNameEmpty,
    /// The name has over 1023 bytes.
    #[error("Checkpoint name too long: {0}")]
    CheckpointNameTooLong(String),
    /// Changes were asked for between a checkpoint and an earlier one, or itself.
    #[error("Checkpoint '{to}' is not later than '{from}'")]
    CheckpointOrder {
        /// Where the changes begin.
        from: String,
        /// Where they end.
        to: String,
    },
}

/// Who froze a bitmap, and so who may end that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A job of this process.
    Job,
    /// Whoever is at the control socket: any client may go on where another has died.
    Client,
}

/// The dirty set of a bitmap as of a freeze; immutable once its commit succeeded.
#[derive(Clone)]
pub struct Frozen {
    id: Uuid,
    owner: Owner,
    layers: Layers,
}

impl Frozen {
    /// Names this freeze in reports and queries.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Who may end it.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Granularity of the bitmap.
    pub fn granularity(&self) -> Granularity {
        self.layers.granularity()
    }

    /// Whether any byte of `range` is in the set. Allocates nothing, so that a gate may ask in a critical section.
    pub fn any(&self, range: ByteRange) -> bool {
        self.layers.any(range)
    }

    /// The set as plain bits.
    pub fn bits(&self) -> Bits {
        self.layers.bits(None)
    }

    /// Names the generation that the next flip closes, before that flip: a gate has to know the set when it is armed,
    /// and nobody marks a generation after it is closed.
    pub(crate) fn close(&mut self, generation: Option<&Arc<LiveMap>>) {
        self.layers.close(generation);
    }

    pub(crate) fn layers(&self) -> &Layers {
        &self.layers
    }
}

impl fmt::Debug for Frozen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frozen").field("id", &self.id).finish_non_exhaustive()
    }
}

/// One named bitmap. While `frozen` is there, `layers` is the successor.
#[derive(Clone, Debug)]
pub(crate) struct Bitmap {
    name: String,
    recording: bool,
    /// While frozen: the successor records although the bitmap is disabled (see `fill`).
    pub(crate) for_job: bool,
    /// While frozen: made for what a job is to find, and of no worth without it.
    pub(crate) unfilled: bool,
    persistent: bool,
    inconsistent: bool,
    pub(crate) layers: Layers,
    frozen: Option<Frozen>,
}

/// What queries tell of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// Dirty bytes, in whole granules; of the frozen set while there is one, as in QEMU.
    pub count: u64,
    /// Whether guest writes are being recorded, in the successor while frozen.
    pub recording: bool,
    /// Whether an operation holds it.
    pub busy: bool,
    /// The freeze that it is in, if any.
    pub frozen: Option<Uuid>,
    /// Who froze it, if anybody did.
    pub owner: Option<Owner>,
    /// Whether it is in the disk's store, and outlives the process.
    pub persistent: bool,
    /// Nobody knows what it should hold; it can only be removed.
    pub inconsistent: bool,
}

/// The bitmaps of one disk, as one operation after another leaves them.
#[derive(Clone, Debug)]
pub struct Draft {
    size: u64,
    pub(crate) bitmaps: Vec<Bitmap>,
    pub(crate) checkpoints: Checkpoints,
    /// The commit begins a generation.
    cut: bool,
    /// The store has to know.
    changed: bool,
}

/// A bitmap's dirty set, taken out of one draft to be merged into another.
#[derive(Clone, Debug)]
pub struct DirtySet(Layers);

impl Draft {
    pub(crate) fn new(size: u64) -> Self {
        Self { size, bitmaps: Vec::new(), checkpoints: Checkpoints::default(), cut: false, changed: false }
    }

    pub(crate) fn position(&self, name: &str) -> Result<usize, BitmapError> {
        self.bitmaps.iter().position(|b| b.name == name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))
    }

    /// The bitmap, if it may be read and changed.
    pub(crate) fn free(&mut self, name: &str) -> Result<&mut Bitmap, BitmapError> {
        let index = self.position(name)?;
        let bitmap = &mut self.bitmaps[index];
        if bitmap.frozen.is_some() {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        if bitmap.inconsistent {
            return Err(BitmapError::Inconsistent(name.to_owned()));
        }
        Ok(bitmap)
    }

    /// The bitmap, to be changed in a way that a new generation begins with.
    fn cut(&mut self, name: &str) -> Result<&mut Bitmap, BitmapError> {
        self.free(name)?;
        (self.cut, self.changed) = (true, true);
        self.free(name)
    }

    /// The current generation ends with this commit, whatever else it does.
    pub(crate) fn end_generation(&mut self) {
        (self.cut, self.changed) = (true, true);
    }

    /// Adds an empty bitmap that records from the commit on, unless it is `disabled`.
    pub fn add(&mut self, name: &str, granularity: Granularity, disabled: bool) -> Result<(), BitmapError> {
        if name.is_empty() {
            return Err(BitmapError::NameEmpty);
        }
        if name.len() > NAME_MAX {
            return Err(BitmapError::NameTooLong(name.to_owned()));
        }
        if self.position(name).is_ok() {
            return Err(BitmapError::Exists(name.to_owned()));
        }
        self.bitmaps.push(Bitmap {
            name: name.to_owned(),
            recording: !disabled,
            for_job: false,
            unfilled: false,
            persistent: false,
            inconsistent: false,
            layers: Layers::empty(granularity, self.size),
            frozen: None,
        });
        self.end_generation();
        Ok(())
    }

    /// A bitmap that this draft added belongs into the disk's store. Whether there is one shows at the commit.
    pub fn keep(&mut self, name: &str) -> Result<(), BitmapError> {
        self.cut(name)?.persistent = true;
        Ok(())
    }

    /// Removes a bitmap that is not busy.
    pub fn remove(&mut self, name: &str) -> Result<(), BitmapError> {
        let index = self.position(name)?;
        if !self.bitmaps[index].inconsistent {
            self.free(name)?;
        } else if self.bitmaps[index].frozen.is_some() {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        self.end_generation();
        self.bitmaps.remove(index);
        Ok(())
    }

    /// Forgets all that the bitmap recorded until the commit.
    pub fn clear(&mut self, name: &str) -> Result<(), BitmapError> {
        let bitmap = self.cut(name)?;
        bitmap.layers = Layers::empty(bitmap.layers.granularity(), bitmap.layers.size());
        Ok(())
    }

    /// Records from the commit on.
    pub fn enable(&mut self, name: &str) -> Result<(), BitmapError> {
        self.cut(name)?.recording = true;
        Ok(())
    }

    /// Records until the commit.
    pub fn disable(&mut self, name: &str) -> Result<(), BitmapError> {
        self.cut(name)?.recording = false;
        Ok(())
    }

    /// Takes out the dirty set of `name` as of the commit, to merge it; a busy bitmap may not be read this way.
    pub fn dirty_set(&mut self, name: &str) -> Result<DirtySet, BitmapError> {
        Ok(DirtySet(self.free(name)?.layers.clone()))
    }

    /// Adds `source` to `target`. `source` must stand over a disk of the same size; its current generation, if it has
    /// one, must be this disk's (see `Commit::foreign`).
    pub fn merge(&mut self, target: &str, source: &DirtySet) -> Result<(), BitmapError> {
        let bitmap = self.cut(target)?;
        if source.0.size() != bitmap.layers.size() {
            return Err(BitmapError::Sizes { destination: bitmap.layers.size(), source_size: source.0.size() });
        }
        bitmap.layers.absorb(&source.0);
        Ok(())
    }

    /// Freezes a bitmap for a job: its set as of the commit belongs to the caller, an empty successor takes over.
    pub fn freeze(&mut self, name: &str) -> Result<Frozen, BitmapError> {
        self.freeze_for(name, Owner::Job)
    }

    /// Freezes a bitmap for whoever is at the control socket, who ends that by [`Draft::client_abdicate`] or
    /// [`Draft::client_reclaim`].
    pub fn create_successor(&mut self, name: &str) -> Result<Frozen, BitmapError> {
        self.freeze_for(name, Owner::Client)
    }

    fn freeze_for(&mut self, name: &str, owner: Owner) -> Result<Frozen, BitmapError> {
        let bitmap = self.cut(name)?;
        let successor = Layers::empty(bitmap.layers.granularity(), bitmap.layers.size());
        let frozen = Frozen { id: Uuid::new_v4(), owner, layers: std::mem::replace(&mut bitmap.layers, successor) };
        bitmap.frozen = Some(frozen.clone());
        Ok(frozen)
    }

    pub(crate) fn thaw(&mut self, name: &str, id: Uuid) -> Result<(&mut Bitmap, Frozen), BitmapError> {
        let index = self.position(name)?;
        let bitmap = &mut self.bitmaps[index];
        match bitmap.frozen.take() {
            Some(frozen) if frozen.id == id => {
                self.changed = true;
                // Recording for the job ends with it.
                self.cut |= bitmap.for_job;
                Ok((bitmap, frozen))
            }
            other => {
                bitmap.frozen = other;
                Err(BitmapError::NotFrozen(name.to_owned()))
            }
        }
    }

    /// Ends freeze `id` in success: the successor is the bitmap from now on, the frozen set is gone.
    pub fn abdicate(&mut self, name: &str, id: Uuid) -> Result<(), BitmapError> {
        self.thaw(name, id).map(|_| ())
    }

    /// Ends freeze `id` in failure: the frozen set is merged back into the successor. A bitmap that was made for what a job was to
    /// find holds nothing without that, and goes.
    pub fn reclaim(&mut self, name: &str, id: Uuid) -> Result<(), BitmapError> {
        let (bitmap, frozen) = self.thaw(name, id)?;
        if bitmap.unfilled {
            return self.remove(name);
        }
        if std::mem::take(&mut bitmap.for_job) {
            // A disabled bitmap is as it was: what was recorded, the job alone wanted.
            bitmap.layers = frozen.layers;
        } else {
            bitmap.layers.absorb(&frozen.layers);
        }
        Ok(())
    }

    /// The client's freeze of a bitmap, which has to be `id` if that is given; `none` if it is in no freeze at all.
    fn of_client(&self, name: &str, id: Option<Uuid>, none: BitmapError) -> Result<Uuid, BitmapError> {
        let bitmap = &self.bitmaps[self.position(name)?];
        match &bitmap.frozen {
            None => Err(none),
            Some(frozen) if frozen.owner == Owner::Job => Err(BitmapError::Busy(name.to_owned())),
            Some(frozen) if id.is_some_and(|id| id != frozen.id) => {
                Err(BitmapError::OtherFreeze { name: name.to_owned(), freeze: frozen.id })
            }
            Some(frozen) => Ok(frozen.id),
        }
    }

    /// [`Draft::abdicate`] by a client, of a freeze that a client made: `id`, if that is given.
    pub fn client_abdicate(&mut self, name: &str, id: Option<Uuid>) -> Result<(), BitmapError> {
        let id = self.of_client(name, id, BitmapError::NothingToAbdicate)?;
        self.abdicate(name, id)
    }

    /// [`Draft::reclaim`] by a client, of a freeze that a client made: `id`, if that is given.
    pub fn client_reclaim(&mut self, name: &str, id: Option<Uuid>) -> Result<(), BitmapError> {
        let id = self.of_client(name, id, BitmapError::NothingToReclaim)?;
        self.reclaim(name, id)
    }

    /// Ends freeze `id`, merging back only `uncopied`: what `bitmap-mode: always` leaves after a failure.
    pub fn abdicate_except(&mut self, name: &str, id: Uuid, uncopied: &Bits) -> Result<(), BitmapError> {
        let (bitmap, _) = self.thaw(name, id)?;
        bitmap.layers.add(uncopied);
        Ok(())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The disk has `size` bytes from the commit on. Bitmaps lose what lies beyond it; what is added counts as written in
    /// those that record. No bitmap may be busy.
    pub fn resize(&mut self, size: u64) -> Result<(), BitmapError> {
        for bitmap in &self.bitmaps {
            if bitmap.frozen.is_some() {
                return Err(BitmapError::Busy(bitmap.name.clone()));
            }
            if bitmap.layers.granularity().bits_for(size) > MOST_BITS {
                return Err(BitmapError::TooLarge(bitmap.name.clone()));
            }
        }
        self.checkpoints.check_size(size)?;
        for bitmap in &mut self.bitmaps {
            bitmap.layers.resize(size, bitmap.recording);
        }
        self.checkpoints.resize(size);
        self.end_generation();
        self.size = size;
        Ok(())
    }

    /// The granularity of a bitmap whose bits stand still from the commit on: it is frozen (then those of the frozen set
    /// do) or records nothing. `None` if they change with every write.
    pub fn standing(&self, name: &str) -> Result<Option<Granularity>, BitmapError> {
        let bitmap = &self.bitmaps[self.position(name)?];
        Ok((bitmap.frozen.is_some() || !bitmap.recording).then(|| bitmap.layers.granularity()))
    }

    /// Whether there is such a bitmap.
    pub fn has(&self, name: &str) -> bool {
        self.position(name).is_ok()
    }

    /// Whether the commit begins a generation.
    pub(crate) fn cuts(&self) -> bool {
        self.cut
    }

    /// Whether the store has to know of the commit.
    pub(crate) fn has_changed(&self) -> bool {
        self.changed
    }

    /// The finest granularity that records; `None` if nothing does.
    pub(crate) fn recording_granularity(&self) -> Option<Granularity> {
        let bitmaps = self.bitmaps.iter().filter(|b| b.records()).map(|b| b.layers.granularity());
        bitmaps.chain(self.checkpoints.recording_granularity()).min()
    }

    /// As [`Draft::recording_granularity`], of what is in a store: persistent bitmaps, and checkpoints.
    pub(crate) fn kept_granularity(&self) -> Option<Granularity> {
        let bitmaps = self.kept().filter(|b| b.records()).map(|b| b.layers.granularity());
        bitmaps.chain(self.checkpoints.recording_granularity()).min()
    }

    /// Whether a store is needed for it.
    pub(crate) fn needs_store(&self) -> bool {
        self.kept().any(|bitmap| !bitmap.inconsistent) || !self.checkpoints.0.is_empty()
    }

    /// The bitmaps that are in the store.
    pub(crate) fn kept(&self) -> impl Iterator<Item = &Bitmap> {
        self.bitmaps.iter().filter(|bitmap| bitmap.persistent)
    }

    /// Nobody can tell any more what the bitmaps in the store should hold.
    pub(crate) fn distrust(&mut self) {
        for bitmap in self.bitmaps.iter_mut().filter(|bitmap| bitmap.persistent) {
            bitmap.inconsistent = true;
            (bitmap.recording, bitmap.for_job) = (false, false);
            bitmap.layers = Layers::empty(bitmap.layers.granularity(), bitmap.layers.size());
        }
    }

    /// Puts a bitmap of the store back.
    pub(crate) fn restore(&mut self, name: String, granularity: Granularity, recording: bool, base: Option<Arc<Bits>>) {
        let mut layers = base.map_or_else(|| Layers::empty(granularity, self.size), Layers::of);
        layers.record(recording);
        self.put_back(name, recording, false, layers);
    }

    /// The bitmap that was put back last of this name is still in freeze `id` of a job, which goes on.
    pub(crate) fn restore_frozen(&mut self, name: &str, id: Uuid, freeze: &Freeze) {
        if let Ok(index) = self.position(name) {
            let bitmap = &mut self.bitmaps[index];
            let base = freeze.dirty.bits.clone();
            let layers = base.map_or_else(|| Layers::empty(bitmap.layers.granularity(), self.size), Layers::of);
            bitmap.frozen = Some(Frozen { id, owner: Owner::Job, layers });
            (bitmap.for_job, bitmap.unfilled) = (freeze.for_job, freeze.unfilled);
            let records = bitmap.records();
            bitmap.layers.record(records);
        }
    }

    /// What is frozen of a bitmap, if it is in this freeze.
    pub(crate) fn frozen_in(&self, name: &str, id: Uuid) -> Option<Frozen> {
        let bitmap = &self.bitmaps[self.position(name).ok()?];
        bitmap.frozen.clone().filter(|frozen| frozen.id == id && !bitmap.inconsistent)
    }

    /// Puts a bitmap of the store back that is not to be trusted.
    pub(crate) fn restore_inconsistent(&mut self, name: String, granularity: Granularity) {
        self.put_back(name, false, true, Layers::empty(granularity, self.size));
    }

    fn put_back(&mut self, name: String, recording: bool, inconsistent: bool, layers: Layers) {
        self.bitmaps.push(Bitmap {
            name,
            recording,
            for_job: false,
            unfilled: false,
            persistent: true,
            inconsistent,
            layers,
            frozen: None,
        });
    }

    /// The draft comes into force. `cut`: with it, a generation ended, which was `closed`.
    pub(crate) fn settle(&mut self, cut: bool, closed: Option<&Arc<LiveMap>>) {
        for bitmap in &mut self.bitmaps {
            if cut {
                bitmap.layers.close(closed);
            }
            bitmap.layers.record(bitmap.records());
            bitmap.layers.compact();
            if let Some(frozen) = &mut bitmap.frozen {
                frozen.close(closed);
            }
        }
        self.checkpoints.settle(cut, closed);
        (self.cut, self.changed) = (false, false);
    }

    /// Makes each bitmap one layer, so that it takes the least room in a store.
    pub(crate) fn fold(&mut self) {
        self.bitmaps.iter_mut().for_each(|bitmap| bitmap.layers.fold());
        self.checkpoints.0.iter_mut().for_each(|checkpoint| checkpoint.layers.fold());
    }

    pub(crate) fn info(&self, live: Option<&Arc<LiveMap>>) -> Vec<BitmapInfo> {
        let count = |bitmap: &Bitmap| if bitmap.inconsistent { 0 } else { bitmap.shown(live).dirty_bytes() };
        self.bitmaps.iter().map(|bitmap| bitmap.info(count(bitmap))).collect()
    }

    pub(crate) fn look(&self, name: &str, live: Option<&Arc<LiveMap>>) -> Result<(BitmapInfo, Bits), BitmapError> {
        let bits = self.bits(name, live)?;
        let bitmap = &self.bitmaps[self.position(name)?];
        Ok((bitmap.info(bits.dirty_bytes()), bits))
    }

    pub(crate) fn bits(&self, name: &str, live: Option<&Arc<LiveMap>>) -> Result<Bits, BitmapError> {
        let bitmap = &self.bitmaps[self.position(name)?];
        if bitmap.inconsistent {
            return Err(BitmapError::Inconsistent(name.to_owned()));
        }
        Ok(bitmap.shown(live))
    }
}

impl Bitmap {
    /// Whether the current generation belongs to it.
    pub(crate) fn records(&self) -> bool {
        self.recording || self.for_job
    }

    fn info(&self, count: u64) -> BitmapInfo {
        BitmapInfo {
            name: self.name.clone(),
            granularity: self.layers.granularity(),
            count,
            recording: self.recording,
            busy: self.frozen.is_some(),
            frozen: self.frozen.as_ref().map(Frozen::id),
            owner: self.frozen.as_ref().map(Frozen::owner),
            persistent: self.persistent,
            inconsistent: self.inconsistent,
        }
    }

    fn shown(&self, live: Option<&Arc<LiveMap>>) -> Bits {
        match &self.frozen {
            Some(frozen) => frozen.layers.bits(live),
            None => self.layers.bits(live),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn is_recording(&self) -> bool {
        self.recording
    }

    pub(crate) fn is_inconsistent(&self) -> bool {
        self.inconsistent
    }

    pub(crate) fn layers(&self) -> &Layers {
        &self.layers
    }

    pub(crate) fn frozen(&self) -> Option<(&Frozen, &Layers)> {
        self.frozen.as_ref().map(|frozen| (frozen, &frozen.layers))
    }
}

impl DirtySet {
    /// The set as it stands in another disk's draft: that disk's current generation is closed by name, since `merge`
    /// would take it for this disk's own.
    pub(crate) fn close(&mut self, generation: Option<&Arc<LiveMap>>) {
        self.0.close(generation);
    }
}
