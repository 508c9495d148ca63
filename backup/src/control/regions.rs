//! Bits as regions of bytes, in pages: how `query-block-dirty-bitmap` and `query-changes` answer.
//!
//! A page begins at a byte and ends after so many regions; the next one begins where it says. Each page is of the moment at
//! which it was asked for: what is still recorded may be more in the next.

use crate::qmp::{Arguments, QmpError};
use blkmark_bitmap::Bits;
use serde_json::{Map, Value, json};

/// Regions of a page, unless the client says otherwise.
const USUAL: u64 = 1024;

/// Regions of a page, whatever the client says: a page stays below a mebibyte.
const MOST: u64 = 16384;

/// What a client wants to see.
#[derive(Clone, Copy, Debug)]
pub(super) struct Page {
    offset: u64,
    limit: u64,
}

impl Page {
    /// Reads the members `offset` and `limit`.
    pub(super) fn read(arguments: &mut Arguments) -> Result<Self, QmpError> {
        let offset = arguments.opt_u64("offset")?.unwrap_or(0);
        let limit = arguments.opt_u64("limit")?.unwrap_or(USUAL);
        Ok(Self { offset, limit })
    }

    /// Puts the members of a page into an answer.
    pub(super) fn show(self, bits: &Bits, answer: &mut Map<String, Value>) -> Result<(), QmpError> {
        if !(1..=MOST).contains(&self.limit) {
            return Err(QmpError::generic(format!("Parameter 'limit' expects 1 to {MOST} regions")));
        }
        if self.offset > bits.size() {
            let text = format!("Parameter 'offset' is beyond the end of the disk, which has {} bytes", bits.size());
            return Err(QmpError::generic(text));
        }
        let (mut regions, mut at, mut next) = (Vec::new(), self.offset, None);
        while let Some((dirty, end)) = bits.run_at(at) {
            if dirty {
                if regions.len() as u64 == self.limit {
                    next = Some(at);
                    break;
                }
                regions.push(json!({ "start": at, "count": end - at }));
            }
            at = end;
        }
        answer.insert("size".into(), bits.size().into());
        answer.insert("granularity".into(), bits.granularity().bytes().into());
        answer.insert("count".into(), bits.dirty_bytes().into());
        answer.insert("dirty-regions".into(), regions.into());
        if let Some(next) = next {
            answer.insert("next-offset".into(), next.into());
        }
        Ok(())
    }
}
