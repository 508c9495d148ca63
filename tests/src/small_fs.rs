//! A file system that runs full soon.

use std::path::Path;

use anyhow::{Context, Result};

use crate::tools::{command, run};

/// A tmpfs of a few bytes, unmounted when dropped.
#[derive(Debug)]
pub struct SmallFileSystem {
    folder: tempfile::TempDir,
}

impl SmallFileSystem {
    /// Mounts one of `bytes`, which needs root.
    pub fn mount(bytes: u64) -> Result<SmallFileSystem> {
        let folder = tempfile::tempdir()?;
        run(command("mount")?.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "blkmark-test"]).arg(folder.path()))
            .context("this test mounts a small tmpfs, which needs root")?;
        Ok(SmallFileSystem { folder })
    }

    /// Where it is.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        if let Ok(mut command) = command("umount") {
            let _ = command.arg("-l").arg(self.folder.path()).status();
        }
    }
}
