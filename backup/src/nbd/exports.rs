//! What blkmark exports: a disk that is read while its guest writes, with frozen or disabled bitmaps as metadata.
//!
//! Made by whoever adds an export; served by `server`. Read-only. Invariant: a bitmap's context shows the bits as they were
//! when the export was made, whatever is recorded meanwhile.

use super::export::{Export, Extent};
use super::protocol::allocation;
use crate::buffer::AlignedBuffer;
use crate::node::Node;
use crate::source::{BlockStatus, Source};
use blkmark_bitmap::Bits;
use std::io;
use std::sync::Arc;

/// Its context, at number 0.
const ALLOCATION: &str = "base:allocation";

/// How QEMU names the context of a bitmap, but for the bitmap's own name.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";

/// The flag of dirty extents.
const DIRTY: u32 = 1;

/// Why a bitmap cannot be exported with a disk. The texts are QEMU's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BitmapExportError {
    /// The disk has none of this name.
    #[error("Bitmap '{0}' is not found")]
    NotFound(String),
    /// It changes with every write of the guest's, and what a client reads would not fit to it.
    #[error("Enabled bitmap '{0}' incompatible with readonly export")]
    Enabled(String),
}

/// A disk or a point in time, read as it stands.
pub struct SourceExport {
    source: Arc<dyn Source>,
    bitmaps: Vec<(String, Bits)>,
}

impl SourceExport {
    /// Exports `source`, with the bits of named bitmaps of the same size.
    pub fn new(source: Arc<dyn Source>, bitmaps: Vec<(String, Bits)>) -> Self {
        Self { source, bitmaps }
    }

    /// Exports a served disk as it stands, with bitmaps of its own that do not change.
    pub fn of_node(node: &Node, bitmaps: &[String]) -> Result<Self, BitmapExportError> {
        let bits = |name: &String| Ok((name.clone(), Self::standing_bits(node, name)?));
        let bitmaps = bitmaps.iter().map(bits).collect::<Result<_, _>>()?;
        Ok(Self::new(Arc::clone(&node.source), bitmaps))
    }

    /// What a bitmap of a served disk holds now, if that stands: it is frozen (then it is the frozen set) or disabled. One
    /// that is enabled will do if nobody writes to the disk.
    pub fn standing_bits(node: &Node, name: &str) -> Result<Bits, BitmapExportError> {
        let gone = || BitmapExportError::NotFound(name.to_owned());
        let info = node.tracker.list().into_iter().find(|info| info.name == name).ok_or_else(gone)?;
        if info.recording && info.frozen.is_none() && !node.read_only {
            return Err(BitmapExportError::Enabled(name.to_owned()));
        }
        node.tracker.bits(name).map_err(|_| gone())
    }

    fn allocation(&self, offset: u64, len: u64, most: usize) -> io::Result<Vec<Extent>> {
        let (mut extents, mut at): (Vec<Extent>, u64) = (Vec::new(), 0);
        while at < len {
            let (status, run) = self.source.block_status(offset + at, len - at)?;
            let flags = match status {
                BlockStatus::Data => 0,
                BlockStatus::Hole => allocation::HOLE | allocation::ZERO,
            };
            let run = run.clamp(1, len - at);
            let full = extents.len() == most;
            match extents.last_mut() {
                Some(last) if last.flags == flags => last.len += run,
                _ if full => break,
                _ => extents.push(Extent { len: run, flags }),
            }
            at += run;
        }
        Ok(extents)
    }
}

impl Export for SourceExport {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let unit = u64::from(self.source.alignment());
        let (size, end) = (self.size(), offset + buf.len() as u64);
        if buf.is_empty() {
            return Ok(());
        }
        if offset.is_multiple_of(unit) && (end.is_multiple_of(unit) || end == size) {
            return self.source.read_at(buf, offset);
        }
        // The units that it touches, whole.
        let from = offset / unit * unit;
        let to = end.next_multiple_of(unit).min(size);
        let mut wide = AlignedBuffer::new((to - from) as usize);
        let wide = &mut wide[..(to - from) as usize];
        self.source.read_at(wide, from)?;
        let skip = (offset - from) as usize;
        buf.copy_from_slice(&wide[skip..skip + buf.len()]);
        Ok(())
    }

    fn is_hole(&self, offset: u64, len: u64) -> bool {
        matches!(self.source.block_status(offset, len), Ok((BlockStatus::Hole, run)) if run >= len)
    }

    fn contexts(&self) -> Vec<String> {
        let bitmaps = self.bitmaps.iter().map(|(name, _)| format!("{DIRTY_BITMAP}{name}"));
        std::iter::once(ALLOCATION.to_owned()).chain(bitmaps).collect()
    }

    fn block_status(&self, context: usize, offset: u64, len: u64, most: usize) -> io::Result<Vec<Extent>> {
        let Some(bitmap) = context.checked_sub(1) else { return self.allocation(offset, len, most) };
        let (_, bits) = self.bitmaps.get(bitmap).ok_or(io::ErrorKind::InvalidInput)?;
        let (mut extents, mut at, end) = (Vec::new(), offset, offset + len);
        while at < end && extents.len() < most {
            let (dirty, run_end) = bits.run_at(at).unwrap_or((false, end));
            let run_end = run_end.min(end);
            extents.push(Extent { len: run_end - at, flags: if dirty { DIRTY } else { 0 } });
            at = run_end;
        }
        Ok(extents)
    }
}

impl std::fmt::Debug for SourceExport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceExport").field("contexts", &self.contexts()).finish_non_exhaustive()
    }
}
