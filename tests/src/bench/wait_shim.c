/* Lets a program that waits in io_uring_enter run under valgrind, which holds its one big lock in that call and so would
 * keep all other threads from running: the wait is made of poll, which it knows to block. A ring of deferred completions wakes
 * nobody in poll, hence the timeout. Rings are not registered, since poll needs their descriptors. Preloaded by the benchmark's instruction count alone; never part of blkmark. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/syscall.h>

#define GETEVENTS 1u
#define REGISTER_RING_FDS 20u

long syscall(long number, ...)
{
    static long (*next)(long, ...);
    long a[6];
    va_list list;

    va_start(list, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(list, long);
    va_end(list);
    if (!next)
        next = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_io_uring_register && (unsigned)a[1] == REGISTER_RING_FDS) {
        errno = EINVAL;
        return -1;
    }
    if (number != SYS_io_uring_enter || (unsigned)a[2] == 0)
        return next(number, a[0], a[1], a[2], a[3], a[4], a[5]);
    long done = next(number, a[0], a[1], 0L, a[3] | GETEVENTS, a[4], a[5]);
    struct pollfd ring = {.fd = (int)a[0], .events = POLLIN};
    for (int ready = 0; done >= 0 && ready == 0;) {
        ready = poll(&ring, 1, 1);
        next(number, a[0], 0L, 0L, a[3] | GETEVENTS, a[4], a[5]);
    }
    return done;
}
