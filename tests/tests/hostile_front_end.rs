//! The promise: whatever a front end puts into its rings and messages, blkmark goes on, and nobody else notices.
//!
//! One process serves two disks. On one, a front end does what no decent driver does: rings with loops, heads and
//! indices out of range, lengths and addresses beyond memory, tables within tables, requests that overwrite their own
//! rings, garbage on the socket, hang-ups in the middle of requests, and rings full of random bytes. After each, a
//! decent client on the same socket gets what it writes. All the while another client writes to the second disk and
//! reads back, and none of its requests fails; in the end that disk holds what it wrote.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use blkmark::frontend::{Buffer, Descriptor, FrontendError, Guest, Options, Queue, RawQueue, Request, Wait};
use blkmark_tests::beside::{Stop, beside};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::readable_until;
use blkmark_tests::random::Random;

const SIZE: u64 = 16 * MIB;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const UNTOUCHED: u8 = 0xee;

const READ_REQUEST: u32 = 0;
const WRITE_REQUEST: u32 = 1;
const DISCARD_REQUEST: u32 = 11;
const WRITE_ZEROES_REQUEST: u32 = 13;

#[test]
fn a_broken_ring_hurts_nobody_else() -> Result<()> {
    beside_a_decent_guest(|disk| {
        for (name, scenario) in BROKEN_RINGS {
            attack(disk, |queue| scenario(&mut queue.raw())).context(*name)?;
            a_decent_client_works(disk).with_context(|| format!("after: {name}"))?;
        }
        Ok(())
    })
}

#[test]
fn a_malformed_request_ends_in_a_status_byte() -> Result<()> {
    beside_a_decent_guest(|disk| {
        let mut guest = Guest::connect(&disk.socket, Options::default())?;
        let mut queue = guest.take_queues().pop().context("no queue")?;
        malformed_requests(&mut queue.raw())
    })
}

#[test]
fn random_rings_hurt_nobody_else() -> Result<()> {
    beside_a_decent_guest(|disk| {
        let mut random = Random(0x5851_f42d_4c95_7f2d);
        for round in 0..40 {
            attack(disk, |queue| random_ring(&mut queue.raw(), &mut random))
                .with_context(|| format!("random ring {round}"))?;
        }
        a_decent_client_works(disk)
    })
}

#[test]
fn a_front_end_may_hang_up_in_the_middle_of_requests() -> Result<()> {
    beside_a_decent_guest(|disk| {
        for round in 0..20u64 {
            let mut guest = Guest::connect(&disk.socket, Options::default())?;
            let mut queue = guest.take_queues().pop().context("no queue")?;
            for index in 0..64usize {
                let buffer = Buffer { offset: index << 16, len: 1 << 16 };
                let sector = (round * 64 + index as u64) * 128 % (SIZE / 512);
                let request = match index % 2 {
                    0 => Request::Write { sector, buffer },
                    _ => Request::Read { sector, buffer },
                };
                queue.submit(request, index as u64)?;
            }
            queue.kick()?;
            guest.disconnect_abruptly();
            drop(queue);
            drop(guest);
            a_decent_client_works(disk).with_context(|| format!("after hang-up {round}"))?;
        }
        Ok(())
    })
}

#[test]
fn garbage_on_the_socket_hurts_nobody_else() -> Result<()> {
    beside_a_decent_guest(|disk| {
        let header = |request: u32, flags: u32, size: u32| {
            let mut bytes = Vec::new();
            for word in [request, flags, size] {
                bytes.extend_from_slice(&word.to_le_bytes());
            }
            bytes
        };
        let messages = [
            vec![],
            vec![0],
            vec![0xff; 4096],
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            header(1, 1, 0)[..7].to_vec(),
            header(1, 1, u32::MAX),
            header(5, 1, 8),
            header(0, 1, 0),
            header(u32::MAX, u32::MAX, 0),
            [header(5, 1, 8), vec![0xff; 8]].concat(),
            [header(3, 1, 0), header(8, 1, 8), vec![0xff; 8]].concat(),
            [header(3, 1, 0), header(10, 1, 8), vec![0xff; 8]].concat(),
            [header(24, 1, 12 + 256), vec![0xff; 12 + 256]].concat(),
        ];
        for message in messages {
            let mut stream = UnixStream::connect(&disk.socket)?;
            // A back end that hangs up before it was sent all is right to do so.
            let _ = stream.write_all(&message);
            drop(stream);
            a_decent_client_works(disk).with_context(|| format!("after {message:.40?}"))?;
        }
        Ok(())
    })
}

