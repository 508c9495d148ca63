//! The processes and what is known of them: a daemon, a guest a disk, the torturer's own client, and the journal between
//! them. Everything that starts, kills or misses a process goes through here.
//!
//! One thread does all of it, in the order of the log; only a kill in the middle of a command comes from another.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkmark_backup::qmp::Event;
use rustix::process::{Pid, Signal, kill_process};

use super::backups::{Active, Instants};
use super::chain::Chain;
use super::geometry::{LONGEST, SECTORS};
use super::guest::{GuestArgs, QUEUES};
use super::journal::Reader;
use super::log::Log;
use super::marks::{Marks, Op};
use super::mirror::Mirror;
use super::model::Model;
use super::options::Options;
use super::place::Place;
use super::schedule::numbers;
use crate::daemon::{blkmark_binary, disk_option};
use crate::lab::Disk;
use crate::process::{GIVE_UP, Process};
use crate::qmp::Qmp;

/// Logs of so many daemons and guests are kept.
const LOGS: u64 = 32;

/// A disk with all that belongs to it.
pub struct Served {
    /// As the daemon is told of it.
    pub disk: Disk,
    /// What it must hold.
    pub model: Model,
    /// Its guest, but for a moment.
    pub guest: Option<Process>,
    /// Its bitmaps that come and go.
    pub marks: Marks,
    /// Its chain of backups.
    pub chain: Chain,
    /// Its mirror.
    pub mirror: Mirror,
}

/// The torture.
pub struct Torture {
    /// As it was told.
    pub options: Options,
    /// What fixes the schedule.
    pub seed: u64,
    /// Where it happens.
    pub place: Place,
    /// What happened.
    pub log: Log,
    /// The disks.
    pub served: Vec<Served>,
    /// The daemon, but for a moment.
    pub daemon: Option<Process>,
    /// A client of it.
    pub qmp: Option<Qmp>,
    /// Jobs.
    pub active: Vec<Active>,
    /// The store may be damaged in ways that are nobody's fault: it ran full.
    pub store_was_full: bool,
    /// Images of orders over several disks.
    pub instants: Instants,
    /// Changes of bitmaps that were never answered, those of one order together.
    pub unsettled: Vec<Vec<(usize, Vec<Op>)>>,
    /// Numbers for names that are never used again.
    pub names: u64,
    /// What guests say.
    pub journal: Reader,
    starts: u64,
    lives: u32,
}

impl Torture {
    /// Everything in place, nothing running.
    pub fn new(options: Options, seed: u64) -> Result<Torture> {
        let place = Place::make(options.dir.as_deref())?;
        let log = Log::create(&place.path("events.log"), options.verbose)?;
        let journal = Reader::create(&place.journal())?;
        let served = (0..options.disks).map(|number| Served::make(&place, number)).collect::<Result<_>>()?;
        Ok(Torture {
            options,
            seed,
            place,
            log,
            served,
            daemon: None,
            qmp: None,
            active: Vec::new(),
            store_was_full: false,
            instants: Instants::default(),
            unsettled: Vec::new(),
            names: 0,
            journal,
            starts: 0,
            lives: 0,
        })
    }

    /// A number that no name had yet.
    pub fn name(&mut self) -> u64 {
        self.names += 1;
        self.names
    }

    fn serve(&self) -> Result<Command> {
        let mut command = Command::new(blkmark_binary()?);
        command.arg("serve");
        for served in &self.served {
            let mut option = disk_option(&served.disk);
            option += &format!(",scratch={}", self.place.path("scratch").display());
            option += &match self.options.volatile {
                true => ",bitmaps=off".to_owned(),
                false => format!(",bitmaps={}", self.place.store.folder().join(&served.disk.id).display()),
            };
            // One disk has hardly any scratch: its slow backups break, and its guest must not notice.
            if served.model_number() % 2 == 1 {
                option += ",scratch-size=4M";
            }
            command.arg("--disk").arg(option);
        }
        command.arg("--control").arg(self.place.path("control.sock"));
        command.arg("--runtime-dir").arg(self.place.runtime()).stdin(Stdio::null());
        Ok(command)
    }

