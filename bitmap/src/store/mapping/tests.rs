//! Memory of files on tmpfs, with huge pages where there are some.

use super::*;
use crate::sync::Ordering;
use std::os::unix::fs::MetadataExt;

const PAGE: usize = 4096;

/// An empty file on tmpfs; `None` where there is none.
fn file() -> Option<File> {
    tempfile::tempfile_in("/dev/shm").ok()
}

/// What the words of a file are set to.
fn value(at: usize) -> u64 {
    at as u64 ^ 0x0123_4567_89ab_cdef
}

#[test]
fn memory_is_taken_in_full_is_zero_and_is_that_of_the_file() {
    for len in [PAGE + 8, HUGE - PAGE, HUGE, HUGE + PAGE, 3 * HUGE + 5 * PAGE + 24, 9 * HUGE + 8] {
        let Some(file) = file() else { return };
        let mapping = Mapping::take(&file, len).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), len as u64);
        assert!(metadata.blocks() * 512 >= len as u64, "{len}: {} blocks", metadata.blocks());
        assert!(mapping.start.addr().get().is_multiple_of(HUGE));
        for at in (0..len).step_by(8) {
            assert_eq!(mapping.word(at).load(Ordering::Relaxed), 0, "{len}: {at}");
        }
        let marked = || (0..len).step_by(PAGE).chain([len - 8]);
        marked().for_each(|at| mapping.word(at).store(value(at), Ordering::Relaxed));
        drop(mapping);
        for at in marked() {
            let mut word = [0; 8];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut word, at as u64).unwrap();
            assert_eq!(u64::from_ne_bytes(word), value(at), "{len}: {at}");
        }
        assert_eq!(file.metadata().unwrap().blocks(), metadata.blocks(), "a mark took memory");
    }
}

#[test]
fn mappings_are_not_in_each_others_way() {
    let Some(files) = (0..8).map(|_| file()).collect::<Option<Vec<_>>>() else { return };
    let mut mappings: Vec<_> = files.iter().map(|file| Mapping::take(file, HUGE + PAGE).unwrap()).collect();
    // What one gave back is taken by others.
    mappings.drain(2..5);
    mappings.extend(files[2..5].iter().map(|file| {
        file.set_len(0).unwrap();
        Mapping::take(file, 3 * HUGE).unwrap()
    }));
    for (number, mapping) in (1..).zip(&mappings) {
        (0..mapping.len).step_by(8).for_each(|at| mapping.word(at).store(number, Ordering::Relaxed));
    }
    for (number, mapping) in (1..).zip(&mappings) {
        assert!((0..mapping.len).step_by(8).all(|at| mapping.word(at).load(Ordering::Relaxed) == number));
    }
}

#[test]
fn what_is_no_file_of_ours_takes_no_memory() {
    let read_only = File::open("/proc/self/exe").unwrap();
    assert!(Mapping::take(&read_only, PAGE).is_err());
}
