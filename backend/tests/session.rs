//! What a session promises: it outlives whatever its front ends do, and its rings start, stop and
//! move as the protocol says.

mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};

use blkmark::session::{Endpoint, Session};
use proptest::prelude::*;
use support::disk::{CAPACITY, Event};
use support::guest::{event, protocol_bit, wait_readable};
use support::{Guest, MemoryDisk, Served};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

// Message numbers, as the protocol has them.
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const ADD_MEM_REG: u32 = 37;

/// Sends one message as it is.
fn send(stream: &UnixStream, code: u32, body: &[u8], fds: &[RawFd]) {
    let mut bytes = Vec::new();
    for word in [code, 1, body.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(body);
    // The session may have closed already: that is what some tests are about.
    let _ = stream.send_with_fds(&[&bytes[..]], fds);
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Waits until the session has closed a connection.
fn wait_closed(stream: &UnixStream) {
    let mut rest = [0; 4096];
    loop {
        wait_readable(stream, "the connection to be closed");
        match rustix::net::recv(stream, &mut rest, rustix::net::RecvFlags::empty()) {
            Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => return,
            Ok(_) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

fn served() -> Served {
    Served::new(MemoryDisk::new(2))
}

#[test]
fn all_kinds_of_requests_go_through_a_ring() {
    let served = served();
    let guest = Guest::new(2, 16);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    let ring = guest.ring(1);
    // Often enough for the indexes to wrap around the ring several times.
    for _ in 0..30 {
        ring.check_io();
    }
    assert_eq!(ring.request(4, 0, &[]).0, 0, "flush");
    assert_eq!(&ring.request(8, 0, &[0; 20]).1[..12], b"memory-disk\0", "id");
    let segment = [words(&[9]), vec![1, 0, 0, 0, 0, 0, 0, 0]].concat();
    assert_eq!(ring.request(11, 0, &segment).0, 0, "discard");
    assert_eq!(ring.request(0, 9, &[1; 512]), (0, vec![0; 512]));
    assert_eq!(ring.request(99, 0, &[]).0, 2, "unsupported");
    assert_eq!(ring.request(0, (CAPACITY / 512) as u64, &[0; 512]).0, 1, "past the end");
    ring.put(0, 9, &[1; 512], true);
    ring.kick().write(1).unwrap();
    assert_eq!(ring.complete(512), (0, vec![0; 512]), "indirect");
    served.stop();
}

#[test]
fn front_ends_come_and_go() {
    let served = served();
    let guest = Guest::new(1, 16);
    for round in 0..5 {
        let mut vmm = served.front_end();
        guest.attach(&mut vmm, 2 * round);
        guest.ring(0).check_io();
        drop(vmm);
        served.disk.wait_running(0);
    }
    let starts: Vec<_> = served
        .disk
        .events()
        .into_iter()
        .filter_map(|e| match e {
            Event::Start { next_used, .. } => Some(next_used),
            Event::Stop { .. } => None,
        })
        .collect();
    assert_eq!(starts, [0, 2, 4, 6, 8], "the used index is the ring's own");
    served.stop();
}

#[test]
fn a_second_front_end_waits_for_the_first_to_go() {
    let served = served();
    let (a, b) = (Guest::new(1, 16), Guest::new(1, 16));
    let mut first = served.front_end();
    a.attach(&mut first, 0);
    let mut second = served.front_end();
    let (told, hears) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            b.attach(&mut second, 0);
            told.send(()).unwrap();
            b.ring(0).check_io();
        });
        a.ring(0).check_io();
        assert!(hears.try_recv().is_err(), "served two at once");
        drop(first);
        hears.recv().unwrap();
    });
    served.stop();
}

#[test]
fn kick_call_enable_and_memory_may_come_again_while_a_ring_runs() {
    let served = served();
    let guest = Guest::new(1, 16);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    let ring = guest.ring(0);
    for _ in 0..3 {
        ring.check_io();
        vmm.set_vring_kick(0, &ring.kick()).unwrap();
        ring.check_io();
        vmm.set_vring_kick(0, &ring.renew_kick()).unwrap();
        ring.check_io();
        vmm.set_vring_call(0, &ring.renew_call()).unwrap();
        ring.check_io();
        vmm.set_vring_enable(0, true).unwrap();
        ring.check_io();
        vmm.set_mem_table(&guest.regions()).unwrap();
        ring.check_io();
        vmm.set_vring_num(0, ring.size).unwrap();
        vmm.set_vring_addr(0, &guest.config(0)).unwrap();
        ring.check_io();
    }
    served.stop();
}

#[test]
fn a_disabled_ring_takes_nothing_until_it_is_enabled() {
    let served = served();
    let guest = Guest::new(1, 16);
    let mut vmm = served.front_end();
    guest.negotiate(&mut vmm);
    guest.start_ring(&mut vmm, 0, 0);
    guest.ring(0).submit(1, 9, &[1; 512]);
    // A second message answered: the first has long been acted on.
    vmm.set_vring_enable(1, true).unwrap();
    assert_eq!(guest.ring(0).used_idx(), 0);
    vmm.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.ring(0).complete(0).0, 0);
    vmm.set_vring_enable(0, false).unwrap();
    assert_eq!(vmm.get_vring_base(0).unwrap(), 1);
    served.stop();
}