#[test]
fn impossible_ring_set_ups_hurt_nobody_else() -> Result<()> {
    use vhost::{VhostBackend, VringConfigData};
    beside_a_decent_guest(|disk| {
        let ring = |desc: u64, used: u64, avail: u64, size: u16| VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        for case in 0..8 {
            let mut guest = Guest::connect(&disk.socket, Options::default())?;
            let session = guest.session().context("no session")?;
            // Any of these may be refused, and the session may end with it.
            let _ = match case {
                0 => session.set_vring_num(0, 0),
                1 => session.set_vring_num(0, 3),
                2 => session.set_vring_num(0, u16::MAX),
                3 => session.set_vring_base(0, u16::MAX),
                4 => session.set_vring_addr(0, &ring(0, 0, 0, 256)),
                5 => session.set_vring_addr(0, &ring(0x10, u64::MAX - 15, 0x20, 256)),
                6 => session.set_vring_addr(0, &ring(1, 1, 1, 256)),
                _ => session.set_features(u64::MAX),
            };
            let mut queue = guest.take_queues().pop().context("no queue")?;
            // A ring that was broken may swallow this or not; a back end that is gone is an answer too.
            let _ = queue.submit(Request::Flush, 0).and_then(|()| queue.kick());
            settle(&mut queue.raw())?;
            drop(queue);
            drop(guest);
            a_decent_client_works(disk).with_context(|| format!("after case {case}"))?;
        }
        Ok(())
    })
}

