//! What may be asked of the kernel, by seccomp: a list of what the daemon does, and nothing else.
//!
//! Not on it, among others: executing, starting processes, tracing, other users and namespaces, mounting, modules, bpf, reboot,
//! device nodes, links and permissions by name, raw and packet sockets, making memory executable. A call that is not on the list
//! fails with EPERM and is told to the kernel's log (`type=1326 … syscall=N`); the process goes on. Killing it would be safer for
//! the host by a little and worse for the guests' data by a lot, since a rare path of a library is the likelier cause.
//!
//! The list is proven by the test suite, all of which runs under it. What io_uring does is not seen here: see `files`.

use rustix::io::Errno;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BpfProgram, SeccompAction, SeccompCondition, SeccompFilter, SeccompRule, sock_filter};
use std::collections::BTreeMap;
use std::io;
use thiserror::Error;

/// Why there is no filter.
#[derive(Debug, Error)]
pub(super) enum FilterError {
    #[error("the filter cannot be made: {0}")]
    Make(#[from] seccompiler::BackendError),
    #[error("the kernel does not take the filter: {0}")]
    Install(io::Error),
}

/// Allowed, whatever the arguments.
const FREE: &[libc::c_long] = &[
    // Descriptors and their contents.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_pipe2,
    libc::SYS_eventfd2,
    libc::SYS_memfd_create,
    // Files. Which ones is landlock's affair.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_newfstatat,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_linkat,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_utimensat,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_msync,
    libc::SYS_mlock,
    libc::SYS_munlock,
    libc::SYS_brk,
    libc::SYS_membarrier,
    // Threads, signals to them, time.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_getattr,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_getrandom,
    libc::SYS_getcpu,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigpending,
    libc::SYS_sigaltstack,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Sockets that exist.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvmmsg,
];

/// Older forms that younger machines do not have.
#[cfg(target_arch = "x86_64")]
const FREE_HERE: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_readlink,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_poll,
    libc::SYS_select,
    libc::SYS_epoll_wait,
    libc::SYS_dup2,
    libc::SYS_time,
    libc::SYS_arch_prctl,
];
#[cfg(not(target_arch = "x86_64"))]
const FREE_HERE: &[libc::c_long] = &[];

/// What may be asked of descriptors: of sockets, terminals, block devices, and of files that share blocks.
const IOCTLS: &[u64] = &[
    libc::FIONREAD,
    libc::FIONBIO,
    libc::FIOCLEX,
    libc::TIOCOUTQ,
    libc::TCGETS,
    0x8008_1272, // BLKGETSIZE64
    0x1268,      // BLKSSZGET
    0x127b,      // BLKPBSZGET
    0x1277,      // BLKDISCARD
    0x127f,      // BLKZEROOUT
    0x4004_9409, // FICLONE
    0x4020_940d, // FICLONERANGE
];

/// Of ioprio_set: a thread.
const IOPRIO_WHO_PROCESS: u64 = 1;

