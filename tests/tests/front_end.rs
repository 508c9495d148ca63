//! The embedded front end does what a guest's driver does, checked against QEMU's own back end
//! (`qemu-storage-daemon`), which knows nothing of blkmark: so that a failure of blkmark's tests points at blkmark.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use blkmark::frontend::{Buffer, Descriptor, FrontendError, Guest, MemoryMessage, Options, Request, Status, Wait};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const MIB: usize = 1 << 20;
/// Long enough for any machine; reached only by a failing test.
const GIVE_UP: Option<Duration> = Some(Duration::from_secs(60));

/// A `qemu-storage-daemon` with one disk of random bytes.
struct Reference {
    child: Child,
    dir: tempfile::TempDir,
    content: Vec<u8>,
}

impl Reference {
    fn new(size: usize, queues: usize, writable: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content = noise(size, 1);
        fs::write(dir.path().join("disk"), &content).unwrap();
        let mut reference = Reference { child: Self::start(dir.path(), queues, writable), dir, content };
        reference.await_ready();
        reference
    }

    fn start(dir: &std::path::Path, queues: usize, writable: bool) -> Child {
        let on = if writable { "on" } else { "off" };
        Command::new("qemu-storage-daemon")
            .current_dir(dir)
            .args([
                "--blockdev",
                &format!("driver=file,node-name=d,filename=disk,discard=unmap,read-only={}",
                    if writable { "off" } else { "on" }),
                "--export",
                &format!(
                    "type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=sock,writable={on},num-queues={queues}"
                ),
                "--chardev",
                "stdio,id=m",
                "--monitor",
                "m",
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// The monitor greets after the exports before it on the command line exist.
    fn await_ready(&mut self) {
        let mut line = String::new();
        let stdout = self.child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert!(line.contains("QMP"), "no greeting: {line}");
    }

    fn restart(&mut self, queues: usize) {
        self.kill();
        self.child = Self::start(self.dir.path(), queues, true);
        self.await_ready();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    fn file(&self) -> File {
        File::open(self.dir.path().join("disk")).unwrap()
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reproducible bytes that no block repeats.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

fn variants() -> Vec<(&'static str, Options)> {
    let base = Options { max_request: 256 << 10, data_size: 2 * MIB, queue_size: 64, ..Options::default() };
    vec![
        ("default", base.clone()),
        ("direct descriptors", Options { indirect: false, ..base.clone() }),
        ("indirect not agreed", base.clone().without(VIRTIO_RING_F_INDIRECT_DESC)),
        ("no event idx", base.clone().without(VIRTIO_RING_F_EVENT_IDX)),
        ("many segments, indirect", Options { segment: Some(4096), ..base.clone() }),
        ("many segments, direct", Options { segment: Some(16 << 10), indirect: false, ..base.clone() }),
        ("memory table, no acks", Options { memory_message: MemoryMessage::Table, reply_ack: false, ..base.clone() }),
        ("spinning", Options { spin: Duration::from_micros(50), ..base }),
    ]
}

#[test]
fn bytes_arrive_where_they_belong_in_every_way_of_talking() {
    let reference = Reference::new(8 * MIB, 1, true);
    for (seed, (name, options)) in variants().into_iter().enumerate() {
        let mut disk = Guest::connect(&reference.socket(), options).unwrap().into_disk().unwrap();
        assert_eq!(disk.size(), 8 * MIB as u64, "{name}");
        let mut before = vec![0; 8 * MIB];
        reference.file().read_exact_at(&mut before, 0).unwrap();
        let mut read = vec![0; 8 * MIB];
        disk.read_at(&mut read, 0).unwrap();
        assert!(read == before, "{name}: read");

        // Odd sizes and places, larger than the data area.
        let data = noise(3 * MIB + 512, 100 + seed as u64);
        disk.write_at(&data, 512 * 77).unwrap();
        disk.flush().unwrap();
        before[512 * 77..512 * 77 + data.len()].copy_from_slice(&data);
        let mut after = vec![0; 8 * MIB];
        reference.file().read_exact_at(&mut after, 0).unwrap();
        assert!(after == before, "{name}: written");
    }
}

#[test]
fn discard_and_write_zeroes_reach_the_disk() {
    let reference = Reference::new(4 * MIB, 1, true);
    let mut disk = Guest::connect(&reference.socket(), Options::default()).unwrap().into_disk().unwrap();
    disk.write_zeroes(512, 4096 + 512, false).unwrap();
    disk.write_zeroes(MIB as u64, MIB as u64, true).unwrap();
    disk.discard(3 * MIB as u64, MIB as u64).unwrap();
    let mut expected = reference.content.clone();
    expected[512..512 + 4096 + 512].fill(0);
    expected[MIB..2 * MIB].fill(0);
    let mut after = vec![0; 4 * MIB];
    reference.file().read_exact_at(&mut after, 0).unwrap();
    assert!(after[..3 * MIB] == expected[..3 * MIB]);
    assert_eq!(disk.id().unwrap(), "vhost_user_blk");
}

#[test]
fn features_and_config_space_are_read_as_offered() {
    let reference = Reference::new(4 * MIB, 2, false);
    let guest = Guest::connect(&reference.socket(), Options::default().queues(2)).unwrap();
    assert!(guest.read_only());
    for feature in [
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
    ] {
        assert!(guest.has_feature(feature), "feature {feature}");
    }
    let config = guest.config();
    assert_eq!(config.capacity, 4 * MIB as u64 / 512);
    assert_eq!(config.blk_size, 512);
    assert_eq!(config.num_queues, 2);
    assert_eq!(config.seg_max, 126);
    assert!(config.max_discard_sectors > 0);
    assert_eq!(guest.close().unwrap(), [0, 0]);
}

#[test]
fn a_request_that_fails_says_what_and_where() {
    let reference = Reference::new(4 * MIB, 1, false);
    let mut disk = Guest::connect(&reference.socket(), Options::default()).unwrap().into_disk().unwrap();
    let error = disk.write_at(&[0; 512], 1024).unwrap_err();
    assert!(
        matches!(error, FrontendError::Failed { request: "write", offset: 1024, status: Status::IoError }),
        "{error}"
    );
    let error = disk.read_at(&mut [0; 512], 4 * MIB as u64).unwrap_err();
    assert!(matches!(error, FrontendError::Failed { .. }), "{error}");
    assert!(matches!(disk.read_at(&mut [0; 100], 0), Err(FrontendError::NotInSectors { len: 100, .. })));
    // The disk is as usable as before.
    disk.read_at(&mut [0; 4096], 0).unwrap();
}

#[test]
fn queues_work_side_by_side_each_in_its_thread() {
    let reference = Reference::new(16 * MIB, 2, true);
    let mut guest = Guest::connect(&reference.socket(), Options::default().queues(2)).unwrap();
    let content = &reference.content;
    std::thread::scope(|scope| {
        for mut queue in guest.take_queues() {
            scope.spawn(move || {
                let depth = 64;
                let mut at: Vec<u64> = (0..depth).collect();
                let mut done = Vec::new();
                let mut finished = 0;
                let submit = |queue: &mut blkmark::frontend::Queue, slot: u64, block: u64| {
                    let buffer = Buffer::slot(slot as usize, 4096);
                    let sector = block * 8;
                    queue.submit(Request::Read { sector, buffer }, slot).unwrap();
                };
                for slot in 0..depth {
                    submit(&mut queue, slot, at[slot as usize]);
                }
                // Past the wrap of the ring's 16-bit indices.
                while finished < 70_000 {
                    queue.kick().unwrap();
                    assert_eq!(queue.wait(GIVE_UP).unwrap(), Wait::Ready);
                    queue.completions(&mut done).unwrap();
                    for completion in done.drain(..) {
                        assert_eq!(completion.status, Status::Ok);
                        let slot = completion.token as usize;
                        let block = at[slot];
                        if finished % 64 == 0 {
                            let mut bytes = [0; 4096];
                            queue.read_data(slot * 4096, &mut bytes).unwrap();
                            let start = block as usize * 4096;
                            assert!(bytes == content[start..start + 4096], "block {block}");
                        }
                        finished += 1;
                        at[slot] = (block * 31 + 7) % (16 * MIB as u64 / 4096);
                        submit(&mut queue, completion.token, at[slot]);
                    }
                }
                queue.kick().unwrap();
                while queue.in_flight() > 0 {
                    queue.wait(GIVE_UP).unwrap();
                    queue.completions(&mut done).unwrap();
                }
            });
        }
    });
    guest.close().unwrap();
}

#[test]
fn a_full_ring_is_said_and_loses_nothing() {
    let reference = Reference::new(4 * MIB, 1, true);
    let options = Options { queue_size: 16, indirect: false, ..Options::default() };
    let mut guest = Guest::connect(&reference.socket(), options).unwrap();
    let mut queue = guest.take_queues().remove(0);
    let mut accepted = HashSet::new();
    for token in 0.. {
        let buffer = Buffer::slot(token as usize, 4096);
        match queue.submit(Request::Read { sector: 0, buffer }, token) {
            Ok(()) => assert!(accepted.insert(token)),
            Err(FrontendError::QueueFull) => break,
            Err(e) => panic!("{e}"),
        }
    }
    assert_eq!(accepted.len(), 5, "three descriptors each");
    assert!(queue.kick().unwrap());
    let mut done = Vec::new();
    while !accepted.is_empty() {
        assert_eq!(queue.wait(GIVE_UP).unwrap(), Wait::Ready);
        queue.completions(&mut done).unwrap();
        for completion in done.drain(..) {
            assert!(accepted.remove(&completion.token));
            assert_eq!(completion.written, 4097);
        }
    }
    let short = Some(Duration::from_millis(1));
    assert_eq!(queue.wait(short).unwrap(), Wait::TimedOut);
}

#[test]
fn the_death_of_the_back_end_wakes_a_waiting_queue_and_a_new_one_serves_on() {
    let mut reference = Reference::new(4 * MIB, 1, true);
    let mut guest = Guest::connect(&reference.socket(), Options::default()).unwrap();
    let mut queue = guest.take_queues().remove(0);
    let waiter = std::thread::spawn(move || {
        let result = queue.wait(GIVE_UP);
        (queue, result)
    });
    reference.kill();
    let (mut queue, result) = waiter.join().unwrap();
    assert!(matches!(result, Err(FrontendError::BackendGone)), "{result:?}");
    assert!(matches!(queue.wait(None), Err(FrontendError::BackendGone)));

    fs::remove_file(reference.socket()).unwrap();
    let error = guest.reconnect(&reference.socket()).unwrap_err();
    assert!(matches!(error, FrontendError::Connect { .. }), "{error}");

    // Published while nobody listened: served by the next back end.
    let buffer = Buffer::slot(0, 4096);
    queue.submit(Request::Read { sector: 8, buffer }, 7).unwrap();
    queue.kick().unwrap();
    reference.restart(1);
    guest.reconnect(&reference.socket()).unwrap();
    assert_eq!(queue.wait(GIVE_UP).unwrap(), Wait::Ready);
    let mut done = Vec::new();
    queue.completions(&mut done).unwrap();
    assert_eq!((done[0].token, done[0].status), (7, Status::Ok));
    let mut bytes = [0; 4096];
    queue.read_data(0, &mut bytes).unwrap();
    assert!(bytes == reference.content[4096..8192]);
}

#[test]
fn hanging_up_abruptly_leaves_the_back_end_free_for_the_next_guest() {
    let reference = Reference::new(4 * MIB, 1, true);
    let mut first = Guest::connect(&reference.socket(), Options::default()).unwrap();
    let mut queue = first.take_queues().remove(0);
    for token in 0..32 {
        let buffer = Buffer::slot(token as usize, 4096);
        queue.submit(Request::Read { sector: 0, buffer }, token).unwrap();
    }
    queue.kick().unwrap();
    first.disconnect_abruptly();
    let mut disk = Guest::connect(&reference.socket(), Options::default()).unwrap().into_disk().unwrap();
    disk.read_at(&mut [0; 4096], 0).unwrap();
}

#[test]
fn a_mute_back_end_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let options = Options { answer_within: Duration::from_millis(50), ..Options::default() };
    let Err(error) = Guest::connect(&socket, options) else {
        panic!("connected to nobody");
    };
    assert!(matches!(error, FrontendError::TimedOut(_)), "{error}");
}

#[test]
fn impossible_options_are_refused_before_anything_happens() {
    let reference = Reference::new(4 * MIB, 1, true);
    let connect = |options| match Guest::connect(&reference.socket(), options) {
        Ok(_) => panic!("connected"),
        Err(e) => e,
    };
    let size = |queue_size| Options { queue_size, ..Options::default() };
    assert!(matches!(connect(size(100)), FrontendError::BadOptions(_)));
    assert!(matches!(connect(size(0)), FrontendError::BadOptions(_)));
    assert!(matches!(connect(Options::default().queues(0)), FrontendError::BadOptions(_)));
    assert!(matches!(connect(Options::default().queues(2)), FrontendError::TooManyQueues { wanted: 2, offered: 1 }));
}

#[test]
fn raw_access_reaches_the_ring_as_a_driver_would() {
    let reference = Reference::new(4 * MIB, 1, true);
    let mut guest = Guest::connect(&reference.socket(), Options::default()).unwrap();
    let mut queue = guest.take_queues().remove(0);
    let mut raw = queue.raw();
    let base = raw.data_address();
    // A read of sector 1 whose header stands in two descriptors.
    raw.write(base, &[0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    raw.write(base + 64, &1u64.to_le_bytes()).unwrap();
    let parts = [(base, 8, 1, 9), (base + 64, 8, 1, 3), (base + 512, 512, 3, 77), (base + 128, 1, 2, 0)];
    for (index, (address, len, flags, next)) in [5, 9, 3, 77].into_iter().zip(parts) {
        let descriptor = Descriptor { address, len, flags, next };
        raw.set_descriptor(index, descriptor).unwrap();
    }
    raw.push_avail(5).unwrap();
    raw.kick().unwrap();
    assert_eq!(raw.wait(GIVE_UP).unwrap(), Wait::Ready);
    assert_eq!(raw.take_used().unwrap(), Some((5, 513)));
    assert_eq!(raw.take_used().unwrap(), None);
    let mut sector = [0; 512];
    raw.read(base + 512, &mut sector).unwrap();
    assert!(sector == reference.content[512..1024]);
    assert!(raw.write(u64::MAX, &[0]).is_err());
}