type Scenario = fn(&mut RawQueue<'_>) -> Result<()>;

const BROKEN_RINGS: &[(&str, Scenario)] = &[
    ("a chain that is a loop", |raw| {
        for (index, next) in [(0, 1), (1, 2), (2, 0)] {
            let address = raw.data_address();
            raw.set_descriptor(index, Descriptor { address, len: 16, flags: NEXT, next })?;
        }
        send(raw, &[0])
    }),
    ("a descriptor that follows itself", |raw| {
        let address = raw.data_address();
        raw.set_descriptor(0, Descriptor { address, len: 512, flags: NEXT | WRITE, next: 0 })?;
        send(raw, &[0])
    }),
    ("heads beyond the ring", |raw| send(raw, &[256, 257, 0x7fff, 0xffff])),
    ("a next beyond the ring", |raw| {
        let address = raw.data_address();
        raw.set_descriptor(0, Descriptor { address, len: 16, flags: NEXT, next: 300 })?;
        send(raw, &[0])
    }),
    ("lengths of four gigabytes", |raw| {
        let address = raw.data_address();
        header(raw, WRITE_REQUEST, 0)?;
        raw.set_descriptor(0, Descriptor { address, len: 16, flags: NEXT, next: 1 })?;
        for index in 1..250 {
            raw.set_descriptor(index, Descriptor { address, len: u32::MAX, flags: NEXT, next: index + 1 })?;
        }
        raw.set_descriptor(250, Descriptor { address, len: 1, flags: WRITE, next: 0 })?;
        send(raw, &[0])
    }),
    ("addresses beyond memory", |raw| {
        let inside = raw.data_address();
        header(raw, WRITE_REQUEST, 0)?;
        for (round, address) in
            [0, 1, inside.wrapping_sub(1 << 40), u64::MAX, u64::MAX - 511, 1 << 63].into_iter().enumerate()
        {
            let at = round as u16 * 3;
            raw.set_descriptor(at, Descriptor { address: inside, len: 16, flags: NEXT, next: at + 1 })?;
            raw.set_descriptor(at + 1, Descriptor { address, len: 512, flags: NEXT, next: at + 2 })?;
            raw.set_descriptor(at + 2, Descriptor { address, len: 1, flags: WRITE, next: 0 })?;
            raw.push_avail(at)?;
        }
        Ok(raw.kick()?)
    }),
    ("an available index that jumps", |raw| {
        let idx = raw.avail_idx().wrapping_add(5000);
        raw.set_avail_idx(idx)?;
        Ok(raw.notify()?)
    }),
    ("an available index that goes back", |raw| {
        let idx = raw.avail_idx().wrapping_sub(1);
        raw.set_avail_idx(idx)?;
        Ok(raw.notify()?)
    }),
    ("kicks for nothing", |raw| {
        for _ in 0..1000 {
            raw.notify()?;
        }
        Ok(())
    }),
    ("broken tables", |raw| {
        let base = raw.data_address();
        let table = base + 4096;
        header(raw, READ_REQUEST, 0)?;
        let nested = Descriptor { address: table, len: 16, flags: INDIRECT, next: 0 };
        let own_loop = Descriptor { address: base, len: 16, flags: NEXT, next: 0 };
        let far_next = Descriptor { address: base, len: 16, flags: NEXT, next: 9999 };
        let mut heads = Vec::new();
        for (index, entry) in [nested, own_loop, far_next].into_iter().enumerate() {
            let address = table + index as u64 * 64;
            raw.write(address, &entry.to_bytes())?;
            heads.push(Descriptor { address, len: 16, flags: INDIRECT, next: 0 });
        }
        for (address, len) in [(table, 0), (table, 15), (table, 17), (table, u32::MAX), (0, 16), (u64::MAX - 7, 16)] {
            heads.push(Descriptor { address, len, flags: INDIRECT, next: 0 });
        }
        heads.push(Descriptor { address: table, len: 16, flags: INDIRECT | NEXT, next: 99 });
        heads.push(Descriptor { address: table, len: 16, flags: INDIRECT | WRITE, next: 0 });
        for (index, head) in (0u16..).zip(&heads) {
            raw.set_descriptor(index, *head)?;
        }
        let all: Vec<u16> = (0..heads.len() as u16).collect();
        send(raw, &all)
    }),
    ("a read over its own rings", |raw| {
        let base = raw.data_address();
        let rings = raw.descriptor_address();
        header(raw, READ_REQUEST, 0)?;
        raw.set_descriptor(0, Descriptor { address: base, len: 16, flags: NEXT, next: 1 })?;
        let len = ((base - rings) as u32).min(32 << 10) / 512 * 512;
        raw.set_descriptor(1, Descriptor { address: rings, len, flags: NEXT | WRITE, next: 2 })?;
        raw.set_descriptor(2, Descriptor { address: base + 512, len: 1, flags: WRITE, next: 0 })?;
        send(raw, &[0, 0, 0, 0])
    }),
    ("one chain many times", |raw| {
        let base = raw.data_address();
        header(raw, WRITE_REQUEST, 8)?;
        raw.set_descriptor(0, Descriptor { address: base, len: 16, flags: NEXT, next: 1 })?;
        raw.set_descriptor(1, Descriptor { address: base + 4096, len: 4096, flags: NEXT, next: 2 })?;
        raw.set_descriptor(2, Descriptor { address: base + 512, len: 1, flags: WRITE, next: 0 })?;
        send(raw, &[0; 200])
    }),
];

/// Name, type, sector, payload, data, and the status that is due.
type Malformed = (&'static str, u32, u64, Vec<u8>, Vec<Piece>, u8);

/// Requests that are wrong in themselves, in rings that are right: each is answered, and the next one too.
fn malformed_requests(raw: &mut RawQueue<'_>) -> Result<()> {
    let sectors = SIZE / 512;
    let data = |len| Piece { len, device_writes: false };
    let room = |len| Piece { len, device_writes: true };
    let segment = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let cases: [Malformed; 12] = [
        ("an unknown type", 0x7777, 0, vec![], vec![], UNSUPPORTED),
        ("a read past the end", READ_REQUEST, sectors, vec![], vec![room(512)], IO_ERROR),
        ("a read over the end", READ_REQUEST, sectors - 1, vec![], vec![room(1024)], IO_ERROR),
        ("a read at the last sector there can be", READ_REQUEST, u64::MAX, vec![], vec![room(512)], IO_ERROR),
        ("a write past the end", WRITE_REQUEST, u64::MAX / 512, vec![], vec![data(512)], IO_ERROR),
        ("half a sector", READ_REQUEST, 0, vec![], vec![room(256)], IO_ERROR),
        ("a discard of the last sector and one more", DISCARD_REQUEST, 0, segment(sectors - 1, 2, 0), vec![], IO_ERROR),
        ("a discard of all sectors there can be", DISCARD_REQUEST, 0, segment(1, u32::MAX, 0), vec![], IO_ERROR),
        ("half a discard segment", DISCARD_REQUEST, 0, vec![0; 8], vec![], IO_ERROR),
        ("zeroes past the end", WRITE_ZEROES_REQUEST, 0, segment(u64::MAX, 8, 1), vec![], IO_ERROR),
        ("an unknown flag of zeroes", WRITE_ZEROES_REQUEST, 0, segment(0, 8, 0x80), vec![], UNSUPPORTED),
        ("unmap in a discard", DISCARD_REQUEST, 0, segment(0, 8, 1), vec![], UNSUPPORTED),
    ];
    for (name, kind, sector, payload, pieces, wanted) in cases {
        let status = request(raw, kind, sector, &payload, &pieces).context(name)?;
        ensure!(status == wanted, "{name}: status {status}, not {wanted}");
        let status = request(raw, READ_REQUEST, 0, &[], &[room(512)])?;
        ensure!(status == OK, "a good read after {name}: status {status}");
    }
    Ok(())
}

/// A part of a request's data.
#[derive(Clone, Copy)]
struct Piece {
    len: u32,
    device_writes: bool,
}

/// Sends one well-formed chain and waits for its status byte.
fn request(raw: &mut RawQueue<'_>, kind: u32, sector: u64, payload: &[u8], pieces: &[Piece]) -> Result<u8> {
    let base = raw.data_address();
    let status = base + 512;
    header(raw, kind, sector)?;
    raw.write(status, &[UNTOUCHED])?;
    raw.write(base + 1024, payload)?;
    let mut chain = vec![Descriptor { address: base, len: 16, flags: NEXT, next: 1 }];
    if !payload.is_empty() {
        chain.push(Descriptor { address: base + 1024, len: payload.len() as u32, flags: NEXT, next: 2 });
    }
    for piece in pieces {
        let flags = if piece.device_writes { NEXT | WRITE } else { NEXT };
        let next = chain.len() as u16 + 1;
        chain.push(Descriptor { address: base + 4096, len: piece.len, flags, next });
    }
    chain.push(Descriptor { address: status, len: 1, flags: WRITE, next: 0 });
    for (index, descriptor) in (0u16..).zip(&chain) {
        raw.set_descriptor(index, *descriptor)?;
    }
    raw.push_avail(0)?;
    raw.kick()?;
    if raw.wait(Some(Duration::from_secs(60)))? == Wait::TimedOut {
        bail!("no answer");
    }
    let (head, _) = raw.take_used()?.context("no used entry")?;
    ensure!(head == 0, "the answer is to head {head}");
    let mut byte = [0];
    raw.read(status, &mut byte)?;
    Ok(byte[0])
}

fn header(raw: &mut RawQueue<'_>, kind: u32, sector: u64) -> Result<()> {
    let mut bytes = [0u8; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    let address = raw.data_address();
    Ok(raw.write(address, &bytes)?)
}

fn send(raw: &mut RawQueue<'_>, heads: &[u16]) -> Result<()> {
    for &head in heads {
        raw.push_avail(head)?;
    }
    Ok(raw.kick()?)
}

/// Fills the ring with descriptors that are wrong in random ways, and offers random heads.
fn random_ring(raw: &mut RawQueue<'_>, random: &mut Random) -> Result<()> {
    let base = raw.data_address();
    for index in 0..256 {
        let address = match random.below(8) {
            0 => random.next(),
            1 => u64::MAX - random.below(4096),
            2 => raw.descriptor_address() + random.below(8192),
            _ => base + random.below(1 << 16),
        };
        let len = match random.below(6) {
            0 => random.next() as u32,
            1 => 16,
            2 => 1,
            _ => random.below(64) as u32 * 512,
        };
        let flags = (random.below(8) | if random.below(16) == 0 { random.below(1 << 16) } else { 0 }) as u16;
        let next = if random.below(16) == 0 { random.next() as u16 } else { random.below(256) as u16 };
        raw.set_descriptor(index, Descriptor { address, len, flags, next })?;
    }
    let mut bytes = Vec::new();
    for _ in 0..8192 {
        bytes.extend_from_slice(&random.below(16).to_le_bytes());
    }
    raw.write(base, &bytes)?;
    let heads: Vec<u16> =
        (0..64).map(|_| if random.below(32) == 0 { random.next() as u16 } else { random.below(256) as u16 }).collect();
    send(raw, &heads)
}

/// Connects, misbehaves, lets the back end have its say, and goes.
fn attack(disk: &Disk, act: impl FnOnce(&mut Queue) -> Result<()>) -> Result<()> {
    let mut guest = Guest::connect(&disk.socket, Options::default())?;
    let mut queue = guest.take_queues().pop().context("no queue")?;
    match act(&mut queue) {
        // A connection that was dropped meanwhile is an answer.
        Err(error) if matches!(error.downcast_ref(), Some(FrontendError::BackendGone)) => return Ok(()),
        other => other?,
    }
    settle(&mut queue.raw())
}

/// Waits for the first answer of any kind. A ring that is given up as broken gives none: hence the short limit, after
/// which the front end goes on as a hostile one would.
fn settle(raw: &mut RawQueue<'_>) -> Result<()> {
    match raw.wait(Some(Duration::from_millis(200))) {
        Ok(_) | Err(FrontendError::BackendGone) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn a_decent_client_works(disk: &Disk) -> Result<()> {
    let mut client = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let mut found = vec![0; 8192];
    for (round, offset) in [0, 4 * MIB + 512, SIZE - 8192].into_iter().enumerate() {
        let wanted = vec![0x40 + round as u8; 8192];
        client.write_at(&wanted, offset)?;
        client.read_at(&mut found, offset)?;
        ensure!(found == wanted, "what was written at {offset} is not read back");
    }
    Ok(client.flush()?)
}

/// Runs a story about one disk while a decent guest uses another disk of the same process.
fn beside_a_decent_guest(story: impl FnOnce(&Disk) -> Result<()>) -> Result<()> {
    let lab = Lab::new()?;
    let disks = [lab.filled_disk("attacked", SIZE)?, lab.filled_disk("decent", SIZE)?];
    let mut model = disks[1].content()?;
    let mut daemon = Daemon::blkmark(&lab, &disks)?;
    let decent = |stop: &Stop| use_decently(&disks[1], &mut model, stop);
    beside(vec![Box::new(decent)], || {
        let told = story(&disks[0]);
        daemon.assert_running()?;
        told
    })?;
    daemon.stop()?;
    ensure!(disks[1].content()? == model, "the other disk does not hold what was written to it");
    Ok(())
}

fn use_decently(disk: &Disk, model: &mut [u8], stop: &Stop) -> Result<()> {
    let mut client = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut found = vec![0; 4096];
    while !stop.is_due() {
        let at = random.below(SIZE / 4096) as usize * 4096;
        client.read_at(&mut found, at as u64)?;
        ensure!(found == model[at..at + 4096], "byte {at} and on changed behind the guest's back");
        model[at..at + 4096].fill(random.next() as u8);
        client.write_at(&model[at..at + 4096], at as u64)?;
    }
    Ok(client.flush()?)
}

#[test]
fn guest_memory_that_shrinks_hurts_nobody_else() -> Result<()> {
    beside_a_decent_guest(|disk| {
        for (left, case) in [(1 << 20, "nothing"), (0, "all of it"), (8192, "the rings stay, the buffers go")] {
            shrink_memory(disk, left).context(case)?;
            a_decent_client_works(disk).with_context(|| format!("after the loss of {case}"))?;
        }
        Ok(())
    })
}

/// A session by hand, since a decent front end seals its memory: rings in the first two pages, a write whose data lies
/// behind them, and a file that is cut to `left` bytes before the back end is told of the request.
fn shrink_memory(disk: &Disk, left: u64) -> Result<()> {
    use std::os::fd::{AsRawFd, BorrowedFd};
    use std::os::unix::fs::FileExt;

    use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
    use vhost::vhost_user::{Frontend, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    const BASE: u64 = 1 << 32;
    const LENGTH: u64 = 1 << 20;
    let memory = std::fs::File::from(rustix::fs::memfd_create("shrinks", rustix::fs::MemfdFlags::CLOEXEC)?);
    memory.set_len(LENGTH)?;
    let data = 64 << 10;
    let chain = [
        Descriptor { address: BASE + 4096, len: 16, flags: NEXT, next: 1 },
        Descriptor { address: BASE + data, len: 65536, flags: NEXT, next: 2 },
        Descriptor { address: BASE + 4096 + 64, len: 1, flags: WRITE, next: 0 },
    ];
    for (index, descriptor) in chain.into_iter().enumerate() {
        memory.write_all_at(&descriptor.to_bytes(), index as u64 * 16)?;
    }
    memory.write_all_at(&WRITE_REQUEST.to_le_bytes(), 4096)?;
    memory.write_all_at(&[0, 0, 0, 0, 0, 0], 2048)?;

    let mut session = Frontend::connect(&disk.socket, 1)?;
    session.set_owner()?;
    let features = session.get_features()?;
    let protocol = session.get_protocol_features()? & (Protocol::MQ | Protocol::CONFIG);
    session.set_protocol_features(protocol)?;
    // VERSION_1 and the protocol features' bit, no more.
    session.set_features(features & (1 << 32 | 1 << 30))?;
    session.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: BASE,
        memory_size: LENGTH,
        userspace_addr: BASE,
        mmap_offset: 0,
        mmap_handle: memory.as_raw_fd(),
    }])?;
    let (call, kick) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
    session.set_vring_num(0, 16)?;
    session.set_vring_addr(
        0,
        &VringConfigData {
            queue_max_size: 16,
            queue_size: 16,
            flags: 0,
            desc_table_addr: BASE,
            used_ring_addr: BASE + 3072,
            avail_ring_addr: BASE + 2048,
            log_addr: None,
        },
    )?;
    session.set_vring_base(0, 0)?;
    session.set_vring_call(0, &call)?;
    session.set_vring_kick(0, &kick)?;
    session.set_vring_enable(0, true)?;
    session.get_queue_num()?;
    if left > 0 {
        memory.write_all_at(&[0, 0, 1, 0, 0, 0], 2048)?;
    }
    memory.set_len(left)?;
    // Rings are told once when they start; that is not the answer.
    let _ = call.read();
    kick.write(1)?;
    // The answer is a status, silence, or the end of the session; the next client tells whether all is well.
    // SAFETY: `call` stays open to the end of this function.
    let call = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    readable_until(&call, Instant::now() + Duration::from_secs(1))?;
    Ok(())
}
