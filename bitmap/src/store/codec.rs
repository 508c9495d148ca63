//! How numbers and bytes are laid out in the store's files: little-endian, lengths before contents. Reading is total: any
//! bytes in, a value or [`Damage`] out.

use crate::units::Granularity;
use thiserror::Error;
use uuid::Uuid;

/// Why bytes are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Damage {
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// It ends too early.
    #[error("it is cut short")]
    Short,
    /// It does not begin as such a file does.
    #[error("it is no such file")]
    Foreign,
    /// Another version of blkmark made it.
    #[error("it has version {0}, which this version does not know")]
    Version(u32),
    /// Its checksum does not fit.
    #[error("its checksum does not fit")]
    Checksum,
    /// It is whole, and is not what was asked for.
    #[error("it is another than the one that was asked for")]
    Another,
    /// It makes no sense.
    #[error("it makes no sense")]
    Nonsense,
    /// It cannot be read.
    #[error("it cannot be read: {0}")]
    Unreadable(String),
}

/// Numbers of records, generations and files count up by one, so none beyond this was ever given, and one can always be added.
pub(crate) const MOST_NUMBER: u64 = u64::MAX >> 1;

/// Writes.
#[derive(Default)]
pub(crate) struct Encoder(pub(crate) Vec<u8>);

impl Encoder {
    pub(crate) fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    pub(crate) fn uuid(&mut self, value: Uuid) {
        self.0.extend(value.as_bytes());
    }

    pub(crate) fn granularity(&mut self, value: Granularity) {
        self.u64(value.bytes());
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.u32(value.len() as u32);
        self.0.extend(value);
    }

    pub(crate) fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.u8(u8::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
    }

    pub(crate) fn list<T>(&mut self, values: &[T], mut write: impl FnMut(&mut Self, &T)) {
        self.u32(values.len() as u32);
        for value in values {
            write(self, value);
        }
    }
}

/// Reads.
pub(crate) struct Decoder<'a>(pub(crate) &'a [u8]);

impl<'a> Decoder<'a> {
    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], Damage> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Damage::Short)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Damage> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| Damage::Short)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Damage> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Damage> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Damage> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(crate) fn uuid(&mut self) -> Result<Uuid, Damage> {
        Ok(Uuid::from_bytes(self.array()?))
    }

    pub(crate) fn bool(&mut self) -> Result<bool, Damage> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Damage::Nonsense),
        }
    }

    pub(crate) fn granularity(&mut self) -> Result<Granularity, Damage> {
        Granularity::new(self.u64()?).ok_or(Damage::Nonsense)
    }

    pub(crate) fn bytes(&mut self) -> Result<&'a [u8], Damage> {
        let count = self.u32()?;
        self.take(count as usize)
    }

    pub(crate) fn text(&mut self) -> Result<String, Damage> {
        String::from_utf8(self.bytes()?.to_vec()).map_err(|_| Damage::Nonsense)
    }

    pub(crate) fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, Damage>) -> Result<Option<T>, Damage> {
        if self.bool()? { read(self).map(Some) } else { Ok(None) }
    }

    /// Each element takes at least a byte, so a count that cannot be true takes no memory.
    pub(crate) fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Result<T, Damage>) -> Result<Vec<T>, Damage> {
        let count = self.u32()? as usize;
        if count > self.0.len() {
            return Err(Damage::Short);
        }
        (0..count).map(|_| read(self)).collect()
    }

    pub(crate) fn end(&self) -> Result<(), Damage> {
        if self.0.is_empty() { Ok(()) } else { Err(Damage::Nonsense) }
    }
}
