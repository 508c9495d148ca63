//! Loom model of admission, on the real code, under the C11 memory model: while a writer holds, no reader is inside, and a
//! reader sees the whole of the last change. Taking either SeqCst fence away makes it fail. Readers do not touch each
//! other's flags, so one reader stands for all; scenes with more of them are in `model_flip.rs`.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p blkmark-bitmap --test model_admission`
#![cfg(loom)]

use blkmark_bitmap::admission::Admission;
use loom::sync::Arc;
use loom::thread;

/// Two plain numbers that are equal whenever nobody is in the middle of a change. Loom's cell notices every overlap.
type Pair = (u64, u64);

fn reader(admission: &Admission<Pair>, index: usize, rounds: usize) {
    let mut pass = admission.take_pass(index).unwrap();
    for _ in 0..rounds {
        let section = admission.enter(&mut pass);
        section.with(|pair| assert_eq!(pair.0, pair.1));
    }
    admission.return_pass(pass);
}

fn writer(admissions: &[&Admission<Pair>]) {
    let mut held = Admission::hold_all(admissions, || true).unwrap();
    for held in &mut held {
        held.with(|pair| {
            pair.0 += 1;
            pair.1 += 1;
        });
    }
}

#[test]
fn a_reader_and_a_writer_never_meet() {
    loom::model(|| {
        let admission = Arc::new(Admission::new((0, 0), 1));
        let there = Arc::clone(&admission);
        let thread = thread::spawn(move || reader(&there, 0, 2));
        writer(&[&admission]);
        thread.join().unwrap();
    });
}

#[test]
fn writers_over_the_same_disks_in_any_order_do_not_deadlock() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let a = Arc::new(Admission::new((0, 0), 1));
        let b = Arc::new(Admission::new((0, 0), 0));
        let (a2, b2) = (Arc::clone(&a), Arc::clone(&b));
        let other = thread::spawn(move || writer(&[&b2, &a2]));
        writer(&[&a, &b]);
        reader(&a, 0, 1);
        other.join().unwrap();
    });
}
