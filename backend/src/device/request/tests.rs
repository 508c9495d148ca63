//! Every shape a chain can have: the well-formed ones come back as they were meant, the others end
//! in the status that the specification names, or in "broken".

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryMmap};

use super::*;
use crate::device::chain::Chain;
use crate::memory::view::View;

/// Two regions with a hole between them: 64 KiB at 0, 64 KiB at 128 KiB.
const REGIONS: [(GuestAddress, usize); 2] = [(GuestAddress(0), 0x10000), (GuestAddress(0x20000), 0x10000)];
const HOLE: u64 = 0x18000;
const DISK: Bounds = Bounds { capacity: 1 << 20, read_only: false };
/// Where the tests put header, data and status.
const HEAD: u64 = 0x100;
const DATA: u64 = 0x1000;
const STATUS: u64 = 0x200;

/// Parses a chain over memory that stays.
fn parse(
    chain: impl Iterator<Item = Descriptor>,
    mem: &GuestMemoryMmap,
    bounds: &Bounds,
    iovecs: &mut Vec<iovec>,
) -> Parsed {
    super::parse(chain, View::over(mem).spans(), bounds, iovecs)
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&REGIONS).unwrap()
}

fn readable(addr: u64, len: u32) -> Descriptor {
    Descriptor::new(addr, len, VRING_DESC_F_NEXT as u16, 1)
}

fn writable(addr: u64, len: u32) -> Descriptor {
    Descriptor::new(addr, len, (VRING_DESC_F_NEXT | VRING_DESC_F_WRITE) as u16, 1)
}

/// The same chain, ended: the last descriptor names no next one.
fn ended(mut chain: Vec<Descriptor>) -> Vec<Descriptor> {
    if let Some(last) = chain.last_mut() {
        let flags = last.flags() & !(VRING_DESC_F_NEXT as u16);
        *last = Descriptor::new(last.addr().0, last.len(), flags, 0);
    }
    chain
}

fn header(kind: u32, sector: u64) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; SEGMENT] {
    let mut bytes = [0; SEGMENT];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Parses a chain after putting a header at [`HEAD`].
fn run(head: [u8; HEADER], chain: Vec<Descriptor>) -> (Parsed, Vec<iovec>, GuestMemoryMmap) {
    run_on(&DISK, memory(), head, chain)
}

fn run_on(
    disk: &Bounds,
    mem: GuestMemoryMmap,
    head: [u8; HEADER],
    chain: Vec<Descriptor>,
) -> (Parsed, Vec<iovec>, GuestMemoryMmap) {
    mem.write_slice(&head, GuestAddress(HEAD)).unwrap();
    let mut iovecs = Vec::new();
    let parsed = parse(ended(chain).into_iter(), &mem, disk, &mut iovecs);
    (parsed, iovecs, mem)
}

fn code(parsed: &Parsed) -> Option<u8> {
    match parsed {
        Parsed::Answer { code, .. } => Some(*code),
        _ => None,
    }
}

fn request(parsed: Parsed) -> Request {
    match parsed {
        Parsed::Request(request) => request,
        other => panic!("not a request: {other:?}"),
    }
}

/// The usual chain of a driver: header, data, status.
fn plain(data: Option<Descriptor>) -> Vec<Descriptor> {
    let mut chain = vec![readable(HEAD, 16)];
    chain.extend(data);
    chain.push(writable(STATUS, 1));
    chain
}

fn status_of(head: [u8; HEADER], chain: Vec<Descriptor>) -> Option<u8> {
    let (parsed, iovecs, _) = run(head, chain);
    assert!(iovecs.is_empty(), "an answer leaves no iovecs");
    assert_ne!(parsed, Parsed::Broken);
    code(&parsed)
}

#[test]
fn a_read_names_its_range_its_buffer_and_its_status() {
    let (parsed, iovecs, mem) = run(header(0, 8), plain(Some(writable(DATA, 4096))));
    let r = request(parsed);
    assert_eq!((r.kind, r.offset, r.len), (Kind::Read, 4096, 4096));
    assert_eq!((r.used_len, r.iovecs.clone()), (4097, 0..1));
    assert_eq!(iovecs[0].iov_len, 4096);
    let host = mem.get_host_address(GuestAddress(DATA)).unwrap();
    assert_eq!(iovecs[0].iov_base.cast(), host);
    assert_eq!(r.status.guest, GuestAddress(STATUS));
    // SAFETY: `mem` is alive.
    unsafe { r.status.write(UNSUPP) };
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), UNSUPP);
}

