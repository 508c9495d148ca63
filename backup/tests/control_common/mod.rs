//! Disks, writers and commands for the tests of the control room: real files, the real marking, no socket.

#![allow(dead_code, missing_docs, reason = "each test binary uses its part of it")]

use blkmark_backup::control::{Control, Settings};
use blkmark_backup::node::Node;
use blkmark_backup::qmp::{Commands, Event, Events, Subscription};
use blkmark_backup::scratch::ScratchSettings;
use blkmark_backup::source::{BlockStatus, FileId, Source};
use blkmark_bitmap::tracker::Admitted;
use blkmark_bitmap::{ByteRange, Lane, Tracker, Verdict};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

pub const MIB: u64 = 1 << 20;
pub const CLUSTER: u64 = 64 * 1024;

/// Long enough for any machine; it only ends a test that hangs.
pub const GIVE_UP: Duration = Duration::from_secs(120);

/// A file read as a disk, which can be told to fail.
pub struct FileSource {
    file: File,
    size: u64,
    pub broken: AtomicBool,
    /// Whether it says of itself that to read it is to copy memory.
    pub memory: AtomicBool,
    /// While it is locked, no read comes back.
    pub hung: Mutex<()>,
    /// How many reads are under way.
    pub reads: AtomicUsize,
    /// A place that cannot be read, and how many times more.
    fails: Mutex<(u64, u32)>,
}

impl FileSource {
    /// So many reads of that byte fail.
    pub fn fail_at(&self, offset: u64, times: u32) {
        *self.fails.lock().unwrap() = (offset, times);
    }
}

impl Source for FileSource {
    fn size(&self) -> u64 {
        self.size
    }
    fn alignment(&self) -> u32 {
        1
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let mut fails = self.fails.lock().unwrap();
        if fails.1 > 0 && (offset..offset + buf.len() as u64).contains(&fails.0) {
            fails.1 -= 1;
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        drop(fails);
        self.reads.fetch_add(1, Ordering::SeqCst);
        drop(self.hung.lock().unwrap());
        let result = self.file.read_exact_at(buf, offset);
        self.reads.fetch_sub(1, Ordering::SeqCst);
        result
    }
    fn block_status(&self, _: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        Ok((BlockStatus::Data, limit))
    }
    fn is_memory(&self) -> bool {
        self.memory.load(Ordering::SeqCst)
    }
    fn file_id(&self) -> Option<FileId> {
        let metadata = self.file.metadata().ok()?;
        Some(FileId { device: metadata.dev(), inode: metadata.ino() })
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }
}

/// A bitmap's name, count, hash, and whether it records and is busy.
pub type Shown = (String, u64, String, bool, bool);

/// A served disk with a guest that writes as the write path does.
pub struct Disk {
    pub node: Arc<Node>,
    pub source: Arc<FileSource>,
    pub path: PathBuf,
    lane: Mutex<Lane>,
}

impl Disk {
    pub fn new(dir: &Path, id: &str, size: u64, scratch: u64) -> Self {
        let path = dir.join(format!("{id}.disk"));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(size).unwrap();
        let (broken, hung, reads) = (AtomicBool::new(false), Mutex::new(()), AtomicUsize::new(0));
        let (memory, fails) = (AtomicBool::new(false), Mutex::default());
        let source = Arc::new(FileSource { file, size, broken, memory, hung, reads, fails });
        let tracker = Tracker::new(size, 1, 4);
        let lane = Mutex::new(tracker.lane(0).unwrap());
        let scratch = ScratchSettings { directory: dir.to_owned(), cap: scratch, memory: 1 << 20 };
        let shared: Arc<dyn Source> = source.clone();
        let node = Node::new(id, &path, false, tracker, shared, scratch);
        Self { node: Arc::new(node), source, path, lane }
    }

    /// A guest's write: admitted, marked, done; held while a point in time saves what was there.
    pub fn write(&self, offset: u64, len: u64, byte: u8) {
        self.write_bytes(offset, &vec![byte; len as usize]);
    }

    pub fn write_bytes(&self, offset: u64, bytes: &[u8]) {
        assert!(self.try_write(offset, bytes), "the write was refused");
    }

    /// A guest's write; whether it was let through.
    pub fn try_write(&self, offset: u64, bytes: &[u8]) -> bool {
        self.admitted(offset, bytes.len() as u64, || self.source.file.write_all_at(bytes, offset).unwrap())
    }

