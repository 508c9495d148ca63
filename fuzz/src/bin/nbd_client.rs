//! Fuzzes `blkmark_backup::fuzzing::nbd_client`.
#![no_main]
libfuzzer_sys::fuzz_target!(
    init: {
        // As in every Rust program; libFuzzer's main leaves it alone.
        // SAFETY: ignoring a signal runs no code of ours.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    },
    |data: &[u8]| blkmark_backup::fuzzing::nbd_client(data)
);
