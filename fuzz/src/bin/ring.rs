//! Fuzzes `blkmark::fuzzing::ring`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark::fuzzing::ring(data));
