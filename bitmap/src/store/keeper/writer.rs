//! Collects what a record names, and writes the objects that are not there yet.

use super::super::object::{self, ObjectRef};
use super::super::record::{BitmapRecord, CheckpointRecord, Contents, FrozenRecord, LayersRecord};
use super::{Keeper, State};
use crate::bits::Bits;
use crate::layers::Layers;
use crate::live::LiveMap;
use crate::named::{Draft, Owner};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

/// What is written at once.
const PIECE: usize = 1 << 20;

/// A layer that has an object. Kept, so that its address stands for it.
pub(super) enum Layer {
    Base(Arc<Bits>),
    Closed(Arc<LiveMap>),
}

impl Layer {
    pub(super) fn key(&self) -> usize {
        match self {
            Layer::Base(bits) => Arc::as_ptr(bits).addr(),
            Layer::Closed(map) => Arc::as_ptr(map).addr(),
        }
    }
}

/// Collects what a record names, and writes the objects that are not there yet.
pub(super) struct Writer<'a> {
    keeper: &'a mut Keeper,
    pub(super) objects: Vec<ObjectRef>,
    places: HashMap<usize, u32>,
    pub(super) layers: Vec<(Layer, ObjectRef)>,
    /// Written now.
    pub(super) new: Vec<ObjectRef>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(keeper: &'a mut Keeper) -> Self {
        Self { keeper, objects: Vec::new(), places: HashMap::new(), layers: Vec::new(), new: Vec::new() }
    }

    pub(super) fn contents(&mut self, state: &State<'_>) -> io::Result<(Contents, Option<Contents>)> {
        let contents = self.draft(state.draft)?;
        let otherwise = match &state.prepared {
            Some((_, _, otherwise)) => Some(self.draft(otherwise)?),
            None => None,
        };
        Ok((contents, otherwise))
    }

    fn draft(&mut self, draft: &Draft) -> io::Result<Contents> {
        let mut contents = Contents::default();
        for bitmap in draft.kept() {
            let frozen = match bitmap.frozen().filter(|_| !bitmap.is_inconsistent()) {
                Some((frozen, layers)) => Some(FrozenRecord {
                    id: frozen.id(),
                    by_client: frozen.owner() == Owner::Client,
                    layers: self.layers(layers)?,
                }),
                None => None,
            };
            let layers = match bitmap.is_inconsistent() {
                true => LayersRecord::default(),
                false => self.layers(bitmap.layers())?,
            };
            contents.bitmaps.push(BitmapRecord {
                name: bitmap.name().to_owned(),
                granularity: bitmap.layers().granularity(),
                recording: bitmap.is_recording(),
                inconsistent: bitmap.is_inconsistent() || bitmap.unfilled,
                for_job: bitmap.for_job,
                layers,
                frozen,
            });
        }
        for checkpoint in &draft.checkpoints.0 {
            contents.checkpoints.push(CheckpointRecord {
                mark: checkpoint.mark.clone(),
                size: checkpoint.size,
                granularity: checkpoint.layers.granularity(),
                layers: self.layers(&checkpoint.layers)?,
            });
        }
        Ok(contents)
    }

    fn layers(&mut self, layers: &Layers) -> io::Result<LayersRecord> {
        let (base, closed) = layers.parts();
        let mut record = LayersRecord::default();
        if let Some(base) = base {
            record.objects.push((self.layer(Layer::Base(Arc::clone(base)))?, base.granularity()));
        }
        for (generation, granularity) in closed {
            record.objects.push((self.layer(Layer::Closed(Arc::clone(generation)))?, *granularity));
        }
        Ok(record)
    }

    fn layer(&mut self, layer: Layer) -> io::Result<u32> {
        let key = layer.key();
        if let Some(place) = self.places.get(&key) {
            return Ok(*place);
        }
        let object = match (self.keeper.known.get(&key), &layer) {
            (Some((_, object)), _) => *object,
            (None, Layer::Base(bits)) => self.write(bits)?,
            (None, Layer::Closed(map)) => self.write(&map.to_bits())?,
        };
        let place = self.objects.len() as u32;
        self.objects.push(object);
        self.places.insert(key, place);
        self.layers.push((layer, object));
        Ok(place)
    }

    pub(super) fn write(&mut self, bits: &Bits) -> io::Result<ObjectRef> {
        let number = self.keeper.next_object;
        self.keeper.next_object += 1;
        let (bytes, object) = object::encode(self.keeper.store, number, self.keeper.sequence + 1, bits);
        let (medium, file) = (&self.keeper.medium, object.file());
        self.new.push(object);
        medium.allocate(&file, object.len)?;
        for (at, piece) in (0u64..).step_by(PIECE).zip(bytes.chunks(PIECE)) {
            medium.write(&file, at, piece)?;
        }
        medium.sync(&file)?;
        Ok(object)
    }
}
