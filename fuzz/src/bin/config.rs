//! Fuzzes `blkmark::fuzzing::config`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark::fuzzing::config(data));
