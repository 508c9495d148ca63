//! The guest: it owns the vhost-user session and the memory, negotiates, sets the rings up, hands out the queues,
//! and can lose its back end and find it again.
//!
//! Order of messages as Cloud Hypervisor and QEMU send them: owner, features, protocol features, queue number,
//! config space, features acknowledged, memory, inflight region, then each ring (num, addr, base, call, kick) and at
//! last all rings enabled.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SIZE_MAX};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::{CONFIG_SIZE, DeviceConfig};
use super::disk::Disk;
use super::error::FrontendError;
use super::layout::Layout;
use super::link::Link;
use super::memory::GuestMemory;
use super::options::{MemoryMessage, Options};
use super::queue::{Parts, Queue};

/// Queue indices travel in eight bits.
const MAX_QUEUES: u64 = 256;

/// What the guest keeps of a queue to set it up again.
struct Ring {
    layout: Layout,
    call: Arc<EventFd>,
    kick: Arc<EventFd>,
}

/// What was agreed on.
#[derive(Clone, Copy, Debug)]
struct Agreed {
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

/// A guest attached to one vhost-user-blk disk. Dropping it stops the rings (GET_VRING_BASE) and hangs up.
pub struct Guest {
    session: Option<Frontend>,
    link: Arc<Link>,
    options: Options,
    agreed: Agreed,
    config: Arc<DeviceConfig>,
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    queues: Vec<Queue>,
    inflight: Option<(VhostUserInflight, File)>,
}

impl Guest {
    /// Connects to a back end's socket and sets everything up.
    pub fn connect(socket: &Path, options: Options) -> Result<Self, FrontendError> {
        Self::from_stream(dial(socket)?, options)
    }

    /// The same over a connected stream.
    pub fn from_stream(stream: UnixStream, options: Options) -> Result<Self, FrontendError> {
        options.check()?;
        let watched = duplicate(&stream)?;
        let limit = options.answer_within;
        within(limit, &watched, || Self::build(stream, options))
    }

    fn build(stream: UnixStream, options: Options) -> Result<Self, FrontendError> {
        let link = Arc::new(Link::new(duplicate(&stream)?));
        let (mut session, agreed) = negotiate(stream, &options, u64::MAX)?;
        let config = Arc::new(read_config(&mut session, agreed)?);
        acknowledge(&mut session, agreed)?;

        let has = |feature: u32| agreed.features & (1 << feature) != 0;
        let size_max = match config.size_max as usize {
            0 => usize::MAX,
            max if has(VIRTIO_BLK_F_SIZE_MAX) => max,
            _ => usize::MAX,
        };
        let segment = options.segment.unwrap_or(options.max_request).min(size_max).min(options.max_request);
        let table_len = options.max_request.div_ceil(segment).max(1) + 2;
        let mut end = 0;
        let mut layouts = Vec::new();
        for _ in 0..options.queues {
            let layout = Layout::new(end, options.queue_size, table_len, options.data_size);
            end = layout.end;
            layouts.push(layout);
        }
        let memory = Arc::new(GuestMemory::new(end)?);
        let mut rings = Vec::new();
        let mut queues = Vec::new();
        for (index, layout) in layouts.into_iter().enumerate() {
            let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Arc::new).map_err(FrontendError::io("eventfd"));
            let (call, kick) = (event()?, event()?);
            queues.push(Queue::new(Parts {
                index,
                memory: Arc::clone(&memory),
                layout,
                event_idx: has(VIRTIO_RING_F_EVENT_IDX),
                indirect: options.indirect && has(VIRTIO_RING_F_INDIRECT_DESC),
                segment,
                max_request: options.max_request,
                call: Arc::clone(&call),
                kick: Arc::clone(&kick),
                link: Arc::clone(&link),
                config: Arc::clone(&config),
                spin: options.spin,
                answer_within: options.answer_within,
            })?);
            rings.push(Ring { layout, call, kick });
        }
        let mut guest =
            Guest { session: Some(session), link, options, agreed, config, memory, rings, queues, inflight: None };
        guest.start_rings()?;
        Ok(guest)
    }

