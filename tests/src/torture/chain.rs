//! A disk's chain of backups: a full one, increments on top of it, and the bitmap that tells what the next one needs.
//!
//! The chain follows the rules that any client has to keep. A backup that failed is thrown away, and the bitmap has its
//! marks back. A backup whose end nobody saw is kept if its image came to its end, and thrown away if it is marked as
//! unfinished: the bitmap then must have what fits.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::bounds::{Bounds, Found};
use crate::tools::{answer, command, run};

/// Increments after which a new chain begins.
const LONGEST: usize = 12;

/// One image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Where it is.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: &'static str,
}

/// The chain of one disk.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// What records what the next increment needs; none: the next backup is a full one.
    pub bitmap: Option<String>,
    /// The full backup and the increments on top of it.
    pub images: Vec<Image>,
    goes_on: bool,
}

impl Chain {
    /// What an increment would stand on, if there can be one.
    pub fn tip(&self) -> Option<&Image> {
        self.bitmap.as_ref().and(self.images.last())
    }

    /// Whether it is time for a new one.
    pub fn is_long(&self) -> bool {
        self.images.len() > LONGEST && !self.goes_on
    }

    /// From now on it is never time for a new one.
    pub fn goes_on(&mut self) {
        self.goes_on = true;
    }

    /// A full backup took the place of everything before.
    pub fn begin(&mut self, bitmap: String, image: Image) {
        self.forget();
        self.bitmap = Some(bitmap);
        self.images.push(image);
    }

    /// The bitmap is gone: what there is cannot be continued.
    pub fn forget(&mut self) {
        self.bitmap = None;
        for image in self.images.drain(..) {
            image.remove();
        }
    }
}

impl Image {
    /// Makes an empty qcow2 image on top of this one, for a disk of `bytes`.
    pub fn put_on_top(&self, image: &Path, bytes: u64) -> Result<()> {
        let args = ["create", "-q", "-f", "qcow2", "-F", self.format, "-b"];
        run(command("qemu-img")?.args(args).arg(&self.path).arg(image).arg(bytes.to_string()))?;
        Ok(())
    }

    /// Whether a tool would take it, which it does not if its writer did not come to the end.
    pub fn is_finished(&self) -> Result<bool> {
        Ok(answer(command("qemu-img")?.args(["check", "-q", "-f", self.format]).arg(&self.path))?.code == 0)
    }

    /// Restores it and what is beneath it; fails unless that is within the bounds.
    pub fn verify(&self, bounds: &Bounds) -> Result<Found> {
        if self.format == "raw" {
            return bounds.check(&self.path);
        }
        let restored = self.restore()?;
        let found = bounds.check(&restored).with_context(|| format!("restored from {}", self.path.display()))?;
        fs::remove_file(&restored)?;
        Ok(found)
    }

    /// The image with everything beneath it as a raw file beside it.
    pub fn restore(&self) -> Result<PathBuf> {
        let restored = self.path.with_extension("restored");
        run(command("qemu-img")?.args(["convert", "-f", self.format, "-O", "raw"]).arg(&self.path).arg(&restored))?;
        Ok(restored)
    }

    /// Removes the file, if it is there.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.path);
    }
}
