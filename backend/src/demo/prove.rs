//! The proofs: is a restored image the disk as of the instant of its backup?
//!
//! Two ways. [`equal`] knows the disk at that instant exactly and compares checksums. [`between`] is for a backup that
//! was taken while the guest wrote: each block has to be whole, no older than what was acknowledged before the order and
//! no newer than what was issued before the answer; and there has to be one instant that parts all requests in the image
//! from all that are not in it. Reads images, changes nothing; what it finds wrong it tells to the block.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::disproof::Disproof;
use super::error::DemoError;
use super::model::{BLOCK, Content, Mark, Snapshot, head, read};
use super::workload::Kind;
use super::writers::Recorded;

/// Bytes read at a time, in whole blocks.
const CHUNK: usize = 1 << 20;

/// A raw image and what to call it.
pub struct Restored<'a> {
    /// For people.
    pub name: &'a str,
    /// The file.
    pub path: &'a Path,
    /// Asked again and again whether to give up.
    pub go_on: &'a (dyn Fn() -> Result<(), DemoError> + Sync),
}

impl Restored<'_> {
    fn open(&self, expected: u64) -> Result<File, DemoError> {
        let file = File::open(self.path)?;
        let found = file.metadata()?.len();
        if found != expected {
            return Err(Disproof::Size { image: self.name.to_owned(), expected, found }.into());
        }
        Ok(file)
    }

    fn chunks(
        &self,
        size: u64,
        mut each: impl FnMut(&mut [u8], u64) -> Result<(), DemoError>,
    ) -> Result<(), DemoError> {
        let mut bytes = vec![0; CHUNK];
        for offset in (0..size).step_by(CHUNK) {
            (self.go_on)()?;
            each(&mut bytes[..(size - offset).min(CHUNK as u64) as usize], offset)?;
        }
        Ok(())
    }

    /// The SHA-256 of its `size` bytes, as `sha256sum` shows it.
    pub fn checksum(&self, size: u64) -> Result<String, DemoError> {
        let file = self.open(size)?;
        let mut hash = Sha256::new();
        self.chunks(size, |bytes, offset| {
            file.read_exact_at(bytes, offset)?;
            hash.update(&*bytes);
            Ok(())
        })?;
        Ok(hex(&hash.finalize()))
    }

    fn wrong(&self, block: u64, bytes: &[u8], expected: String) -> DemoError {
        Disproof::Block { image: self.name.to_owned(), block, expected, found: describe(block, bytes) }.into()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn name(content: Content) -> String {
    match content {
        Content::Zeroes => "zeroes".to_owned(),
        Content::Data(stamp) => format!("the whole data of stamp {stamp}"),
    }
}

fn describe(block: u64, bytes: &[u8]) -> String {
    match (read(block, bytes), head(bytes)) {
        (Some(content), _) => name(content),
        (None, Some((stamp, other))) if other != block => format!("data of block {other}, stamp {stamp}"),
        (None, Some((stamp, _))) => format!("broken data that begins with stamp {stamp}"),
        (None, None) => format!("strange bytes that begin with {}", hex(&bytes[..bytes.len().min(16)])),
    }
}

/// Whether the image is the disk that `expected` describes; the checksum of both.
pub fn equal(image: &Restored<'_>, expected: &Snapshot) -> Result<String, DemoError> {
    // Two checksums that know nothing of each other, side by side.
    let (found, wanted) = std::thread::scope(|scope| {
        let wanted = scope.spawn(|| {
            let mut hash = Sha256::new();
            image.chunks(expected.size(), |bytes, offset| {
                expected.read_at(bytes, offset);
                hash.update(&*bytes);
                Ok(())
            })?;
            Ok::<_, DemoError>(hex(&hash.finalize()))
        });
        let found = image.checksum(expected.size());
        (found, wanted.join().unwrap_or_else(|_| Err(io::Error::other("a checksum thread panicked").into())))
    });
    let (found, wanted) = (found?, wanted?);
    if found == wanted {
        return Ok(found);
    }
    let file = image.open(expected.size())?;
    let mut block_expected = [0; BLOCK];
    image.chunks(expected.size(), |bytes, offset| {
        file.read_exact_at(bytes, offset)?;
        for (block, bytes) in (offset / BLOCK as u64..).zip(bytes.chunks(BLOCK)) {
            expected.read_at(&mut block_expected, block * BLOCK as u64);
            if *bytes != block_expected {
                return Err(image.wrong(block, bytes, name(expected.marks()[block as usize].content())));
            }
        }
        Ok(())
    })?;
    Err(Disproof::Checksum { image: image.name.to_owned(), expected: wanted, found }.into())
}

/// What was seen around an order that was given while the guest wrote.
pub struct Around {
    /// The last acknowledged stamp of each block, just before the order.
    pub acknowledged_before: Vec<u32>,
    /// What was issued last, just after the answer.
    pub issued_after: Snapshot,
    /// Every request that was in flight at the order or issued since, with its times.
    pub recorded: Vec<Recorded>,
}

/// How narrow the proof was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Narrowed {
    /// Blocks that were written between the order and the answer, so that more than one content would have been right.
    pub open_blocks: u64,
    /// Recorded requests that the image was found to hold, and not to hold.
    pub held: (u64, u64),
    /// Between the last request that is in and the first acknowledged one that is not: the instant lies in this span.
    /// `None` if there was none of the one or of the other.
    pub span: Option<Duration>,
}