    /// A write that is admitted, and that reaches the disk only when `go` comes back.
    pub fn write_slowly(&self, offset: u64, bytes: &[u8], go: impl FnOnce()) {
        let write = || {
            go();
            self.source.file.write_all_at(bytes, offset).unwrap();
        };
        assert!(self.admitted(offset, bytes.len() as u64, write), "the write was refused");
    }

    /// A write that is admitted, and then fails without having written anything.
    pub fn ask(&self, offset: u64, len: u64) {
        assert!(self.admitted(offset, len, || ()), "the write was refused");
    }

    fn admitted(&self, offset: u64, len: u64, write: impl FnOnce()) -> bool {
        let range = ByteRange::new(offset, len);
        let mut lane = self.lane.lock().unwrap();
        loop {
            let admitted = lane.enter().admit(0, range);
            match admitted {
                Admitted::Go => break,
                Admitted::Beyond => panic!("a write beyond the end"),
                Admitted::Held(gate) => {
                    let (tx, rx) = mpsc::channel();
                    gate.hold(range, Instant::now(), Box::new(move |verdict| tx.send(verdict).unwrap()));
                    if rx.recv_timeout(GIVE_UP).expect("a held write is let go") == Verdict::Refused {
                        return false;
                    }
                }
            }
        }
        write();
        lane.finish(0);
        true
    }

    /// Writes whole clusters, each given by its number.
    pub fn dirty(&self, clusters: impl IntoIterator<Item = u64>, byte: u8) {
        for cluster in clusters {
            self.write(cluster * CLUSTER, CLUSTER, byte);
        }
    }

    pub fn image(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    /// The dirty clusters (of 64 KiB) of a bitmap.
    pub fn dirty_clusters(&self, bitmap: &str) -> Vec<u64> {
        let bits = self.node.tracker.bits(bitmap).unwrap();
        bits.runs().flat_map(|run| run.start() / CLUSTER..run.end().div_ceil(CLUSTER)).collect()
    }

    /// What a refused command may not change.
    pub fn bitmaps(&self) -> Vec<Shown> {
        let tracker = &self.node.tracker;
        let show = |b: blkmark_bitmap::BitmapInfo| {
            let hash = tracker.bits(&b.name).unwrap().sha256();
            (b.name, b.count, hash, b.recording, b.busy)
        };
        tracker.list().into_iter().map(show).collect()
    }
}

/// Tells the guests of a test that it is over, however it ends.
#[derive(Default)]
pub struct Over(AtomicBool);

/// Makes it over when dropped.
pub struct OverAtLast<'a>(&'a Over);

impl Over {
    pub fn yet(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
    pub fn at_last(&self) -> OverAtLast<'_> {
        OverAtLast(self)
    }
}

impl Drop for OverAtLast<'_> {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// A control room over some disks.
pub struct Lab {
    pub control: Arc<Control>,
    pub events: Subscription,
    pub disks: Vec<Disk>,
    pub dir: tempfile::TempDir,
}

impl Lab {
    /// Disks d0, d1, ... of 4 MiB.
    pub fn new(disks: usize) -> Self {
        Self::sized(&vec![4 * MIB; disks])
    }

    pub fn sized(sizes: &[u64]) -> Self {
        Self::with_scratch(sizes, 1 << 30)
    }

