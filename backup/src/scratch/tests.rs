//! Whose files go when.

use super::*;
use crate::source::FileId;

fn haven(directory: &Path) -> Haven {
    let disk = FileId { device: 1, inode: 2 };
    Haven::new(&[directory, Path::new("/dev/shm")], directory, directory, disk, Uuid::new_v4()).unwrap()
}

#[test]
fn an_end_takes_away_the_scratch_that_somebody_still_has_and_nobody_elses() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let names = || {
        let mut names: Vec<_> = directory.path().read_dir().unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let settings = ScratchSettings { directory: directory.path().to_owned(), cap: 1 << 20, memory: 1 << 20 };
    // Two daemons that serve the same disk, which is read-only.
    let (ours, theirs) = (haven(directory.path()), haven(directory.path()));
    let _their_scratch = Scratch::new(ScratchFiles::open(&settings, Some(&theirs)).unwrap(), &settings, 4096);
    let of_theirs = names();
    let scratch = Scratch::new(ScratchFiles::open(&settings, Some(&ours)).unwrap(), &settings, 4096);
    let gone = Scratch::new(ScratchFiles::open(&settings, Some(&ours)).unwrap(), &settings, 4096);
    assert_eq!(names().len(), 3 * of_theirs.len());
    drop(gone);
    let kept = scratch.keep(&[7; 4096]).unwrap();
    ours.let_all_go();
    assert_eq!(names(), of_theirs);
    // What is open goes on, and is not missed when it goes.
    let mut back = [0; 4096];
    kept.load(&mut back).unwrap();
    assert_eq!(back, [7; 4096]);
    drop((scratch, kept));
    assert_eq!(names(), of_theirs);
}