#[test]
fn a_write_takes_what_is_readable_after_the_header() {
    let (parsed, iovecs, _) = run(header(1, 2), plain(Some(readable(DATA, 1024))));
    let r = request(parsed);
    assert_eq!((r.kind, r.offset, r.len), (Kind::Write, 1024, 1024));
    assert_eq!((r.used_len, r.iovecs), (1, 0..1));
    assert_eq!(iovecs.len(), 1);
}

#[test]
fn requests_of_a_batch_share_one_vector() {
    let mem = memory();
    mem.write_slice(&header(1, 0), GuestAddress(HEAD)).unwrap();
    let mut iovecs = Vec::new();
    for n in 0..3 {
        // Each right behind the one before.
        let chain = ended(plain(Some(readable(DATA + 512 * n as u64, 512))));
        let r = request(parse(chain.into_iter(), &mem, &DISK, &mut iovecs));
        assert_eq!(r.iovecs, n..n + 1, "never merged with the request before");
    }
    let broken = ended(vec![readable(HEAD, 16), readable(DATA, 512)]);
    assert_eq!(parse(broken.into_iter(), &mem, &DISK, &mut iovecs), Parsed::Broken);
    assert_eq!(iovecs.len(), 3);
}

#[test]
fn flush_and_get_id_are_understood() {
    let r = request(run(header(4, 0), plain(None)).0);
    assert_eq!((r.kind, r.len, r.iovecs.len(), r.used_len), (Kind::Flush, 0, 0, 1));

    let (parsed, iovecs, mem) = run(header(8, 0), plain(Some(writable(DATA, 20))));
    let r = request(parsed);
    assert_eq!((r.kind, r.len, r.used_len), (Kind::GetId, 20, 21));
    // SAFETY: `mem` is alive and these are its iovecs.
    let put = unsafe { put_id(&iovecs[r.iovecs], b"0123456789abcdefghij") };
    assert_eq!(put, 20);
    let mut seen = [0; 21];
    mem.read_slice(&mut seen, GuestAddress(DATA)).unwrap();
    assert_eq!(&seen, b"0123456789abcdefghij\0");
}

#[test]
fn an_id_goes_as_far_as_its_buffer() {
    let chain = vec![readable(HEAD, 16), writable(DATA, 3), writable(DATA + 0x100, 4), writable(STATUS, 1)];
    let (parsed, iovecs, mem) = run(header(8, 0), chain);
    let r = request(parsed);
    assert_eq!(r.len, 7);
    // SAFETY: `mem` is alive and these are its iovecs.
    assert_eq!(unsafe { put_id(&iovecs[r.iovecs], b"0123456789abcdefghij") }, 7);
    let mut seen = [0; 5];
    mem.read_slice(&mut seen, GuestAddress(DATA + 0x100)).unwrap();
    assert_eq!(&seen, b"3456\0");
    assert_eq!(status_of(header(8, 0), plain(None)), Some(IOERR), "no room at all");
}

fn with_segment(kind: u32, seg: [u8; SEGMENT], disk: &Bounds) -> Parsed {
    let mem = memory();
    mem.write_slice(&seg, GuestAddress(DATA)).unwrap();
    let (parsed, iovecs, _) = run_on(disk, mem, header(kind, 0), plain(Some(readable(DATA, 16))));
    assert!(iovecs.is_empty());
    parsed
}

#[test]
fn discard_and_write_zeroes_name_their_range() {
    let r = request(with_segment(11, segment(8, 16, 0), &DISK));
    assert_eq!((r.kind, r.offset, r.len), (Kind::Discard, 4096, 8192));
    for (flags, unmap) in [(0, false), (1, true)] {
        let r = request(with_segment(13, segment(1, 1, flags), &DISK));
        assert_eq!((r.kind, r.offset, r.len), (Kind::WriteZeroes { unmap }, 512, 512));
    }
}

