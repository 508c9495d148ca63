//! Processor time, memory and processor affinity: what the benchmark asks of the kernel.

use std::io;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Processor time that a process has used so far, user and system, all its threads together (io_uring workers and
/// threads that have ended included), to the nanosecond.
pub fn process_time(pid: u32) -> Result<Duration> {
    let pid = libc::pid_t::try_from(pid).context("no such process id")?;
    let mut clock = 0;
    // SAFETY: the call writes one clock id to a valid place.
    let errno = unsafe { libc::clock_getcpuclockid(pid, &mut clock) };
    if errno != 0 {
        return Err(io::Error::from_raw_os_error(errno)).context("cannot find the server's processor clock");
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec to a valid place.
    if unsafe { libc::clock_gettime(clock, &mut time) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot read the server's processor clock");
    }
    let (Ok(seconds), Ok(nanos)) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec)) else {
        bail!("the server's processor clock runs backwards");
    };
    Ok(Duration::new(seconds, nanos))
}

/// Bytes of memory that a process shares with nobody; what it maps of a guest's it shares with the guest.
pub fn private_memory(pid: u32) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("cannot read the server's maps")?;
    let kib = |line: &str| line.strip_prefix("Private_")?.split_whitespace().nth(1)?.parse::<u64>().ok();
    Ok(text.lines().filter_map(kib).sum::<u64>() << 10)
}

/// Processor time of all children of this process that have ended and were waited for.
pub fn children_time() -> Result<Duration> {
    // SAFETY: all zeroes is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the call writes one rusage to a valid place.
    if unsafe { libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage) } != 0 {
        return Err(io::Error::last_os_error()).context("cannot read the processor time of children");
    }
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    Ok(time(usage.ru_utime) + time(usage.ru_stime))
}

/// Time that all processors of the machine have been busy so far, all together, in steps of a clock tick; time that a
/// hypervisor took away counts as busy, waiting for a disk does not.
pub fn machine_time() -> Result<Duration> {
    let text = std::fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    // cpu user nice system idle iowait irq softirq steal (guest time is in user already)
    let fields: Vec<u64> = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("cpu "))
        .map(|rest| rest.split_whitespace().map_while(|field| field.parse().ok()).collect())
        .unwrap_or_default();
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields[..] else {
        bail!("/proc/stat has no line of all processors");
    };
    let ticks = user + nice + system + irq + softirq + steal;
    Ok(Duration::from_secs_f64(ticks as f64 / rustix::param::clock_ticks_per_second() as f64))
}

/// A list of processors, as `0` or `0,2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

impl Cpus {
    fn parse(text: &str) -> Result<Self> {
        let list = text
            .split(',')
            .map(|part| part.parse::<usize>().with_context(|| format!("`{part}` is no processor number")))
            .collect::<Result<Vec<_>>>()?;
        if let Some(beyond) = list.iter().find(|&&cpu| cpu >= CpuSet::MAX_CPU) {
            bail!("there is no processor {beyond}");
        }
        Ok(Cpus(list))
    }

    fn set(&self) -> CpuSet {
        let mut set = CpuSet::new();
        for &cpu in &self.0 {
            set.set(cpu);
        }
        set
    }

    /// The processor of the `index`th thread.
    pub fn one(&self, index: usize) -> Cpus {
        Cpus(self.0.get(index % self.0.len().max(1)).copied().into_iter().collect())
    }

    /// Ties the calling thread to these processors.
    pub fn pin_thread(&self) -> Result<()> {
        sched_setaffinity(None, &self.set()).with_context(|| format!("cannot pin to processors {:?}", self.0))
    }

    /// Runs `start` on these processors, so that a process it starts stays on them, and returns to where it was.
    pub fn pin_child<T>(&self, start: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = sched_getaffinity(None).context("cannot read the processor affinity")?;
        self.pin_thread()?;
        let started = start();
        sched_setaffinity(None, &before).context("cannot restore the processor affinity")?;
        started
    }
}

/// `--pin SERVER:GUEST`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pin {
    /// Where the server runs.
    pub server: Cpus,
    /// Where the guest's threads run, one each, in turn.
    pub guest: Cpus,
}

impl std::str::FromStr for Pin {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let Some((server, guest)) = text.split_once(':') else {
            bail!("give processors of the server and of the guest, as 0:1 or 0,1:2,3");
        };
        let pin = Pin { server: Cpus::parse(server)?, guest: Cpus::parse(guest)? };
        let here = sched_getaffinity(None).context("cannot read the processor affinity")?;
        for &cpu in pin.server.0.iter().chain(&pin.guest.0) {
            if !here.is_set(cpu) {
                bail!("processor {cpu} does not exist or may not be used");
            }
        }
        Ok(pin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_moves_with_work() {
        let before = process_time(std::process::id()).unwrap();
        let mut x = 1u64;
        while process_time(std::process::id()).unwrap() < before + Duration::from_millis(2) {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(process_time(0x7fff_fff0).is_err());
    }

    #[test]
    fn the_machine_is_at_least_as_busy_as_this_process() {
        let (mine, all) = (process_time(std::process::id()).unwrap(), machine_time().unwrap());
        let mut x = 1u64;
        while process_time(std::process::id()).unwrap() < mine + Duration::from_millis(60) {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        // Sixty milliseconds are six ticks, of which the first and the last may be counted elsewhere.
        assert!(machine_time().unwrap() >= all + Duration::from_millis(30));
    }

    #[test]
    fn pin_says_what_is_wrong() {
        let error = |text: &str| text.parse::<Pin>().unwrap_err().to_string();
        assert!("0:0".parse::<Pin>().is_ok());
        assert!(error("0").contains("as 0:1"));
        assert!(error("a:0").contains("`a` is no processor number"));
        assert!(error("0:1023").contains("processor 1023"));
        assert!(error("0:99999").contains("there is no processor 99999"));
    }
}
