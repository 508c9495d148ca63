//! Exports, a server and clients of others, for the tests of the NBD server.

#![allow(dead_code, missing_docs, reason = "each test binary uses its part of it")]

use blkmark_backup::nbd::{Address, Export, Extent, NbdServer, ServerSettings, SourceExport, TlsCredentials};
use blkmark_backup::source::{BlockStatus, FileId, Source};
use blkmark_bitmap::{Bits, ByteRange, Granularity};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

pub const SIZE: u64 = 40 << 20;

/// Long enough for any machine; it only ends a test that hangs.
pub const GIVE_UP: Duration = Duration::from_secs(120);

/// A file with holes, which wants whole sectors.
pub struct FileSource(pub File);

impl Source for FileSource {
    fn size(&self) -> u64 {
        SIZE
    }
    fn alignment(&self) -> u32 {
        512
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(512) && buf.len().is_multiple_of(512), "{offset} {}", buf.len());
        self.0.read_exact_at(buf, offset)
    }
    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        let seek = |whence| {
            // SAFETY: a system call on a descriptor that is open, with numbers.
            let at = unsafe { libc::lseek(self.0.as_raw_fd(), offset as i64, whence) };
            if at < 0 { SIZE } else { at as u64 }
        };
        let (status, end) = match seek(libc::SEEK_DATA) {
            data if data == offset => (BlockStatus::Data, seek(libc::SEEK_HOLE)),
            data => (BlockStatus::Hole, data),
        };
        Ok((status, (end - offset).min(limit)))
    }
    fn file_id(&self) -> Option<FileId> {
        None
    }
}

/// Memory that can be written, and can be told to fail.
pub struct Memory {
    bytes: RwLock<Vec<u8>>,
    flushes: AtomicU64,
    fails: RwLock<Option<u64>>,
}

impl Memory {
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.read().unwrap().clone()
    }
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::SeqCst)
    }
    /// Requests that touch this byte fail.
    pub fn fail_at(&self, at: Option<u64>) {
        *self.fails.write().unwrap() = at;
    }
    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        match *self.fails.read().unwrap() {
            Some(at) if (offset..offset + len as u64).contains(&at) => Err(io::Error::from_raw_os_error(libc::EIO)),
            _ => Ok(()),
        }
    }
}

