//! What the fuzzers run, and what the tests replay their corpora through: see `backend/src/fuzzing.rs`, its likeness.
//!
//! Compiled for tests and for fuzzing (`--cfg fuzzing`) only.

pub use crate::store::fuzzing::store;

#[cfg(test)]
#[path = "../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    #[test]
    fn the_corpus_of_store_holds() {
        super::replay::replay("store", super::store);
    }
}
