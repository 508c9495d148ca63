//! What the fuzzers run, and what the tests replay their corpora through: one function a target, from bytes to nothing.
//!
//! Compiled for tests and for fuzzing (`--cfg fuzzing`) only. `fuzz/` has the programs and the corpora, `scripts/fuzz` runs
//! them; each function stands in the room that it attacks. It states a promise that holds for all bytes and panics where that
//! is broken: beside "no panic, no endless loop" something that an outsider would see.

pub use crate::config::fuzzing::config;
pub use crate::device::fuzzing::{request, ring};
pub use crate::session::fuzzing::inflight;

#[cfg(test)]
#[path = "../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;
    use super::*;

    #[test]
    fn the_corpus_of_request_holds() {
        replay("request", request);
    }

    #[test]
    fn the_corpus_of_ring_holds() {
        replay("ring", ring);
    }

    #[test]
    fn the_corpus_of_inflight_holds() {
        replay("inflight", inflight);
    }

    #[test]
    fn the_corpus_of_config_holds() {
        replay("config", config);
    }
}
