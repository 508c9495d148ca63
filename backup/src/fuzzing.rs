//! What the fuzzers run, and what the tests replay their corpora through: one function a target, from bytes to nothing.
//!
//! Compiled for tests and for fuzzing (`--cfg fuzzing`) only. `fuzz/` has the programs and the corpora, `scripts/fuzz` runs
//! them; each function stands in the room that it attacks. It states a promise that holds for all bytes and panics where that
//! is broken: beside "no panic, no endless loop" something that an outsider would see.

pub use crate::nbd::fuzzing::{nbd_client, nbd_server};
pub use crate::qmp::fuzzing::qmp;
pub use crate::target::fuzzing::qcow2;

#[cfg(test)]
#[path = "../../fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;
    use super::*;

    #[test]
    fn the_corpus_of_qmp_holds() {
        replay("qmp", qmp);
    }

    #[test]
    fn the_corpus_of_nbd_server_holds() {
        replay("nbd_server", nbd_server);
    }

    #[test]
    fn the_corpus_of_nbd_client_holds() {
        replay("nbd_client", nbd_client);
    }

    #[test]
    fn the_corpus_of_qcow2_holds() {
        replay("qcow2", qcow2);
    }
}