    /// With room for `scratch` bytes of old data for each point in time.
    pub fn with_scratch(sizes: &[u64], scratch: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disks: Vec<Disk> =
            sizes.iter().enumerate().map(|(i, size)| Disk::new(dir.path(), &format!("d{i}"), *size, scratch)).collect();
        let events = Events::new();
        let hearer = events.subscribe();
        let nodes = disks.iter().map(|disk| Arc::clone(&disk.node)).collect();
        let settings = Settings { roots: Vec::new(), sandbox: Default::default(), on_quit: Box::new(|| ()) };
        Self { control: Control::new(nodes, events, settings), events: hearer, disks, dir }
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub fn run(&self, command: &str, arguments: Value) -> Result<Value, String> {
        let Value::Object(arguments) = arguments else { panic!("arguments are an object") };
        let answer = self.control.execute(command, arguments).unwrap_or_else(|| panic!("no command {command}"));
        answer.map_err(|error| error.desc)
    }

    #[track_caller]
    pub fn ok(&self, command: &str, arguments: Value) -> Value {
        self.run(command, arguments.clone()).unwrap_or_else(|error| panic!("{command} {arguments}: {error}"))
    }

    #[track_caller]
    pub fn err(&self, command: &str, arguments: Value) -> String {
        match self.run(command, arguments.clone()) {
            Ok(value) => panic!("{command} {arguments} should be refused, and gave {value}"),
            Err(error) => error,
        }
    }

    /// The next event with this name, those before it passed over.
    #[track_caller]
    pub fn event(&self, name: &str) -> Value {
        self.wait(|event| event.name == name).data
    }

    #[track_caller]
    pub fn wait(&self, wanted: impl FnMut(&Event) -> bool) -> Event {
        self.events.wait(GIVE_UP, wanted).unwrap().expect("the event comes")
    }

    /// Waits until the job has this state.
    #[track_caller]
    pub fn state(&self, job: &str, status: &str) {
        self.wait(|e| e.name == "JOB_STATUS_CHANGE" && e.data["id"] == job && e.data["status"] == status);
    }

    /// All events so far, each as `NAME`, `NAME device`, or for a change of state `id:status`.
    pub fn told(&self) -> Vec<String> {
        let mut told = Vec::new();
        while let Some(event) = self.events.next_within(Duration::ZERO).unwrap() {
            told.push(line(&event));
        }
        told
    }

    /// The same, up to and with the first for which `last` holds.
    #[track_caller]
    pub fn told_until(&self, last: &str) -> Vec<String> {
        let mut told = Vec::new();
        while told.last().map(String::as_str) != Some(last) {
            let event = self.events.next_within(GIVE_UP).unwrap();
            told.push(line(&event.unwrap_or_else(|| panic!("{last} should follow {told:?}"))));
        }
        told
    }

    /// A raw file of a disk's size, opened as node `name`.
    pub fn raw_target(&self, name: &str, size: u64) -> PathBuf {
        let path = self.dir.path().join(format!("{name}.raw"));
        File::create(&path).unwrap().set_len(size).unwrap();
        let file = json!({ "driver": "file", "filename": path });
        self.ok("blockdev-add", json!({ "driver": "raw", "node-name": name, "file": file }));
        path
    }

    pub fn jobs(&self) -> Value {
        self.ok("query-jobs", json!({}))
    }
}

fn line(event: &Event) -> String {
    match event.name.as_str() {
        "JOB_STATUS_CHANGE" => {
            format!("{}:{}", event.data["id"].as_str().unwrap(), event.data["status"].as_str().unwrap())
        }
        name => match event.data["device"].as_str().or(event.data["id"].as_str()) {
            Some(device) => format!("{name} {device}"),
            None => name.to_owned(),
        },
    }
}

/// Runs a tool of QEMU's that must succeed.
#[track_caller]
pub fn qemu_img(arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img is installed");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

/// What an image holds, its backing chain included.
#[track_caller]
pub fn contents(dir: &Path, image: &str, format: &str) -> Vec<u8> {
    let raw = dir.join("contents.tmp");
    qemu_img(&["convert", "-f", format, "-O", "raw", image, raw.to_str().unwrap()]);
    let bytes = std::fs::read(&raw).unwrap();
    std::fs::remove_file(&raw).unwrap();
    bytes
}

/// Whether two images are the same, without printing megabytes if they are not.
#[track_caller]
pub fn assert_same(got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len());
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!("differs at {at:#x} (cluster {}): {:#x}, not {:#x}", at as u64 / CLUSTER, got[at], want[at]);
    }
}

/// Files end here while the limit stands: half the disk.
pub const LIMIT: u64 = 2 * MIB;

/// Makes the kernel refuse writes past `limit` in this process, or takes that back.
pub fn set_limit(limit: Option<u64>) {
    // SAFETY: the signal of a write past the limit is ignored from here on, by a process of this test's own.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let maximum = getrlimit(Resource::Fsize).maximum;
    setrlimit(Resource::Fsize, Rlimit { current: limit.or(maximum), maximum }).unwrap();
}

/// A disk full of ones with bitmap b, of which clusters 1, 2 and 40 are dirty twos, and target t.
pub fn dirty_lab() -> Lab {
    let lab = Lab::new(1);
    lab.disks[0].dirty(0..64, 1);
    lab.ok("block-dirty-bitmap-add", json!({ "node": "d0", "name": "b" }));
    lab.disks[0].dirty([1, 2, 40], 2);
    lab.raw_target("t", 4 * MIB);
    lab
}
