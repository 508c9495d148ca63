//! The promise: a comparison finds the blocks that differ, all of them and no others, whatever the two sides are made of; and
//! does not read what both sides say are holes.

mod nbd_common;

use blkmark_backup::compare::{CompareError, allocated, differing};
use blkmark_backup::copy::{Action, CopyControl, Side};
use blkmark_backup::nbd::{Address, ClientSettings, NbdReader};
use blkmark_backup::source::{BlockStatus, FileId, Source};
use blkmark_backup::target::image::Image;
use blkmark_backup::target::{Format, Policy};
use blkmark_bitmap::{Bits, ByteRange, Granularity};
use nbd_common::{Process, run};
use proptest::prelude::*;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// The end is not a whole block.
const SIZE: u64 = 6 * MIB + 4096 + 512;

fn report(_: Side, _: &io::Error) -> Action {
    Action::Report
}

fn granularity(bytes: u64) -> Granularity {
    Granularity::new(bytes).unwrap()
}

fn raw(path: &Path) -> Image {
    Image::open(path, Format::Raw, &Policy::default()).unwrap()
}

/// Which blocks differ, found out byte by byte.
fn truth(ours: &[u8], theirs: &[u8], granularity: Granularity) -> Bits {
    let mut bits = Bits::new(granularity, ours.len() as u64);
    for (at, (a, b)) in ours.iter().zip(theirs).enumerate() {
        if a != b {
            bits.set(ByteRange::new(at as u64, 1));
        }
    }
    bits
}

/// A sparse file with these pieces of one byte each.
fn sparse(path: &Path, pieces: &[(u64, u64, u8)]) {
    let file = File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for (offset, len, byte) in pieces {
        let len = (*len).min(SIZE - offset);
        file.write_all_at(&vec![*byte; len as usize], *offset).unwrap();
    }
}

/// Pieces on a disk, some of them whole clusters, some of zeroes.
fn pieces() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
    let small = (0..SIZE, 1..20_000_u64, 0..3_u8);
    let large = (0..96_u64, 1..24_u64, 0..3_u8).prop_map(|(at, len, byte)| (at * 64 * KIB, len * 64 * KIB, byte));
    proptest::collection::vec(prop_oneof![small, large], 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn sparse_files_are_compared_as_if_byte_by_byte(
        ours in pieces(), theirs in pieces(), cell in prop::sample::select(vec![512, 4096, 64 * KIB, MIB, 4 * MIB]),
        outside in 0..80_u64,
    ) {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        sparse(&a, &ours);
        sparse(&b, &theirs);
        let cell = granularity(cell);
        let want = truth(&std::fs::read(&a).unwrap(), &std::fs::read(&b).unwrap(), cell);
        let (a, b) = (raw(&a), raw(&b));
        let full = Bits::full(cell, SIZE);
        let control = CopyControl::default();
        prop_assert!(differing(&a, &b, &full, &control, &report).unwrap() == want);
        prop_assert_eq!(control.progress(), (SIZE, SIZE));
        // A plan that leaves some out answers at least for all that is in it, and never wrongly.
        let mut plan = full;
        plan.clear(ByteRange::new(outside * 64 * KIB, MIB));
        let found = differing(&a, &b, &plan, &CopyControl::default(), &report).unwrap();
        let mut beyond = found.clone();
        beyond.subtract(&want);
        prop_assert!(beyond.is_empty());
        let mut missed = want;
        missed.subtract(&found);
        prop_assert!(missed.runs().all(|run| !plan.any(run)));
    }
}

/// A chain of a raw base, an overlay, and one more, with data, zeroes and holes in each.
fn chain(dir: &Path) -> PathBuf {
    let path = |name: &str| dir.join(name).display().to_string();
    sparse(Path::new(&path("base.raw")), &[(0, 2 * MIB, 1), (4 * MIB, MIB, 1)]);
    for (image, below, format) in [("mid.qcow2", "base.raw", "raw"), ("top.qcow2", "mid.qcow2", "qcow2")] {
        let (image, below) = (path(image), path(below));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &below, "-F", format, &image]);
    }
    let io = |image: &str, command: &str| run("qemu-io", &["-f", "qcow2", "-c", command, &path(image)]);
    io("mid.qcow2", "write -P 2 1M 128k");
    io("mid.qcow2", "write -z 4M 256k");
    io("mid.qcow2", "write -P 5 3M 64k");
    io("top.qcow2", "write -P 3 1M 64k");
    io("top.qcow2", "write -z 64k 64k");
    io("top.qcow2", "write -P 7 6M 4k");
    PathBuf::from(path("top.qcow2"))
}

