//! When operations are handed over, and what counts as under way.

use super::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn engine() -> Engine {
    let disk = Arc::new(DiskFile::null(1 << 20, false).unwrap());
    Engine::new(&disk, 64).unwrap()
}

/// Begins so many operations that go through the ring; after which of them nothing was left queued.
fn handed_over_after(engine: &mut Engine, operations: u64) -> Vec<u64> {
    (1..=operations)
        .filter(|token| {
            // SAFETY: there is no memory to it.
            assert!(unsafe { engine.begin(Operation::Sync, *token) }.unwrap().is_none());
            engine.queued == 0
        })
        .collect()
}

/// Waits for so many completions.
fn wait_for(engine: &mut Engine, count: usize) -> Vec<Completion> {
    let mut completions = Vec::new();
    while completions.len() < count {
        engine.wait(1, false).unwrap();
        engine.completions(&mut completions);
    }
    completions
}

#[test]
fn an_idle_disk_gets_the_first_operations_while_the_others_are_prepared() {
    let mut engine = engine();
    assert_eq!(handed_over_after(&mut engine, 40), [2, 4, 8, 16, 32]);
    assert_eq!((engine.queued, engine.under_way), (8, 32));
    let completions = wait_for(&mut engine, 40);
    assert_eq!((engine.queued, engine.under_way), (0, 0));
    assert!(completions.iter().all(|completion| completion.result == 0), "{completions:?}");
    // Idle again.
    assert_eq!(handed_over_after(&mut engine, 4), [2, 4]);
    wait_for(&mut engine, 4);
}

#[test]
fn one_operation_waits_for_the_call_that_waits() {
    let mut engine = engine();
    assert!(handed_over_after(&mut engine, 1).is_empty());
    wait_for(&mut engine, 1);
}

#[test]
fn a_watch_is_under_way_however_often_it_tells() {
    let mut engine = engine();
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    engine.watch(&event, 7).unwrap();
    engine.flush().unwrap();
    for _ in 0..3 {
        event.write(1).unwrap();
        let told = wait_for(&mut engine, 1);
        assert!(told.iter().all(|completion| completion.token == 7 && completion.more), "{told:?}");
        assert_eq!(engine.under_way, 1);
    }
}