#[test]
fn unknown_flags_of_a_segment_are_unsupported() {
    let flagged = |kind, flags| code(&with_segment(kind, segment(0, 1, flags), &DISK));
    assert_eq!(flagged(11, 1), Some(UNSUPP), "unmap means nothing on a discard");
    assert_eq!(flagged(11, 2), Some(UNSUPP));
    assert_eq!(flagged(13, 2), Some(UNSUPP));
    assert_eq!(flagged(13, 3), Some(UNSUPP));
}

#[test]
fn a_discard_keeps_to_the_limit_and_to_the_disk() {
    let big = Bounds { capacity: 1 << 40, read_only: false };
    let discard = |sector, n, disk: &Bounds| with_segment(11, segment(sector, n, 0), disk);
    assert_eq!(request(discard(0, 32768, &big)).len, 16 << 20);
    assert_eq!(code(&discard(0, 32769, &big)), Some(IOERR));
    assert_eq!(code(&discard(0, u32::MAX, &big)), Some(IOERR));
    assert_eq!(code(&discard(2047, 2, &DISK)), Some(IOERR));
    assert_eq!(code(&discard(u64::MAX, 1, &big)), Some(IOERR));
    assert_eq!(code(&discard(0, 0, &DISK)), Some(OK), "nothing to do");
}

#[test]
fn one_segment_is_what_was_offered() {
    let of = |len| status_of(header(11, 0), plain(Some(readable(DATA, len))));
    assert_eq!(of(32), Some(UNSUPP));
    assert_eq!(of(15), Some(IOERR));
    assert_eq!(of(17), Some(IOERR));
    assert_eq!(status_of(header(11, 0), plain(None)), Some(IOERR));
}

#[test]
fn a_read_only_disk_takes_no_change() {
    let disk = Bounds { read_only: true, ..DISK };
    let on = |kind, data| run_on(&disk, memory(), header(kind, 0), plain(data)).0;
    assert_eq!(code(&on(1, Some(readable(DATA, 512)))), Some(IOERR));
    assert_eq!(code(&with_segment(11, segment(0, 1, 0), &disk)), Some(IOERR));
    assert_eq!(code(&with_segment(13, segment(0, 1, 0), &disk)), Some(IOERR));
    assert_eq!(request(on(0, Some(writable(DATA, 512)))).kind, Kind::Read);
    assert_eq!(request(on(4, None)).kind, Kind::Flush);
}

#[test]
fn an_unknown_type_is_unsupported() {
    for kind in [2, 3, 14, 16, 1 << 31, u32::MAX] {
        assert_eq!(status_of(header(kind, 0), plain(None)), Some(UNSUPP), "{kind}");
    }
}

#[test]
fn a_range_beyond_the_end_is_an_error() {
    let read = |sector, len| status_of(header(0, sector), plain(Some(writable(DATA, len))));
    assert_eq!(read(2047, 1024), Some(IOERR));
    assert_eq!(read(2048, 512), Some(IOERR));
    assert_eq!(read(u64::MAX, 512), Some(IOERR), "sector x 512 overflows");
    assert_eq!(read(u64::MAX / 512, 512), Some(IOERR), "the end overflows");
    let (last, _, _) = run(header(0, 2047), plain(Some(writable(DATA, 512))));
    assert_eq!(request(last).offset, (1 << 20) - 512);
}

#[test]
fn a_part_of_a_sector_is_an_error_and_nothing_is_done_for_nothing() {
    for len in [1, 511, 513] {
        assert_eq!(status_of(header(0, 0), plain(Some(writable(DATA, len)))), Some(IOERR));
        assert_eq!(status_of(header(1, 0), plain(Some(readable(DATA, len)))), Some(IOERR));
    }
    assert_eq!(status_of(header(0, 0), plain(None)), Some(OK));
    assert_eq!(status_of(header(1, 0), plain(None)), Some(OK));
    assert_eq!(status_of(header(1, 2049), plain(None)), Some(IOERR));
}

#[test]
fn data_of_the_wrong_direction_is_an_error() {
    let cases = [
        (0, readable(DATA, 512)),
        (1, writable(DATA, 512)),
        (4, readable(DATA, 512)),
        (4, writable(DATA, 512)),
        (8, readable(DATA, 20)),
        (11, writable(DATA, 16)),
    ];
    for (kind, data) in cases {
        assert_eq!(status_of(header(kind, 0), plain(Some(data))), Some(IOERR), "{kind}");
    }
}

