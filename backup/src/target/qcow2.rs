//! qcow2 targets, written through `imago`.
//!
//! Made by `target::create` and `target::open`. What of imago 0.2.6 (feature `sync`) matters here:
//! - While it writes, the file is not consistent: L2 tables and refcounts sit in caches until `flush`. So the file is
//!   *marked* (`storage::MARK`) from before the first change until [`Target::conclude`], and whoever is killed in
//!   between leaves an image that every tool refuses rather than one that is silently wrong.
//! - `flush` writes its caches, `sync` is the fsync; dropping a `FormatAccess` flushes and swallows the error.
//! - One writer is fastest, and `discard_to_zero` wants `&mut self`: a mutex serialises the workers.
//! - Errors lose their errno: `storage::keeping_errno` gives it back.
//! - Opening for writing drops foreign bitmaps (auto-clear features) from the header; encrypted images open without a
//!   check, extended L2 and external data files are unsupported: `header` refuses what must not get that far.
//! - It believes the refcounts of an existing image: `check` follows every reference before it may write.
//! - Nothing is opened implicitly: the gate denies, and the backing chain is opened by `image` under the policy.
//! - A range that is no whole cluster is completed from the backing image, zeroes past its end.

use super::bytes::check_range;
use super::check;
use super::draft::Draft;
use super::header::{self, Access};
use super::image::{Image, backing_of, beside, plain_name};
use super::storage::{ImageBytes, ImageFile, keeping_errno};
use super::{Backing, CreateOptions, Format, Policy, Target, TargetError};
use crate::source::FileId;
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, ShallowMapping};
use rustix::io::Errno;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

const DEFAULT_CLUSTER: u64 = 64 * 1024;
/// Longest backing file name that a header can hold.
const MAX_BACKING_NAME: usize = 1023;

struct Geometry {
    size: u64,
    cluster_size: u64,
}

struct Writer {
    access: FormatAccess<ImageFile>,
    marked: bool,
    /// The feature name that made room for that of the mark.
    displaced: Option<(u64, [u8; 48])>,
}

/// A qcow2 image that is written.
pub(super) struct Qcow2Target {
    writer: Mutex<Writer>,
    image: Arc<ImageBytes>,
    draft: Draft,
    size: u64,
    cluster_size: u64,
    reads_zero: bool,
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
        let backing = match &options.backing {
            Some(backing) => Some(open_backing(path, backing, policy)?),
            None => None,
        };
        let (backing_name, backing_access, chain) = match backing {
            Some((name, image)) => {
                let (access, ids) = image.into_parts();
                (Some(name), Some(access), ids)
            }
            None => (None, None, Vec::new()),
        };
        // The chain may not be what we are about to empty.
        let mut strict = policy.clone();
        strict.forbidden.extend(&chain);
        let draft = Draft::make(path, options.overwrite, &strict)?;

