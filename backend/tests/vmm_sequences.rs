//! The message sequences of real front ends, replayed: each ends with requests through the ring.
//!
//! Taken from the sources of QEMU 10 (`hw/virtio/vhost.c`, `vhost-user.c`,
//! `hw/block/vhost-user-blk.c`), Cloud Hypervisor (`virtio-devices/src/vhost_user/blk.rs`,
//! `vu_common_ctrl.rs`), Firecracker (`src/vmm/src/devices/virtio/vhost_user.rs`,
//! `block/vhost_user/device.rs`) and crosvm (`devices/src/virtio/vhost_user_frontend/mod.rs`):
//! which messages, in which order, with which features and flags.

mod support;

use support::disk::Event;
use support::guest::{event, protocol_bit, wait_readable_event};
use support::{Guest, MemoryDisk, Served};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{
    VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

type Protocol = VhostUserProtocolFeatures;

const LOG_ALL: u64 = 1 << 26;

fn bits(of: &[u32]) -> u64 {
    of.iter().fold(0, |all, bit| all | 1 << bit)
}

/// The configuration space, read as a front end reads it; answers capacity in sectors and queues.
fn read_config(vmm: &mut Frontend, size: u32) -> (u64, u16) {
    let (_, space) = vmm.get_config(0, size, VhostUserConfigFlags::WRITABLE, &vec![0; size as usize]).unwrap();
    assert_eq!(space.len(), size as usize);
    let capacity = u64::from_le_bytes(space[..8].try_into().unwrap());
    (capacity, u16::from_le_bytes(space[34..36].try_into().unwrap()))
}

// ---- QEMU ----------------------------------------------------------------------------------

/// `vhost_user_blk_connect`: everything before the guest's driver shows up.
fn qemu_connect(vmm: &mut Frontend, queues: usize) -> u64 {
    vmm.get_features().unwrap();
    let offered = vmm.get_protocol_features().unwrap();
    let known = Protocol::MQ
        | Protocol::LOG_SHMFD
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS;
    vmm.set_protocol_features(offered & known).unwrap();
    assert_eq!(vmm.get_queue_num().unwrap(), queues as u64);
    assert!(vmm.get_max_mem_slots().unwrap() >= 8);
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap();
    // One descriptor that stands in until the guest's interrupts are set up.
    let masked = event();
    for index in 0..queues {
        vmm.set_vring_call(index, &masked).unwrap();
        vmm.set_vring_err(index, &event()).unwrap();
    }
    let (capacity, told) = read_config(vmm, 60);
    assert_eq!((capacity, usize::from(told)), (2048, queues));
    features
}

/// `vhost_dev_start`: the driver is ready.
fn qemu_start(guest: &Guest, vmm: &mut Frontend, queues: usize, features: u64, base: u16) {
    vmm.set_features(features).unwrap();
    // With memory slots each region comes alone, and its answer is waited for.
    vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    for region in guest.regions() {
        vmm.add_mem_region(&region).unwrap();
    }
    vmm.set_hdr_flags(VhostUserHeaderFlag::empty());
    for index in 0..queues {
        let ring = guest.ring(index);
        vmm.set_vring_num(index, ring.size).unwrap();
        vmm.set_vring_base(index, base).unwrap();
        vmm.set_vring_addr(index, &guest.config(index)).unwrap();
        vmm.set_vring_kick(index, &ring.kick()).unwrap();
        vmm.set_vring_call(index, &ring.call()).unwrap();
    }
    for index in 0..queues {
        vmm.set_vring_enable(index, true).unwrap();
    }
}

/// `vhost_dev_stop`.
fn qemu_stop(guest: &Guest, vmm: &mut Frontend, queues: usize) -> Vec<u32> {
    for index in 0..queues {
        vmm.set_vring_enable(index, false).unwrap();
    }
    let bases = (0..queues).map(|i| vmm.get_vring_base(i).unwrap()).collect();
    for region in guest.regions() {
        vmm.remove_mem_region(&region).unwrap();
    }
    bases
}

#[test]
fn qemu_boots_resets_and_boots_again() {
    let served = Served::new(MemoryDisk::new(2));
    let guest = Guest::new(2, 128);
    let mut vmm = served.front_end();
    let features = qemu_connect(&mut vmm, 2);
    qemu_start(&guest, &mut vmm, 2, features, 0);
    guest.ring(0).check_io();
    guest.ring(1).check_io();
    // The firmware's driver goes, the kernel's comes.
    assert_eq!(qemu_stop(&guest, &mut vmm, 2), [2, 2]);
    vmm.reset_device().unwrap();
    guest.ring(0).forget();
    guest.ring(1).forget();
    qemu_start(&guest, &mut vmm, 2, features, 0);
    guest.ring(0).check_io();
    guest.ring(1).check_io();
    served.stop();
}

#[test]
fn qemu_reconnects_and_goes_on_at_the_used_index() {
    let served = Served::new(MemoryDisk::new(1));
    let guest = Guest::new(1, 128);
    let mut vmm = served.front_end();
    let features = qemu_connect(&mut vmm, 1);
    qemu_start(&guest, &mut vmm, 1, features, 0);
    guest.ring(0).check_io();
    drop(vmm);
    served.disk.wait_running(0);
    // While it is away the guest goes on submitting.
    guest.ring(0).put(1, 9, &[7; 512], false);
    let mut vmm = served.front_end();
    let features = qemu_connect(&mut vmm, 1);
    let base = guest.ring(0).used_idx();
    assert_eq!(base, 2);
    qemu_start(&guest, &mut vmm, 1, features, base);
    // Nobody kicks for what was submitted before.
    assert_eq!(guest.ring(0).complete(0).0, 0);
    guest.ring(0).check_io();
    drop(vmm);
    served.stop();
}

#[test]
fn qemu_masks_interrupts_and_switches_descriptors_while_rings_run() {
    let served = Served::new(MemoryDisk::new(1));
    let guest = Guest::new(1, 128);
    let mut vmm = served.front_end();
    let features = qemu_connect(&mut vmm, 1);
    qemu_start(&guest, &mut vmm, 1, features, 0);
    // Masked: completions go to a descriptor that the guest does not see; unmasked again, the
    // signal that was missed comes after all.
    vmm.set_vring_call(0, &event()).unwrap();
    guest.ring(0).submit(1, 9, &[3; 512]);
    guest.ring(0).poll_used(1);
    let unmasked = guest.ring(0).renew_call();
    vmm.set_vring_call(0, &unmasked).unwrap();
    wait_readable_event(&unmasked, "the signal that was missed");
    assert_eq!(guest.ring(0).complete(0).0, 0);
    // Another ioeventfd.
    vmm.set_vring_kick(0, &guest.ring(0).renew_kick()).unwrap();
    guest.ring(0).check_io();
    // Migration logging is switched by the same features and addresses again; it is not offered,
    // so only the messages come.
    vmm.set_features(features).unwrap();
    vmm.set_vring_addr(0, &guest.config(0)).unwrap();
    guest.ring(0).check_io();
    let starts = |e: &Event| matches!(e, Event::Start { .. });
    assert_eq!(served.disk.events().into_iter().filter(starts).count(), 2, "one for the kick");
    served.stop();
}

#[test]
fn qemu_without_memory_slots_sends_its_table_again_while_rings_run() {
    let served = Served::new(MemoryDisk::new(1));
    let guest = Guest::new(1, 128);
    let mut vmm = served.front_end();
    guest.attach(&mut vmm, 0);
    guest.ring(0).check_io();
    // A DIMM is plugged: the whole table again, the ring stays where it was.
    vmm.set_mem_table(&guest.regions()).unwrap();
    guest.ring(0).check_io();
    vmm.set_mem_table(&guest.regions()[..1]).unwrap();
    guest.ring(0).check_io();
    let stops = |e: &Event| matches!(e, Event::Stop { .. });
    assert!(!served.disk.events().iter().any(stops), "the ring was not disturbed");
    served.stop();
}

// ---- Cloud Hypervisor ------------------------------------------------------------------------

fn cloud_hypervisor_features(queues: usize) -> u64 {
    let mut known = bits(&[
        VIRTIO_BLK_F_SIZE_MAX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_GEOMETRY,
        VIRTIO_BLK_F_RO,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_DISCARD,
        VIRTIO_BLK_F_WRITE_ZEROES,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_F_VERSION_1,
        VIRTIO_F_IN_ORDER,
        VIRTIO_F_ORDER_PLATFORM,
        VIRTIO_F_NOTIFICATION_DATA,
    ]) | protocol_bit()
        | LOG_ALL;
    if queues > 1 {
        known |= bits(&[VIRTIO_BLK_F_MQ]);
    }
    known
}

/// `Blk::new`; answers the features and protocol features that it keeps for reconnecting.
fn cloud_hypervisor_new(vmm: &mut Frontend, queues: usize) -> (u64, Protocol) {
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap() & cloud_hypervisor_features(queues);
    let known = Protocol::CONFIG
        | Protocol::MQ
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::REPLY_ACK
        | Protocol::INFLIGHT_SHMFD
        | Protocol::LOG_SHMFD
        | Protocol::DEVICE_STATE;
    let protocol = known & vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    assert!(protocol.contains(Protocol::REPLY_ACK));
    vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    assert!(vmm.get_queue_num().unwrap() >= queues as u64);
    assert_eq!(read_config(vmm, 60).0, 2048);
    (features, protocol)
}

/// `setup_vhost_user`: sizes first, then ring by ring, all enabled at the end.
fn cloud_hypervisor_setup(guest: &Guest, vmm: &mut Frontend, queues: usize, features: u64) {
    vmm.set_features(features).unwrap();
    vmm.set_mem_table(&guest.regions()).unwrap();
    for index in 0..queues {
        vmm.set_vring_num(index, guest.ring(index).size).unwrap();
    }
    for index in 0..queues {
        vmm.set_vring_addr(index, &guest.config(index)).unwrap();
        // It starts at the available index, also after a reconnect.
        let base = guest.ring(index).avail_idx();
        vmm.set_vring_base(index, base).unwrap();
        vmm.set_vring_call(index, &guest.ring(index).call()).unwrap();
        vmm.set_vring_kick(index, &guest.ring(index).kick()).unwrap();
    }
    cloud_hypervisor_enable(vmm, queues, true);
}

fn cloud_hypervisor_enable(vmm: &mut Frontend, queues: usize, on: bool) {
    for index in 0..queues {
        vmm.set_vring_enable(index, on).unwrap();
    }
}

#[test]
fn cloud_hypervisor_boots_pauses_hotplugs_and_resets() {
    let served = Served::new(MemoryDisk::new(4));
    let guest = Guest::new(2, 128);
    let mut vmm = served.front_end();
    let (features, _) = cloud_hypervisor_new(&mut vmm, 2);
    cloud_hypervisor_setup(&guest, &mut vmm, 2, features);
    guest.ring(0).check_io();
    guest.ring(1).check_io();

    // Paused, nothing moves; resumed, what was submitted meanwhile does.
    cloud_hypervisor_enable(&mut vmm, 2, false);
    guest.ring(0).put(1, 9, &[5; 512], false);
    cloud_hypervisor_enable(&mut vmm, 2, true);
    assert_eq!(guest.ring(0).complete(0).0, 0);

    // Memory is plugged: one region more, at an address of its own.
    let mut more = guest.regions().pop().unwrap();
    more.guest_phys_addr = 8 << 30;
    more.userspace_addr = 1 << 40;
    vmm.add_mem_region(&more).unwrap();
    guest.ring(0).check_io();

    // The guest turns the write cache off, which is not offered.
    vmm.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();

    // `reset_vhost_user`, and the driver comes again.
    for index in 0..2 {
        vmm.set_vring_enable(index, false).unwrap();
        vmm.get_vring_base(index).unwrap();
        guest.ring(index).forget();
    }
    assert_eq!(served.disk.running(), 0);
    cloud_hypervisor_setup(&guest, &mut vmm, 2, features);
    guest.ring(0).check_io();
    guest.ring(1).check_io();
    served.stop();
}

#[test]
fn cloud_hypervisor_reconnects_without_asking_again() {
    let served = Served::new(MemoryDisk::new(1));
    let guest = Guest::new(1, 128);
    let mut vmm = served.front_end();
    let (features, protocol) = cloud_hypervisor_new(&mut vmm, 1);
    cloud_hypervisor_setup(&guest, &mut vmm, 1, features);
    guest.ring(0).check_io();
    drop(vmm);
    // `reinitialize_vhost_user`: protocol features are set, not asked for; no owner bit differs.
    let mut vmm = served.front_end();
    vmm.set_owner().unwrap();
    vmm.get_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    vmm.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    cloud_hypervisor_setup(&guest, &mut vmm, 1, features);
    guest.ring(0).check_io();
    served.stop();
}

// ---- Firecracker -----------------------------------------------------------------------------

#[test]
fn firecracker_boots_with_config_alone() {
    let served = Served::new(MemoryDisk::new(1));
    let guest = Guest::new(1, 256);
    let mut vmm = served.front_end();
    // `VhostUserBlockImpl::new`.
    vmm.set_owner().unwrap();
    let known =
        bits(&[VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_FLUSH]) | protocol_bit();
    let features = known & vmm.get_features().unwrap();
    let protocol = Protocol::CONFIG & vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    assert_eq!(read_config(&mut vmm, 60).0, 2048);
    // `activate`, `setup_backend`: each ring is enabled before the next is told of.
    vmm.set_features(features).unwrap();
    vmm.set_mem_table(&guest.regions()).unwrap();
    vmm.set_vring_num(0, guest.ring(0).size).unwrap();
    vmm.set_vring_addr(0, &guest.config(0)).unwrap();
    vmm.set_vring_base(0, guest.ring(0).avail_idx()).unwrap();
    vmm.set_vring_call(0, &guest.ring(0).call()).unwrap();
    vmm.set_vring_kick(0, &guest.ring(0).kick()).unwrap();
    vmm.set_vring_enable(0, true).unwrap();
    guest.ring(0).check_io();
    // `config_update` while it runs.
    assert_eq!(read_config(&mut vmm, 60).0, 2048);
    guest.ring(0).check_io();
    served.stop();
}

// ---- crosvm ----------------------------------------------------------------------------------

/// `activate_vring`.
fn crosvm_activate(guest: &Guest, vmm: &mut Frontend, index: usize, base: u16) {
    vmm.set_vring_num(index, guest.ring(index).size).unwrap();
    vmm.set_vring_addr(index, &guest.config(index)).unwrap();
    vmm.set_vring_base(index, base).unwrap();
    vmm.set_vring_call(index, &guest.ring(index).call()).unwrap();
    vmm.set_vring_kick(index, &guest.ring(index).kick()).unwrap();
    vmm.set_vring_enable(index, true).unwrap();
}

#[test]
fn crosvm_boots_sleeps_wakes_and_resets() {
    let served = Served::new(MemoryDisk::new(3));
    let guest = Guest::new(3, 256);
    let mut vmm = served.front_end();
    // `VhostUserFrontend::new`: device features are taken as they are offered.
    vmm.set_owner().unwrap();
    let features = vmm.get_features().unwrap();
    let known = Protocol::CONFIG
        | Protocol::MQ
        | Protocol::BACKEND_REQ
        | Protocol::DEVICE_STATE
        | Protocol::SHMEM
        | Protocol::REPLY_ACK;
    let protocol = known & vmm.get_protocol_features().unwrap();
    vmm.set_protocol_features(protocol).unwrap();
    assert_eq!(vmm.get_queue_num().unwrap(), 3);
    // The guest reads and writes the configuration space piece by piece, before any feature is set.
    let field = |vmm: &mut Frontend, at, len: usize| {
        let flags = VhostUserConfigFlags::WRITABLE;
        vmm.get_config(at, len as u32, flags, &vec![0; len]).unwrap().1
    };
    assert_eq!(field(&mut vmm, 0, 4), [0, 8, 0, 0]);
    assert_eq!(field(&mut vmm, 4, 4), [0; 4]);
    assert_eq!(field(&mut vmm, 34, 2), [3, 0]);
    assert_eq!(field(&mut vmm, 56, 1), [1]);
    assert_eq!(field(&mut vmm, 92, 4), [0; 4]);
    vmm.set_config(32, VhostUserConfigFlags::empty(), &[1]).unwrap();

    // `activate`.
    vmm.set_features(features).unwrap();
    vmm.set_mem_table(&guest.regions()).unwrap();
    for index in 0..3 {
        crosvm_activate(&guest, &mut vmm, index, 0);
    }
    (0..3).for_each(|i| guest.ring(i).check_io());

    // `virtio_sleep` and `virtio_wake`: the same features, so no SET_FEATURES again.
    let bases: Vec<_> = (0..3)
        .map(|i| {
            vmm.set_vring_enable(i, false).unwrap();
            vmm.get_vring_base(i).unwrap()
        })
        .collect();
    assert_eq!(bases, [2, 2, 2]);
    assert_eq!(served.disk.running(), 0);
    vmm.set_mem_table(&guest.regions()).unwrap();
    for (index, base) in bases.into_iter().enumerate() {
        crosvm_activate(&guest, &mut vmm, index, base as u16);
    }
    (0..3).for_each(|i| guest.ring(i).check_io());

    // `reset`, and a guest with one queue.
    for index in 0..3 {
        vmm.set_vring_enable(index, false).unwrap();
        vmm.get_vring_base(index).unwrap();
        guest.ring(index).forget();
    }
    vmm.set_mem_table(&guest.regions()).unwrap();
    crosvm_activate(&guest, &mut vmm, 0, 0);
    guest.ring(0).check_io();
    served.stop();
}
