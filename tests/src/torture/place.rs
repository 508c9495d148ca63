//! Where the torture happens: the folder with disks and images, and the file systems of the parts that run full or are lost.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::lab::MIB;
use crate::small_fs::SmallFileSystem;

/// The folders of a run.
pub struct Place {
    folder: TempDir,
    runtime: TempDir,
    memory: TempDir,
    /// Stores of bitmaps.
    pub store: SmallFileSystem,
    /// Where a backup has hardly any room.
    pub narrow: SmallFileSystem,
}

impl Place {
    /// Makes all of them, in `dir` or where temporary files go.
    pub fn make(dir: Option<&Path>) -> Result<Place> {
        let dir = dir.map_or_else(std::env::temp_dir, Path::to_owned);
        let folder = tempfile::Builder::new().prefix("blkmark-torture-").tempdir_in(&dir);
        let folder = folder.with_context(|| format!("cannot make a folder in {}", dir.display()))?;
        let in_memory = || tempfile::Builder::new().prefix("blkmark-torture-").tempdir_in("/dev/shm");
        let runtime = in_memory().context("cannot make a folder in /dev/shm")?;
        let memory = in_memory().context("cannot make a folder in /dev/shm")?;
        let (store, narrow) = (SmallFileSystem::mount(16 * MIB)?, SmallFileSystem::mount(MIB)?);
        Ok(Place { folder, runtime, memory, store, narrow })
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The journal of all guests: in memory, where giving back its beginning holds nobody up.
    pub fn journal(&self) -> PathBuf {
        self.memory.path().join("journal")
    }

    /// What the daemon is told as its runtime directory.
    pub fn runtime(&self) -> &Path {
        self.runtime.path()
    }

    /// Everything on tmpfs is gone, as after a reboot.
    pub fn forget_runtime(&self) -> Result<()> {
        for entry in fs::read_dir(self.runtime())? {
            let path = entry?.path();
            if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
        }
        Ok(())
    }

    /// Leaves all files where they are; where that is.
    pub fn keep(&mut self) -> PathBuf {
        self.folder.disable_cleanup(true);
        for (name, from) in
            [("store", self.store.folder()), ("runtime", self.runtime()), ("memory", self.memory.path())]
        {
            let to = self.folder.path().join(name);
            let _ = fs::create_dir(&to).and_then(|()| copy_all(from, &to));
        }
        self.folder.path().to_owned()
    }
}

fn copy_all(from: &Path, to: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir(&to)?;
            copy_all(&entry.path(), &to)?;
        } else if entry.file_type()?.is_file() {
            fs::copy(entry.path(), to)?;
        }
    }
    Ok(())
}