        let image = ImageBytes::new(Arc::clone(&draft.bytes), true);
        let storage = ImageFile::new(Arc::clone(&image), path.display().to_string());
        let reads_zero = backing_access.is_none();
        let mut builder =
            Qcow2::<ImageFile>::create_builder(storage).size(options.size).cluster_size(cluster_size as usize);
        if let (Some(name), Some(backing)) = (backing_name, &options.backing) {
            builder = builder.backing(name, backing.format.name().to_owned());
        }
        let qcow2 = keeping_errno(|| {
            builder.create_open(DenyImplicitOpenGate::default(), |storage| {
                Ok(Qcow2::builder(storage).write(true).backing(backing_access))
            })
        })
        .map_err(failed)?;
        let access = FormatAccess::new(qcow2);
        let mut writer = Writer { access, marked: true, displaced: None };
        writer.name_mark(&image).map_err(failed)?;
        keeping_errno(|| writer.access.flush()).map_err(failed)?;
        let geometry = Geometry { size: options.size, cluster_size };
        Ok(Self::new(writer, image, draft, geometry, reads_zero, path, chain))
    }

    /// Opens an existing image; it is marked at the first write.
    pub fn open(path: &Path, policy: &Policy) -> Result<Self, TargetError> {
        let failed = |source| TargetError::Open { path: path.to_owned(), source };
        let draft = Draft::existing(path, policy)?;
        let header = header::examine(&draft.bytes, Access::Write)
            .map_err(failed)?
            .map_err(|reason| TargetError::refused(path, reason))?;
        check::check(&draft.bytes, &header).map_err(failed)?.map_err(|reason| TargetError::refused(path, reason))?;
        let image = ImageBytes::new(Arc::clone(&draft.bytes), false);
        let name = path.display().to_string();

        // A look without write access first: refusing the chain must not have changed the header.
        let look = ImageFile::new(Arc::clone(&image), name.clone());
        let look = keeping_errno(|| Qcow2::<ImageFile>::open_image(look, false)).map_err(failed)?;
        let mut strict = policy.clone();
        strict.forbidden.push(draft.bytes.id());
        let (below, chain) = match backing_of(&look, path)? {
            Some((below, format)) => {
                let (access, ids) = Image::open(&below, format, &strict)?.into_parts();
                (Some(access), ids)
            }
            None => (None, Vec::new()),
        };
        drop(look);

        let storage = ImageFile::new(Arc::clone(&image), name);
        let mut qcow2 = keeping_errno(|| Qcow2::<ImageFile>::open_image(storage, true)).map_err(failed)?;
        qcow2.set_data_file(None);
        qcow2.set_backing(below);
        let access = FormatAccess::new(qcow2);
        let writer = Writer { access, marked: false, displaced: None };
        let geometry = Geometry { size: header.size, cluster_size: header.cluster_size };
        Ok(Self::new(writer, image, draft, geometry, false, path, chain))
    }

    fn new(
        writer: Writer,
        image: Arc<ImageBytes>,
        mut draft: Draft,
        geometry: Geometry,
        reads_zero: bool,
        path: &Path,
        chain: Vec<FileId>,
    ) -> Self {
        draft.keep();
        let mut ids = vec![draft.bytes.id()];
        ids.extend(chain);
        Self {
            writer: Mutex::new(writer),
            image,
            draft,
            size: geometry.size,
            cluster_size: geometry.cluster_size,
            reads_zero,
            path: path.to_owned(),
            ids,
        }
    }

    fn writer(&self) -> io::Result<MutexGuard<'_, Writer>> {
        // A panic inside imago leaves its tables in a state that nobody vouches for.
        self.writer.lock().map_err(|_| Errno::IO.into())
    }

    /// The writer, with the file marked as being changed.
    fn marked_writer(&self) -> io::Result<MutexGuard<'_, Writer>> {
        let mut writer = self.writer()?;
        if !writer.marked {
            self.image.mark()?;
            writer.marked = true;
            writer.name_mark(&self.image)?;
        }
        Ok(writer)
    }
}

impl Writer {
    /// Tells tools that print feature names what the mark means. Cosmetic: an image without a table of names is fine.
    fn name_mark(&mut self, image: &ImageBytes) -> io::Result<()> {
        if let Some(at) = header::last_feature_name(&image.bytes)? {
            let mut entry = [0; 48];
            image.bytes.read_at(&mut entry, at)?;
            image.bytes.write_at(&header::unfinished_name(), at)?;
            self.displaced = Some((at, entry));
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        keeping_errno(|| self.access.flush())?;
        keeping_errno(|| self.access.sync())
    }
}

impl Target for Qcow2Target {
    fn size(&self) -> u64 {
        self.size
    }

    fn cluster_size(&self) -> u64 {
        self.cluster_size
    }

    fn reads_zero(&self) -> bool {
        self.reads_zero
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size)?;
        let writer = self.marked_writer()?;
        keeping_errno(|| writer.access.write(buf, offset))
    }

    fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        check_range(offset, len, self.size)?;
        let mut writer = self.marked_writer()?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let (zero, n) = {
                let look = keeping_errno(|| writer.access.get_shallow_mapping(at, end - at))?;
                (matches!(look.0, ShallowMapping::Zero { .. }), look.1)
            };
            // Zero in this layer, or nothing in it and nothing beneath: it needs no entry in a table.
            if !zero {
                keeping_errno(|| writer.access.discard_to_zero(at, n))?;
            }
            at += n;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.writer()?.flush()
    }

    fn accept(&self) -> io::Result<()> {
        self.draft.accept()
    }

    fn conclude(&self) -> io::Result<()> {
        self.accept()?;
        let mut writer = self.writer()?;
        writer.flush()?;
        if writer.marked {
            if let Some((at, entry)) = writer.displaced.take() {
                self.image.bytes.write_at(&entry, at)?;
            }
            self.image.unmark()?;
            writer.marked = false;
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
