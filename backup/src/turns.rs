//! Whose turn it is on a processor: who serves the guest comes soon, who copies can wait.
//!
//! Called by threads about themselves, at their start. Both calls only ask, and neither needs a privilege: where the kernel
//! refuses, or knows no such thing, the thread is scheduled like any other. Nobody's share of the processors changes.

/// What a thread that comes soon does at a time, in nanoseconds: the least that the kernel takes. To keep a unit of old data, or
/// to answer a round of requests, takes about as long.
const SHORT: u64 = 100_000;

/// Tells the kernel that this thread does little at a time (Linux 6.12 and later): when it wakes, it takes the processor from one
/// with longer turns, instead of waiting for the end of that turn, which may be the next tick, four milliseconds away. A
/// thread that the operator gave another policy, as the real-time ones, is left alone.
pub fn come_soon() {
    const SIZE: u32 = size_of::<libc::sched_attr>() as u32;
    // SAFETY: a structure of integers, for which zeroes are a value.
    let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes at most SIZE bytes to `attr`, about the calling thread.
    let known = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, SIZE, 0) } == 0;
    if known && attr.sched_policy == libc::SCHED_OTHER as u32 {
        // All else as it was: with the niceness that this thread has.
        attr.size = SIZE;
        attr.sched_runtime = SHORT;
        // SAFETY: the kernel reads SIZE bytes of `attr`. If it refuses, nothing changes.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
    }
}

/// Tells the kernel that this thread is in no hurry: it does not push others off a processor when it wakes, and where the
/// disk has a scheduler that knows priorities its requests come after the guest's. It keeps its share of the processors.
pub(crate) fn yield_to_others() {
    /// `IOPRIO_WHO_PROCESS` with id 0 is this thread; class 2 is best effort, 7 its lowest level (linux/ioprio.h).
    const WHO_THREAD: libc::c_int = 1;
    const LOWEST: libc::c_int = 2 << 13 | 7;
    let ordinary = libc::sched_param { sched_priority: 0 };
    // SAFETY: two calls about the calling thread; the first reads one sched_param. Where they are refused, nothing changes.
    unsafe {
        libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const ordinary);
        libc::syscall(libc::SYS_ioprio_set, WHO_THREAD, 0, LOWEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attr() -> libc::sched_attr {
        // SAFETY: as above.
        let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let result = unsafe {
            libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size_of::<libc::sched_attr>() as u32, 0)
        };
        assert_eq!(result, 0);
        attr
    }

    #[test]
    fn who_comes_soon_has_short_turns_and_stays_as_nice() {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: about the calling thread.
                assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 7) }, 0);
                let before = attr();
                come_soon();
                let after = attr();
                assert_eq!((after.sched_policy, after.sched_nice), (libc::SCHED_OTHER as u32, 7));
                // Kernels before 6.12 know no turns of a length of its own, and say 0.
                assert!(after.sched_runtime == SHORT || before.sched_runtime == 0, "{}", after.sched_runtime);
            });
        });
    }

    #[test]
    fn another_policy_is_left_alone() {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                yield_to_others();
                let before = attr();
                come_soon();
                let after = attr();
                assert_eq!(after.sched_policy, libc::SCHED_BATCH as u32);
                assert_eq!(after.sched_runtime, before.sched_runtime);
            });
        });
    }
}
