//! The promise: a daemon that was taken over can do little. A thread of the running daemon is hijacked and made to try what an
//! intruder would; with the sandbox off the same attempts succeed, so it is the sandbox that refuses them. It is on unless told
//! otherwise, in every thread, and it is told which parts are. The sockets are for their owner alone.
//!
//! Needs root and a kernel with seccomp and landlock.

#[cfg(target_arch = "x86_64")]
mod hijack;

use blkmark::lockdown::{Rules, apply};
use blkmark_backup::control::Confinement;
use blkmark_backup::qmp::Client;
use io_uring::{IoUring, opcode, types};
use serde_json::json;
use std::ffi::CString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

struct Lab {
    directory: tempfile::TempDir,
}

impl Lab {
    /// A disk; a directory that clients may use, with a link out of it; a secret outside.
    fn new() -> Self {
        let lab = Self { directory: tempfile::tempdir().unwrap() };
        for directory in ["disks", "allowed", "outside", "run"] {
            fs::create_dir(lab.path(directory)).unwrap();
        }
        fs::File::create(lab.path("disks/d")).unwrap().set_len(1 << 20).unwrap();
        fs::write(lab.path("allowed/file"), "allowed").unwrap();
        fs::write(lab.path("outside/secret"), "secret").unwrap();
        symlink(lab.path("outside"), lab.path("allowed/link")).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn serve(&self, more: &[&str]) -> Daemon {
        let disk = format!("id=d,path={},socket={}", self.text("disks/d"), self.text("run/v"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_blkmark"));
        command.args([
            "serve",
            "--disk",
            &disk,
            "--control",
            &self.text("run/c"),
            "--allow-path",
            &self.text("allowed"),
        ]);
        command.args(more).stdout(Stdio::piped());
        // Whatever becomes of this test, the daemon does not outlive it.
        // SAFETY: one system call in the child.
        unsafe {
            command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            })
        };
        let mut child = command.spawn().unwrap();
        let mut ready = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut ready).unwrap();
        assert!(ready.contains("ready"), "{ready:?}");
        Daemon { child, control: self.path("run/c") }
    }
}

struct Daemon {
    child: Child,
    control: PathBuf,
}

impl Daemon {
    fn client(&self) -> Client {
        Client::connect(&self.control).unwrap()
    }