#[test]
fn without_protocol_features_rings_are_enabled_from_the_start() {
    let served = served();
    let guest = Guest::new(1, 16);
    let vmm = served.front_end();
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap() & !protocol_bit();
    vmm.set_features(features).unwrap();
    vmm.set_mem_table(&guest.regions()).unwrap();
    let mut vmm = vmm;
    guest.start_ring(&mut vmm, 0, 0);
    guest.ring(0).check_io();
    assert_eq!(vmm.get_vring_base(0).unwrap(), 2);
    served.stop();
}

#[test]
fn messages_may_come_in_any_order_before_the_kick() {
    let served = served();
    let guest = Guest::new(1, 16);
    let mut vmm = served.front_end();
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap();
    let protocol = vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    vmm.set_features(features).unwrap();
    let ring = guest.ring(0);
    // Everything backwards: the ring starts when the last of it is there.
    vmm.set_vring_enable(0, true).unwrap();
    vmm.set_vring_kick(0, &ring.kick()).unwrap();
    vmm.set_vring_call(0, &ring.call()).unwrap();
    vmm.set_vring_base(0, 0).unwrap();
    vmm.set_vring_addr(0, &guest.config(0)).unwrap();
    vmm.set_vring_num(0, ring.size).unwrap();
    vmm.set_mem_table(&guest.regions()).unwrap();
    ring.check_io();
    served.stop();
}

#[test]
fn stopping_a_ring_answers_where_it_stood() {
    let served = served();
    let guest = Guest::new(1, 16);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    assert_eq!(vmm.get_vring_base(0).unwrap(), 2);
    assert_eq!(served.disk.running(), 0);
    assert_eq!(vmm.get_vring_base(0).unwrap(), 2, "asked again");
    vmm.set_vring_base(0, 9).unwrap();
    assert_eq!(vmm.get_vring_base(0).unwrap(), 9, "never started");
    guest.start_ring(&mut vmm, 0, 2);
    guest.ring(0).check_io();
    served.stop();
}

#[test]
fn a_ring_whose_memory_goes_is_suspended_until_it_comes_back() {
    let served = served();
    let guest = Guest::new(1, 16);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    let [low, high] = guest.regions().try_into().ok().unwrap();
    vmm.remove_mem_region(&high).unwrap();
    guest.ring(0).check_io();
    vmm.remove_mem_region(&low).unwrap();
    assert_eq!(served.disk.running(), 0);
    guest.ring(0).submit(1, 9, &[1; 512]);
    vmm.add_mem_region(&low).unwrap();
    assert_eq!(guest.ring(0).complete(0).0, 0);
    guest.ring(0).check_io();
    served.stop();
}

#[test]
fn a_reset_stops_all_rings_and_forgets_them() {
    let served = served();
    let guest = Guest::new(2, 16);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    vmm.reset_device().unwrap();
    assert_eq!(served.disk.running(), 0);
    assert_eq!(vmm.get_vring_base(0).unwrap(), 0);
    guest.ring(0).forget();
    vmm.set_features(vmm.get_features().unwrap()).unwrap();
    guest.start_ring(&mut vmm, 0, 0);
    vmm.set_vring_enable(0, true).unwrap();
    guest.ring(0).check_io();
    served.stop();
}

#[test]
fn a_ring_may_go_without_a_call_descriptor() {
    let served = served();
    let guest = Guest::new(1, 16);
    let stream = served.stream();
    let mut vmm = Frontend::from_stream(stream.try_clone().unwrap(), 2);
    guest.attach(&mut vmm, 0);
    // Bit 8: no descriptor, the front end polls.
    send(&stream, SET_VRING_CALL, &words(&[0x100]), &[]);
    vmm.get_features().unwrap();
    guest.ring(0).submit(1, 9, &[1; 512]);
    guest.ring(0).poll_used(1);
    assert_eq!(vmm.get_vring_base(0).unwrap(), 1);
    // No kick descriptor: polling it is not supported, and not fatal.
    guest.start_ring(&mut vmm, 0, 1);
    send(&stream, SET_VRING_KICK, &words(&[0x100]), &[]);
    vmm.get_features().unwrap();
    assert_eq!(served.disk.running(), 0);
    served.stop();
}

