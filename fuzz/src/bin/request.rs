//! Fuzzes `blkmark::fuzzing::request`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark::fuzzing::request(data));
