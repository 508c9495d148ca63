//! Fuzzes `blkmark::fuzzing::inflight`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark::fuzzing::inflight(data));
