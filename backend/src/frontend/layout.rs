//! Where the rings, the request records and the data of one queue lie in guest memory. Pure arithmetic.
//!
//! Every area is page-aligned: the rings need 16, 2 and 4 bytes, and direct I/O wants aligned data.

use super::request::{HEADER_LEN, SEGMENT_LEN};

const PAGE: usize = 4096;

/// A request's small parts: header, discard segment, status byte. One record a descriptor head, 64 bytes apart.
const RECORD_LEN: usize = 64;
const SEGMENT_AT: usize = HEADER_LEN;
const STATUS_AT: usize = SEGMENT_AT + SEGMENT_LEN;

/// Bytes of a descriptor.
pub(super) const DESCRIPTOR_LEN: usize = 16;

/// Offsets of one queue's areas from the start of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// Entries of the ring.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: usize,
    /// Available ring: flags, idx, ring[size], used_event.
    pub avail: usize,
    /// Used ring: flags, idx, ring[size] of (id, len), avail_event.
    pub used: usize,
    /// Request records.
    pub records: usize,
    /// Indirect tables, `table_len` descriptors each.
    pub tables: usize,
    /// Descriptors in an indirect table.
    pub table_len: usize,
    /// Data area.
    pub data: usize,
    /// Bytes of the data area.
    pub data_len: usize,
    /// First byte after everything.
    pub end: usize,
}

impl Layout {
    /// Lays a queue of `size` entries out from `start`, with indirect tables of `table_len` descriptors.
    pub fn new(start: usize, size: u16, table_len: usize, data_len: usize) -> Self {
        let entries = usize::from(size);
        let descriptors = start.next_multiple_of(PAGE);
        let avail = (descriptors + entries * DESCRIPTOR_LEN).next_multiple_of(PAGE);
        let used = (avail + 6 + entries * 2).next_multiple_of(PAGE);
        let records = (used + 6 + entries * 8).next_multiple_of(PAGE);
        let tables = (records + entries * RECORD_LEN).next_multiple_of(PAGE);
        let data = (tables + entries * table_len * DESCRIPTOR_LEN).next_multiple_of(PAGE);
        Layout {
            size,
            descriptors,
            avail,
            used,
            records,
            tables,
            table_len,
            data,
            data_len,
            end: (data + data_len).next_multiple_of(PAGE),
        }
    }

    fn entry(&self, index: u16) -> usize {
        usize::from(index % self.size)
    }

    pub fn descriptor(&self, index: u16) -> usize {
        self.descriptors + self.entry(index) * DESCRIPTOR_LEN
    }

    pub fn avail_flags(&self) -> usize {
        self.avail
    }

    pub fn avail_idx(&self) -> usize {
        self.avail + 2
    }

    pub fn avail_entry(&self, index: u16) -> usize {
        self.avail + 4 + self.entry(index) * 2
    }

    pub fn used_event(&self) -> usize {
        self.avail + 4 + usize::from(self.size) * 2
    }

    pub fn used_flags(&self) -> usize {
        self.used
    }

    pub fn used_idx(&self) -> usize {
        self.used + 2
    }

    pub fn used_entry(&self, index: u16) -> usize {
        self.used + 4 + self.entry(index) * 8
    }

    pub fn avail_event(&self) -> usize {
        self.used + 4 + usize::from(self.size) * 8
    }

    pub fn header(&self, head: u16) -> usize {
        self.records + self.entry(head) * RECORD_LEN
    }

    pub fn segment(&self, head: u16) -> usize {
        self.header(head) + SEGMENT_AT
    }

    pub fn status(&self, head: u16) -> usize {
        self.header(head) + STATUS_AT
    }

    pub fn table(&self, head: u16) -> usize {
        self.tables + self.entry(head) * self.table_len * DESCRIPTOR_LEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_do_not_overlap_whatever_the_size() {
        for size in [4u16, 8, 64, 128, 256, 1024, 32768] {
            for table_len in [0, 3, 130] {
                let l = Layout::new(12345, size, table_len, 70_001);
                assert!(l.descriptors >= 12345);
                assert!(l.descriptor(size - 1) + DESCRIPTOR_LEN <= l.avail);
                assert_eq!(l.used_event(), l.avail_entry(size - 1) + 2);
                assert!(l.used_event() + 2 <= l.used);
                assert_eq!(l.avail_event(), l.used_entry(size - 1) + 8);
                assert!(l.avail_event() + 2 <= l.records);
                assert!(l.status(size - 1) < l.tables);
                assert!(l.table(size - 1) + table_len * DESCRIPTOR_LEN <= l.data);
                assert!(l.data + l.data_len <= l.end);
                assert_eq!(l.data % PAGE, 0);
            }
        }
    }
}