#[test]
fn a_short_header_is_an_error_and_a_spread_one_is_not() {
    let short = vec![readable(HEAD, 15), writable(STATUS, 1)];
    assert_eq!(status_of(header(4, 0), short), Some(IOERR));
    let none = vec![writable(STATUS, 1)];
    assert_eq!(status_of(header(4, 0), none), Some(IOERR));

    let spread = vec![
        readable(HEAD, 3),
        readable(HEAD + 3, 0),
        readable(HEAD + 3, 5),
        readable(HEAD + 8, 8 + 512),
        writable(STATUS, 1),
    ];
    let (parsed, iovecs, mem) = run(header(1, 7), spread);
    let r = request(parsed);
    assert_eq!((r.kind, r.offset, r.len), (Kind::Write, 7 * 512, 512));
    let data = mem.get_host_address(GuestAddress(HEAD + 16)).unwrap();
    assert_eq!((iovecs[0].iov_base.cast(), iovecs[0].iov_len), (data, 512));
}

#[test]
fn the_status_may_share_a_descriptor_with_data() {
    let chain = vec![readable(HEAD, 16), writable(DATA, 513)];
    let (parsed, iovecs, _) = run(header(0, 0), chain);
    let r = request(parsed);
    assert_eq!((r.len, r.used_len, r.status.guest.0), (512, 513, DATA + 512));
    assert_eq!(iovecs[r.iovecs].iter().map(|i| i.iov_len).sum::<usize>(), 512);
}

#[test]
fn buffers_across_regions_become_two_pieces_and_holes_an_error() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000), (GuestAddress(0x10000), 0x10000)]).unwrap();
    let (parsed, iovecs, _) = run_on(&DISK, mem, header(0, 0), plain(Some(writable(0xf000, 0x2000))));
    let r = request(parsed);
    assert_eq!(r.len, 0x2000);
    assert_eq!(iovecs[r.iovecs].iter().map(|i| i.iov_len).sum::<usize>(), 0x2000);

    for addr in [HOLE, 0xff00, 0x30000, u64::MAX - 100] {
        assert_eq!(status_of(header(0, 0), plain(Some(writable(addr, 512)))), Some(IOERR));
        assert_eq!(status_of(header(1, 0), plain(Some(readable(addr, 512)))), Some(IOERR));
    }
    let lost = vec![readable(HOLE, 16), writable(STATUS, 1)];
    assert_eq!(status_of(header(4, 0), lost), Some(IOERR), "header outside memory");
}

#[test]
fn without_a_place_for_a_status_the_chain_is_broken() {
    let broken = |chain: Vec<Descriptor>| run(header(4, 0), chain).0 == Parsed::Broken;
    assert!(broken(vec![]));
    assert!(broken(vec![readable(HEAD, 16)]));
    assert!(broken(vec![readable(HEAD, 16), writable(STATUS, 0)]));
    assert!(broken(vec![readable(HEAD, 16), writable(HOLE, 1)]));
    assert!(broken(vec![readable(HEAD, 16), writable(u64::MAX, 2)]));
    assert!(broken(vec![writable(STATUS, 1), readable(HEAD, 16)]), "readable after writable");
    assert!(broken(vec![writable(STATUS, 1), readable(HEAD, 0)]));
}

#[test]
fn a_chain_cut_short_is_broken_although_its_head_looks_whole() {
    let mem = memory();
    mem.write_slice(&header(4, 0), GuestAddress(HEAD)).unwrap();
    let cut = vec![readable(HEAD, 16), writable(STATUS, 1)];
    assert_eq!(parse(cut.into_iter(), &mem, &DISK, &mut Vec::new()), Parsed::Broken);
}

#[test]
fn a_trailing_empty_descriptor_does_not_move_the_status() {
    let chain = vec![readable(HEAD, 16), writable(STATUS, 1), writable(HOLE, 0)];
    let r = request(run(header(4, 0), chain).0);
    assert_eq!(r.status.guest.0, STATUS);
}

