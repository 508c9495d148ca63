//! What the reply to a request brings besides its outcome: nothing, bytes, or extents; put together from chunks and checked.
//!
//! Used by `client`, whose reading thread fills it. Invariant: bytes count only when each of them came exactly once and all
//! were asked for; nothing is allocated for a length that the server names.

use super::client::fault;
use std::collections::BTreeMap;
use std::io::{self, Read};

/// Most extents in one reply; servers send as many at most.
const EXTENTS_MAX: u32 = 1 << 17;

/// Bytes that are read at once.
const EXTENT: usize = 8;

/// What is expected, and what of it has come.
#[derive(Debug, Default)]
pub(super) enum Payload {
    /// Nothing.
    #[default]
    Nothing,
    /// Bytes of the export from `offset` on.
    Data {
        /// Where they begin.
        offset: u64,
        /// Room for as many as were asked for.
        bytes: Vec<u8>,
        /// Which have come: beginning and end, neighbours together.
        came: BTreeMap<usize, usize>,
    },
    /// Lengths and flags, in order.
    Extents {
        /// The metadata context that was asked for.
        context: u32,
        /// What has come.
        extents: Vec<(u32, u32)>,
    },
}

impl Payload {
    /// To be filled with the export's bytes from `offset` on.
    pub fn data(offset: u64, bytes: Vec<u8>) -> Self {
        Payload::Data { offset, bytes, came: BTreeMap::new() }
    }

    /// To be filled with the extents of `context`.
    pub fn extents(context: u32) -> Self {
        Payload::Extents { context, extents: Vec::new() }
    }

    /// Whether a reply may bring anything.
    pub fn is_nothing(&self) -> bool {
        matches!(self, Payload::Nothing)
    }

    /// Whether all has come.
    pub fn is_whole(&self) -> bool {
        match self {
            Payload::Nothing => true,
            Payload::Data { bytes, came, .. } => bytes.is_empty() || came.get(&0) == Some(&bytes.len()),
            Payload::Extents { extents, .. } => !extents.is_empty(),
        }
    }

    /// All bytes, as a simple reply has them.
    pub fn take_all(&mut self, replies: &mut impl Read) -> io::Result<()> {
        match self {
            Payload::Nothing => Ok(()),
            Payload::Data { bytes, came, .. } => {
                replies.read_exact(bytes)?;
                came.insert(0, bytes.len());
                Ok(())
            }
            Payload::Extents { .. } => Err(fault("a reply that fits no request")),
        }
    }

    /// A chunk of bytes, `length` with their offset.
    pub fn take_data(&mut self, replies: &mut impl Read, length: u32) -> io::Result<()> {
        let Some(len) = (length as usize).checked_sub(8) else { return Err(wrong_length()) };
        let offset = u64::from_be_bytes(array(replies)?);
        replies.read_exact(self.place(offset, len)?)
    }

    /// A chunk that stands for zeroes.
    pub fn take_hole(&mut self, replies: &mut impl Read, length: u32) -> io::Result<()> {
        if length != 12 {
            return Err(wrong_length());
        }
        let (offset, len) = (u64::from_be_bytes(array(replies)?), u32::from_be_bytes(array(replies)?));
        self.place(offset, len as usize)?.fill(0);
        Ok(())
    }

    /// The room for `len` bytes of the export at `offset`, noted as filled.
    fn place(&mut self, offset: u64, len: usize) -> io::Result<&mut [u8]> {
        let Payload::Data { offset: start, bytes, came } = self else {
            return Err(fault("a reply that fits no request"));
        };
        let from = offset.checked_sub(*start).and_then(|from| usize::try_from(from).ok());
        let range = from.and_then(|from| Some((from, from.checked_add(len)?)));
        match range {
            Some((from, to)) if to <= bytes.len() && note(came, from, to) => Ok(&mut bytes[from..to]),
            _ => Err(fault("bytes that were not asked for, or that had come")),
        }
    }

    /// A chunk of extents.
    pub fn take_extents(&mut self, replies: &mut impl Read, length: u32) -> io::Result<()> {
        let Payload::Extents { context, extents } = self else {
            return Err(fault("a reply that fits no request"));
        };
        let count = length.checked_sub(4).filter(|rest| rest.is_multiple_of(EXTENT as u32)).map(|rest| rest / 8);
        let Some(count) = count.filter(|count| (1..=EXTENTS_MAX).contains(count)) else { return Err(wrong_length()) };
        if u32::from_be_bytes(array(replies)?) != *context || !extents.is_empty() {
            return Err(fault("extents that were not asked for, or that had come"));
        }
        for _ in 0..count {
            let (len, flags) = (u32::from_be_bytes(array(replies)?), u32::from_be_bytes(array(replies)?));
            if len == 0 {
                return Err(fault("an empty extent"));
            }
            extents.push((len, flags));
        }
        Ok(())
    }
}

fn array<const N: usize>(replies: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    replies.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn wrong_length() -> io::Error {
    fault("a chunk with the wrong length")
}

/// Notes that `from..to` has come. False if there is nothing in it, or some of it had come before.
fn note(came: &mut BTreeMap<usize, usize>, mut from: usize, mut to: usize) -> bool {
    let before = came.range(..=from).next_back().map(|(start, end)| (*start, *end));
    let after = came.range(from..).next().map(|(start, end)| (*start, *end));
    if from >= to || before.is_some_and(|(_, end)| end > from) || after.is_some_and(|(start, _)| start < to) {
        return false;
    }
    if let Some((start, end)) = before
        && end == from
    {
        from = start;
    }
    if let Some(end) = came.remove(&to) {
        to = end;
    }
    came.insert(from, to);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_once_and_all_of_them() {
        let mut came = BTreeMap::new();
        for (from, to, new) in [
            (10, 20, true),
            (20, 30, true),
            (0, 5, true),
            (4, 6, false),
            (15, 16, false),
            (9, 11, false),
            (29, 31, false),
            (7, 7, false),
            (5, 10, true),
            (0, 30, false),
            (30, 40, true),
        ] {
            assert_eq!(note(&mut came, from, to), new, "{from}..{to} after {came:?}");
        }
        assert_eq!(came, BTreeMap::from([(0, 40)]));
    }
}
