//! Live maps in files on tmpfs: page 0 is a header, the words follow.
//!
//! A mark is a store into shared memory, which the kernel keeps when the process is killed. On tmpfs alone: elsewhere
//! write-back would stall those who mark. A file is allocated in full before it is mapped, and its name, which has the ids of
//! store and run in it, is made afresh or not at all, so nobody can put a file of his in the way of it.
//!
//! | at | bytes | what |
//! |---|---|---|
//! | 0 | 8 | magic `BLKMKMAP` |
//! | 8 | 4, 4 | version, CRC-32 of bytes 16 to 88 |
//! | 16 | 16, 16 | store, run |
//! | 48 | 8, 8, 8, 8 | generation, granularity, size of the disk, sequence of the record in force |
//! | 80 | 8 | 0 |
//! | 128 | 8 | the generation made after this one, or 0 |
//! | 4096 | | the words, as the machine has them |

use super::codec::{Decoder, Encoder, MOST_NUMBER};
use super::is_memory;
use super::mapping::Mapping;
use super::maps::{FoundMap, FoundMaps, MapHead, Maps};
use crate::bits::Bits;
use crate::blocks::words_for;
use crate::live::LiveMap;
use crate::named::MOST_BITS;
use crate::sync::Ordering;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"BLKMKMAP";
const VERSION: u32 = 1;
const PAGE: usize = 4096;
const HEADER: usize = 88;
const NEXT: usize = 128;
/// Live maps in a directory on tmpfs.
#[derive(Debug)]
pub struct Shm {
    directory: PathBuf,
    newest: Option<(u64, Arc<Mapping>)>,
}

impl Shm {
    /// In `directory`; `None` if that is not on tmpfs.
    pub fn new(directory: &Path) -> Option<Self> {
        let stat = rustix::fs::statfs(directory).ok()?;
        is_memory(&stat).then(|| Self { directory: directory.to_owned(), newest: None })
    }

    fn prefix(store: Uuid) -> String {
        format!("blkmark.{}.", store.simple())
    }

    fn path(&self, head: &MapHead) -> PathBuf {
        let (prefix, run) = (Self::prefix(head.store), head.run.simple());
        self.directory.join(format!("{prefix}{run}.{}", head.generation))
    }

    /// The names of the files of a store, with what follows the store's id.
    fn files(&self, store: Uuid) -> io::Result<Vec<(PathBuf, String)>> {
        let prefix = Self::prefix(store);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let entry = entry?;
            if let Some(rest) = entry.file_name().to_str().and_then(|name| name.strip_prefix(&prefix)) {
                files.push((entry.path(), rest.to_owned()));
            }
        }
        Ok(files)
    }
}

fn create(path: &Path) -> io::Result<File> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)?))
}

/// Somebody else's file is no map of ours, whatever it holds.
fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd: OwnedFd = rustix::fs::open(path, flags, Mode::empty())?;
    let file = File::from(fd);
    let metadata = file.metadata()?;
    let ours = metadata.is_file() && metadata.uid() == rustix::process::geteuid().as_raw();
    Ok(ours.then_some(file))
}

fn header(head: &MapHead) -> Vec<u8> {
    let mut out = Encoder::default();
    out.uuid(head.store);
    out.uuid(head.run);
    out.u64(head.generation);
    out.granularity(head.granularity);
    out.u64(head.size);
    out.u64(head.sequence);
    out.u64(0);
    let body = out.0;
    let mut out = Encoder::default();
    out.0.extend(MAGIC);
    out.u32(VERSION);
    out.u32(crc32fast::hash(&body));
    out.0.extend(body);
    out.0
}

fn read_header(bytes: &[u8]) -> Option<MapHead> {
    let mut input = Decoder(bytes);
    let begins = input.take(8).ok()? == MAGIC && input.u32().ok()? == VERSION;
    let checksum = input.u32().ok()?;
    if !begins || checksum != crc32fast::hash(bytes.get(16..HEADER)?) {
        return None;
    }
    let (store, run, generation) = (input.uuid().ok()?, input.uuid().ok()?, input.u64().ok()?);
    let (granularity, size, sequence) = (input.granularity().ok()?, input.u64().ok()?, input.u64().ok()?);
    let possible = generation <= MOST_NUMBER && granularity.bits_for(size) <= MOST_BITS;
    possible.then_some(MapHead { store, run, generation, sequence, granularity, size })
}