#[test]
fn length_count_and_pieces_are_bounded() {
    let many = |n: usize, desc: Descriptor| {
        let mut chain = vec![readable(HEAD, 16)];
        chain.extend(std::iter::repeat_n(desc, n));
        chain.push(writable(STATUS, 1));
        run(header(0, 0), chain).0
    };
    assert_eq!(request(many(1022, writable(DATA, 512))).len, 1022 * 512);
    assert_eq!(many(1023, writable(DATA, 512)), Parsed::Broken);
    assert_eq!(many(100_000, writable(DATA, 512)), Parsed::Broken);

    let roomy = || GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 256 << 20)]).unwrap();
    let disk = Bounds { capacity: 1 << 40, read_only: false };
    let of = |len| run_on(&disk, roomy(), header(1, 0), plain(Some(readable(DATA, len)))).0;
    assert_eq!(request(of(128 << 20)).len, MAX_DATA);
    assert_eq!(code(&of((128 << 20) + 512)), Some(IOERR));

    let huge = |len| status_of(header(1, 0), plain(Some(readable(DATA, len))));
    assert_eq!(huge(u32::MAX), Some(IOERR));
    assert_eq!(huge((128 << 20) + 512), Some(IOERR));
    let endless = std::iter::repeat(writable(DATA, u32::MAX));
    assert_eq!(parse(endless, &memory(), &DISK, &mut Vec::new()), Parsed::Broken);
}

#[test]
fn neighbouring_buffers_become_one_piece() {
    let chain = vec![
        readable(HEAD, 16),
        writable(DATA, 512),
        writable(DATA + 512, 1024),
        writable(DATA + 0x4000, 512),
        writable(STATUS, 1),
    ];
    let (parsed, iovecs, _) = run(header(0, 0), chain);
    let lens: Vec<_> = iovecs[request(parsed).iovecs].iter().map(|i| i.iov_len).collect();
    assert_eq!(lens, [1536, 512]);
}

/// Host ranges of the guest memory, to hold iovecs against.
fn host_ranges(mem: &GuestMemoryMmap) -> Vec<Range<usize>> {
    mem.iter().map(|r| r.as_ptr() as usize..r.as_ptr() as usize + r.size()).collect()
}

/// Whether every byte of a piece lies in some region: regions that happen to be neighbours in host
/// memory may have become one piece.
fn inside(mem: &GuestMemoryMmap, iov: &iovec) -> bool {
    let (mut at, end) = (iov.iov_base as usize, iov.iov_base as usize + iov.iov_len);
    while at < end {
        match host_ranges(mem).iter().find(|r| r.contains(&at)) {
            Some(r) => at = r.end,
            None => return false,
        }
    }
    true
}