#[test]
fn a_chain_and_an_nbd_server_say_the_same_as_the_flat_image() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let top = chain(dir.path());
    let flat = dir.path().join("flat.raw");
    let (top_name, flat_name) = (top.display().to_string(), flat.display().to_string());
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &top_name, &flat_name]);
    let old = std::fs::read(&flat).unwrap();
    let disk = dir.path().join("disk.raw");
    std::fs::copy(&flat, &disk).unwrap();
    let file = File::options().write(true).open(&disk).unwrap();
    for (offset, bytes) in [(0, &b"x"[..]), (MIB + 70_000, b"yy"), (5 * MIB + 1, b"z"), (SIZE - 1, b"!")] {
        file.write_all_at(bytes, offset).unwrap();
    }
    file.write_all_at(&vec![0; 64 << 10], 3 * MIB).unwrap();
    let now = std::fs::read(&disk).unwrap();

    let socket = dir.path().join("sock").display().to_string();
    let serve = |more: &[&str]| {
        let _ = std::fs::remove_file(&socket);
        let arguments = [&["-t", "-r", "-f", "qcow2", "-e", "4", "-k", &socket], more, &[&top_name[..]]].concat();
        Process::start("qemu-nbd", &arguments, &socket)
    };
    let nbd =
        || NbdReader::open(&Address::Unix(socket.clone().into()), "", ClientSettings::default(), &Policy::default());
    for cell in [512, 64 * KIB, MIB] {
        let cell = granularity(cell);
        let want = truth(&now, &old, cell);
        let plan = Bits::full(cell, SIZE);
        let compare =
            |image: &dyn Source| differing(&raw(&disk), image, &plan, &CopyControl::default(), &report).unwrap();
        assert!(compare(&Image::open(&top, Format::Qcow2, &Policy::default()).unwrap()) == want, "the chain, {cell:?}");
        let server = serve(&[]);
        let reader = nbd().unwrap();
        assert_eq!(reader.block_status(2 * MIB, MIB).unwrap(), (BlockStatus::Hole, MIB));
        assert!(compare(&reader) == want, "over NBD, {cell:?}");
        drop(reader);
        drop(server);
    }
    let _server = serve(&["-x", "named"]);
    assert_eq!(nbd().unwrap_err().to_string(), "Requested export not available");
}

/// Counts what is read of a source, and fails where it is told to.
struct Watched<'a> {
    source: &'a dyn Source,
    read: AtomicU64,
    bad: Option<u64>,
}

impl<'a> Watched<'a> {
    fn new(source: &'a dyn Source) -> Self {
        Self { source, read: AtomicU64::new(0), bad: None }
    }
}

impl Source for Watched<'_> {
    fn size(&self) -> u64 {
        self.source.size()
    }
    fn alignment(&self) -> u32 {
        4096
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && buf.as_ptr().addr().is_multiple_of(4096), "fit for direct I/O");
        self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        if self.bad.is_some_and(|bad| (offset..offset + buf.len() as u64).contains(&bad)) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.source.read_at(buf, offset)
    }
    fn block_status(&self, offset: u64, limit: u64) -> io::Result<(BlockStatus, u64)> {
        self.source.block_status(offset, limit)
    }
    fn file_id(&self) -> Option<FileId> {
        None
    }
}

#[test]
fn holes_are_not_read() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (a, b) = (dir.path().join("a"), dir.path().join("b"));
    sparse(&a, &[(0, 64 * KIB, 1), (2 * MIB, 256 * KIB, 1)]);
    sparse(&b, &[(0, 64 * KIB, 1), (4 * MIB, 256 * KIB, 0)]);
    let (a, b) = (raw(&a), raw(&b));
    let (ours, theirs) = (Watched::new(&a), Watched::new(&b));
    let plan = Bits::full(Granularity::DEFAULT, SIZE);
    let found = differing(&ours, &theirs, &plan, &CopyControl::default(), &report).unwrap();
    let runs: Vec<_> = found.runs().collect();
    assert_eq!(runs, [ByteRange::new(2 * MIB, 256 * KIB)]);
    let read = |side: &Watched<'_>| side.read.load(Ordering::Relaxed);
    // What is short is read with its surroundings.
    assert!(read(&ours) <= 512 * KIB && read(&theirs) <= 512 * KIB, "{} and {}", read(&ours), read(&theirs));
    let found = allocated(&ours, &plan, &CopyControl::default(), &report).unwrap();
    let runs: Vec<_> = found.runs().collect();
    assert_eq!(runs, [ByteRange::new(0, 64 * KIB), ByteRange::new(2 * MIB, 256 * KIB)]);
    assert!(read(&ours) <= 512 * KIB, "and nothing is read for that");
}

#[test]
fn a_read_that_fails_is_tried_again_or_reported_with_its_side_and_never_taken_for_equal() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let a = dir.path().join("a");
    sparse(&a, &[(0, SIZE, 1)]);
    let image = raw(&a);
    let plan = Bits::full(Granularity::DEFAULT, SIZE);
    for side in [Side::Source, Side::Target] {
        let (mut ours, mut theirs) = (Watched::new(&image), Watched::new(&image));
        let bad = if side == Side::Source { &mut ours } else { &mut theirs };
        bad.bad = Some(3 * MIB + 5);
        let error = differing(&ours, &theirs, &plan, &CopyControl::default(), &report).unwrap_err();
        assert!(error.to_string().ends_with("at 0x300000: Input/output error"), "{error}");
        assert_eq!(matches!(error, CompareError::Disk { .. }), side == Side::Source);
        let heard = Mutex::new(Vec::new());
        let control = CopyControl::default();
        let thrice = |side, error: &io::Error| {
            let mut heard = heard.lock().unwrap();
            heard.push((side, error.raw_os_error()));
            if heard.len() == 3 { Action::Report } else { Action::Retry }
        };
        assert!(differing(&ours, &theirs, &plan, &control, &thrice).is_err());
        assert_eq!(*heard.lock().unwrap(), [(side, Some(libc::EIO)); 3]);
    }
    let control = CopyControl::default();
    control.cancel();
    let ended = differing(&image, &image, &plan, &control, &report).unwrap_err();
    assert!(matches!(ended, CompareError::Cancelled));
}
