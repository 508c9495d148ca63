//! Which disk a store belongs to, and whether somebody changed it meanwhile.
//!
//! A clean end stamps the disk; the next start compares. After any other end only what writing does not change can be
//! compared. A block device has no times to go by: it is known by its name, or within one boot by its sequence number.
//! `docs/store.md` tells what that leaves undetected.

use super::codec::{Damage, Decoder, Encoder};
use uuid::Uuid;

/// What is seen of a disk from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// A block device, not a file.
    pub block_device: bool,
    /// `st_dev` of a file, `st_rdev` of a device; of meaning within one boot.
    pub device: u64,
    /// `st_ino` of a file; of a device the number of its attachment (`diskseq`), of meaning within one boot, 0 if there is none.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When its bytes changed, in nanoseconds; 0 of a device.
    pub changed: i128,
    /// When its inode changed, likewise.
    pub touched: i128,
    /// The boot of the machine that this was seen in.
    pub boot: Uuid,
    /// Of a device: a hash of the name that stays with it; 0 if it has none.
    pub name: u64,
}

impl Stamp {
    /// Why `now` is another disk than this one; `None`: it may be the same.
    pub(crate) fn differs(&self, now: &Stamp) -> Option<&'static str> {
        if self.block_device != now.block_device {
            return Some("one is a file, the other a block device");
        }
        let other = if self.block_device { self.is_other_device(now) } else { self.is_other_file(now) };
        other.or((self.size != now.size).then_some("its size changed"))
    }

    fn is_other_file(&self, now: &Stamp) -> Option<&'static str> {
        match (self.inode == now.inode, self.boot != now.boot || self.device == now.device) {
            (false, _) => Some("it is another file"),
            (_, false) => Some("it lies on another device"),
            _ => None,
        }
    }

    fn is_other_device(&self, now: &Stamp) -> Option<&'static str> {
        if self.name != 0 || now.name != 0 {
            return (self.name != now.name).then_some("it is another device");
        }
        // Nothing but its place tells it from others.
        let place = |stamp: &Stamp| (stamp.device, stamp.inode);
        match (self.boot == now.boot, place(self) == place(now)) {
            (true, true) => None,
            (true, false) => Some("another device is attached there"),
            (false, _) => Some("it has no name by which it could be known again after a boot"),
        }
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
        out.u64(self.name);
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
            name: input.u64()?,
        })
    }
}
