//! A file system of its own over a loop device: of a kind that the machine's own is not, or to be frozen.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tools::{command, run};

/// What `mkfs` makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Shares no blocks.
    Ext4,
    /// Shares blocks.
    Xfs,
    /// Shares blocks, and checks what it reads.
    Btrfs,
}

/// A mounted file system, gone when dropped.
#[derive(Debug)]
pub struct LoopFileSystem {
    folder: tempfile::TempDir,
    frozen: bool,
}

impl LoopFileSystem {
    /// Makes and mounts one of `bytes`, which needs root. XFS wants 300 MiB at least; it takes no more space than is used.
    pub fn mount(kind: Kind, bytes: u64) -> Result<LoopFileSystem> {
        let folder = tempfile::tempdir()?;
        let this = LoopFileSystem { folder, frozen: false };
        File::create_new(this.image())?.set_len(bytes)?;
        std::fs::create_dir(this.folder())?;
        let (tool, arguments): (_, &[&str]) = match kind {
            Kind::Ext4 => ("mke2fs", &["-q", "-t", "ext4"]),
            Kind::Xfs => ("mkfs.xfs", &["-q"]),
            Kind::Btrfs => ("mkfs.btrfs", &["-q", "-m", "single", "-d", "single"]),
        };
        run(command(tool)?.args(arguments).arg(this.image()))?;
        this.attach()?;
        Ok(this)
    }

    fn attach(&self) -> Result<()> {
        run(command("mount")?.args(["-o", "loop"]).arg(self.image()).arg(self.folder()))
            .context("this test mounts a file system over a loop device, which needs root")?;
        Ok(())
    }

    /// What it stands on.
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// Where it is mounted.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().join("mnt")
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder().join(name)
    }

    /// From now on whoever changes anything in it waits, as for a server that does not answer.
    pub fn freeze(&mut self) -> Result<()> {
        run(command("fsfreeze")?.arg("--freeze").arg(self.folder()))?;
        self.frozen = true;
        Ok(())
    }

    /// Lets them go on.
    pub fn thaw(&mut self) -> Result<()> {
        run(command("fsfreeze")?.arg("--unfreeze").arg(self.folder()))?;
        self.frozen = false;
        Ok(())
    }

    /// Has `change` at what it stands on, while it is not mounted.
    pub fn offline(&mut self, change: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        run(command("umount")?.arg(self.folder()))?;
        change(&self.image())?;
        self.attach()
    }
}

impl Drop for LoopFileSystem {
    fn drop(&mut self) {
        if self.frozen {
            let _ = self.thaw();
        }
        // Lazily: a failing test may still have files open there.
        if let Ok(mut command) = command("umount") {
            let _ = command.arg("-l").arg(self.folder()).status();
        }
    }
}