#[test]
fn a_descriptor_that_can_block_is_refused_as_an_event() {
    let served = served();
    let file = tempfile::tempfile().unwrap();
    for code in [SET_VRING_KICK, SET_VRING_CALL] {
        let stream = served.stream();
        send(&stream, code, &words(&[0]), &[file.as_raw_fd()]);
        wait_closed(&stream);
    }
    served.assert_serves();
}

/// What ends a connection, and nothing but the connection.
fn assert_drops(served: &Served, doing: impl FnOnce(&Guest, &mut Frontend)) {
    let guest = Guest::new(2, 16);
    let stream = served.stream();
    let mut vmm = Frontend::from_stream(stream.try_clone().unwrap(), 0x8000);
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    doing(&guest, &mut vmm);
    wait_closed(&stream);
    served.disk.wait_running(0);
    served.assert_serves();
}

#[test]
fn indexes_and_sizes_out_of_range_drop_the_connection() {
    let served = served();
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_num(2, 16)));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_num(255, 16)));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_base(2, 0)));
    assert_drops(&served, |_, vmm| drop(vmm.get_vring_base(0x7000)));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_enable(2, true)));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_kick(2, &event())));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_call(200, &event())));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_err(2, &event())));
    assert_drops(&served, |guest, vmm| drop(vmm.set_vring_addr(2, &guest.config(0))));
    for size in [0, 3, 15, 2048, 0x8000] {
        assert_drops(&served, |_, vmm| drop(vmm.set_vring_num(0, size)));
    }
    served.stop();
}

#[test]
fn a_running_ring_keeps_its_size_and_base() {
    let served = served();
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_num(0, 32)));
    assert_drops(&served, |_, vmm| drop(vmm.set_vring_base(0, 7)));
    served.stop();
}

#[test]
fn rings_outside_guest_memory_drop_the_connection() {
    let served = served();
    let end = |guest: &Guest| {
        let low = guest.regions()[0];
        low.userspace_addr + low.memory_size
    };
    assert_drops(&served, |guest, vmm| {
        let mut config = guest.config(0);
        config.desc_table_addr = 0x1000;
        drop(vmm.set_vring_addr(0, &config));
    });
    assert_drops(&served, |guest, vmm| {
        let mut config = guest.config(0);
        config.desc_table_addr = end(guest) - 16;
        drop(vmm.set_vring_addr(0, &config));
    });
    assert_drops(&served, |guest, vmm| {
        let mut config = guest.config(0);
        config.avail_ring_addr = end(guest) - 2;
        drop(vmm.set_vring_addr(0, &config));
    });
    assert_drops(&served, |guest, vmm| {
        let mut config = guest.config(0);
        config.used_ring_addr = u64::MAX - 3;
        drop(vmm.set_vring_addr(0, &config));
    });
    // Found out only at the start: a table whose tail is outside.
    assert_drops(&served, |guest, vmm| {
        vmm.get_vring_base(0).unwrap();
        let mut config = guest.config(0);
        config.used_ring_addr = end(guest) - 16;
        vmm.set_vring_num(0, 1).unwrap();
        vmm.set_vring_addr(0, &config).unwrap();
        vmm.set_vring_num(0, 16).unwrap();
        drop(vmm.set_vring_kick(0, &guest.ring(0).kick()));
    });
    served.stop();
}

#[test]
fn bad_memory_regions_drop_the_connection() {
    let served = served();
    let with = |change: fn(&mut vhost::VhostUserMemoryRegionInfo)| {
        assert_drops(&served, |guest, vmm| {
            let mut region = guest.regions().pop().unwrap();
            region.guest_phys_addr = 16 << 30;
            change(&mut region);
            drop(vmm.add_mem_region(&region));
        });
    };
    with(|r| r.memory_size += 0x1000);
    with(|r| r.mmap_offset = 1 << 40);
    with(|r| r.mmap_offset += 1);
    with(|r| r.guest_phys_addr = 0x1000);
    with(|r| r.guest_phys_addr += 8);
    with(|r| r.guest_phys_addr = !0xfff);
    with(|r| r.userspace_addr = !0xfff);
    assert_drops(&served, |guest, vmm| {
        let mut regions = guest.regions();
        regions[1].guest_phys_addr = 0x1000;
        drop(vmm.set_mem_table(&regions));
    });
    assert_drops(&served, |guest, vmm| {
        let mut region = guest.regions()[0];
        region.guest_phys_addr = 0x5000;
        drop(vmm.remove_mem_region(&region));
    });
    let zero = words(&[0, 1 << 40, 0, 0, 0]);
    let stream = served.stream();
    send(&stream, ADD_MEM_REG, &zero, &[event().as_raw_fd()]);
    wait_closed(&stream);
    served.assert_serves();
    served.stop();
}

