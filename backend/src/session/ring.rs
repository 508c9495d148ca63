//! One ring of a connection: what the front end has said about it, and whether it runs.
//!
//! The handler feeds it messages; it calls [`Device::start`] once kick, size and addresses are there
//! and lie in guest memory, and [`RunningRing::stop`] before any of them changes. A memory table
//! that takes a running ring's memory away suspends it; one that brings it back resumes it.
//!
//! Invariant: while a ring runs, `addresses` translate to what it was started with.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{FileType, OFlags};
use vm_memory::{Bytes, GuestAddress};

use super::api::{Device, Hangup, RingParts, RunningRing};
use super::error::Refusal;
use super::inflight::{Area, InflightQueue};
use crate::memory::MemoryTable;
use crate::vring::RingPlace;

/// What a ring needs of its connection.
pub(super) struct Context<'a> {
    pub device: &'a dyn Device,
    pub memory: &'a MemoryTable,
    pub inflight: Option<&'a Area>,
    pub features: u64,
    pub event_idx: bool,
    pub hangup: &'a Hangup,
}

/// Where a ring lies, in the front end's addresses or in the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Addresses<A> {
    pub desc: A,
    pub avail: A,
    pub used: A,
}

/// A ring, running or not.
pub(super) struct Ring {
    index: u16,
    size: Option<u16>,
    addresses: Option<Addresses<u64>>,
    /// `next_avail` of the next start.
    base: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    enabled: bool,
    running: Option<(Addresses<GuestAddress>, Box<dyn RunningRing>)>,
}

impl Ring {
    pub fn new(index: u16) -> Self {
        Self { index, size: None, addresses: None, base: 0, kick: None, call: None, enabled: false, running: None }
    }

    /// SET_VRING_NUM.
    pub fn set_size(&mut self, size: u32, ctx: &Context) -> Result<(), Refusal> {
        let max = ctx.device.queue_size_max();
        let checked = u16::try_from(size).ok().filter(|s| s.is_power_of_two() && *s <= max).ok_or(Refusal::Size {
            index: self.index,
            size,
            max,
        })?;
        if self.running.is_some() && self.size != Some(checked) {
            return Err(Refusal::Running(self.index));
        }
        self.size = Some(checked);
        Ok(())
    }

    /// SET_VRING_ADDR. While the ring runs the same addresses come again when logging is switched;
    /// others make it stop and start.
    pub fn set_addresses(&mut self, addresses: Addresses<u64>, ctx: &Context) -> Result<(), Refusal> {
        if !ctx.memory.regions().is_empty() {
            // The size may come later; the start checks the whole ring.
            self.locate(&addresses, self.size.unwrap_or(1), ctx)?;
        }
        self.addresses = Some(addresses);
        self.memory_changed(ctx)
    }

    /// SET_VRING_BASE.
    pub fn set_base(&mut self, base: u32) -> Result<(), Refusal> {
        if self.running.is_some() {
            return Err(Refusal::Running(self.index));
        }
        self.base = u16::try_from(base).map_err(|_| Refusal::Base { index: self.index, base })?;
        Ok(())
    }

    /// GET_VRING_BASE: stops the ring until it is set up again.
    pub fn take_base(&mut self) -> u16 {
        self.suspend();
        self.kick = None;
        self.call = None;
        self.base
    }

    /// SET_VRING_KICK: starts the ring, or moves a running one to the new descriptor.
    pub fn set_kick(&mut self, file: Option<File>, ctx: &Context) -> Result<(), Refusal> {
        let kick = file.map(|f| self.event(f, "kick")).transpose()?;
        self.suspend();
        self.kick = kick;
        if self.kick.is_none() {
            tracing::warn!(queue = self.index, "no kick descriptor: polling is not supported");
        }
        self.start(ctx)
    }

    /// SET_VRING_CALL.
    pub fn set_call(&mut self, file: Option<File>) -> Result<(), Refusal> {
        self.call = file.map(|f| self.event(f, "call")).transpose()?;
        if self.call.is_none() {
            tracing::debug!(queue = self.index, "no call descriptor: the front end polls");
        }
        if let Some((_, running)) = &self.running {
            running.set_call(self.share(&self.call)?);
            self.signal_call();
        }
        Ok(())
    }

    /// SET_VRING_ENABLE, or what SET_FEATURES implies.
    pub fn set_enabled(&mut self, on: bool) {
        self.enabled = on;
        if let Some((_, running)) = &self.running {
            running.set_enabled(on);
        }
    }

    /// The memory table or the addresses changed: stop, move or start as they ask.
    pub fn memory_changed(&mut self, ctx: &Context) -> Result<(), Refusal> {
        if let (Some((at, _)), Some(addresses), Some(size)) = (&self.running, &self.addresses, self.size) {
            let same = matches!(self.locate(addresses, size, ctx), Ok(now) if now == *at);
            if same {
                return Ok(());
            }
            self.suspend();
        }
        match self.start(ctx) {
            Err(Refusal::Outside { part, .. }) => {
                tracing::warn!(queue = self.index, part, "not in guest memory: suspended");
                Ok(())
            }
            other => other,
        }
    }

    /// SET_INFLIGHT_FD: a ring that runs finishes what it has, so that nothing is missing in the new region.
    pub fn inflight_changed(&mut self, ctx: &Context) -> Result<(), Refusal> {
        if self.running.is_some() {
            self.suspend();
            self.start(ctx)?;
        }
        Ok(())
    }

    /// RESET_DEVICE, or the end of the connection: as new.
    pub fn reset(&mut self) {
        self.suspend();
        *self = Self::new(self.index);
    }

