//! qcow2 targets: a writer for images that are new or exist.
//!
//! Made by `target::create` and `target::open`. Workers write at once: under the lock they only take room and, once the data
//! is in the file, enter where it is; they compress and write without it. Rooms: `entry` (what tables say), `tables`, `space`
//! (refcounts and room, with `counts` beneath), `write` (how bytes get there), `create` (a new header).
//!
//! While it writes, the file is not consistent, since tables and refcounts sit in memory until the end. So it is *marked*
//! (`mark`) from before the first change until [`Target::conclude`], and whoever is killed in between leaves an image that
//! every tool refuses rather than one that is silently wrong.
//!
//! Invariants: an entry leads to data that is in the file; what an existing image uses is never handed out again, whatever its
//! refcounts say (`check` finds out what that is); a failed write leaves the cluster as it was, and may be made again; no
//! file but the one that was opened is touched, and the backing chain is opened by `image` under the policy.

mod counts;
mod create;
mod entry;
mod space;
mod tables;
mod write;

use super::bytes::{Bytes, check_range};
use super::check;
use super::deflate::Deflate;
use super::draft::Draft;
use super::header::{self, Access};
use super::image::{Image, backing_of, beside, plain_name};
use super::mark::Mark;
use super::pour::Pour;
use super::storage::{ImageFile, keeping_errno};
use super::{Backing, CreateOptions, Format, Policy, Target, TargetError};
use crate::source::FileId;
pub(super) use counts::Counts;
pub(super) use entry::{COMPRESSED, COPIED, Entry, Geometry, OFFSET};
use imago::qcow2::Qcow2;
use rustix::io::Errno;
use space::Space;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tables::Tables;
pub(super) use tables::read_table;

const DEFAULT_CLUSTER: u64 = 64 * 1024;
/// Longest backing file name that a header can hold.
const MAX_BACKING_NAME: usize = 1023;
/// What QEMU takes for an L1 table.
const MAX_L1_ENTRIES: u64 = (32 << 20) / 8;

/// What changes under the lock.
struct State {
    tables: Tables,
    space: Space,
    mark: Mark,
}

/// A qcow2 image that is written.
pub(super) struct Qcow2Target {
    state: Mutex<State>,
    /// Who completes parts of clusters: two workers may have parts of one.
    partial: Mutex<()>,
    pour: Pour,
    draft: Draft,
    geometry: Geometry,
    backing: Option<Image>,
    fresh: bool,
    compress: AtomicBool,
    deflate: Deflate,
    path: PathBuf,
    ids: Vec<FileId>,
}

impl Qcow2Target {
    /// Makes a new image, marked until it is concluded.
    pub fn create(path: &Path, options: &CreateOptions, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Create { path: path.to_owned(), source };
        let cluster_size = options.cluster_size.unwrap_or(DEFAULT_CLUSTER);
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
            let reason = "Cluster size must be a power of two between 512 and 2048k";
            return Err(TargetError::options(path, reason));
        }
        let geometry = Geometry { size: options.size, cluster_bits: cluster_size.trailing_zeros() };
        if geometry.l1_entries() > MAX_L1_ENTRIES {
            let reason = "The image size is too large for file format 'qcow2' (try using a larger cluster size)";
            return Err(TargetError::options(path, reason));
        }
        let backing = match &options.backing {
            Some(backing) => Some(open_backing(path, backing, policy)?),
            None => None,
        };
        // The chain may not be what we are about to empty.
        let mut strict = policy.clone();
        strict.forbidden.extend(backing.iter().flat_map(|(_, image)| image.file_ids()));
        let draft = Draft::make(path, options.overwrite, &strict)?;
        let bytes = &draft.bytes;

