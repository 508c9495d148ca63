//! The record: all that a store knows, in one piece, written to two slots one after the other.
//!
//! The first slot is made durable before the second is touched, and nobody is answered before both are. So whichever slot
//! is whole is right: if only one is, either the newer record was torn while nobody had been told of it, or the two were
//! the same. Both whole: the higher sequence.
//!
//! | bytes | what |
//! |---|---|
//! | 8 | magic `BLKMKREC` |
//! | 4, 4 | version, bytes of the body |
//! | 32 | SHA-256 of the body |
//! | | the body: see [`Record`], in the order of its members |

use super::codec::{Damage, Decoder, Encoder, MOST_NUMBER};
use super::object::ObjectRef;
use super::stamp::Stamp;
use crate::checkpoints::CheckpointMark;
use crate::named::{MOST_BITS, NAME_MAX};
use crate::units::Granularity;
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// Where the two copies are.
pub const SLOTS: [&str; 2] = ["slot.0", "slot.1"];
/// How a slot begins.
pub const MAGIC: &[u8; 8] = b"BLKMKREC";
/// The latest version that this code writes and reads. It writes the first where that says it all: the second has
/// [`BitmapRecord::for_job`] besides, which a reader of the first must not take for damage.
pub const VERSION: u32 = 2;
const HEADER: usize = 48;
/// No record is larger: thousands of bitmaps with the longest names.
pub(crate) const MOST: usize = 64 << 20;

/// A dirty set: a union of objects, and of the live generation where it counts.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct LayersRecord {
    /// Objects, by their place in [`Record::objects`], each at a granularity.
    pub objects: Vec<(u32, Granularity)>,
}

/// One bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapRecord {
    /// Its name.
    pub name: String,
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// Whether the live generation, and every later one, counts for it.
    pub recording: bool,
    /// It may not be used any more. With a freeze: unless whoever is to fill it goes on.
    pub inconsistent: bool,
    /// It does not record, but what took over when it was frozen does, for the job that froze it alone.
    pub for_job: bool,
    /// What it holds besides.
    pub layers: LayersRecord,
    /// The set that is frozen, if one is.
    pub frozen: Option<FrozenRecord>,
}

/// A freeze.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenRecord {
    /// Its id.
    pub id: Uuid,
    /// Whether a client froze it, not a job.
    pub by_client: bool,
    /// What is frozen.
    pub layers: LayersRecord,
}

/// One checkpoint and its segment. The last one records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointRecord {
    /// Its name, its id and when it was made.
    pub mark: CheckpointMark,
    /// Bytes that the disk had.
    pub size: u64,
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// What was written between it and the next.
    pub layers: LayersRecord,
}

/// All that a draft has in the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// The bitmaps in the order in which they were added.
    pub bitmaps: Vec<BitmapRecord>,
    /// The checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointRecord>,
}

/// The generation that is being written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveRecord {
    /// Bytes a bit stands for.
    pub granularity: Granularity,
    /// What of it was made durable by cooling.
    pub synced: Option<ObjectRef>,
}

/// A commit over several stores that is prepared here and decided in another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// The commit.
    pub commit: Uuid,
    /// The store whose record decides.
    pub decided_in: String,
    /// What there is, should it not have been decided.
    pub otherwise: Contents,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The store.
    pub store: Uuid,
    /// One more with each record.
    pub sequence: u64,
    /// The process that wrote it.
    pub run: Uuid,
    /// The disk, as it was when this process opened it or resized it.
    pub disk: Stamp,
    /// The disk as a clean end left it; `None` while it is served.
    pub clean: Option<Stamp>,
    /// Bytes of the disk, for the bitmaps.
    pub size: u64,
    /// Number of the generation being written.
    pub generation: u64,
    /// It, if a bitmap of this store records.
    pub live: Option<LiveRecord>,
    /// The next object's number.
    pub next_object: u64,
    /// The intent table of this run, and what had been written to it.
    pub table: Option<(u64, u64)>,
    /// The objects in use.
    pub objects: Vec<ObjectRef>,
    /// Bitmaps and checkpoints.
    pub contents: Contents,
    /// A commit that is not decided here.
    pub prepared: Option<Prepared>,
    /// The last commit over several stores that was decided here.
    pub decided: Option<Uuid>,
}

