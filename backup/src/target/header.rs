//! What has to be known of a qcow2 header before `imago` may see the file.
//!
//! Called before every opening, for reading or writing. imago, which reads, trusts the sizes of the tables that it allocates, opens
//! encrypted images as if they were plain, and names features by number only; so everything that we do not handle is
//! refused here, with a reason. Source: the qcow2 specification (QEMU `docs/interop/qcow2.txt`).

use super::bytes::Bytes;
use super::mark::{FEATURES_AT, MARK, UNFINISHED_BIT};
use super::qcow2::Geometry;
use std::io;

pub(super) const MAGIC: u32 = 0x5146_49fb;
const LENGTH: usize = 104;
/// QEMU's own limits for the two tables that are held in memory.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;
/// Offsets in a file have 56 bits.
const MAX_OFFSET: u64 = 1 << 56;

pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
const NAME_ENTRY: usize = 48;

/// What the caller means to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    /// To go on writing what a process left that was killed at it: it may bear the mark.
    Resume,
}

/// A header that passed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Size of the disk and of a cluster.
    pub geometry: Geometry,
    /// Where the active L1 table stands.
    pub l1_offset: u64,
    /// Entries of it.
    pub l1_entries: u64,
    /// Where the refcount table stands.
    pub reftable_offset: u64,
    /// Clusters that it takes.
    pub reftable_clusters: u64,
    /// Logarithm of the width of a refcount in bits.
    pub refcount_order: u32,
    /// Internal snapshots.
    pub snapshots: u32,
}

/// Reads and judges the header. The inner error is the reason for a refusal.
pub(super) fn examine(bytes: &Bytes, access: Access) -> io::Result<Result<Header, String>> {
    let mut raw = [0; LENGTH];
    bytes.read_at(&mut raw, 0)?;
    Ok(judge(&raw, access))
}

fn judge(raw: &[u8; LENGTH], access: Access) -> Result<Header, String> {
    if be32(raw, 0) != MAGIC {
        return Err("Image is not in qcow2 format".into());
    }
    let version = be32(raw, 4);
    match (version, access) {
        (3, _) | (2, Access::Read) => {}
        (2, Access::Write | Access::Resume) => {
            return Err("qcow2 version 2 cannot be written; upgrade it with 'qemu-img amend -o compat=1.1'".into());
        }
        _ => return Err(format!("Unsupported qcow2 version {version}")),
    }
    if version == 3 {
        refuse_features(be64(raw, FEATURES_AT as usize), access)?;
    }
    if be32(raw, 32) != 0 {
        return Err("Encrypted images are not supported".into());
    }
    let cluster_bits = be32(raw, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(format!("Unsupported cluster size: 2^{cluster_bits}"));
    }
    let cluster_size = 1u64 << cluster_bits;
    let size = be64(raw, 24);

    let l1_entries = u64::from(be32(raw, 36));
    let reftable_clusters = u64::from(be32(raw, 56));
    table("Active L1 table", be64(raw, 40), l1_entries * 8, MAX_L1_BYTES, cluster_size)?;
    let reftable_bytes = reftable_clusters * cluster_size;
    table("Reference count table", be64(raw, 48), reftable_bytes, MAX_REFTABLE_BYTES, cluster_size)?;
    // An L1 entry maps as many clusters as a cluster holds 8-byte entries.
    if size.div_ceil(cluster_size * (cluster_size / 8)) > l1_entries {
        return Err("L1 table is too small".into());
    }
    let refcount_order = if version == 3 { be32(raw, 96) } else { 4 };
    if refcount_order > 6 {
        return Err(format!("Unsupported refcount width: 2^{refcount_order}"));
    }
    Ok(Header {
        geometry: Geometry { size, cluster_bits },
        l1_offset: be64(raw, 40),
        l1_entries,
        reftable_offset: be64(raw, 48),
        reftable_clusters,
        refcount_order,
        snapshots: be32(raw, 60),
    })
}

fn refuse_features(features: u64, access: Access) -> Result<(), String> {
    let features = if access == Access::Resume { features & !MARK } else { features };
    let has = |bit: u32| features & (1 << bit) != 0;
    if has(UNFINISHED_BIT) {
        return Err("Image is an unfinished backup: its writer did not come to the end".into());
    }
    if has(1) {
        return Err(match access {
            Access::Write | Access::Resume => "qcow2: Image is corrupt; cannot be opened read/write".into(),
            Access::Read => "qcow2: Image is corrupt".into(),
        });
    }
    if has(0) {
        return Err("Image was not closed cleanly; run 'qemu-img check -r all' first".into());
    }
    if has(2) {
        return Err("External data files are not supported".into());
    }
    if has(3) {
        return Err("Unsupported qcow2 feature: compression type".into());
    }
    if has(4) {
        return Err("Unsupported qcow2 feature: extended L2 entries".into());
    }
    match features {
        0 => Ok(()),
        _ => Err(format!("Unsupported qcow2 feature(s): Unknown incompatible feature: {features:x}")),
    }
}

fn table(what: &str, offset: u64, len: u64, max: u64, cluster_size: u64) -> Result<(), String> {
    if len > max {
        Err(format!("{what} too large"))
    } else if !offset.is_multiple_of(cluster_size) || offset >= MAX_OFFSET {
        Err(format!("{what} offset invalid"))
    } else {
        Ok(())
    }
}

/// Where the last entry of the feature name table stands, if there is one: the place to tell tools that print names
/// what bit 63 means while it is set.
pub(super) fn last_feature_name(bytes: &Bytes) -> io::Result<Option<u64>> {
    let mut raw = [0; LENGTH];
    bytes.read_at(&mut raw, 0)?;
    let cluster_size = 1u64 << be32(&raw, 20).clamp(9, 21);
    let mut at = u64::from(be32(&raw, 100));
    while at + 8 <= cluster_size {
        let mut head = [0; 8];
        bytes.read_at(&mut head, at)?;
        let (kind, len) = (be32(&head, 0), u64::from(be32(&head, 4)));
        at += 8;
        if kind == 0 || at + len > cluster_size {
            return Ok(None);
        }
        if kind == FEATURE_NAMES {
            let entries = len / NAME_ENTRY as u64;
            return Ok(entries.checked_sub(1).map(|last| at + last * NAME_ENTRY as u64));
        }
        at += len.next_multiple_of(8);
    }
    Ok(None)
}

/// An entry that names bit 63 of the incompatible features.
pub(super) fn unfinished_name() -> [u8; NAME_ENTRY] {
    const NAME: &[u8] = b"unfinished backup (blkmark)";
    let mut entry = [0; NAME_ENTRY];
    entry[1] = UNFINISHED_BIT as u8;
    entry[2..2 + NAME.len()].copy_from_slice(NAME);
    entry
}

fn be32(raw: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]])
}

fn be64(raw: &[u8], at: usize) -> u64 {
    u64::from(be32(raw, at)) << 32 | u64::from(be32(raw, at + 4))
}
