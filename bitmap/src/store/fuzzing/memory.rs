//! A directory in memory, whose files a fuzzer makes.

use crate::store::Medium;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

/// The files by their names.
pub(super) type Files = BTreeMap<String, Vec<u8>>;

/// The directory; nothing in it ever fails.
pub(super) struct Memory(Mutex<Files>);

impl Memory {
    pub(super) fn new(files: Files) -> Arc<Self> {
        Arc::new(Self(Mutex::new(files)))
    }

    pub(super) fn files(&self) -> MutexGuard<'_, Files> {
        self.0.lock().unwrap()
    }
}

impl Medium for Memory {
    fn name(&self) -> String {
        "memory".to_owned()
    }

    fn is_there(&self) -> bool {
        true
    }

    fn make(&self) -> io::Result<()> {
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files().keys().cloned().collect())
    }

    fn read(&self, file: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = self.files().get(file).cloned().ok_or(io::ErrorKind::NotFound)?;
        bytes.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    fn allocate(&self, file: &str, len: u64) -> io::Result<()> {
        let mut files = self.files();
        let bytes = files.entry(file.to_owned()).or_default();
        bytes.resize(bytes.len().max(len as usize), 0);
        Ok(())
    }

    fn write(&self, file: &str, at: u64, data: &[u8]) -> io::Result<()> {
        let mut files = self.files();
        let bytes = files.get_mut(file).ok_or(io::ErrorKind::NotFound)?;
        let (at, end) = (at as usize, at as usize + data.len());
        bytes.resize(bytes.len().max(end), 0);
        bytes[at..end].copy_from_slice(data);
        Ok(())
    }

    fn sync(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, file: &str) -> io::Result<()> {
        self.files().remove(file).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn put_aside(&self) -> io::Result<String> {
        self.files().clear();
        Ok("aside".to_owned())
    }

    /// Every other store is this one, so that commits over several are decided by what is in it.
    fn read_elsewhere(&self, _: &str, file: &str, limit: u64) -> io::Result<Vec<u8>> {
        self.read(file, limit)
    }
}
