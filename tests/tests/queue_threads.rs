//! The promises about queue threads: they stay where the operator puts them, they do not keep a processor from others when
//! there is nothing to do, and what the file system cannot take is an error of that request and of nothing else.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Disk as GuestDisk, Guest, Options};
use blkmark_tests::bench::cpu::process_time;
use blkmark_tests::daemon::blkmark_binary;
use blkmark_tests::lab::{Lab, MIB};
use blkmark_tests::process::Process;
use blkmark_tests::small_fs::SmallFileSystem;

/// A daemon with one disk of these options, and the disk's socket.
fn serve(lab: &Lab, options: &str) -> Result<(Process, std::path::PathBuf)> {
    let socket = lab.path("drive0.sock");
    let mut command = Command::new(blkmark_binary()?);
    let disk = format!("id=drive0,socket={},{options}", socket.display());
    command.args(["serve", "--disk", &disk]).stdin(Stdio::null());
    let mut process = lab.start("blkmark", &mut command)?;
    process.first_line()?;
    Ok((process, socket))
}

fn guest(socket: &Path) -> Result<GuestDisk> {
    Ok(Guest::connect(socket, Options::default())?.into_disk()?)
}

fn path_option(path: &Path) -> String {
    format!("path={}", path.display())
}

/// The processors that the thread of this name may use, as the kernel lists them.
fn processors(pid: u32, name: &str) -> Result<String> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = fs::read_to_string(task?.path().join("status"))?;
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        if field("Name:") == Some(name) {
            return Ok(field("Cpus_allowed_list:").context("no Cpus_allowed_list")?.to_owned());
        }
    }
    anyhow::bail!("the daemon has no thread {name}")
}

#[test]
fn a_queue_thread_stays_on_its_processor() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", MIB)?;
    let (process, socket) = serve(&lab, &format!("{},queues=2,cpus=0", path_option(&disk.path)))?;
    let mut guest = Guest::connect(&socket, Options { queues: 2, ..Options::default() })?;
    for queue in guest.take_queues() {
        GuestDisk::new(queue, None).write_at(&[1; 512], 0)?;
    }
    for thread in ["drive0-0", "drive0-1"] {
        ensure!(processors(process.pid(), thread)? == "0", "{thread} may run elsewhere");
    }
    Ok(())
}

/// How long a turn on a processor the thread of this name has, in nanoseconds; 0 where the kernel knows no such thing.
fn turn(pid: u32, name: &str) -> Result<u64> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        if fs::read_to_string(path.join("comm"))?.trim() != name {
            continue;
        }
        let id: i32 = path.file_name().and_then(|id| id.to_str()).context("no id")?.parse()?;
        // SAFETY: a structure of integers, for which zeroes are a value.
        let mut attr: libc::sched_attr = unsafe { std::mem::zeroed() };
        let size = size_of::<libc::sched_attr>() as u32;
        // SAFETY: the kernel writes at most `size` bytes to `attr`.
        let result = unsafe { libc::syscall(libc::SYS_sched_getattr, id, &raw mut attr, size, 0) };
        ensure!(result == 0, "sched_getattr: {}", std::io::Error::last_os_error());
        return Ok(attr.sched_runtime);
    }
    anyhow::bail!("the daemon has no thread {name}")
}

#[test]
fn a_queue_thread_has_shorter_turns_than_others_though_it_is_locked_down() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", MIB)?;
    let (process, socket) = serve(&lab, &path_option(&disk.path))?;
    let mut guest = guest(&socket)?;
    guest.write_at(&[1; 512], 0)?;
    let (queue, session) = (turn(process.pid(), "drive0-0")?, turn(process.pid(), "vu-drive0")?);
    // Kernels before 6.12 say 0 of all.
    ensure!(session == 0 || queue < session, "turns of {queue} and {session} ns");
    Ok(())
}

#[test]
fn a_thread_that_looks_around_falls_asleep() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", MIB)?;
    let (process, socket) = serve(&lab, &format!("{},poll=1000", path_option(&disk.path)))?;
    let mut guest = guest(&socket)?;
    let mut bytes = [0; 4096];
    for round in 0..200u64 {
        let at = round * 4096 % MIB;
        guest.write_at(&[round as u8; 4096], at)?;
        guest.read_at(&mut bytes, at)?;
        ensure!(bytes == [round as u8; 4096], "byte {at}");
    }
    // Long enough to tell an idle thread from a busy one, whoever else is at work on this machine: a thread that spins uses all
    // that it can get, one that sleeps uses next to nothing.
    let (began, before) = (Instant::now(), process_time(process.pid())?);
    std::thread::sleep(Duration::from_millis(500));
    let (used, lasted) = (process_time(process.pid())?.saturating_sub(before), began.elapsed());
    ensure!(used < lasted / 20, "an idle daemon used {used:?} of {lasted:?}");
    Ok(())
}

#[test]
fn a_file_system_in_memory_that_is_full_fails_the_write_alone() -> Result<()> {
    let lab = Lab::new()?;
    let memory = SmallFileSystem::mount(4 * MIB)?;
    let path = memory.folder().join("drive0.raw");
    fs::File::create_new(&path)?.set_len(16 * MIB)?;
    let (_process, socket) = serve(&lab, &path_option(&path))?;
    let mut guest = guest(&socket)?;
    let chunk = vec![7; 64 << 10];
    let failed = (0..16 * MIB).step_by(64 << 10).find(|at| guest.write_at(&chunk, *at).is_err());
    let failed = failed.context("16 MiB fit into 4")?;
    ensure!((2 * MIB..=4 * MIB).contains(&failed), "the write at {failed} failed");
    let mut bytes = vec![0; 64 << 10];
    guest.read_at(&mut bytes, 0)?;
    ensure!(bytes == chunk, "what was written before is gone");
    // A hole reads as zeroes and takes no room.
    guest.read_at(&mut bytes, 12 * MIB)?;
    ensure!(bytes.iter().all(|byte| *byte == 0));
    guest.write_at(&chunk, 0)?;
    guest.flush()?;
    Ok(())
}

#[test]
fn a_null_disk_answers_and_keeps_nothing() -> Result<()> {
    let lab = Lab::new()?;
    let (_process, socket) = serve(&lab, "null=1G")?;
    let mut guest = guest(&socket)?;
    ensure!(guest.size() == 1 << 30);
    guest.write_at(&[7; 4096], 8192)?;
    guest.flush()?;
    guest.write_zeroes(0, 4096, false)?;
    ensure!(guest.write_at(&[7; 512], 1 << 30).is_err(), "a write beyond its end");
    Ok(())
}