fn argument(
    number: u8,
    len: seccompiler::SeccompCmpArgLen,
    op: seccompiler::SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, FilterError> {
    Ok(SeccompCondition::new(number, len, op, value)?)
}

fn all_of(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, FilterError> {
    Ok(SeccompRule::new(conditions)?)
}

/// Allowed with some arguments: any of a call's rules suffices.
fn conditional(network: bool) -> Result<Vec<(libc::c_long, Vec<SeccompRule>)>, FilterError> {
    let is = |number, value: u64| argument(number, Dword, Eq, value);
    let has_not = |number, bit: libc::c_int| argument(number, Dword, MaskedEq(bit as u64), 0);
    let one = |condition| all_of(vec![condition]);

    let mut sockets = vec![one(is(0, libc::AF_UNIX as u64)?)?];
    if network {
        for domain in [libc::AF_INET, libc::AF_INET6] {
            // Datagrams ask for names.
            for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
                let kind = argument(1, Dword, MaskedEq(0xf), kind as u64)?;
                sockets.push(all_of(vec![is(0, domain as u64)?, kind])?);
            }
        }
    }
    let options = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_VMA];
    let options = options.iter().map(|option| one(is(0, *option as u64)?)).collect::<Result<_, _>>()?;
    let ioctls = IOCTLS.iter().map(|request| one(is(1, *request)?)).collect::<Result<_, _>>()?;
    let itself = u64::from(std::process::id());
    let thread = libc::CLONE_THREAD as u64;
    Ok(vec![
        (libc::SYS_socket, sockets),
        (libc::SYS_socketpair, vec![one(is(0, libc::AF_UNIX as u64)?)?]),
        (libc::SYS_ioctl, ioctls),
        (libc::SYS_prctl, options),
        // Threads, not processes.
        (libc::SYS_clone, vec![one(argument(0, Qword, MaskedEq(thread), thread)?)?]),
        (libc::SYS_tgkill, vec![one(is(0, itself)?)?]),
        // How the calling thread is scheduled, not others.
        (libc::SYS_sched_setscheduler, vec![one(is(0, 0)?)?]),
        (libc::SYS_sched_setattr, vec![one(is(0, 0)?)?]),
        (libc::SYS_ioprio_set, vec![all_of(vec![is(0, IOPRIO_WHO_PROCESS)?, is(1, 0)?])?]),
        // Reading limits; setting them takes a pointer.
        (libc::SYS_prlimit64, vec![one(argument(2, Qword, Eq, 0)?)?]),
        // Memory is written or executed: libraries that resolve names are mapped, not made.
        (libc::SYS_mmap, vec![one(has_not(2, libc::PROT_EXEC)?)?, one(has_not(2, libc::PROT_WRITE)?)?]),
        (libc::SYS_mprotect, vec![one(has_not(2, libc::PROT_EXEC)?)?]),
    ])
}

/// Restricts all threads of this process, and those that they start.
pub(super) fn restrict(network: bool) -> Result<(), FilterError> {
    let arch = || std::env::consts::ARCH.try_into();
    // The arguments of clone3 lie in memory, where a filter cannot see them. C libraries go back to clone if there is no
    // clone3, and only then. Of two filters the stricter one wins, and this one has to be there first.
    let errno = SeccompAction::Errno(Errno::NOSYS.raw_os_error() as u32);
    let no_clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let no_clone3 = SeccompFilter::new(no_clone3, SeccompAction::Allow, errno, arch()?)?;

    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    allowed.extend(FREE.iter().chain(FREE_HERE).map(|call| (*call, Vec::new())));
    allowed.extend(conditional(network)?);
    let errno = SeccompAction::Errno(Errno::PERM.raw_os_error() as u32);
    let allowed = SeccompFilter::new(allowed, errno, SeccompAction::Allow, arch()?)?;
    install(&no_clone3.try_into()?, 0)?;
    install(&allowed.try_into()?, libc::SECCOMP_FILTER_FLAG_LOG)
}

/// `seccompiler` has no way to ask for the log.
fn install(program: &BpfProgram, flags: libc::c_ulong) -> Result<(), FilterError> {
    rustix::thread::set_no_new_privs(true).map_err(|errno| FilterError::Install(errno.into()))?;
    let filter: *const sock_filter = program.as_ptr();
    // A filter has at most 4096 instructions.
    let program = libc::sock_fprog { len: program.len() as libc::c_ushort, filter: filter.cast_mut().cast() };
    let flags = flags | libc::SECCOMP_FILTER_FLAG_TSYNC;
    // SAFETY: the program is a list of `len` instructions in the kernel's own layout, which the kernel copies and checks. It
    // changes nothing but what later system calls are answered.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    match result {
        0 => Ok(()),
        -1 => Err(FilterError::Install(io::Error::last_os_error())),
        thread => Err(FilterError::Install(io::Error::other(format!("thread {thread} has filters of its own")))),
    }
}
