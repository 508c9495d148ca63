//! A node: one served disk as everything that runs over it sees it.

use crate::scratch::ScratchSettings;
use crate::source::Source;
use blkmark_bitmap::Tracker;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

/// One served disk. Its id is its node name and its device name.
pub struct Node {
    /// What clients call it.
    pub id: String,
    /// The file or device, as the operator named it.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    /// Where its dirty blocks are marked.
    pub tracker: Arc<Tracker>,
    /// Where its bytes are read from.
    pub source: Arc<dyn Source>,
    /// Where points in time keep what the guest overwrites.
    pub scratch: ScratchSettings,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").field("id", &self.id).field("path", &self.path).finish_non_exhaustive()
    }
}
