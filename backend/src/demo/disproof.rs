//! How an image differs from what it has to be: what a demo that fails shows.

use std::time::Duration;

use super::model::BLOCK;

/// How an image differs from what it has to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Disproof {
    /// Another size.
    #[error("{image} has {found} bytes, not {expected}")]
    Size {
        /// The image's name.
        image: String,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        found: u64,
    },
    /// A block with the wrong bytes.
    #[error("{image}: block {block} (byte {}) holds {found}, expected {expected}", block * BLOCK as u64)]
    Block {
        /// The image's name.
        image: String,
        /// The block.
        block: u64,
        /// What it should hold.
        expected: String,
        /// What it holds.
        found: String,
    },
    /// The blocks are of different instants.
    #[error(
        "{image} is not one instant: it holds a request for block {in_block} that was issued {gap:?} after another, \
         for block {out_block}, was acknowledged, which it does not hold"
    )]
    NotOneInstant {
        /// The image's name.
        image: String,
        /// First block of the younger request.
        in_block: u64,
        /// First block of the older request.
        out_block: u64,
        /// How far the two are apart.
        gap: Duration,
    },
    /// Two files that have to be the same byte for byte differ, though no block of the model does.
    #[error("{image} has SHA-256 {found}, expected {expected}")]
    Checksum {
        /// The image's name.
        image: String,
        /// In hex.
        expected: String,
        /// In hex.
        found: String,
    },
}