/// Whether the image is the disk at one instant between order and answer.
pub fn between(image: &Restored<'_>, around: &Around) -> Result<Narrowed, DemoError> {
    let size = around.issued_after.size();
    let file = image.open(size)?;
    let mut found = Vec::with_capacity(around.acknowledged_before.len());
    let mut open_blocks = 0;
    image.chunks(size, |bytes, offset| {
        file.read_exact_at(bytes, offset)?;
        for (block, bytes) in (offset / BLOCK as u64..).zip(bytes.chunks(BLOCK)) {
            let oldest = around.acknowledged_before[block as usize];
            let newest = around.issued_after.marks()[block as usize];
            open_blocks += u64::from(oldest < newest.stamp());
            let content = read(block, bytes).filter(|content| is_between(*content, oldest, newest));
            match content {
                Some(content) => found.push(content),
                None => return Err(image.wrong(block, bytes, expectation(oldest, newest))),
            }
        }
        Ok(())
    })?;
    let (held, span) = one_instant(image, &found, &around.recorded)?;
    Ok(Narrowed { open_blocks, held, span })
}

/// Zeroes carry no stamp: they are right if the last zeroing is not older than the oldest right content.
fn is_between(content: Content, oldest: u32, newest: Mark) -> bool {
    match content {
        Content::Data(stamp) => oldest <= stamp && stamp <= newest.stamp(),
        Content::Zeroes => oldest <= newest.zeroed(),
    }
}

fn expectation(oldest: u32, newest: Mark) -> String {
    if oldest == newest.stamp() {
        return name(newest.content());
    }
    let zeroes = if oldest <= newest.zeroed() { ", or zeroes" } else { "" };
    format!("the whole data of a stamp from {oldest} to {}{zeroes}", newest.stamp())
}

/// The times of the last request in the image and of the first acknowledged one that is not in it: the former must not
/// have been issued after the latter was acknowledged.
fn one_instant(
    image: &Restored<'_>,
    found: &[Content],
    recorded: &[Recorded],
) -> Result<((u64, u64), Option<Duration>), DemoError> {
    let mut last_in: Option<(Instant, u64)> = None;
    let mut first_out: Option<(Instant, u64)> = None;
    let mut held = (0, 0);
    for request in recorded {
        let blocks = &found[request.step.first as usize..(request.step.first + request.step.blocks) as usize];
        // Only what is beyond doubt counts: a block with this very stamp, and a block with an older one.
        let is_in = request.step.kind == Kind::Write && blocks.contains(&Content::Data(request.stamp));
        let is_out = blocks.iter().any(|content| matches!(content, Content::Data(stamp) if *stamp < request.stamp));
        if is_in {
            held.0 += 1;
            last_in = last_in.max(Some((request.issued, request.step.first)));
        }
        if is_out {
            held.1 += 1;
            let this = (request.acknowledged, request.step.first);
            first_out = Some(first_out.map_or(this, |other| other.min(this)));
        }
    }
    let (Some((issued, in_block)), Some((acknowledged, out_block))) = (last_in, first_out) else {
        return Ok((held, None));
    };
    if issued > acknowledged {
        let image = image.name.to_owned();
        return Err(Disproof::NotOneInstant { image, in_block, out_block, gap: issued - acknowledged }.into());
    }
    Ok((held, Some(acknowledged - issued)))
}

#[cfg(test)]
#[path = "prove_tests.rs"]
mod tests;