    /// Stops the ring, keeping what the front end said about it.
    fn suspend(&mut self) {
        if let Some((_, running)) = self.running.take() {
            self.base = running.stop();
            tracing::debug!(queue = self.index, next_avail = self.base, "ring stopped");
        }
    }

    /// Starts the ring if everything it needs has come.
    fn start(&mut self, ctx: &Context) -> Result<(), Refusal> {
        let (Some(kick), Some(addresses), Some(size), None) = (&self.kick, &self.addresses, self.size, &self.running)
        else {
            return Ok(());
        };
        let at = self.locate(addresses, size, ctx)?;
        let index = self.index;
        let mut ring = self.place(size, &at, ctx)?;
        let (inflight, resubmit) = self.recover(&mut ring, ctx)?;
        let (next_avail, next_used) = (ring.next_avail, ring.next_used);
        let parts = RingParts {
            index,
            ring,
            memory: ctx.memory.memory(),
            memory_lost: ctx.memory.lost(),
            kick: self.dup(kick)?,
            call: self.share(&self.call)?,
            enabled: self.enabled,
            features: ctx.features,
            inflight,
            resubmit,
            hangup: ctx.hangup.clone(),
        };
        let running = ctx.device.start(parts).map_err(|source| Refusal::Start { index, source })?;
        self.running = Some((at, running));
        tracing::debug!(queue = index, size, next_avail, next_used, "ring started");
        self.signal_call();
        Ok(())
    }

    /// What an earlier process has left in the inflight region, and where the ring goes on behind it. SET_VRING_BASE does
    /// not count then: the front end cannot know which requests were taken.
    fn recover(&self, ring: &mut RingPlace, ctx: &Context) -> Result<(Option<InflightQueue>, Vec<u16>), Refusal> {
        let index = self.index;
        let Some(area) = ctx.inflight else { return Ok((None, Vec::new())) };
        let Some(mut inflight) = area.queue(index) else {
            tracing::warn!(queue = index, "the front end's inflight region has no room for this queue");
            return Ok((None, Vec::new()));
        };
        let used = ring.next_used;
        let left = inflight.recover(ring.size, used).map_err(|source| Refusal::Recover { index, source })?;
        let Some(left) = left else { return Ok((Some(inflight), Vec::new())) };
        // At most as many as the ring has entries, which is at most 32768.
        ring.next_avail = used.wrapping_add(left.len() as u16);
        if !left.is_empty() {
            let (next_avail, base) = (ring.next_avail, self.base);
            tracing::info!(queue = index, requests = left.len(), used, next_avail, base, "resubmitting after a crash");
        }
        Ok((Some(inflight), left))
    }

    /// Guest addresses of the ring, if each part lies inside one region.
    fn locate(&self, addresses: &Addresses<u64>, size: u16, ctx: &Context) -> Result<Addresses<GuestAddress>, Refusal> {
        let index = self.index;
        let n = u64::from(size);
        let find = |user, len, part| ctx.memory.translate(user, len).ok_or(Refusal::Outside { index, part });
        // Sizes of virtio 1.x, 2.7: flags, index, entries and the event index behind them.
        Ok(Addresses {
            desc: find(addresses.desc, 16 * n, "descriptor table")?,
            avail: find(addresses.avail, 6 + 2 * n, "available ring")?,
            used: find(addresses.used, 6 + 8 * n, "used ring")?,
        })
    }

    /// The ring as the device takes it. What was used before is read from the ring itself: a front
    /// end that reconnects relies on it.
    fn place(&self, size: u16, at: &Addresses<GuestAddress>, ctx: &Context) -> Result<RingPlace, Refusal> {
        let mut place = RingPlace {
            size,
            desc: at.desc,
            avail: at.avail,
            used: at.used,
            next_avail: self.base,
            next_used: 0,
            event_idx: ctx.event_idx,
        };
        if !place.is_well_formed() {
            return Err(Refusal::Misaligned(self.index));
        }
        // Behind the flags (virtio 1.x, 2.7.8); `locate` has found the whole ring inside guest memory.
        let index = ctx.memory.snapshot().load(GuestAddress(at.used.0 + 2), Ordering::Acquire);
        place.next_used = u16::from_le(index.map_err(|_| Refusal::Outside { index: self.index, part: "used index" })?);
        Ok(place)
    }

    /// An event descriptor as it may be used: not blocking whoever reads or writes it.
    fn event(&self, file: File, what: &'static str) -> Result<OwnedFd, Refusal> {
        let index = self.index;
        let fail = |e: rustix::io::Errno| Refusal::Descriptor { index, source: e.into() };
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file).map_err(fail)?.st_mode);
        // O_NONBLOCK means nothing for these: a read or a write may block or fill a disk.
        if matches!(kind, FileType::RegularFile | FileType::Directory | FileType::BlockDevice) {
            return Err(Refusal::NotAnEvent { index, what });
        }
        let flags = rustix::fs::fcntl_getfl(&file).map_err(fail)?;
        rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(fail)?;
        Ok(file.into())
    }

    fn dup(&self, fd: &OwnedFd) -> Result<OwnedFd, Refusal> {
        fd.try_clone().map_err(|source| Refusal::Descriptor { index: self.index, source })
    }

    fn share(&self, fd: &Option<OwnedFd>) -> Result<Option<OwnedFd>, Refusal> {
        fd.as_ref().map(|fd| self.dup(fd)).transpose()
    }

    /// Completions may have gone unsignalled before a reconnect or to an older descriptor; one
    /// signal too many is harmless.
    fn signal_call(&self) {
        if let Some(call) = &self.call {
            // A full counter is a pending signal already.
            let _ = rustix::io::write(call.as_fd(), &1u64.to_ne_bytes());
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.suspend();
    }
}
