//! Fuzzes `blkmark_bitmap::fuzzing::store`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark_bitmap::fuzzing::store(data));
