//! The driver ring against rust-vmm's `virtio-queue` as the device on the same memory.

use std::sync::Arc;

use virtio_queue::{Queue as DeviceQueue, QueueT};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use super::layout::Layout;
use super::memory::GuestMemory;
use super::ring::{DriverRing, Used, need_event};

#[test]
fn an_event_is_due_exactly_when_its_entry_is_passed() {
    // From the definition: entries old, old+1, .. new-1 were added; was `event` one of them?
    for old in [0u16, 1, 7, 0x7fff, 0xfff0, 0xfffe, 0xffff] {
        for added in [1u16, 2, 3, 15, 16, 17, 255] {
            let new = old.wrapping_add(added);
            for distance in 0..=u16::MAX {
                let event = old.wrapping_add(distance);
                assert_eq!(need_event(event, new, old), distance < added, "event {event} old {old} new {new}");
            }
        }
    }
}

#[test]
fn nothing_added_is_no_event() {
    for event in 0..=u16::MAX {
        assert!(!need_event(event, 5, 5));
    }
}

struct Pair {
    driver: DriverRing,
    device: DeviceQueue,
    view: GuestMemoryMmap,
    memory: Arc<GuestMemory>,
}

fn pair(size: u16, event_idx: bool) -> Pair {
    let layout = Layout::new(0, size, 0, 4096);
    let memory = Arc::new(GuestMemory::new(layout.end).unwrap());
    let view = GuestMemoryMmap::<()>::from_ranges_with_files([(
        GuestAddress(memory.guest_base()),
        memory.size(),
        Some(FileOffset::new(memory.file().try_clone().unwrap(), 0)),
    )])
    .unwrap();
    let mut device = DeviceQueue::new(32768).unwrap();
    let at = |offset| GuestAddress(memory.guest_address(offset));
    device.set_size(size);
    device.try_set_desc_table_address(at(layout.descriptors)).unwrap();
    device.try_set_avail_ring_address(at(layout.avail)).unwrap();
    device.try_set_used_ring_address(at(layout.used)).unwrap();
    device.set_event_idx(event_idx);
    device.set_ready(true);
    assert!(device.is_valid(&view));
    let driver = DriverRing::new(Arc::clone(&memory), layout, event_idx);
    Pair { driver, device, view, memory }
}

/// Sends `total` chains in batches of changing size; the device sleeps whenever it has nothing to do and works only
/// when it was notified, the driver likewise: a lost notification stops the traffic and fails the test.
fn all_arrive(size: u16, event_idx: bool, total: u32) {
    let mut p = pair(size, event_idx);
    let layout = *p.driver.layout();
    for i in 0..size {
        // One device-readable descriptor each, at a valid address.
        let mut d = [0u8; 16];
        d[..8].copy_from_slice(&p.memory.guest_address(layout.data).to_le_bytes());
        d[8..12].copy_from_slice(&64u32.to_le_bytes());
        p.memory.write_at(layout.descriptor(i), &d).unwrap();
    }
    let (mut sent, mut done, mut outstanding) = (0u32, 0u32, 0u16);
    let mut device_awake = false;
    let mut driver_called = false;
    let mut step = 0u32;
    while done < total {
        step += 1;
        let room = size - outstanding;
        let batch = (step * 7 % 13 + 1).min(u32::from(room)).min(total - sent);
        for _ in 0..batch {
            p.driver.push((sent % u32::from(size)) as u16).unwrap();
            sent += 1;
            outstanding += 1;
        }
        device_awake |= p.driver.publish().unwrap();
        p.driver.disarm().unwrap();

        if device_awake {
            loop {
                p.device.disable_notification(&p.view).unwrap();
                while let Some(chain) = p.device.pop_descriptor_chain(&p.view) {
                    let head = chain.head_index();
                    p.device.add_used(&p.view, head, u32::from(head) + 1).unwrap();
                }
                if !p.device.enable_notification(&p.view).unwrap() {
                    break;
                }
            }
            device_awake = false;
            driver_called |= p.device.needs_notification(&p.view).unwrap();
        }

        // Sleeping: only a call or entries seen while arming wake the driver.
        if !driver_called && !p.driver.arm().unwrap() {
            assert!(outstanding < size && sent < total, "both sides sleep at {done} of {total}");
            continue;
        }
        driver_called = false;
        for _ in 0..p.driver.pending().unwrap() {
            let Used { id, len } = p.driver.take().unwrap();
            assert_eq!(id, done % u32::from(size));
            assert_eq!(len, id + 1);
            done += 1;
            outstanding -= 1;
        }
        p.driver.arm().unwrap();
    }
    assert_eq!(p.driver.pending().unwrap(), 0);
    assert_eq!(p.driver.last_used(), total as u16);
}

#[test]
fn every_chain_arrives_over_many_wraps_with_event_idx() {
    for size in [4, 8, 256] {
        all_arrive(size, true, 200_000);
    }
}

#[test]
fn every_chain_arrives_over_many_wraps_without_event_idx() {
    for size in [4, 8, 256] {
        all_arrive(size, false, 200_000);
    }
}

#[test]
fn a_busy_device_is_not_notified() {
    let mut p = pair(8, true);
    let layout = *p.driver.layout();
    // The device said it waits for entry 5.
    p.memory.write_at(layout.avail_event(), &5u16.to_le_bytes()).unwrap();
    for i in 0..5 {
        p.driver.push(i).unwrap();
        assert!(!p.driver.publish().unwrap(), "entry {i}");
    }
    p.driver.push(5).unwrap();
    assert!(p.driver.publish().unwrap());
    assert!(!p.driver.publish().unwrap(), "nothing new");
}
