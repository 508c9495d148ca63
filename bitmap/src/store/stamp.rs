//! Which disk a store belongs to, and whether somebody changed it meanwhile.
//!
//! A clean end stamps the disk; the next start compares. After any other end only what writing does not change can be
//! compared. Of a block device there are no times to go by, and its numbers change from boot to boot: `docs/store.md`
//! tells what that leaves undetected.

use super::codec::{Damage, Decoder, Encoder};
use uuid::Uuid;

/// What is seen of a disk from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// A block device, not a file.
    pub block_device: bool,
    /// `st_dev` of a file, `st_rdev` of a device; of meaning within one boot.
    pub device: u64,
    /// `st_ino` of a file, 0 of a device.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When its bytes changed, in nanoseconds; 0 of a device.
    pub changed: i128,
    /// When its inode changed, likewise.
    pub touched: i128,
    /// The boot of the machine that this was seen in.
    pub boot: Uuid,
}

impl Stamp {
    /// Why `now` is another disk than this one; `None`: it may be the same.
    pub(crate) fn differs(&self, now: &Stamp) -> Option<&'static str> {
        let checks = [
            (self.block_device == now.block_device, "one is a file, the other a block device"),
            (self.inode == now.inode, "it is another file"),
            (self.boot != now.boot || self.device == now.device, "it lies on another device"),
            (self.size == now.size, "its size changed"),
        ];
        checks.iter().find(|(same, _)| !same).map(|(_, reason)| *reason)
    }

    /// Why the disk is not as it was left; `None`: nothing tells that it is not.
    pub(crate) fn changed_until(&self, now: &Stamp) -> Option<&'static str> {
        self.differs(now).or_else(|| {
            let same = self.changed == now.changed && self.touched == now.touched;
            (!same).then_some("it was written to, or replaced")
        })
    }

    pub(crate) fn encode(&self, out: &mut Encoder) {
        out.u8(u8::from(self.block_device));
        out.u64(self.device);
        out.u64(self.inode);
        out.u64(self.size);
        out.0.extend(self.changed.to_le_bytes());
        out.0.extend(self.touched.to_le_bytes());
        out.uuid(self.boot);
    }

    pub(crate) fn decode(input: &mut Decoder<'_>) -> Result<Self, Damage> {
        let time = |input: &mut Decoder<'_>| -> Result<i128, Damage> {
            input.take(16)?.try_into().map(i128::from_le_bytes).map_err(|_| Damage::Short)
        };
        Ok(Self {
            block_device: input.bool()?,
            device: input.u64()?,
            inode: input.u64()?,
            size: input.u64()?,
            changed: time(input)?,
            touched: time(input)?,
            boot: input.uuid()?,
        })
    }
}
