//! A block device over a file of the test: it can grow with the file, and fails where the file was cut.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tools::{command, run};

/// A loop device; detached when dropped.
#[derive(Debug)]
pub struct Loop {
    device: PathBuf,
    file: PathBuf,
}

impl Loop {
    /// Makes one with sectors of `sector` bytes, which needs root.
    pub fn over(file: &Path, sector: u32) -> Result<Loop> {
        let size = sector.to_string();
        let arguments = ["--find", "--show", "--sector-size", &size];
        let device = run(command("losetup")?.args(arguments).arg(file)).context("a loop device needs root")?;
        Ok(Loop { device: PathBuf::from(device.trim()), file: file.to_owned() })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// Makes file and device as long as that.
    pub fn grow(&self, len: u64) -> Result<()> {
        self.lengthen(len)?;
        run(command("losetup")?.arg("--set-capacity").arg(&self.device))?;
        Ok(())
    }

    /// The file has `len` bytes; the device notices nothing. What lies beyond can be neither read nor got back.
    pub fn lengthen(&self, len: u64) -> Result<()> {
        Ok(OpenOptions::new().write(true).open(&self.file)?.set_len(len)?)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        // A test that has failed already says why.
        if let Ok(mut losetup) = command("losetup") {
            let _ = run(losetup.arg("--detach").arg(&self.device));
        }
    }
}
