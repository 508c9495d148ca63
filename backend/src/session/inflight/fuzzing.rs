//! The inflight region as a front end that means harm hands it over: its shape and all of its bytes.
//!
//! Promises: what is resubmitted are heads that exist, each once, that the region marks, in the order of its counters; once
//! all of them are answered nothing is left over.

use super::{Area, ENTRY, HEADER, create, stride};
use crate::memory::MemoryTable;
use std::fs::File;
use std::os::unix::fs::FileExt;
use vhost::vhost_user::message::VhostUserInflight;

const MOST: u16 = 4;

/// Shape (9 bytes), ring (5 bytes), contents.
pub fn inflight(data: &[u8]) {
    let Some((shape, rest)) = data.split_first_chunk::<9>() else { return };
    let Some((ring, contents)) = rest.split_first_chunk::<5>() else { return };
    let queues = u16::from_le_bytes([shape[0], shape[1]]);
    let entries = u16::from_le_bytes([shape[2], shape[3]]);
    let word = |at: usize| u64::from(u16::from_le_bytes([shape[at], shape[at + 1]]));
    // Offsets and sizes of every magnitude out of two bytes and a shift.
    let size = word(4) << (shape[8] & 0x3f);
    let offset = word(6) << (shape[8] >> 6 << 2);

    let memory = MemoryTable::default();
    let wish = VhostUserInflight::new(0, 0, queues, entries);
    let Ok((told, file)) = create(&wish, MOST) else {
        let file: File = rustix::fs::memfd_create("fuzz", rustix::fs::MemfdFlags::CLOEXEC).unwrap().into();
        file.set_len(1 << 16).unwrap();
        let told = VhostUserInflight::new(size, offset, queues, entries);
        assert!(Area::map(&told, file, MOST, &memory).is_err(), "a shape that is not made is taken");
        return;
    };
    let contents = &contents[..contents.len().min(told.mmap_size as usize)];
    file.write_all_at(contents, 0).unwrap();
    let odd = VhostUserInflight::new(size, offset, queues, entries);
    if let Ok(area) = Area::map(&odd, file.try_clone().unwrap(), MOST, &memory) {
        recover(&area, &odd, ring, None);
    }
    if let Ok(area) = Area::map(&told, file.try_clone().unwrap(), MOST, &memory) {
        recover(&area, &told, ring, Some(&file));
    }
}

fn recover(area: &Area, told: &VhostUserInflight, ring: &[u8; 5], file: Option<&File>) {
    assert!(area.queue(told.num_queues).is_none());
    let index = u16::from(ring[4]) % told.num_queues;
    let size = u16::from_le_bytes([ring[0], ring[1]]);
    let used = u16::from_le_bytes([ring[2], ring[3]]);
    let at = (stride(told.queue_size) * usize::from(index)) as u64;
    let entry = |head: u16| {
        let mut entry = [0; ENTRY];
        let at = at + HEADER as u64 + ENTRY as u64 * u64::from(head);
        file.map(|file| file.read_exact_at(&mut entry, at).map(|()| entry).unwrap())
    };
    let counter = |entry: [u8; ENTRY]| u64::from_le_bytes(*entry.last_chunk().unwrap());
    let mut queue = area.queue(index).expect("a queue that was told");
    let Ok(Some(left)) = queue.recover(size, used) else { return };
    assert!(left.len() <= usize::from(size));
    let mut seen = vec![false; usize::from(size)];
    let mut last = None;
    for head in &left {
        assert!(!std::mem::replace(&mut seen[usize::from(*head)], true), "head {head} twice");
        if let Some(entry) = entry(*head) {
            assert!(entry[0] != 0, "head {head} is not marked");
            let order = Some((counter(entry), *head));
            assert!(last < order, "head {head} is out of order");
            last = order;
        }
    }
    // The same again finds the same; once all is answered there is nothing.
    let again = area.queue(index).unwrap().recover(size, used).unwrap();
    assert_eq!(again.as_ref(), Some(&left));
    let shown = used.wrapping_add(left.len() as u16);
    queue.answer(&left, || Ok::<_, ()>(shown)).unwrap();
    assert_eq!(area.queue(index).unwrap().recover(size, shown).unwrap(), Some(Vec::new()));
    for head in 0..size {
        queue.begin(head);
    }
    queue.begin(u16::MAX);
}