fn object(out: &mut Encoder, object: &ObjectRef) {
    out.u64(object.number);
    out.u64(object.sequence);
    out.u64(object.len);
    out.u32(object.checksum);
}

fn read_object(input: &mut Decoder<'_>) -> Result<ObjectRef, Damage> {
    Ok(ObjectRef { number: input.u64()?, sequence: input.u64()?, len: input.u64()?, checksum: input.u32()? })
}

fn layers(out: &mut Encoder, layers: &LayersRecord) {
    out.list(&layers.objects, |out, (object, granularity)| {
        out.u32(*object);
        out.granularity(*granularity);
    });
}

fn read_layers(input: &mut Decoder<'_>) -> Result<LayersRecord, Damage> {
    Ok(LayersRecord { objects: input.list(|input| Ok((input.u32()?, input.granularity()?)))? })
}

fn bitmap(out: &mut Encoder, bitmap: &BitmapRecord) {
    out.bytes(bitmap.name.as_bytes());
    out.granularity(bitmap.granularity);
    out.u8(u8::from(bitmap.recording) | u8::from(bitmap.inconsistent) << 1 | u8::from(bitmap.for_job) << 2);
    layers(out, &bitmap.layers);
    out.option(bitmap.frozen.as_ref(), |out, frozen| {
        out.uuid(frozen.id);
        out.u8(u8::from(frozen.by_client));
        layers(out, &frozen.layers);
    });
}

fn contents(out: &mut Encoder, contents: &Contents) {
    out.list(&contents.bitmaps, bitmap);
    out.list(&contents.checkpoints, |out, checkpoint| {
        out.bytes(checkpoint.mark.name.as_bytes());
        out.uuid(checkpoint.mark.id);
        out.u64(checkpoint.mark.created);
        out.u64(checkpoint.size);
        out.granularity(checkpoint.granularity);
        layers(out, &checkpoint.layers);
    });
}

fn read_contents(input: &mut Decoder<'_>) -> Result<Contents, Damage> {
    Ok(Contents {
        bitmaps: input.list(read_bitmap)?,
        checkpoints: input.list(|input| {
            Ok(CheckpointRecord {
                mark: CheckpointMark { name: input.text()?, id: input.uuid()?, created: input.u64()? },
                size: input.u64()?,
                granularity: input.granularity()?,
                layers: read_layers(input)?,
            })
        })?,
    })
}

fn read_bitmap(input: &mut Decoder<'_>) -> Result<BitmapRecord, Damage> {
    let (name, granularity, flags) = (input.text()?, input.granularity()?, input.u8()?);
    if name.is_empty() || name.len() > NAME_MAX || flags > 7 {
        return Err(Damage::Nonsense);
    }
    let bitmap = BitmapRecord {
        name,
        granularity,
        recording: flags & 1 != 0,
        inconsistent: flags & 2 != 0,
        for_job: flags & 4 != 0,
        layers: read_layers(input)?,
        frozen: input.option(|input| {
            Ok(FrozenRecord { id: input.uuid()?, by_client: input.bool()?, layers: read_layers(input)? })
        })?,
    };
    let makes_sense = !bitmap.for_job || !bitmap.recording && bitmap.frozen.is_some();
    if makes_sense { Ok(bitmap) } else { Err(Damage::Nonsense) }
}