#[test]
fn features_that_were_not_offered_drop_the_connection() {
    let served = served();
    for code in [SET_FEATURES, SET_PROTOCOL_FEATURES] {
        let stream = served.stream();
        send(&stream, code, &words(&[1 << 60]), &[]);
        wait_closed(&stream);
    }
    served.assert_serves();
    served.stop();
}

#[test]
fn messages_that_were_not_negotiated_drop_the_connection() {
    let served = served();
    // Log, postcopy, inflight, device state, shared objects, and numbers nobody has given out.
    for code in (0..50).chain([u32::MAX]) {
        let stream = served.stream();
        send(&stream, code, &[], &[]);
        send(&stream, GET_PROTOCOL_FEATURES, &[1], &[]);
        wait_closed(&stream);
    }
    served.assert_serves();
    served.stop();
}

#[test]
fn a_device_that_cannot_start_a_ring_drops_the_connection() {
    let served = served();
    served.disk.broken.store(true, Ordering::SeqCst);
    let guest = Guest::new(1, 16);
    let stream = served.stream();
    let mut vmm = Frontend::from_stream(stream.try_clone().unwrap(), 2);
    guest.negotiate(&mut vmm);
    let ring = guest.ring(0);
    vmm.set_vring_num(0, ring.size).unwrap();
    vmm.set_vring_addr(0, &guest.config(0)).unwrap();
    assert!(vmm.set_vring_kick(0, &ring.kick()).is_err());
    wait_closed(&stream);
    served.disk.broken.store(false, Ordering::SeqCst);
    served.assert_serves();
    served.stop();
}

#[test]
fn a_ring_beyond_repair_ends_only_its_connection() {
    let served = served();
    assert_drops(&served, |guest, _| {
        // More heads than the ring has entries: its index cannot be true.
        let ring = guest.ring(0);
        (0..20).for_each(|_| ring.publish(0));
        ring.kick().write(1).unwrap();
    });
    served.stop();
}

#[test]
fn a_connection_may_end_in_the_middle_of_anything() {
    let served = served();
    let guest = Guest::new(1, 16);
    drop(served.stream());
    // Half a header; a header without its body.
    served.stream().write_all(&[1, 0, 0]).unwrap();
    served.stream().write_all(&words(&[0x1_0000_0002])).unwrap();
    let mut stream = served.stream();
    stream.write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]).unwrap();
    drop(stream);
    // In the middle of setting up a ring, and with requests in it.
    let mut vmm = served.front_end();
    guest.negotiate(&mut vmm);
    vmm.set_vring_num(0, 16).unwrap();
    drop(vmm);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    guest.ring(0).submit(1, 9, &[1; 512]);
    drop(vmm);
    served.assert_serves();
    served.stop();
}

#[test]
fn a_front_end_cannot_hold_up_the_stop() {
    // Silent; in the middle of a header; in the middle of a body; not reading its answers; with a
    // ring that runs.
    let silent = |_: &UnixStream| {};
    let half_header = |s: &UnixStream| (&*s).write_all(&[1, 0, 0]).unwrap();
    let half_body = |s: &UnixStream| {
        (&*s).write_all(&[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0]).unwrap();
    };
    let deaf = |s: &UnixStream| {
        s.set_nonblocking(true).unwrap();
        let question = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        // Until both directions are full: the session is then stuck in an answer.
        let mut full = 0;
        while full < 20 {
            match (&*s).write(&question) {
                Ok(12) => full = 0,
                Ok(_) => break,
                Err(_) => {
                    full += 1;
                    std::thread::yield_now();
                }
            }
        }
    };
    let whole = |s: &UnixStream| {
        let guest = Guest::new(1, 16);
        let mut vmm = Frontend::from_stream(s.try_clone().unwrap(), 2);
        guest.attach(&mut vmm, 0);
        guest.ring(0).check_io();
    };
    let kinds: [&dyn Fn(&UnixStream); 5] = [&silent, &half_header, &half_body, &deaf, &whole];
    for doing in kinds {
        let served = served();
        let stream = served.stream();
        doing(&stream);
        served.stop();
    }
}

