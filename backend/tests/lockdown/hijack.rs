//! A thread of the daemon, taken over as code that a guest smuggled in would have it: it makes the system calls that it is told
//! to. Done with ptrace by the parent process, which is outside of the daemon's sandbox.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

/// `syscall`.
const INSTRUCTION: [u8; 2] = [0x0f, 0x05];

/// Room below the stack for what arguments point to.
const BELOW: u64 = 64 << 10;

pub struct Hijacked {
    pid: i32,
    before: libc::user_regs_struct,
}

fn request(request: libc::c_uint, pid: i32, data: *mut libc::c_void) -> libc::c_long {
    // SAFETY: requests about another process; `data` is null or registers that live during the call.
    unsafe { libc::ptrace(request, pid, std::ptr::null_mut::<libc::c_void>(), data) }
}

fn stopped(pid: i32) {
    let mut status = 0;
    // SAFETY: writes one int.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    assert!(waited == pid && libc::WIFSTOPPED(status), "the daemon ended: {status:#x}");
}

fn registers(pid: i32) -> libc::user_regs_struct {
    // SAFETY: plain numbers.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    assert_eq!(request(libc::PTRACE_GETREGS, pid, (&raw mut registers).cast()), 0);
    registers
}

impl Hijacked {
    /// Takes over the first thread of `pid` at a moment when it waits in a system call.
    pub fn take(pid: u32) -> Self {
        let pid = pid as i32;
        for _ in 0..1000 {
            let error = std::io::Error::last_os_error;
            assert_eq!(request(libc::PTRACE_ATTACH, pid, std::ptr::null_mut()), 0, "{}", error());
            stopped(pid);
            let before = registers(pid);
            let hijacked = Self { pid, before };
            let mut at = [0; 2];
            if hijacked.memory().read_exact_at(&mut at, before.rip - 2).is_ok() && at == INSTRUCTION {
                return hijacked;
            }
        }
        panic!("the thread is never in a system call");
    }

    fn memory(&self) -> std::fs::File {
        OpenOptions::new().read(true).write(true).open(format!("/proc/{}/mem", self.pid)).unwrap()
    }

    /// Makes a system call: its result, or minus its errno.
    pub fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> i64 {
        let mut now = self.before;
        [now.rdi, now.rsi, now.rdx, now.r10, now.r8, now.r9] = arguments;
        now.rip -= 2;
        now.rax = number as u64;
        // Not a system call that is to be started again.
        now.orig_rax = u64::MAX;
        assert_eq!(request(libc::PTRACE_SETREGS, self.pid, (&raw mut now).cast()), 0);
        assert_eq!(request(libc::PTRACE_SINGLESTEP, self.pid, std::ptr::null_mut()), 0);
        stopped(self.pid);
        registers(self.pid).rax as i64
    }

    /// Puts a text where the daemon can read it: its address there. The next text takes its place.
    pub fn text(&self, text: &str) -> u64 {
        let at = self.before.rsp - BELOW;
        self.memory().write_all_at(format!("{text}\0").as_bytes(), at).unwrap();
        at
    }
}

impl Drop for Hijacked {
    /// The thread goes on where it was.
    fn drop(&mut self) {
        let mut before = self.before;
        request(libc::PTRACE_SETREGS, self.pid, (&raw mut before).cast());
        request(libc::PTRACE_DETACH, self.pid, std::ptr::null_mut());
    }
}