prop_compose! {
    fn any_descriptor()(
        near in prop::bool::weighted(0.8),
        low in 0u64..0x31000,
        high: u64,
        small in prop::bool::weighted(0.8),
        short in 0u32..2048,
        long: u32,
        flags in 0u16..8,
        next: u16,
    ) -> Descriptor {
        let addr = if near { low } else { high };
        let len = if small { short } else { long };
        Descriptor::new(addr, len, flags, next)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_chain_panics_or_reaches_outside_guest_memory(
        chain in prop::collection::vec(any_descriptor(), 0..12),
        head in prop::array::uniform16(any::<u8>()),
        kind in 0u8..16,
        plausible: bool,
        first_is_header: bool,
        end: bool,
        read_only: bool,
        capacity in 0u64..4096,
    ) {
        let mem = memory();
        let mut head = head;
        if plausible {
            head[..4].copy_from_slice(&u32::from(kind).to_le_bytes());
            head[9..].fill(0);
        }
        mem.write_slice(&head, GuestAddress(HEAD)).unwrap();
        let mut chain = chain;
        if first_is_header {
            chain.insert(0, readable(HEAD, 16));
        }
        if end {
            chain = ended(chain);
        }
        let disk = Bounds { capacity: capacity * 512, read_only };
        let earlier = iovec { iov_base: std::ptr::null_mut(), iov_len: 7 };
        let mut iovecs = vec![earlier];
        let parsed = parse(chain.into_iter(), &mem, &disk, &mut iovecs);
        let pushed = match &parsed {
            Parsed::Request(r) => {
                prop_assert!(r.offset % 512 == 0 && r.offset + r.len <= disk.capacity || r.kind == Kind::GetId);
                prop_assert!(r.kind == Kind::Flush || r.len > 0);
                let bytes: usize = iovecs[r.iovecs.clone()].iter().map(|i| i.iov_len).sum();
                match r.kind {
                    Kind::Read | Kind::Write => prop_assert_eq!(bytes as u64, r.len),
                    Kind::GetId => prop_assert!(bytes as u64 >= r.len && r.len <= 20),
                    _ => prop_assert_eq!(bytes, 0),
                }
                prop_assert!(r.iovecs.start == 1 && r.iovecs.end == iovecs.len());
                r.iovecs.clone()
            }
            _ => {
                prop_assert_eq!(iovecs.len(), 1);
                1..1
            }
        };
        prop_assert_eq!(iovecs[0].iov_len, 7, "what was there stays");
        for iov in &iovecs[pushed] {
            prop_assert!(iov.iov_len > 0 && inside(&mem, iov));
        }
    }

    #[test]
    fn every_well_formed_request_comes_back_as_it_was_meant(
        write: bool,
        sector in 0u64..1900,
        pieces in prop::collection::vec(1u32..2000, 0..8),
        head_cuts in prop::collection::vec(0usize..16, 0..3),
        status_shared: bool,
    ) {
        // Pieces of any length whose sum is whole sectors.
        let sum: u32 = pieces.iter().sum();
        let mut pieces = pieces;
        pieces.push(512 - sum % 512);
        let total: u32 = pieces.iter().sum();

        let mem = memory();
        mem.write_slice(&header(u32::from(write), sector), GuestAddress(HEAD)).unwrap();
        let mut cuts = head_cuts;
        cuts.extend([0, 16]);
        cuts.sort_unstable();
        let mut chain: Vec<_> = cuts
            .windows(2)
            .map(|c| readable(HEAD + c[0] as u64, (c[1] - c[0]) as u32))
            .collect();
        let mut at = DATA;
        for (i, len) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            chain.push(if write {
                readable(at, *len)
            } else {
                writable(at, *len + u32::from(last && status_shared))
            });
            at += u64::from(*len) + 1;
        }
        if write || !status_shared {
            chain.push(writable(STATUS, 1));
        }
        let mut iovecs = Vec::new();
        let r = request(parse(ended(chain).into_iter(), &mem, &DISK, &mut iovecs));
        let kind = if write { Kind::Write } else { Kind::Read };
        prop_assert_eq!((r.kind, r.offset, r.len), (kind, sector * 512, u64::from(total)));
        prop_assert_eq!(r.used_len, if write { 1 } else { total + 1 });
        let lens: Vec<_> = iovecs[r.iovecs].iter().map(|i| i.iov_len as u32).collect();
        prop_assert_eq!(lens, pieces);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Whole rings of hostile bytes: loops, chains that run into each other, indirect tables in indirect tables.
    #[test]
    fn no_ring_panics_or_reaches_outside_guest_memory(
        table in prop::collection::vec(any_descriptor(), 64),
        nexts in prop::collection::vec(0u16..18, 64),
        heads in prop::collection::vec(0u16..18, 16),
        tidy: bool,
    ) {
        let mem = memory();
        mem.write_slice(&header(0, 0), GuestAddress(HEAD)).unwrap();
        // Four tables of 16 descriptors behind each other: the ring's own, and where indirect ones often lie.
        for (i, (desc, next)) in table.iter().zip(nexts).enumerate() {
            let (addr, len) = match desc.refers_to_indirect_table() && tidy {
                true => (0x8000 + desc.addr().0 % 4 * 256, desc.len() % 16 * 16),
                false => (desc.addr().0, desc.len()),
            };
            let desc = Descriptor::new(addr, len, desc.flags(), next);
            mem.write_slice(&desc.to_bytes(), GuestAddress(0x8000 + 16 * i as u64)).unwrap();
        }
        let mut iovecs = Vec::new();
        let view = View::over(&mem);
        for head in heads {
            let chain = Chain::new(view.spans(), GuestAddress(0x8000), 16, head);
            parse(chain, &mem, &DISK, &mut iovecs);
        }
        for iov in &iovecs {
            prop_assert!(iov.iov_len > 0 && inside(&mem, iov));
        }
    }
}
