//! How the tests of each crate replay the corpora of its targets. The modules `fuzzing` of the crates take it in by its path.

/// Replays every file of a target's corpus. What a fuzzer found once stays found.
pub fn replay(target: &str, run: fn(&[u8])) {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus");
    let mut replayed = 0;
    for entry in std::fs::read_dir(format!("{corpus}/{target}")).unwrap() {
        let path = entry.unwrap().path();
        println!("{}", path.display());
        run(&std::fs::read(&path).unwrap());
        replayed += 1;
    }
    assert!(replayed > 0, "no corpus for {target}");
    run(&[]);
}
