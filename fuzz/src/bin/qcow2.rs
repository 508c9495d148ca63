//! Fuzzes `blkmark_backup::fuzzing::qcow2`.
#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blkmark_backup::fuzzing::qcow2(data));