#[test]
fn a_session_nobody_came_to_stops_and_its_socket_goes() {
    let served = served();
    let path = served.path.clone();
    served.stop();
    assert!(!path.exists());
}

#[test]
fn a_front_end_sees_the_end_only_after_its_rings_have_stopped() {
    let mut disk = MemoryDisk::new(1);
    let (told, hears) = mpsc::channel();
    disk.report_waiting(told);
    let mut served = Served::new(disk);
    let guest = Guest::new(1, 16);
    let stream = served.stream();
    let mut vmm = Frontend::from_stream(stream.try_clone().unwrap(), 2);
    guest.attach(&mut vmm, 0);
    served.disk.set_gate(false);
    let session = served.session.take().unwrap();
    session.stopper().stop();
    hears.recv().unwrap();
    let events = rustix::event::PollFlags::IN | rustix::event::PollFlags::RDHUP;
    let mut fds = [rustix::event::PollFd::new(&stream, events)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let seen = rustix::event::poll(&mut fds, Some(&now)).unwrap();
    served.disk.set_gate(true);
    assert_eq!(seen, 0, "closed too early");
    wait_closed(&stream);
    session.join();
    assert_eq!(served.disk.running(), 0);
}

#[test]
fn a_handed_over_connection_is_served_once() {
    let disk = Arc::new(MemoryDisk::new(1));
    let (ours, theirs) = UnixStream::pair().unwrap();
    let endpoint = Endpoint::adopt(OwnedFd::from(theirs)).unwrap();
    let session = Session::spawn("disk", endpoint, disk.clone()).unwrap();
    let guest = Guest::new(1, 16);
    let mut vmm = Frontend::from_stream(ours, 1);
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    drop(vmm);
    session.join();
    assert_eq!(disk.running(), 0);
}

#[test]
fn acknowledgements_say_no_before_the_connection_ends() {
    let served = served();
    let guest = Guest::new(1, 16);
    let mut vmm = served.front_end();
    guest.negotiate(&mut vmm);
    vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let error = vmm.set_vring_num(0, 3).unwrap_err();
    assert!(error.to_string().contains("internal error"), "{error}");
    served.stop();
}

/// A message with a number that exists and anything in it, and perhaps descriptors.
fn any_message() -> impl Strategy<Value = (u32, Vec<u8>, u8)> {
    let value = prop_oneof![
        any::<u64>(),
        0u64..4,
        Just(16),
        Just(1 << 32 | 16),
        Just(1 << 32),
        (0u64..64).prop_map(|b| 1 << b),
        (0u64..64).prop_map(|page| page << 12),
    ];
    (0u32..45, prop::collection::vec(value, 0..12), 0u8..4, 0usize..8).prop_map(|(code, value, fds, odd)| {
        let mut body = words(&value);
        if odd == 0 {
            body.push(0);
        }
        // Often of the size that the message has.
        match code {
            8 | 10 | 11 | 12 | 13 | 14 | 18 if odd > 2 => body.truncate(8),
            SET_VRING_ADDR if odd > 2 => body.truncate(40),
            2 | 16 if odd > 2 => body.truncate(8),
            1 | 3 | 4 | 15 | 17 | 34 | 36 if odd > 2 => body.clear(),
            37 | 38 if odd > 2 => body.resize(40, 0),
            SET_MEM_TABLE if odd > 2 => {
                body.resize(40, 0);
                body[..8].copy_from_slice(&1u64.to_le_bytes());
            }
            _ => {}
        }
        (code, body, fds)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_and_no_messages_end_the_session(
        noise in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..20),
        talks in prop::collection::vec(prop::collection::vec(any_message(), 1..12), 1..40),
        negotiated: bool,
    ) {
        let served = served();
        for bytes in &noise {
            let mut stream = served.stream();
            let _ = stream.write_all(bytes);
            let _ = stream.shutdown(Shutdown::Both);
        }
        let guest = Guest::new(1, 16);
        let memory = guest.file.as_raw_fd();
        let signal = event();
        for talk in &talks {
            let stream = served.stream();
            let mut vmm = Frontend::from_stream(stream.try_clone().unwrap(), 2);
            if negotiated {
                guest.ring(0).forget();
                guest.attach(&mut vmm, 0);
            }
            for (code, body, fds) in talk {
                let fds: &[RawFd] = match fds {
                    0 | 1 => &[],
                    2 => &[memory],
                    _ => &[signal.as_raw_fd()],
                };
                send(&stream, *code, body, fds);
            }
            // Answers that nobody reads go with the connection.
        }
        served.assert_serves();
        served.stop();
    }
}
