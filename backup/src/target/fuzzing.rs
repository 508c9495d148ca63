//! qcow2 images made of arbitrary bytes, opened as backing chains and as targets are.
//!
//! Promises: nothing outside the policy's root is opened, no image makes us panic, read without end or answer a status of no
//! length; and an image that passed the check for writing reads back what was written into it, and passes again.

use super::image::Image;
use super::{Format, Policy, open};
use crate::source::Source;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// How much of an image is looked at.
const LOOKS: usize = 64;

/// A directory of its own, gone at the end.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let (process, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = parent.join(format!("blkmark-fuzz-{process}-{number}"));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// `data` is the file; `base` beside it is a raw image that it may stand on.
pub fn qcow2(data: &[u8]) {
    let place = Place::new();
    let path = place.0.join("image");
    std::fs::write(&path, data).unwrap();
    std::fs::write(place.0.join("base"), [0x42; 4096]).unwrap();
    let policy = Policy { roots: vec![place.0.clone()], forbidden: Vec::new() };
    if let Ok(image) = Image::open(&path, Format::Qcow2, &policy) {
        look(&image);
    }
    change(&path, &policy);
}

/// Goes through the first extents, and reads here and there. Errors are fine.
fn look(image: &Image) {
    let size = image.size();
    let mut at = 0;
    for _ in 0..LOOKS {
        if at == size {
            break;
        }
        if let Ok((_, len)) = image.allocation(at, size - at) {
            assert!((1..=size - at).contains(&len), "an allocation of {len} bytes at {at} of {size}");
        }
        let Ok((_, len)) = image.block_status(at, size - at) else { break };
        assert!((1..=size - at).contains(&len), "a status of {len} bytes at {at} of {size}");
        at += len;
    }
    let mut buf = vec![0; 64 << 10];
    for at in [0, size / 2, size.saturating_sub(1000), size.saturating_sub(buf.len() as u64)] {
        let len = (size - at).min(buf.len() as u64) as usize;
        let _ = image.read_at(&mut buf[..len], at);
    }
}

/// Writes where the image lets us, as a job with `mode: existing` does.
fn change(path: &Path, policy: &Policy) {
    let Ok(target) = open(path, Format::Qcow2, policy) else { return };
    let size = target.size();
    let places = [0, size / 3, size.saturating_sub(700)];
    let written = (|| {
        for (at, byte) in places.iter().zip(1..) {
            let len = (size - at).min(700) as usize;
            target.write_at(&vec![byte; len], *at)?;
        }
        target.write_zeroes_at(0, size.min(300))?;
        target.conclude()
    })();
    drop(target);
    if written.is_err() {
        return;
    }
    open(path, Format::Qcow2, policy).map(drop).expect("what was written and concluded is a good image");
    let image = Image::open(path, Format::Qcow2, policy).expect("what was concluded can be read");
    let mut expected = std::collections::BTreeMap::new();
    for (at, byte) in places.iter().zip(1u8..) {
        expected.extend((*at..size.min(at + 700)).map(|at| (at, byte)));
    }
    expected.extend((0..size.min(300)).map(|at| (at, 0)));
    for at in places {
        let mut buf = vec![0; (size - at).min(700) as usize];
        image.read_at(&mut buf, at).expect("what was written can be read");
        for (byte, at) in buf.iter().zip(at..) {
            assert_eq!(*byte, expected[&at], "byte {at} is not what was written");
        }
    }
}