    /// Of each thread.
    fn status(&self, field: &str) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let value = |path: PathBuf| {
            let text = fs::read_to_string(path.join("status")).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
            line.trim().to_owned()
        };
        threads.map(|thread| value(thread.unwrap().path())).collect()
    }

    /// It still serves, and ends as it should.
    fn ends_well(mut self) {
        self.client().execute("query-block", json!(null)).unwrap();
        self.client().execute("quit", json!(null)).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What an intruder tries, and how it ends; a result that is no error counts as 0.
#[cfg(target_arch = "x86_64")]
fn attempts(lab: &Lab, daemon: &Daemon) -> Vec<(&'static str, i32)> {
    let hijacked = hijack::Hijacked::take(daemon.child.id());
    let here = libc::AT_FDCWD as u64;
    let mut outcomes = Vec::new();
    let mut tried = |name, result: i64| outcomes.push((name, (-result.min(0)) as i32));
    let call = |number, arguments: &[u64]| {
        let mut six = [0; 6];
        six[..arguments.len()].copy_from_slice(arguments);
        hijacked.call(number, six)
    };
    let open = |path: &str, flags: i32| call(libc::SYS_openat, &[here, hijacked.text(path), flags as u64, 0o600]);

    tried("open what is allowed", open(&lab.text("allowed/file"), libc::O_RDWR));
    tried("make what is allowed", open(&lab.text("allowed/new"), libc::O_RDWR | libc::O_CREAT));
    tried("open the disk", open(&lab.text("disks/d"), libc::O_RDWR));

    tried("read outside", open(&lab.text("outside/secret"), libc::O_RDONLY));
    tried("read through a link", open(&lab.text("allowed/link/secret"), libc::O_RDONLY));
    tried("make outside", open(&lab.text("outside/made"), libc::O_RDWR | libc::O_CREAT));
    tried("read /etc/shadow", open("/etc/shadow", libc::O_RDONLY));

    let nowhere = hijacked.text("/no/such/program");
    tried("execute", call(libc::SYS_execve, &[nowhere, 0, 0]));
    let magic = 1; // Not one that reboots anything.
    tried("reboot", call(libc::SYS_reboot, &[magic, magic, 0]));
    tried("mount", call(libc::SYS_mount, &[nowhere, nowhere, nowhere, 0, 0]));
    tried("trace", call(libc::SYS_ptrace, &[u64::from(libc::PTRACE_ATTACH), i32::MAX as u64, 0, 0]));
    tried("bpf", call(libc::SYS_bpf, &[9999, 0, 0]));
    tried("leave the namespaces", call(libc::SYS_unshare, &[libc::CLONE_NEWUTS as u64]));
    tried("signal init", call(libc::SYS_kill, &[1, 0]));
    tried("a packet socket", call(libc::SYS_socket, &[libc::AF_PACKET as u64, libc::SOCK_DGRAM as u64, 0]));
    tried("a raw socket", call(libc::SYS_socket, &[libc::AF_INET as u64, libc::SOCK_RAW as u64, 1]));
    let device = lab.text("allowed/device");
    tried("make a device", call(libc::SYS_mknodat, &[here, hijacked.text(&device), 0o20600, 0x103]));
    let inside = lab.text("allowed/planted");
    tried("plant a link", call(libc::SYS_symlinkat, &[hijacked.text(&inside), here, hijacked.text(&inside)]));
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let everything = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u64;
    let mapped = call(libc::SYS_mmap, &[0, 4096, everything, anonymous, u64::MAX, 0]);
    tried("memory to execute", mapped);
    outcomes
}

/// Allowed with the sandbox, and how many attempts there are before the others.
#[cfg(target_arch = "x86_64")]
const ALLOWED: usize = 3;

#[test]
#[cfg(target_arch = "x86_64")]
fn a_hijacked_daemon_gets_nothing_that_it_does_not_need() {
    let lab = Lab::new();
    let daemon = lab.serve(&[]);
    for (at, (name, errno)) in attempts(&lab, &daemon).into_iter().enumerate() {
        match at {
            0..ALLOWED => assert_eq!(errno, 0, "{name}"),
            _ => assert!(matches!(errno, libc::EPERM | libc::EACCES), "{name}: {errno}"),
        }
    }
    daemon.ends_well();
}

/// Otherwise the test above would tell nothing.
#[test]
#[cfg(target_arch = "x86_64")]
fn without_the_sandbox_the_same_attempts_are_not_refused() {
    let lab = Lab::new();
    let daemon = lab.serve(&["--sandbox", "off"]);
    for (name, errno) in attempts(&lab, &daemon) {
        assert!(!matches!(errno, libc::EPERM | libc::EACCES), "{name}: {errno}");
    }
    assert!(daemon.status("Seccomp").iter().all(|mode| mode == "0"));
    daemon.ends_well();
}

/// And seccomp alone what is not about files.
#[test]
#[cfg(target_arch = "x86_64")]
fn landlock_alone_refuses_to_execute_and_what_lies_outside() {
    let lab = Lab::new();
    let daemon = lab.serve(&["--sandbox", "landlock"]);
    {
        let hijacked = hijack::Hijacked::take(daemon.child.id());
        let program = hijacked.text("/bin/true");
        assert_eq!(hijacked.call(libc::SYS_execve, [program, 0, 0, 0, 0, 0]), -i64::from(libc::EACCES));
        let secret = hijacked.text(&lab.text("outside/secret"));
        let opened = hijacked.call(libc::SYS_openat, [libc::AT_FDCWD as u64, secret, 0, 0, 0, 0]);
        assert_eq!(opened, -i64::from(libc::EACCES));
    }
    let told = daemon.client().execute("query-sandbox", json!(null)).unwrap();
    assert_eq!(told, json!({ "seccomp": "off", "landlock": "on", "paths": "allowed-paths" }));
    daemon.ends_well();
}

#[test]
fn every_thread_is_locked_down_also_those_of_a_job_and_it_is_told() {
    let lab = Lab::new();
    let daemon = lab.serve(&[]);
    let mut client = daemon.client();
    let told = client.execute("query-sandbox", json!(null)).unwrap();
    assert_eq!(told, json!({ "seccomp": "on", "landlock": "on", "paths": "allowed-paths" }));
    let before = daemon.status("Seccomp").len();
    let backup = json!({ "device": "d", "target": lab.text("allowed/t"), "format": "raw", "sync": "full", "speed": 1 });
    client.execute("drive-backup", backup).unwrap();
    let modes = daemon.status("Seccomp");
    assert!(modes.len() > before && modes.iter().all(|mode| mode == "2"), "{modes:?}");
    assert!(daemon.status("NoNewPrivs").iter().all(|set| set == "1"));
    daemon.ends_well();
}

#[test]
fn what_a_client_names_outside_of_the_allowed_paths_is_refused() {
    let lab = Lab::new();
    let daemon = lab.serve(&[]);
    let mut client = daemon.client();
    for target in ["outside/t", "allowed/../outside/t", "allowed/link/t", "disks/t"] {
        let backup = json!({ "device": "d", "target": lab.text(target), "format": "raw", "sync": "full" });
        let error = client.execute("drive-backup", backup).unwrap_err().to_string();
        assert!(error.contains("not below an allowed directory"), "{target}: {error}");
    }
    for directory in ["outside", "disks"] {
        assert!(!lab.path(directory).join("t").exists());
    }
    let backup = json!({ "device": "d", "target": lab.text("allowed/t"), "format": "raw", "sync": "full" });
    client.execute("drive-backup", backup).unwrap();
    daemon.ends_well();
}

#[test]
fn sockets_are_for_their_owner_alone_in_directories_that_nobody_else_can_change() {
    let lab = Lab::new();
    let daemon = lab.serve(&[]);
    for socket in ["run/v", "run/c"] {
        let mode = fs::symlink_metadata(lab.path(socket)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{socket}");
    }
    daemon.ends_well();
    for socket in ["run/v", "run/c"] {
        assert!(!lab.path(socket).exists(), "{socket} stays");
    }
    fs::create_dir(lab.path("open")).unwrap();
    fs::set_permissions(lab.path("open"), fs::Permissions::from_mode(0o777)).unwrap();
    for (disk, control) in [("open/v", "run/c"), ("run/v", "open/c")] {
        let disk = format!("id=d,path={},socket={}", lab.text("disks/d"), lab.text(disk));
        let arguments = ["serve", "--disk", &disk, "--control", &lab.text(control)];
        let output = Command::new(env!("CARGO_BIN_EXE_blkmark")).args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("writable by everybody and not sticky"), "{said}");
    }
}

/// Which operations of io_uring are no system calls, so only landlock stands in their way.
#[test]
fn io_uring_opens_nothing_outside() {
    let lab = Lab::new();
    // A process of its own, since what is given up does not come back.
    let test = ["--exact", "inside_a_process_of_its_own", "--ignored", "--nocapture"];
    let output = Command::new(std::env::current_exe().unwrap())
        .args(test)
        .env("BLKMARK_TEST_LAB", lab.directory.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "run by the test above"]
fn inside_a_process_of_its_own() {
    let lab = PathBuf::from(std::env::var_os("BLKMARK_TEST_LAB").unwrap());
    let mut ring = IoUring::new(4).unwrap();
    assert!(open(&mut ring, &lab.join("outside/secret")) >= 0, "it can be opened before");
    let roots = vec![lab.join("allowed")];
    let sandbox = apply(&Rules { seccomp: true, landlock: true, roots, ..Rules::default() });
    assert_eq!(sandbox.seccomp, Confinement::On);
    // The test's own first thread is not limited by landlock, and it is told.
    assert_eq!(sandbox.landlock, Confinement::Partial);
    assert!(open(&mut ring, &lab.join("allowed/file")) >= 0);
    for secret in ["outside/secret", "allowed/link/secret", "allowed/../outside/secret"] {
        assert_eq!(open(&mut ring, &lab.join(secret)), -libc::EACCES, "{secret}");
    }
    // Nor does a path that is changed between a check and its use lead out.
    fs::rename(lab.join("outside/secret"), lab.join("allowed/secret")).unwrap_err();
    assert!(Command::new("/bin/true").status().is_err(), "a process was started");
    assert!(std::net::TcpStream::connect("127.0.0.1:1").is_err_and(|e| e.raw_os_error() == Some(libc::EPERM)));
    std::thread::spawn(|| ()).join().unwrap();
}

fn open(ring: &mut IoUring, path: &Path) -> i32 {
    let path = CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    let entry = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).flags(libc::O_RDONLY).build();
    // SAFETY: the path lives until the operation is over, below.
    unsafe { ring.submission().push(&entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}
