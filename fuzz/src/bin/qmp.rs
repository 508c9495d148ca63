//! Fuzzes `blkmark_backup::fuzzing::qmp`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark_backup::fuzzing::qmp(data));
