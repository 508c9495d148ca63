//! The promise: whatever a front end puts into its inflight region, its rings and its memory, blkmark goes on, and whoever
//! comes next is served.
//!
//! Sessions by hand, since a decent front end keeps nothing in the region itself. Each says that all requests of its ring are in
//! flight, over descriptor tables of noise that point anywhere, indirect tables and loops included; some cut the region or the
//! memory short while the requests are being submitted again. The used ring tells how many were answered: never more than
//! there were.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use blkmark::frontend::{Descriptor, Guest, Options};
use blkmark_tests::daemon::Daemon;
use blkmark_tests::lab::{Disk, Lab, MIB};
use blkmark_tests::process::readable_until;
use blkmark_tests::random::Random;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures as Protocol};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BASE: u64 = 1 << 32;
const LENGTH: u64 = 1 << 20;
const RING: u16 = 64;
const AVAIL: u64 = 4096;
const USED: u64 = 12288;
/// Headers and indirect tables lie here.
const NOISE: u64 = 16384;

#[test]
fn requests_left_over_in_a_hostile_region_hurt_nobody() -> Result<()> {
    let lab = Lab::new()?;
    let disk = lab.disk("drive0", 8 * MIB)?;
    let mut daemon = Daemon::blkmark(&lab, std::slice::from_ref(&disk))?;
    let mut answered = 0;
    for seed in 1..=60 {
        answered += u32::from(attack(&disk, &mut Random(seed)).with_context(|| format!("seed {seed}"))?);
        daemon.assert_running()?;
        a_decent_client_works(&disk).with_context(|| format!("after seed {seed}"))?;
    }
    // Half of the sessions lose memory; the others' requests are all carried out or refused.
    ensure!(answered > 20 * u32::from(RING), "only {answered} requests were submitted again");
    daemon.stop().map(drop)
}

/// Gives the number of requests that were answered.
fn attack(disk: &Disk, random: &mut Random) -> Result<u16> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let memory = File::from(rustix::fs::memfd_create("noise", flags)?);
    memory.set_len(LENGTH)?;
    for index in 0..u64::from(RING) {
        memory.write_all_at(&descriptor(random).to_bytes(), index * 16)?;
    }
    // Requests of every type, some of them with offsets inside the disk; and tables.
    for at in (0..64 << 10).step_by(64) {
        let (kind, sector) = (random.below(16) as u32, random.next() >> (random.below(52) + 12));
        memory.write_all_at(&kind.to_le_bytes(), NOISE + at)?;
        memory.write_all_at(&sector.to_le_bytes(), NOISE + at + 8)?;
        for more in [16, 32, 48] {
            memory.write_all_at(&descriptor(random).to_bytes(), NOISE + at + more)?;
        }
    }

    let mut session = Frontend::connect(&disk.socket, 1)?;
    session.set_owner()?;
    let features = session.get_features()?;
    let wanted = Protocol::MQ | Protocol::CONFIG | Protocol::INFLIGHT_SHMFD;
    ensure!(session.get_protocol_features()?.contains(wanted), "not offered");
    session.set_protocol_features(wanted)?;
    // VERSION_1, INDIRECT_DESC and the protocol features' bit.
    session.set_features(features & (1 << 32 | 1 << 28 | 1 << 30))?;
    session.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: BASE,
        memory_size: LENGTH,
        userspace_addr: BASE,
        mmap_offset: 0,
        mmap_handle: memory.as_raw_fd(),
    }])?;

    let told = VhostUserInflight { mmap_size: 4096, mmap_offset: 0, num_queues: 1, queue_size: RING };
    let region = File::from(rustix::fs::memfd_create("inflight", flags)?);
    region.set_len(4096)?;
    region.write_all_at(&1u16.to_ne_bytes(), 8)?;
    region.write_all_at(&RING.to_ne_bytes(), 10)?;
    for head in 0..u64::from(RING) {
        let entry = [random.next() | 1, random.next() >> random.below(64)];
        let bytes: Vec<u8> = entry.iter().flat_map(|word| word.to_ne_bytes()).collect();
        region.write_all_at(&bytes, 16 + 16 * head)?;
    }
    session.set_inflight_fd(&told, region.as_raw_fd())?;

    let (call, kick) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
    session.set_vring_num(0, RING)?;
    session.set_vring_addr(
        0,
        &VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: BASE,
            used_ring_addr: BASE + USED,
            avail_ring_addr: BASE + AVAIL,
            log_addr: None,
        },
    )?;
    memory.write_all_at(&RING.to_le_bytes(), AVAIL + 2)?;
    session.set_vring_base(0, random.next() as u16)?;
    session.set_vring_call(0, &call)?;
    session.set_vring_kick(0, &kick)?;
    let _ = session.get_queue_num();
    let _ = call.read();
    session.set_vring_enable(0, true)?;
    match random.below(4) {
        0 => region.set_len(0)?,
        1 => memory.set_len(NOISE)?,
        _ => {
            // Unless it was dropped, it answers.
            let deadline = Instant::now() + Duration::from_secs(60);
            while used(&memory)? < RING && session.get_queue_num().is_ok() {
                ensure!(Instant::now() < deadline, "{} of {RING} were answered", used(&memory)?);
                // SAFETY: `call` stays open to the end of this function.
                let call_fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(call.as_raw_fd()) };
                readable_until(&call_fd, Instant::now() + Duration::from_millis(100))?;
                let _ = call.read();
            }
        }
    }
    let used = used(&memory)?;
    ensure!(used <= RING, "{used} answers to {RING} requests");
    Ok(used)
}

fn used(memory: &File) -> Result<u16> {
    let mut idx = [0; 2];
    memory.read_exact_at(&mut idx, USED + 2)?;
    Ok(u16::from_le_bytes(idx))
}

fn descriptor(random: &mut Random) -> Descriptor {
    let address = match random.below(8) {
        0 => random.next(),
        // The available ring, but not the used one, whose index is looked at.
        1 => BASE + AVAIL + random.below(64),
        _ => BASE + NOISE + 64 * random.below(1024) + random.below(2) * 16,
    };
    let len = match random.below(8) {
        0 => random.next() as u32,
        1 => 1,
        2..5 => 16,
        5 => 48,
        _ => 512 * random.below(9) as u32,
    };
    // NEXT 1, WRITE 2, INDIRECT 4.
    let flags = [1, 1, 1, 3, 3, 2, 2, 4, 4, 5, 0, random.next() as u16 & 7][random.below(12) as usize];
    Descriptor { address, len, flags, next: random.below(u64::from(RING) + 2) as u16 }
}

fn a_decent_client_works(disk: &Disk) -> Result<()> {
    let mut client = Guest::connect(&disk.socket, Options::default())?.into_disk()?;
    let mut found = vec![0; 8192];
    for (round, offset) in [0, 4 * MIB + 512, 8 * MIB - 8192].into_iter().enumerate() {
        let wanted = vec![0x40 + round as u8; 8192];
        client.write_at(&wanted, offset)?;
        client.read_at(&mut found, offset)?;
        ensure!(found == wanted, "what was written at {offset} is not read back");
    }
    Ok(client.flush()?)
}