    /// Memory, inflight region and rings of a session that has its features; also after a reconnect.
    fn start_rings(&mut self) -> Result<(), FrontendError> {
        let agreed = self.agreed;
        let session = self.session.as_mut().ok_or(FrontendError::BackendGone)?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: self.memory.guest_base(),
            memory_size: self.memory.size() as u64,
            userspace_addr: self.memory.user_address(0),
            mmap_offset: 0,
            mmap_handle: self.memory.file().as_raw_fd(),
        };
        let slots = agreed.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        if slots && self.options.memory_message == MemoryMessage::Preferred {
            session.add_mem_region(&region).map_err(step("ADD_MEM_REG"))?;
        } else {
            session.set_mem_table(&[region]).map_err(step("SET_MEM_TABLE"))?;
        }
        if agreed.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            let inflight = match self.inflight.take() {
                Some(known) => known,
                None => session
                    .get_inflight_fd(&VhostUserInflight {
                        mmap_size: 0,
                        mmap_offset: 0,
                        num_queues: self.rings.len() as u16,
                        queue_size: self.options.queue_size,
                    })
                    .map_err(step("GET_INFLIGHT_FD"))?,
            };
            let sent = session.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd());
            self.inflight = Some(inflight);
            sent.map_err(step("SET_INFLIGHT_FD"))?;
        }
        for (index, ring) in self.rings.iter().enumerate() {
            let layout = &ring.layout;
            session.set_vring_num(index, layout.size).map_err(step("SET_VRING_NUM"))?;
            session
                .set_vring_addr(
                    index,
                    &VringConfigData {
                        queue_max_size: layout.size,
                        queue_size: layout.size,
                        flags: 0,
                        desc_table_addr: self.memory.user_address(layout.descriptors),
                        used_ring_addr: self.memory.user_address(layout.used),
                        avail_ring_addr: self.memory.user_address(layout.avail),
                        log_addr: None,
                    },
                )
                .map_err(step("SET_VRING_ADDR"))?;
            // After a reconnect the used index is what the device has done for certain, as QEMU sees it too.
            let base = self.memory.cell(layout.used_idx())?.load(Ordering::Acquire);
            session.set_vring_base(index, base).map_err(step("SET_VRING_BASE"))?;
            session.set_vring_call(index, &ring.call).map_err(step("SET_VRING_CALL"))?;
            session.set_vring_kick(index, &ring.kick).map_err(step("SET_VRING_KICK"))?;
        }
        for index in 0..self.rings.len() {
            session.set_vring_enable(index, true).map_err(step("SET_VRING_ENABLE"))?;
        }
        Ok(())
    }

    /// The config space, as read at connect.
    pub fn config(&self) -> &DeviceConfig {
        &self.config
    }

    /// Reads the config space again.
    pub fn read_config(&mut self) -> Result<DeviceConfig, FrontendError> {
        let agreed = self.agreed;
        let session = self.session.as_mut().ok_or(FrontendError::BackendGone)?;
        let socket = self.link.socket();
        within(self.options.answer_within, &socket, || read_config(session, agreed))
    }

    /// The virtio features agreed on.
    pub fn features(&self) -> u64 {
        self.agreed.features
    }

    /// Whether the feature with this number (`VIRTIO_*_F_*`) was agreed on.
    pub fn has_feature(&self, feature: u32) -> bool {
        1u64.checked_shl(feature).is_some_and(|bit| self.agreed.features & bit != 0)
    }

    /// The vhost-user protocol features agreed on.
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.agreed.protocol
    }

    /// Whether the disk is read-only.
    pub fn read_only(&self) -> bool {
        self.has_feature(VIRTIO_BLK_F_RO)
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The raw session, for tests that send messages of their own.
    pub fn session(&mut self) -> Option<&mut Frontend> {
        self.session.as_mut()
    }

    /// All queues that were not taken yet, each fit for a thread of its own.
    pub fn take_queues(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
    }

    /// A blocking disk over the first queue; the guest lives in it.
    pub fn into_disk(mut self) -> Result<Disk, FrontendError> {
        if self.queues.is_empty() {
            return Err(FrontendError::BadOptions("the queues were taken".into()));
        }
        let queue = self.queues.remove(0);
        Ok(Disk::new(queue, Some(self)))
    }

    /// Attaches the same memory and rings to a back end again, after the old one died or hung up. The queues go on
    /// where they were; what was in flight is finished by the back end if inflight tracking was agreed on.
    pub fn reconnect(&mut self, socket: &Path) -> Result<(), FrontendError> {
        self.hang_up();
        let stream = dial(socket)?;
        let watched = duplicate(&stream)?;
        within(self.options.answer_within, &watched, || {
            let link = duplicate(&stream)?;
            let (mut session, agreed) = negotiate(stream, &self.options, self.agreed.features)?;
            if agreed.features != self.agreed.features {
                return Err(FrontendError::MissingFeature("the features agreed on before the reconnect"));
            }
            self.config = Arc::new(read_config(&mut session, agreed)?);
            acknowledge(&mut session, agreed)?;
            self.session = Some(session);
            self.agreed = agreed;
            if !agreed.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
                self.inflight = None;
            }
            self.start_rings()?;
            self.link.replace(link);
            // Requests published while nobody listened are waiting for a kick.
            for ring in &self.rings {
                ring.kick.write(1).map_err(FrontendError::io("kicking"))?;
            }
            Ok(())
        })
    }

    /// Stops each ring and hangs up; the rings' positions as the back end reported them.
    pub fn close(mut self) -> Result<Vec<u32>, FrontendError> {
        self.stop()
    }

    fn stop(&mut self) -> Result<Vec<u32>, FrontendError> {
        let Some(session) = self.session.take() else {
            return Ok(Vec::new());
        };
        let socket = self.link.socket();
        let bases = within(self.options.answer_within, &socket, || {
            (0..self.rings.len()).map(|index| session.get_vring_base(index).map_err(step("GET_VRING_BASE"))).collect()
        });
        self.link.cut();
        bases
    }

    fn hang_up(&mut self) {
        if self.session.take().is_some() {
            self.link.cut();
        }
    }

    /// Hangs up in the middle of everything, as a killed VMM does: no ring is stopped. The guest can reconnect.
    pub fn disconnect_abruptly(&mut self) {
        self.hang_up();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // A back end that is gone or mute cannot be told that we go.
        let _ = self.stop();
    }
}