    /// Starts a daemon without waiting for it.
    pub fn spawn_daemon(&mut self) -> Result<()> {
        ensure!(self.daemon.is_none(), "there is a daemon already");
        self.starts += 1;
        let log = self.place.path(&format!("daemon-{}.log", self.starts % LOGS));
        self.log.say(format_args!("start of daemon {}", self.starts));
        self.daemon = Some(Process::start("blkmark", &mut self.serve()?, &log)?);
        Ok(())
    }

    /// Waits until the daemon is ready; connects.
    pub fn daemon_ready(&mut self) -> Result<()> {
        let daemon = self.daemon.as_mut().context("no daemon")?;
        daemon.first_line()?;
        self.qmp = Some(Qmp::connect(&self.place.path("control.sock")).with_context(|| daemon.log_tail())?);
        Ok(())
    }

    /// Starts a daemon and looks whether it has all that it must have.
    pub fn start_daemon(&mut self) -> Result<()> {
        self.spawn_daemon()?;
        self.daemon_ready()?;
        self.recognise()
    }

    /// kill -9 of the daemon.
    pub fn kill_daemon(&mut self, kind: &'static str) -> Result<()> {
        self.log.say(format_args!("kill -9 of the daemon ({kind})"));
        self.log.count("kills", kind, 1);
        if let Some(daemon) = &mut self.daemon {
            daemon.kill()?;
        }
        self.daemon_is_gone()
    }

    /// SIGTERM, after which the daemon must end well.
    pub fn terminate_daemon(&mut self) -> Result<()> {
        self.log.say("SIGTERM to the daemon");
        self.log.count("ends", "SIGTERM", 1);
        if let Some(daemon) = &mut self.daemon {
            let status = daemon.terminate()?;
            ensure!(status.success(), "blkmark ended with {status} on SIGTERM\n{}", daemon.log_tail());
        }
        self.daemon_is_gone()
    }

    /// The daemon's end, whatever it was: it may be killed, it must not have failed.
    pub fn daemon_is_gone(&mut self) -> Result<()> {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        daemon.wait(GIVE_UP)?;
        let said = daemon.log();
        ensure!(!said.contains("panicked"), "the daemon panicked\n{}", daemon.log_tail());
        // What it said before it died was true.
        let mut events: Vec<Event> = Vec::new();
        while let Some(qmp) = self.qmp.as_mut() {
            let heard = qmp.client().wait_event(Duration::from_millis(1), |event| {
                events.push(event.clone());
                false
            });
            if heard.is_err() {
                self.qmp = None;
            }
        }
        for event in events {
            self.heard(&event)?;
        }
        self.catch_up()
    }

