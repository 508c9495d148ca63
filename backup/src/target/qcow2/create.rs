//! The first cluster of a new image.
//!
//! Called by the writer. Source: the qcow2 specification, "Header" and "Header extensions". The image is marked from its very
//! first byte on.

use super::super::Format;
use super::super::header::{FEATURE_NAMES, MAGIC, unfinished_name};
use super::super::mark::MARK;
use super::entry::Geometry;

const VERSION: u32 = 3;
/// As far as the compression type and its padding.
const LENGTH: usize = 112;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Refcounts of 16 bits, as everybody has them.
pub(super) const REFCOUNT_ORDER: u32 = 4;

/// Where the header keeps where the refcount table stands, and its clusters.
pub(super) const REFTABLE_AT: u64 = 48;

/// Names of features, for tools that do not know them: kind, bit, name.
const NAMES: [(u8, u8, &[u8]); 8] = [
    (0, 0, b"dirty bit"),
    (0, 1, b"corrupt bit"),
    (0, 2, b"external data file"),
    (0, 3, b"compression type"),
    (0, 4, b"extended L2 entries"),
    (1, 0, b"lazy refcounts"),
    (2, 0, b"bitmaps"),
    (2, 1, b"raw external data"),
];

/// The whole cluster, or `None` if what it has to hold is too long for it.
pub(super) fn header(
    geometry: Geometry,
    l1_offset: u64,
    reftable_offset: u64,
    backing: Option<(&str, Format)>,
) -> Option<Vec<u8>> {
    let mut names: Vec<u8> = Vec::new();
    for (kind, bit, name) in NAMES {
        let mut entry = [0; 48];
        (entry[0], entry[1]) = (kind, bit);
        entry[2..2 + name.len()].copy_from_slice(name);
        names.extend(entry);
    }
    names.extend(unfinished_name());
    // The names are a help; where they leave no room for what is needed they are left out.
    fill(geometry, l1_offset, reftable_offset, backing, &names)
        .or_else(|| fill(geometry, l1_offset, reftable_offset, backing, &[]))
}

fn fill(
    geometry: Geometry,
    l1_offset: u64,
    reftable_offset: u64,
    backing: Option<(&str, Format)>,
    names: &[u8],
) -> Option<Vec<u8>> {
    let mut extensions = Vec::new();
    if let Some((_, format)) = backing {
        extend(&mut extensions, BACKING_FORMAT, format.name().as_bytes());
    }
    if !names.is_empty() {
        extend(&mut extensions, FEATURE_NAMES, names);
    }
    extend(&mut extensions, 0, &[]);
    let name = backing.map_or("", |(name, _)| name);
    let name_at = LENGTH + extensions.len();
    if (name_at + name.len()) as u64 > geometry.cluster() {
        return None;
    }
    let mut raw = Vec::with_capacity(geometry.cluster() as usize);
    let mut word = |value: u32| raw.extend(value.to_be_bytes());
    word(MAGIC);
    word(VERSION);
    word(0);
    word(if backing.is_some() { name_at as u32 } else { 0 });
    word(name.len() as u32);
    word(geometry.cluster_bits);
    let mut long = |value: u64| raw.extend(value.to_be_bytes());
    long(geometry.size);
    // No encryption; the length of the L1 table.
    long(geometry.l1_entries());
    long(l1_offset);
    long(reftable_offset);
    // Clusters of the refcount table; no snapshots, and nowhere.
    long(1 << 32);
    long(0);
    // Features: incompatible, compatible, to be cleared.
    long(MARK);
    long(0);
    long(0);
    long(u64::from(REFCOUNT_ORDER) << 32 | LENGTH as u64);
    // Compression type 0, deflate, and padding.
    long(0);
    raw.extend(extensions);
    raw.extend(name.as_bytes());
    raw.resize(geometry.cluster() as usize, 0);
    Some(raw)
}

fn extend(extensions: &mut Vec<u8>, kind: u32, data: &[u8]) {
    extensions.extend(kind.to_be_bytes());
    extensions.extend((data.len() as u32).to_be_bytes());
    extensions.extend(data);
    extensions.resize(extensions.len().next_multiple_of(8), 0);
}