fn dial(socket: &Path) -> Result<UnixStream, FrontendError> {
    UnixStream::connect(socket).map_err(|source| FrontendError::Connect { path: socket.to_owned(), source })
}

fn duplicate(stream: &UnixStream) -> Result<UnixStream, FrontendError> {
    stream.try_clone().map_err(FrontendError::io("duplicating the socket"))
}

/// For `map_err` after a message.
fn step(step: &'static str) -> impl Fn(vhost::Error) -> FrontendError {
    move |source| FrontendError::Protocol { step, source }
}

/// Runs an exchange of messages and shuts the socket down when it takes longer than `limit`: `vhost` reads replies
/// without any time limit of its own.
fn within<T>(
    limit: Duration,
    socket: &UnixStream,
    exchange: impl FnOnce() -> Result<T, FrontendError>,
) -> Result<T, FrontendError> {
    let (done, watch) = sync_channel::<()>(1);
    std::thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let late = watch.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                let _ = socket.shutdown(Shutdown::Both);
            }
            late
        });
        let result = exchange();
        drop(done);
        match watchdog.join() {
            Ok(true) if result.is_err() => Err(FrontendError::TimedOut(limit)),
            _ => result,
        }
    })
}

/// Features and protocol features, up to but without SET_FEATURES.
fn negotiate(stream: UnixStream, options: &Options, acceptable: u64) -> Result<(Frontend, Agreed), FrontendError> {
    let mut session = Frontend::from_stream(stream, MAX_QUEUES);
    session.set_owner().map_err(step("SET_OWNER"))?;
    let offered = session.get_features().map_err(step("GET_FEATURES"))?;
    if offered & (1 << VIRTIO_F_VERSION_1) == 0 {
        return Err(FrontendError::MissingFeature("VIRTIO_F_VERSION_1"));
    }
    let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if offered & protocol_bit == 0 {
        return Err(FrontendError::MissingFeature("VHOST_USER_F_PROTOCOL_FEATURES"));
    }
    let mut wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
    if options.reply_ack {
        wanted |= VhostUserProtocolFeatures::REPLY_ACK;
    }
    if options.inflight {
        wanted |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    }
    let protocol = wanted & session.get_protocol_features().map_err(step("GET_PROTOCOL_FEATURES"))?;
    session.set_protocol_features(protocol).map_err(step("SET_PROTOCOL_FEATURES"))?;
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        session.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let queues = if protocol.contains(VhostUserProtocolFeatures::MQ) {
        session.get_queue_num().map_err(step("GET_QUEUE_NUM"))?
    } else {
        1
    };
    if options.queues as u64 > queues {
        return Err(FrontendError::TooManyQueues { wanted: options.queues, offered: queues });
    }
    let agreed = Agreed { features: offered & (options.features & acceptable | protocol_bit), protocol };
    Ok((session, agreed))
}

fn read_config(session: &mut Frontend, agreed: Agreed) -> Result<DeviceConfig, FrontendError> {
    if !agreed.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
        return Err(FrontendError::MissingFeature("VHOST_USER_PROTOCOL_F_CONFIG"));
    }
    let (_, bytes) = session
        .get_config(0, CONFIG_SIZE as u32, VhostUserConfigFlags::WRITABLE, &[0; CONFIG_SIZE])
        .map_err(step("GET_CONFIG"))?;
    Ok(DeviceConfig::parse(&bytes))
}

fn acknowledge(session: &mut Frontend, agreed: Agreed) -> Result<(), FrontendError> {
    session.set_features(agreed.features).map_err(step("SET_FEATURES"))
}