/// A word as it lies in memory.
fn word(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_ne_bytes)
}

/// A map, or nothing if it is not whole.
fn read(file: &mut File) -> io::Result<Option<FoundMap>> {
    let mut page = vec![0; PAGE];
    if file.metadata()?.len() < PAGE as u64 {
        return Ok(None);
    }
    file.read_exact(&mut page)?;
    let Some(head) = read_header(&page) else { return Ok(None) };
    let next = word(&page[NEXT..NEXT + 8]);
    let words = words_for(head.granularity, head.size);
    if file.metadata()?.len() != (PAGE + words * 8) as u64 {
        return Ok(None);
    }
    let mut bits = Bits::new(head.granularity, head.size);
    let mut block = vec![0; 64 * 8];
    for first in (0..words).step_by(64) {
        let count = (words - first).min(64);
        let data = &mut block[..count * 8];
        file.read_exact(data)?;
        if data.iter().all(|byte| *byte == 0) {
            continue;
        }
        let words: Vec<u64> = data.chunks_exact(8).map(word).collect();
        if !bits.put_block((first / 64) as u64, &words) {
            return Ok(None);
        }
    }
    Ok(Some(FoundMap { head, next, bits }))
}

impl Maps for Shm {
    fn create(&mut self, head: &MapHead) -> io::Result<Arc<LiveMap>> {
        let path = self.path(head);
        let mut file = match create(&path) {
            // Left by a flip of this very run that did not come about.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                std::fs::remove_file(&path)?;
                create(&path)?
            }
            created => created?,
        };
        let len = PAGE as u64 + LiveMap::bytes_for(head.granularity, head.size);
        let made = (|| {
            let mapping = Mapping::take(&file, len as usize)?;
            file.write_all(&header(head))?;
            Ok(mapping)
        })();
        let mapping = match made {
            Ok(mapping) => Arc::new(mapping),
            Err(error) => {
                // What it took is given back; if not, the next start does it.
                let _ = std::fs::remove_file(&path);
                return Err(error);
            }
        };
        if let Some((_, before)) = &self.newest {
            before.word(NEXT).store(head.generation, Ordering::Release);
        }
        self.newest = Some((head.generation, Arc::clone(&mapping)));
        Ok(Arc::new(LiveMap::mapped(head.granularity, head.size, mapping, PAGE)))
    }

    fn find(&mut self, store: Uuid) -> io::Result<FoundMaps> {
        let mut found = FoundMaps::default();
        for (path, rest) in self.files(store)? {
            if rest == "distrust" {
                found.distrusted = true;
            } else if let Some(mut file) = open(&path)?
                && let Some(map) = read(&mut file)?
                && map.head.store == store
            {
                found.maps.push(map);
            }
        }
        Ok(found)
    }

    fn keep(&mut self, store: Uuid, run: Uuid, generation: u64) {
        let run = run.simple().to_string();
        let kept = |rest: &str| {
            let (of, number) = rest.split_once('.')?;
            Some(of == run && number.parse::<u64>().ok()? >= generation)
        };
        for (path, rest) in self.files(store).unwrap_or_default() {
            if kept(&rest) != Some(true) {
                // It takes memory, and says nothing that counts: a record knows better.
                let _ = std::fs::remove_file(path);
            }
        }
        if self.newest.as_ref().is_some_and(|(newest, _)| *newest < generation) {
            self.newest = None;
        }
    }

    fn distrust(&mut self, store: Uuid) {
        let path = self.directory.join(format!("{}distrust", Self::prefix(store)));
        match create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                tracing::error!(path = %path.display(), %error, "could not leave word that bitmaps are not to be trusted");
            }
            _ => {}
        }
    }
}