    /// Waits until no other client of the daemon is left: a command that was sent by a dead one is over then.
    pub fn alone(&mut self) -> Result<()> {
        let path = self.place.path("control.sock").display().to_string();
        let deadline = Instant::now() + GIVE_UP;
        loop {
            // The daemon puts away what is left of clients when the next one comes. Once that one is greeted it is among
            // the connected, and so is, until it is put away, whoever came before.
            let mut next = UnixStream::connect(&path)?;
            next.set_read_timeout(Some(GIVE_UP))?;
            next.read_exact(&mut [0])?;
            let sockets = std::fs::read_to_string("/proc/net/unix")?;
            let ours = |line: &&str| {
                let words: Vec<&str> = line.split_whitespace().collect();
                words.get(7) == Some(&path.as_str()) && words.get(5) == Some(&"03")
            };
            let connected: Vec<&str> = sockets.lines().filter(ours).collect();
            if connected.len() <= 2 {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the daemon does not let go of a dead client: {connected:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Kills the daemon from another thread `after` so long.
    pub fn kill_daemon_later(&mut self, after: Duration) -> Result<std::thread::JoinHandle<()>> {
        let daemon = self.daemon.as_ref().context("no daemon")?;
        // The process is reaped by this thread, after the other has ended: its number is not used again meanwhile.
        let pid = i32::try_from(daemon.pid()).ok().and_then(Pid::from_raw).context("no process id")?;
        Ok(std::thread::spawn(move || {
            std::thread::sleep(after);
            let _ = kill_process(pid, Signal::KILL);
        }))
    }

    /// Starts a guest, which looks first at what the one before was not answered.
    pub fn start_guest(&mut self, disk: usize) -> Result<()> {
        self.catch_up()?;
        self.lives += 1;
        let seed = numbers(self.seed, 1 << 48 | u64::from(self.lives)).next();
        let served = &mut self.served[disk];
        ensure!(served.guest.is_none(), "there is a guest already");
        let look = served.model.guest_died(LONGEST);
        let (socket, journal) = (served.disk.socket.clone(), self.place.journal());
        let args = GuestArgs::new(socket, journal, disk as u8, self.lives, seed, served.model.sectors(), &look);
        let log = self.place.path(&format!("guest-{}.log", u64::from(self.lives) % LOGS));
        let mut command = Command::new(torture_binary()?);
        command.args(args.words()).stdin(Stdio::piped());
        self.log.say(format_args!("guest {} of disk {disk}, which looks at {} ranges first", self.lives, look.len()));
        served.guest = Some(Process::start("guest", &mut command, &log)?);
        Ok(())
    }

    /// kill -9 of a guest.
    pub fn kill_guest(&mut self, disk: usize, kind: &'static str) -> Result<()> {
        self.log.say(format_args!("kill -9 of the guest of disk {disk} ({kind})"));
        self.log.count("kills", kind, 1);
        self.guest_lives(disk)?;
        if let Some(mut guest) = self.served[disk].guest.take() {
            guest.kill()?;
        }
        self.catch_up()
    }

    /// Tells a guest to end, and waits until all that it asked for is answered.
    pub fn end_guest(&mut self, disk: usize) -> Result<()> {
        self.guest_lives(disk)?;
        if let Some(mut guest) = self.served[disk].guest.take() {
            guest.end_input();
            let status = guest.wait(GIVE_UP)?;
            ensure!(status.success(), "the guest of disk {disk} ended with {status}\n{}", guest.log_tail());
        }
        self.catch_up()?;
        let open = self.served[disk].model.pending().count();
        ensure!(open == 0, "the guest of disk {disk} ended with {open} requests that were not answered");
        Ok(())
    }

    fn guest_lives(&mut self, disk: usize) -> Result<()> {
        let Some(guest) = self.served[disk].guest.as_mut() else { return Ok(()) };
        if !guest.is_running() {
            let said = guest.log_tail();
            self.catch_up()?;
            bail!("the guest of disk {disk} ended by itself\n{said}");
        }
        Ok(())
    }

    /// Fails if a process ended that was not told to.
    pub fn all_live(&mut self) -> Result<()> {
        for disk in 0..self.served.len() {
            self.guest_lives(disk)?;
        }
        if let Some(daemon) = self.daemon.as_mut()
            && !daemon.is_running()
        {
            bail!("the daemon ended by itself\n{}", daemon.log_tail());
        }
        if let Some(job) = self.active.iter().find(|job| job.began.elapsed() > GIVE_UP) {
            bail!("job {} does not end", job.id);
        }
        Ok(())
    }
}

impl Served {
    fn make(place: &Place, number: u8) -> Result<Served> {
        let id = format!("drive{number}");
        let path = place.path(&format!("{id}.raw"));
        let file = std::fs::File::create_new(&path)?;
        file.set_len(u64::from(SECTORS) * 512)?;
        let _ = std::fs::create_dir(place.path("scratch"));
        let socket = place.path(&format!("{id}.sock"));
        // Past the page cache, and through it.
        let disk = Disk { id, path, socket, queues: QUEUES, readonly: false, direct: Some(number.is_multiple_of(2)) };
        Ok(Served {
            disk,
            model: Model::new(SECTORS),
            guest: None,
            marks: Marks::default(),
            chain: Chain::default(),
            mirror: Mirror::new(place, number),
        })
    }

    fn model_number(&self) -> usize {
        self.disk.id.trim_start_matches("drive").parse().unwrap_or_default()
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.model.sectors()) * 512
    }
}

/// This program: what `cargo` built, or what runs.
fn torture_binary() -> Result<PathBuf> {
    std::env::current_exe().context("cannot tell where this program is")
}