impl Record {
    /// As it lies in a slot.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Encoder::default();
        out.uuid(self.store);
        out.u64(self.sequence);
        out.uuid(self.run);
        self.disk.encode(&mut out);
        out.option(self.clean.as_ref(), |out, stamp| stamp.encode(out));
        out.u64(self.size);
        out.u64(self.generation);
        out.option(self.live.as_ref(), |out, live| {
            out.granularity(live.granularity);
            out.option(live.synced.as_ref(), object);
        });
        out.u64(self.next_object);
        out.option(self.table, |out, (number, written)| {
            out.u64(number);
            out.u64(written);
        });
        out.list(&self.objects, object);
        contents(&mut out, &self.contents);
        out.option(self.prepared.as_ref(), |out, prepared| {
            out.uuid(prepared.commit);
            out.bytes(prepared.decided_in.as_bytes());
            contents(out, &prepared.otherwise);
        });
        out.option(self.decided, Encoder::uuid);
        let body = out.0;
        let mut slot = Encoder::default();
        slot.0.extend(MAGIC);
        slot.u32(self.version());
        slot.u32(body.len() as u32);
        slot.0.extend(Sha256::digest(&body));
        slot.0.extend(body);
        slot.0
    }

    /// What a slot holds. Bytes behind the record are left over from longer ones.
    pub(crate) fn decode(slot: &[u8]) -> Result<Self, Damage> {
        let mut input = Decoder(slot);
        if input.take(8)? != MAGIC {
            return Err(Damage::Foreign);
        }
        let version = input.u32()?;
        if !(1..=VERSION).contains(&version) {
            return Err(Damage::Version(version));
        }
        let len = input.u32()? as usize;
        let sum = input.take(HEADER - 16)?;
        let body = input.take(len)?;
        if Sha256::digest(body)[..] != *sum {
            return Err(Damage::Checksum);
        }
        let mut input = Decoder(body);
        let record = Self {
            store: input.uuid()?,
            sequence: input.u64()?,
            run: input.uuid()?,
            disk: Stamp::decode(&mut input)?,
            clean: input.option(Stamp::decode)?,
            size: input.u64()?,
            generation: input.u64()?,
            live: input.option(|input| {
                Ok(LiveRecord { granularity: input.granularity()?, synced: input.option(read_object)? })
            })?,
            next_object: input.u64()?,
            table: input.option(|input| Ok((input.u64()?, input.u64()?)))?,
            objects: input.list(read_object)?,
            contents: read_contents(&mut input)?,
            prepared: input.option(|input| {
                Ok(Prepared { commit: input.uuid()?, decided_in: input.text()?, otherwise: read_contents(input)? })
            })?,
            decided: input.option(Decoder::uuid)?,
        };
        input.end()?;
        record.check()?;
        if record.version() == version { Ok(record) } else { Err(Damage::Nonsense) }
    }

    /// What of this record is in force, or may be.
    fn all(&self) -> impl Iterator<Item = &Contents> {
        [Some(&self.contents), self.prepared.as_ref().map(|prepared| &prepared.otherwise)].into_iter().flatten()
    }

    /// The first version that has all of it.
    fn version(&self) -> u32 {
        if self.all().flat_map(|contents| &contents.bitmaps).any(|bitmap| bitmap.for_job) { 2 } else { 1 }
    }

    /// What everybody relies on who reads a record.
    fn check(&self) -> Result<(), Damage> {
        let objects = self.objects.len();
        let fits = |granularity: Granularity| granularity.bits_for(self.size) <= MOST_BITS;
        let sound = |granularity: Granularity, layers: &LayersRecord| {
            fits(granularity) && layers.objects.iter().all(|(object, at)| (*object as usize) < objects && fits(*at))
        };
        let bitmaps = self.all().flat_map(|contents| &contents.bitmaps).all(|bitmap| {
            let frozen = bitmap.frozen.iter().map(|frozen| &frozen.layers);
            frozen.chain([&bitmap.layers]).all(|layers| sound(bitmap.granularity, layers))
        });
        let mut checkpoints = self.all().flat_map(|contents| &contents.checkpoints);
        let checkpoints = checkpoints.all(|checkpoint| sound(checkpoint.granularity, &checkpoint.layers));
        let live = self.live.as_ref().is_none_or(|live| fits(live.granularity));
        let unique = self.all().all(|contents| {
            let mut names: Vec<&str> = contents.bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect();
            names.sort_unstable();
            names.windows(2).all(|pair| pair[0] != pair[1])
        });
        let numbers = [self.sequence, self.generation, self.next_object].iter().all(|number| *number <= MOST_NUMBER);
        if bitmaps && checkpoints && live && unique && numbers { Ok(()) } else { Err(Damage::Nonsense) }
    }
}
