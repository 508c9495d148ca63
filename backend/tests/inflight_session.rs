//! INFLIGHT_SHMFD as the session serves it: what QEMU and Cloud Hypervisor send, where rings go on, what is refused.

mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use support::disk::Event;
use support::{Guest, MemoryDisk, Served};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

const SIZE: u16 = 16;
/// Bytes of a queue's part: a header of 16, entries of 16, up to a multiple of 64.
const PART: u64 = 320;

fn ask(vmm: &mut Frontend, num_queues: u16) -> (VhostUserInflight, File) {
    vmm.get_inflight_fd(&VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues, queue_size: SIZE }).unwrap()
}

/// As a process leaves it that took these heads, in this order, and died.
fn leave_in_flight(file: &File, queue: u64, used_idx: u16, heads: &[u16]) {
    let at = queue * PART;
    let header = [0, 0, 0, 0, 1, SIZE, 0, used_idx];
    let bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
    file.write_all_at(&bytes, at).unwrap();
    for (counter, head) in heads.iter().enumerate() {
        let entry = at + 16 + 16 * u64::from(*head);
        file.write_all_at(&(counter as u64).to_ne_bytes(), entry + 8).unwrap();
        file.write_all_at(&[1], entry).unwrap();
    }
}

fn started(served: &Served) -> Vec<(u16, u16)> {
    let events = served.disk.events().into_iter();
    events
        .filter_map(|e| if let Event::Start { index, next_avail, .. } = e { Some((index, next_avail)) } else { None })
        .collect()
}

#[test]
fn it_is_offered_and_a_fresh_region_changes_nothing() {
    let served = Served::new(MemoryDisk::new(2));
    let guest = Guest::new(2, SIZE);
    let mut vmm = served.front_end();
    guest.negotiate(&mut vmm);
    assert!(vmm.get_protocol_features().unwrap().contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD));
    let (told, file) = ask(&mut vmm, 2);
    assert_eq!((told.mmap_size, told.mmap_offset), (2 * PART, 0));
    assert_eq!(file.metadata().unwrap().len(), 2 * PART);
    vmm.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
    for index in 0..2 {
        guest.start_ring(&mut vmm, index, 0);
        vmm.set_vring_enable(index, true).unwrap();
        guest.ring(index).check_io();
    }
    assert_eq!(started(&served), [(0, 0), (1, 0)]);
    drop(vmm);
    served.stop();
}

#[test]
fn a_ring_goes_on_behind_what_is_in_flight_whatever_the_front_end_says() {
    let served = Served::new(MemoryDisk::new(2));
    let guest = Guest::new(2, SIZE);
    let mut vmm = served.front_end();
    guest.negotiate(&mut vmm);
    let (told, file) = ask(&mut vmm, 2);
    leave_in_flight(&file, 1, 0, &[7, 2, 4]);
    vmm.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
    // QEMU says the used index, Cloud Hypervisor the available one; neither is it.
    guest.start_ring(&mut vmm, 0, 0);
    guest.start_ring(&mut vmm, 1, 9);
    assert_eq!(started(&served), [(0, 0), (1, 3)]);
    assert_eq!(vmm.get_vring_base(1).unwrap(), 3);
    drop(vmm);
    served.stop();
}

#[test]
fn a_running_ring_goes_on_in_a_new_region() {
    let served = Served::new(MemoryDisk::new(1));
    let guest = Guest::new(1, SIZE);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    let (told, file) = ask(&mut vmm, 1);
    vmm.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
    guest.ring(0).check_io();
    assert_eq!(started(&served), [(0, 0), (0, 2)]);
    drop(vmm);
    served.stop();
}

#[test]
fn shapes_that_cannot_be_drop_the_connection() {
    let served = Served::new(MemoryDisk::new(2));
    let good = (2 * PART, 0, 2, SIZE);
    let shapes = [
        (2 * PART - 1, 0, 2, SIZE),
        (2 * PART, 4096, 2, SIZE),
        (2 * PART, 1, 2, SIZE),
        (2 * PART, u64::MAX - 100, 2, SIZE),
        (u64::MAX, u64::MAX, 2, SIZE),
        (3 * PART, 0, 3, SIZE),
        (2 * PART, 0, 2, 32),
        (u64::MAX, 0, 2, u16::MAX),
        (u64::MAX, 0, u16::MAX, 32768),
    ];
    for (mmap_size, mmap_offset, num_queues, queue_size) in shapes.into_iter().chain([good]) {
        let mut vmm = served.front_end();
        Guest::new(2, SIZE).negotiate(&mut vmm);
        let (_, file) = ask(&mut vmm, 2);
        let told = VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size };
        let accepted = vmm.set_inflight_fd(&told, file.as_raw_fd()).is_ok();
        assert_eq!(
            accepted,
            (mmap_size, mmap_offset, num_queues, queue_size) == good,
            "{mmap_size:#x} {mmap_offset:#x}"
        );
    }
    for (num_queues, queue_size) in [(3, SIZE), (u16::MAX, SIZE), (1, 32769)] {
        let mut vmm = served.front_end();
        Guest::new(2, SIZE).negotiate(&mut vmm);
        let wish = VhostUserInflight { mmap_size: 0, mmap_offset: 0, num_queues, queue_size };
        assert!(vmm.get_inflight_fd(&wish).is_err());
    }
    served.assert_serves();
    served.stop();
}

#[test]
fn a_region_that_cannot_be_true_drops_the_connection_and_is_never_guessed_at() {
    let served = Served::new(MemoryDisk::new(1));
    type Spoil = fn(&File);
    let cases: [(&str, Spoil); 4] = [
        ("a later version", |file| file.write_all_at(&2u16.to_ne_bytes(), 8).unwrap()),
        ("features", |file| file.write_all_at(&[1], 3).unwrap()),
        ("fewer entries than the ring has", |file| file.write_all_at(&8u16.to_ne_bytes(), 10).unwrap()),
        ("a batch larger than the ring", |file| file.write_all_at(&17u16.to_ne_bytes(), 14).unwrap()),
    ];
    for (case, spoil) in cases {
        let guest = Guest::new(1, SIZE);
        let mut vmm = served.front_end();
        guest.negotiate(&mut vmm);
        let (told, file) = ask(&mut vmm, 1);
        leave_in_flight(&file, 0, 0, &[3]);
        spoil(&file);
        vmm.set_inflight_fd(&told, file.as_raw_fd()).unwrap();
        let ring = guest.ring(0);
        vmm.set_vring_num(0, ring.size).unwrap();
        vmm.set_vring_addr(0, &guest.config(0)).unwrap();
        assert!(vmm.set_vring_kick(0, &ring.kick()).is_err(), "{case}");
    }
    assert_eq!(started(&served), []);
    served.assert_serves();
    served.stop();
}