        let mut space = Space::new(geometry, create::REFCOUNT_ORDER);
        let l1_clusters = (geometry.l1_entries() * 8).div_ceil(cluster_size).max(1);
        let l1_offset = 2 * cluster_size;
        let named =
            options.backing.as_ref().zip(backing.as_ref()).map(|(options, (name, _))| (&**name, options.format));
        let header = create::header(geometry, l1_offset, cluster_size, named).ok_or_else(|| {
            TargetError::options(path, "The name of the backing file is too long for the cluster size")
        })?;
        bytes.write_at(&header, 0).map_err(failed)?;
        bytes.fill_zero(cluster_size, cluster_size).map_err(failed)?;
        let l1 = space.take_first(bytes, l1_clusters).map_err(failed)?;
        debug_assert_eq!(l1.first * cluster_size, l1_offset);
        let mut tables = Tables::new(geometry, l1_offset);
        tables.flush(bytes).map_err(failed)?;
        let state = State { tables, space, mark: Mark::of_new() };
        let backing = backing.map(|(_, image)| image);
        Ok(Self::new(state, draft, geometry, backing, true, path))
    }

    /// Opens an existing image; it is marked at the first write.
    pub fn open(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        Self::open_for(path, policy, Access::Write)
    }

    /// Opens an image that a killed process was writing: its tables lead to data that is in the file, its refcounts say nothing.
    pub fn reopen(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let mut target = Self::open_for(path, policy, Access::Resume)?;
        target.draft.renew_name();
        Ok(target)
    }

    fn open_for(path: &Path, policy: &Policy, access: Access) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open { path: path.to_owned(), source };
        let draft = Draft::existing(path, policy)?;
        let header = header::examine(&draft.bytes, access)
            .map_err(failed)?
            .map_err(|reason| TargetError::refused(path, reason))?;
        let usage = check::check(&draft.bytes, &header, access != Access::Resume)
            .map_err(failed)?
            .map_err(|reason| TargetError::refused(path, reason))?;
        let look = ImageFile::new(Arc::clone(&draft.bytes), path.display().to_string());
        let look = if access == Access::Resume { look.without_mark() } else { look };
        let look = keeping_errno(|| Qcow2::<ImageFile>::open_image(look, false)).map_err(failed)?;
        let mut strict = policy.clone();
        strict.forbidden.push(draft.bytes.id());
        let backing = match backing_of(&look, path)? {
            Some((below, format)) => Some(Image::open(&below, format, &strict)?),
            None => None,
        };
        let geometry = header.geometry;
        let tables = Tables::read(&draft.bytes, geometry, header.l1_offset, header.l1_entries).map_err(failed)?;
        let len = draft.bytes.len().map_err(failed)?;
        let mut space = Space::existing(&header, usage.counts, &usage.blocks, len);
        let mut mark = Mark::default();
        if access == Access::Resume {
            // It bears the mark, or bears it from now on: either way its end has to write all that the one before did not.
            mark.set(&draft.bytes).map_err(failed)?;
            space.count_anew(&draft.bytes).map_err(failed)?;
        }
        let state = State { tables, space, mark };
        Ok(Self::new(state, draft, geometry, backing, false, path))
    }

    fn new(
        state: State,
        mut draft: Draft,
        geometry: Geometry,
        backing: Option<Image>,
        fresh: bool,
        path: &Path,
    ) -> Self {
        draft.keep();
        let mut ids = vec![draft.bytes.id()];
        ids.extend(backing.iter().flat_map(|image| image.file_ids()));
        Self {
            state: Mutex::new(state),
            partial: Mutex::new(()),
            pour: Pour::new(&draft.bytes),
            draft,
            geometry,
            backing,
            fresh,
            compress: AtomicBool::new(false),
            deflate: Deflate::default(),
            path: path.to_owned(),
            ids,
        }
    }

    fn bytes(&self) -> &Bytes {
        &self.draft.bytes
    }

    fn state(&self) -> io::Result<MutexGuard<'_, State>> {
        // A panic in here leaves tables that nobody vouches for.
        self.state.lock().map_err(|_| Errno::IO.into())
    }

    /// The state, with the file marked as being changed.
    fn marked(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state()?;
        state.mark.set(self.bytes())?;
        Ok(state)
    }

    fn host(&self, cluster: u64) -> u64 {
        cluster << self.geometry.cluster_bits
    }
}

impl Target for Qcow2Target {
    fn size(&self) -> u64 {
        self.geometry.size
    }

    fn cluster_size(&self) -> u64 {
        self.geometry.cluster()
    }

    fn reads_zero(&self) -> bool {
        self.fresh && self.backing.is_none()
    }

    fn compresses(&self) -> bool {
        true
    }

    fn set_compression(&self, on: bool) {
        self.compress.store(on, Ordering::Relaxed);
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.geometry.size)?;
        drop(self.marked()?);
        for (part, (start, end)) in self.cut(offset, buf.len() as u64).into_iter().enumerate() {
            let buf = &buf[(start - offset) as usize..(end - offset) as usize];
            match part {
                1 => self.write_whole(buf, start >> self.geometry.cluster_bits)?,
                _ => self.write_part(buf, start)?,
            }
        }
        Ok(())
    }

    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.geometry.size)?;
        drop(self.marked()?);
        let [head, whole, tail] = self.cut(offset, len);
        self.zero_part(head.0, head.1 - head.0)?;
        let bits = self.geometry.cluster_bits;
        if whole.0 < whole.1 {
            self.zero_whole(whole.0 >> bits, whole.1.div_ceil(self.geometry.cluster()))?;
        }
        self.zero_part(tail.0, tail.1 - tail.0)
    }

    /// Tables lead to data that is in the file; refcounts are found out by whoever goes on (`check`).
    fn note_down(&self) -> io::Result<()> {
        self.state()?.tables.flush(self.bytes())
    }

    fn flush(&self) -> io::Result<()> {
        self.note_down()?;
        self.bytes().sync()
    }

    fn accept(&self) -> io::Result<()> {
        self.draft.accept()
    }

    fn conclude(&self) -> io::Result<()> {
        self.accept()?;
        let mut state = self.state()?;
        if state.mark.is_set() {
            state.tables.flush(self.bytes())?;
            let table = state.space.write_refcounts(self.bytes())?;
            let mut place = self.host(table.first).to_be_bytes().to_vec();
            place.extend((table.count as u32).to_be_bytes());
            self.bytes().write_at(&place, create::REFTABLE_AT)?;
            self.bytes().sync()?;
            state.mark.clear(self.bytes())?;
        } else {
            self.bytes().sync()?;
        }
        self.draft.sync_name()
    }

    fn abandon(&self) -> io::Result<()> {
        self.draft.remove()
    }

    fn file_ids(&self) -> &[FileId] {
        &self.ids
    }

    fn format_name(&self) -> &'static str {
        Format::Qcow2.name()
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }
}

fn open_backing(path: &Path, backing: &Backing, policy: &Policy) -> Result<(String, Image), TargetError> {
    let refuse = |reason: String| TargetError::options(path, reason);
    let name = backing.path.to_str().ok_or_else(|| refuse("The name of the backing file must be UTF-8".into()))?;
    plain_name(name).map_err(refuse)?;
    if name.is_empty() || name.len() > MAX_BACKING_NAME {
        return Err(refuse(format!("The name of the backing file must have 1 to {MAX_BACKING_NAME} bytes")));
    }
    let image = Image::open(&beside(path, &backing.path), backing.format, policy)?;
    Ok((name.to_owned(), image))
}
