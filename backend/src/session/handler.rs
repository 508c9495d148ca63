//! One connection's answers to vhost-user messages.
//!
//! `vhost`'s `BackendReqHandler` decodes and checks the shape of each message and calls this. Every
//! number in them is the front end's: each is checked here or in [`super::ring`] before it is used.
//!
//! Invariant: an `Err` ends the connection (that is how `vhost` works), so errors are kept for what
//! no sane front end sends.

use std::fs::File;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::api::{Device, Hangup};
use super::error::Refusal;
use super::inflight::{self, Area};
use super::ring::{Addresses, Context, Ring};
use crate::memory::{MAX_REGIONS, MemoryTable, RegionSpec};

/// The feature bit that says a front end speaks protocol features.
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What is offered beyond the virtio features.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::CONFIG)
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::BACKEND_REQ)
    .union(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::INFLIGHT_SHMFD);

/// The state of one connection.
pub(super) struct Handler {
    device: Arc<dyn Device>,
    hangup: Hangup,
    memory: MemoryTable,
    inflight: Option<Area>,
    rings: Vec<Ring>,
    features: u64,
}

impl Handler {
    pub fn new(device: Arc<dyn Device>, hangup: Hangup) -> Self {
        let rings = (0..device.queues()).map(Ring::new).collect();
        Self { device, hangup, memory: MemoryTable::default(), inflight: None, rings, features: 0 }
    }

    /// Stops all rings and waits for what they have in flight.
    pub fn stop_rings(&mut self) {
        self.rings.iter_mut().for_each(Ring::reset);
    }

    /// The ring a message is about, and what it needs of the rest.
    fn ring(&mut self, index: u32) -> Result<(&mut Ring, Context<'_>)> {
        let queues = self.rings.len();
        let ring =
            usize::try_from(index).ok().and_then(|i| self.rings.get_mut(i)).ok_or(Refusal::Index { index, queues })?;
        let ctx = Context {
            device: &*self.device,
            memory: &self.memory,
            inflight: self.inflight.as_ref(),
            features: self.features,
            event_idx: self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0,
            hangup: &self.hangup,
        };
        Ok((ring, ctx))
    }

    /// Rings follow a memory table that has changed.
    fn memory_changed(&mut self) -> Result<()> {
        for index in 0..u32::from(self.device.queues()) {
            let (ring, ctx) = self.ring(index)?;
            ring.memory_changed(&ctx)?;
        }
        Ok(())
    }

    fn offered(&self) -> u64 {
        self.device.features() | PROTOCOL_FEATURES
    }
}

fn spec(region: &VhostUserMemoryRegion) -> RegionSpec {
    RegionSpec {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        file_offset: region.mmap_offset,
    }
}

fn not_offered<T>(what: &'static str) -> Result<T> {
    Err(Refusal::NotOffered(what).into())
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    /// Long deprecated; the specification has back ends disable all rings or ignore it.
    fn reset_owner(&mut self) -> Result<()> {
        self.rings.iter_mut().for_each(|r| r.set_enabled(false));
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_rings();
        self.features = 0;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let alien = features & !self.offered();
        if alien != 0 {
            return Err(Refusal::Features(alien).into());
        }
        self.features = features;
        // Without protocol features there is no message to enable a ring with.
        if features & PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|r| r.set_enabled(true));
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let specs: Vec<_> = regions.iter().map(spec).collect();
        self.memory.set(&specs, files).map_err(Refusal::from)?;
        self.memory_changed()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (ring, ctx) = self.ring(index)?;
        Ok(ring.set_size(num, &ctx)?)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (ring, ctx) = self.ring(index)?;
        let addresses = Addresses { desc: descriptor, avail: available, used };
        Ok(ring.set_addresses(addresses, &ctx)?)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        Ok(self.ring(index)?.0.set_base(base)?)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let base = self.ring(index)?.0.take_base();
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let (ring, ctx) = self.ring(index.into())?;
        Ok(ring.set_kick(fd, &ctx)?)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        Ok(self.ring(index.into())?.0.set_call(fd)?)
    }

    /// Errors are told by status bytes and a dropped connection, not here.
    fn set_vring_err(&mut self, index: u8, _fd: Option<File>) -> Result<()> {
        self.ring(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(PROTOCOL)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let alien = features & !PROTOCOL.bits();
        if alien != 0 {
            return Err(Refusal::ProtocolFeatures(alien).into());
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.device.queues().into())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.0.set_enabled(enable);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.device.config(offset, size))
    }

    /// No field is offered as writable. Front ends pass a guest's write on as it comes, so it is no
    /// reason to end the connection.
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        tracing::debug!(offset, len = buf.len(), "ignoring a write to the configuration space");
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        not_offered("GPU_SET_SOCKET")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        not_offered("SHARED_OBJECT")
    }

    fn get_inflight_fd(&mut self, wish: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Ok(inflight::create(wish, self.device.queues()).map_err(Refusal::from)?)
    }

    /// A ring that runs goes on with the new region. A reset of the device leaves the region as it is: then nothing is
    /// in flight in it.
    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        let area = Area::map(told, file, self.device.queues(), &self.memory).map_err(Refusal::from)?;
        self.inflight = Some(area);
        for index in 0..u32::from(self.device.queues()) {
            let (ring, ctx) = self.ring(index)?;
            ring.inflight_changed(&ctx)?;
        }
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory.add(spec(region), fd).map_err(Refusal::from)?;
        self.memory_changed()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory.remove(spec(region)).map_err(Refusal::from)?;
        self.memory_changed()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        not_offered("DEVICE_STATE")
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered("DEVICE_STATE")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered("SHMEM")
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        not_offered("LOG_SHMFD")
    }
}