impl Export for Memory {
    fn size(&self) -> u64 {
        SIZE
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len())?;
        buf.copy_from_slice(&self.bytes.read().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check(offset, buf.len())?;
        self.bytes.write().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn write_zeroes_at(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.bytes.write().unwrap()[offset as usize..][..len as usize].fill(0);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn contexts(&self) -> Vec<String> {
        vec!["base:allocation".to_owned()]
    }
    fn block_status(&self, _: usize, _: u64, len: u64, _: usize) -> io::Result<Vec<Extent>> {
        Ok(vec![Extent { len, flags: 0 }])
    }
}

/// A server on a Unix socket with an export of each kind.
pub struct Lab {
    pub server: NbdServer,
    pub disk: Arc<dyn Export>,
    pub memory: Arc<Memory>,
    dir: tempfile::TempDir,
}

/// Where the disk has data and where bitmap b is dirty; the rest is a hole, and clean.
const DATA: [(u64, u64); 4] = [(1 << 20, 64 << 10), (2 << 20, 3 << 20), (20 << 20, 4096), (SIZE - 65536, 65536)];
const DIRTY: [(u64, u64); 3] = [(0, 65536), (3 << 20, 9 << 20), (SIZE - 65536, 65536)];

/// The whole disk as extents of two types.
fn extents(marked: &[(u64, u64)], on: u64, off: u64) -> Vec<(u64, u64, u64)> {
    let (mut all, mut at) = (Vec::new(), 0);
    for (start, len) in marked {
        if *start > at {
            all.push((at, start - at, off));
        }
        all.push((*start, *len, on));
        at = start + len;
    }
    if at < SIZE {
        all.push((at, SIZE - at, off));
    }
    all
}

impl Lab {
    pub fn new() -> Self {
        Self::with(ServerSettings::default())
    }

    pub fn with(settings: ServerSettings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(SIZE).unwrap();
        for (n, (start, len)) in DATA.iter().enumerate() {
            let bytes: Vec<u8> = (0..*len).map(|at| (at / 97 + n as u64) as u8 | 1).collect();
            file.write_all_at(&bytes, *start).unwrap();
        }
        file.sync_all().unwrap();
        let mut bits = Bits::new(Granularity::new(65536).unwrap(), SIZE);
        for (start, len) in DIRTY {
            bits.set(ByteRange::new(start, len));
        }
        let disk: Arc<dyn Export> =
            Arc::new(SourceExport::new(Arc::new(FileSource(file)), vec![("b".to_owned(), bits)]));
        let bytes = RwLock::new(vec![0xaa; SIZE as usize]);
        let memory = Arc::new(Memory { bytes, flushes: AtomicU64::new(0), fails: RwLock::default() });
        let server = NbdServer::bind(&Address::Unix(dir.path().join("nbd.sock")), settings).unwrap();
        server.add("disk", Arc::clone(&disk), "a guest's disk").unwrap();
        server.add("memory", memory.clone(), "").unwrap();
        Self { server, disk, memory, dir }
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    pub fn socket(&self) -> String {
        self.path("nbd.sock")
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket())
    }

    pub fn wait(&self, until: impl Fn() -> bool) {
        let start = Instant::now();
        while !until() {
            assert!(start.elapsed() < GIVE_UP, "it comes to that");
            std::thread::yield_now();
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path("disk.raw")).unwrap()
    }

    pub fn allocation(&self) -> Vec<(u64, u64, u64)> {
        extents(&DATA, 0, 3)
    }

    pub fn dirty(&self) -> Vec<(u64, u64, u64)> {
        extents(&DIRTY, 1, 0)
    }
}

pub fn local() -> Address {
    Address::Tcp { host: "127.0.0.1".to_owned(), port: "0".to_owned() }
}

/// Whether a tool succeeded, and all that it said.
pub fn output(tool: &str, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("timeout").args(["120", tool]).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

#[track_caller]
pub fn run(tool: &str, arguments: &[&str]) -> String {
    let (success, text) = output(tool, arguments);
    assert!(success, "{tool} {arguments:?}: {text}");
    text
}

#[track_caller]
pub fn fail(tool: &str, arguments: &[&str]) -> String {
    let (success, text) = output(tool, arguments);
    assert!(!success, "{tool} {arguments:?} should fail: {text}");
    text
}

#[track_caller]
pub fn assert_same(got: &[u8], want: &[u8]) {
    assert_eq!(got.len(), want.len());
    if let Some(at) = got.iter().zip(want).position(|(a, b)| a != b) {
        panic!("differs at {at:#x}: {:#x}, not {:#x}", got[at], want[at]);
    }
}

/// A server of somebody else's that ends with the test.
pub struct Process(Child);

impl Process {
    pub fn start(tool: &str, arguments: &[&str], socket: &str) -> Self {
        let mut process = Self(Command::new(tool).args(arguments).stdout(Stdio::null()).spawn().unwrap());
        let start = Instant::now();
        while !PathBuf::from(socket).exists() {
            assert!(start.elapsed() < GIVE_UP && process.0.try_wait().unwrap().is_none(), "{tool} listens");
            std::thread::yield_now();
        }
        process
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Certificates as QEMU and libnbd want them: of a server, of a client, and of a client that nobody vouches for.
pub struct Tls {
    pub server: String,
    pub client: String,
    pub stranger: String,
}

impl Tls {
    pub fn new(dir: &str) -> Self {
        let script = r#"
            set -e; mkdir -p "$1"; cd "$1"
            authority() { openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj "/CN=$1" \
                -addext "keyUsage=critical,keyCertSign" -keyout $1-key.pem -out $1-cert.pem; }
            certificate() { mkdir -p $3; openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$2" \
                -keyout $3/$2-key.pem -out request.pem
                printf 'subjectAltName=IP:127.0.0.1\nextendedKeyUsage=%s\nbasicConstraints=CA:FALSE\n' $4 > extensions
                openssl x509 -req -in request.pem -CA $1-cert.pem -CAkey $1-key.pem -CAcreateserial -days 2 \
                    -extfile extensions -out $3/$2-cert.pem
                cp ours-cert.pem $3/ca-cert.pem; }
            authority ours; authority theirs
            certificate ours server server serverAuth
            certificate ours client client clientAuth
            certificate theirs client stranger clientAuth
        "#;
        let output = Command::new("bash").args(["-c", script, "bash", dir]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let of = |name: &str| format!("{dir}/{name}");
        Self { server: of("server"), client: of("client"), stranger: of("stranger") }
    }

    pub fn credentials(&self) -> TlsCredentials {
        TlsCredentials::load(self.server.as_ref(), true).unwrap()
    }
}
