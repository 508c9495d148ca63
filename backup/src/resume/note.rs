//! What a point in time is for, so that another process can go on with it: the *note*; and the *notice*, which says no more than
//! that there was one.
//!
//! Both are JSON behind a line with its CRC-32, and replaced as a whole. What cannot be read in full is not there.

#[cfg(test)]
mod tests;

use crate::cbw;
use crate::job::{BitmapMode, Destination, Hold, Kind, OnError, OnFailure, Settings};
use crate::point::PointOptions;
use crate::source::FileId;
use blkmark_bitmap::{Granularity, Mask};
use serde_json::{Map, Value, json};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use uuid::Uuid;

const VERSION: u64 = 1;

/// What a point in time is for.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Note {
    pub(crate) boot: Uuid,
    pub(crate) disk: FileId,
    /// The run of the disk's store, where there is one.
    pub(crate) run: Option<Uuid>,
    /// The unit that readers take.
    pub(crate) cluster: Granularity,
    pub(crate) options: PointOptions,
    pub(crate) role: Role,
}

/// Who reads it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Role {
    /// Whoever names it.
    Point { name: String },
    /// A job.
    Job(Box<Member>),
}

/// A job, alone or of a group.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Member {
    pub(crate) id: String,
    pub(crate) settings: Settings,
    pub(crate) paused: bool,
    pub(crate) hold: Option<Hold>,
    /// The point has to give back what is frozen; all of the disk otherwise.
    pub(crate) of_bitmap: bool,
    /// The point with a name that it copies, by its ledger. Its own has nothing but what need not be copied any more.
    pub(crate) point: Option<Uuid>,
    pub(crate) destination: Destination,
    /// The file that the target is.
    pub(crate) target: Option<FileId>,
    /// It copies what the guest overwrites.
    pub(crate) follows: bool,
    pub(crate) compress: bool,
    /// The group, and how many belong to it.
    pub(crate) group: Option<(Uuid, usize)>,
    /// It failed, and its point is kept.
    pub(crate) error: Option<String>,
}

/// That there was a point in time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub(super) boot: Uuid,
    /// The job, or the name of the point.
    pub(crate) name: String,
    /// What kind of a job; `None`: a point in time.
    pub(crate) job: Option<Kind>,
    /// What it comes to is being stored.
    pub(crate) commits: bool,
}

pub(super) fn sealed(value: &Value) -> Vec<u8> {
    let text = value.to_string();
    format!("{:08x}\n{text}\n", crc32fast::hash(text.as_bytes())).into_bytes()
}

pub(super) fn unsealed(bytes: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?;
    let (checksum, text) = text.split_once('\n')?;
    let whole = checksum == format!("{:08x}", crc32fast::hash(text.as_bytes()));
    let value: Value = if whole { serde_json::from_str(text).ok()? } else { return None };
    (value["version"] == VERSION).then_some(value)
}

pub(super) fn name_of<T: Copy + PartialEq>(names: &[(&'static str, T)], value: T) -> &'static str {
    names.iter().find(|(_, known)| *known == value).map_or("", |(name, _)| name)
}

pub(super) fn named<T: Copy>(names: &[(&'static str, T)], value: &Value) -> Option<T> {
    let name = value.as_str()?;
    names.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

const MODES: &[(&str, BitmapMode)] =
    &[("on-success", BitmapMode::OnSuccess), ("never", BitmapMode::Never), ("always", BitmapMode::Always)];
pub(super) const MASKS: &[(&str, Mask)] =
    &[("overwrite", Mask::Overwrite), ("union", Mask::Union), ("difference", Mask::Difference)];
const ON_ERROR: &[(&str, OnError)] = &[
    ("report", OnError::Report),
    ("ignore", OnError::Ignore),
    ("enospc", OnError::Enospc),
    ("stop", OnError::Stop),
    ("auto", OnError::Auto),
];
const ON_CBW_ERROR: &[(&str, cbw::OnError)] =
    &[("break-snapshot", cbw::OnError::BreakSnapshot), ("break-guest-write", cbw::OnError::BreakGuestWrite)];

pub(super) fn file(id: FileId) -> Value {
    json!([id.device, id.inode])
}

pub(super) fn to_file(value: &Value) -> Option<FileId> {
    Some(FileId { device: value[0].as_u64()?, inode: value[1].as_u64()? })
}

pub(super) fn uuid(value: &Value) -> Option<Uuid> {
    Uuid::try_parse(value.as_str()?).ok()
}

pub(super) fn string(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// `None` within where it is null.
pub(super) fn opt<T>(value: &Value, read: impl FnOnce(&Value) -> Option<T>) -> Option<Option<T>> {
    if value.is_null() { Some(None) } else { read(value).map(Some) }
}

/// Any bytes may be one.
pub(super) fn path(path: &Path) -> Value {
    path.as_os_str().as_bytes().into()
}

pub(super) fn to_path(value: &Value) -> Option<PathBuf> {
    let bytes: Option<Vec<u8>> = value.as_array()?.iter().map(|byte| u8::try_from(byte.as_u64()?).ok()).collect();
    Some(PathBuf::from(std::ffi::OsString::from_vec(bytes?)))
}

pub(super) fn group((id, members): (Uuid, usize)) -> Value {
    json!([id.to_string(), members])
}

pub(super) fn to_group(value: &Value) -> Option<(Uuid, usize)> {
    Some((uuid(&value[0])?, usize::try_from(value[1].as_u64()?).ok()?))
}

/// The members that say how a job is to behave.
pub(super) fn settings(settings: &Settings) -> Map<String, Value> {
    let members = [
        ("speed", settings.speed.into()),
        ("auto-finalize", settings.auto_finalize.into()),
        ("auto-dismiss", settings.auto_dismiss.into()),
        ("on-source-error", name_of(ON_ERROR, settings.on_source_error).into()),
        ("on-target-error", name_of(ON_ERROR, settings.on_target_error).into()),
        ("max-guest-latency", u64::try_from(settings.guest_latency.as_micros()).unwrap_or(u64::MAX).into()),
        ("copy-range", settings.sharing.into()),
        ("keep", (settings.on_failure == OnFailure::Keep).into()),
    ];
    members.into_iter().map(|(name, value): (&str, Value)| (name.to_owned(), value)).collect()
}

pub(super) fn to_settings(value: &Value) -> Option<Settings> {
    Some(Settings {
        speed: value["speed"].as_u64()?,
        auto_finalize: value["auto-finalize"].as_bool()?,
        auto_dismiss: value["auto-dismiss"].as_bool()?,
        on_source_error: named(ON_ERROR, &value["on-source-error"])?,
        on_target_error: named(ON_ERROR, &value["on-target-error"])?,
        guest_latency: Duration::from_micros(value["max-guest-latency"].as_u64()?),
        sharing: value["copy-range"].as_bool()?,
        on_failure: if value["keep"].as_bool()? { OnFailure::Keep } else { OnFailure::Reclaim },
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl Note {
    pub(super) fn boot(&self) -> Uuid {
        self.boot
    }

    pub(super) fn disk(&self) -> FileId {
        self.disk
    }

    /// The freeze that it goes on with.
    pub(super) fn freeze(&self) -> Option<Uuid> {
        match &self.role {
            Role::Point { .. } => None,
            Role::Job(job) => Some(job.hold.as_ref()?.freeze),
        }
    }

    /// What is to be said of it once it is over.
    pub(crate) fn notice(&self) -> Notice {
        let (name, job) = match &self.role {
            Role::Point { name } => (name.clone(), None),
            Role::Job(job) => (job.id.clone(), Some(Kind::Backup)),
        };
        Notice { boot: self.boot, name, job, commits: false }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let role = match &self.role {
            Role::Point { name } => json!({ "point": name }),
            // A version that knows of no such job must not take it for one of the disk as it is.
            Role::Job(job) => json!({ if job.point.is_some() { "reader" } else { "job" }: job.encode() }),
        };
        sealed(&json!({
            "version": VERSION,
            "boot": self.boot.to_string(),
            "disk": file(self.disk),
            "run": self.run.map(|run| run.to_string()),
            "cluster": self.cluster.bytes(),
            "keep": self.options.keep,
            "on-cbw-error": name_of(ON_CBW_ERROR, self.options.on_error),
            "cbw-timeout": self.options.timeout.map(millis),
            "for": role,
        }))
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let value = unsealed(bytes)?;
        let role = &value["for"];
        let role = match (string(&role["point"]), &role["job"], &role["reader"]) {
            (Some(name), ..) => Role::Point { name },
            (None, job, Value::Null) => Role::Job(Box::new(Member { point: None, ..Member::decode(job)? })),
            (None, _, reader) => Role::Job(Box::new(Member::decode(reader).filter(|job| job.point.is_some())?)),
        };
        Some(Self {
            boot: uuid(&value["boot"])?,
            disk: to_file(&value["disk"])?,
            run: opt(&value["run"], uuid)?,
            cluster: Granularity::new(value["cluster"].as_u64()?)?,
            options: PointOptions {
                keep: value["keep"].as_bool()?,
                on_error: named(ON_CBW_ERROR, &value["on-cbw-error"])?,
                timeout: opt(&value["cbw-timeout"], Value::as_u64)?.map(Duration::from_millis),
                outlive: true,
            },
            role,
        })
    }
}

impl Member {
    fn encode(&self) -> Value {
        let destination = match &self.destination {
            Destination::Node { name, options } => json!({ "node": name, "options": options }),
            Destination::Path { path: target, format, existing } => {
                json!({ "path": path(target), "format": format, "existing": existing })
            }
        };
        let hold = self.hold.as_ref().map(|hold| {
            json!({ "bitmap": hold.bitmap, "freeze": hold.freeze.to_string(), "mode": name_of(MODES, hold.mode) })
        });
        let mut value = json!({
            "id": self.id,
            "paused": self.paused,
            "hold": hold,
            "of-bitmap": self.of_bitmap,
            "of-point": self.point.map(|point| point.to_string()),
            "destination": destination,
            "target": self.target.map(file),
            "follows": self.follows,
            "compress": self.compress,
            "group": self.group.map(group),
            "error": self.error,
        });
        if let Some(members) = value.as_object_mut() {
            members.extend(settings(&self.settings));
        }
        value
    }

    fn decode(value: &Value) -> Option<Self> {
        let hold = |value: &Value| {
            let (bitmap, freeze) = (string(&value["bitmap"])?, uuid(&value["freeze"])?);
            Some(Hold { bitmap, freeze, mode: named(MODES, &value["mode"])? })
        };
        let destination = &value["destination"];
        let destination = match string(&destination["node"]) {
            Some(name) => {
                Destination::Node { name, options: destination["options"].as_array().cloned().unwrap_or_default() }
            }
            None => {
                let format = opt(&destination["format"], string)?;
                Destination::Path {
                    path: to_path(&destination["path"])?,
                    format,
                    existing: destination["existing"].as_bool()?,
                }
            }
        };
        Some(Self {
            id: string(&value["id"])?,
            settings: to_settings(value)?,
            paused: value["paused"].as_bool()?,
            hold: opt(&value["hold"], hold)?,
            of_bitmap: value["of-bitmap"].as_bool()?,
            point: opt(&value["of-point"], uuid)?,
            destination,
            target: opt(&value["target"], to_file)?,
            follows: value["follows"].as_bool()?,
            compress: value["compress"].as_bool()?,
            group: opt(&value["group"], to_group)?,
            error: opt(&value["error"], string)?,
        })
    }
}

impl Notice {
    /// Of a job without a ledger.
    pub(crate) fn of_job(boot: Uuid, name: String, kind: Kind) -> Self {
        Self { boot, name, job: Some(kind), commits: false }
    }

    pub(super) fn boot(&self) -> Uuid {
        self.boot
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        sealed(&self.value())
    }

    pub(super) fn value(&self) -> Value {
        let mut value = Map::new();
        value.insert("version".into(), VERSION.into());
        value.insert("boot".into(), self.boot.to_string().into());
        value.insert(if self.job.is_some() { "job" } else { "point" }.into(), self.name.clone().into());
        if let Some(kind) = self.job {
            value.insert("type".into(), kind.name().into());
        }
        value.insert("commits".into(), self.commits.into());
        value.into()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        Self::of(&unsealed(bytes)?)
    }

    pub(super) fn of(value: &Value) -> Option<Self> {
        let (job, point) = (string(&value["job"]), string(&value["point"]));
        // What left none knew of no other.
        let kind = Kind::ALL.into_iter().find(|kind| value["type"] == kind.name()).unwrap_or(Kind::Backup);
        let kind = job.is_some().then_some(kind);
        let commits = value["commits"].as_bool().unwrap_or(false);
        Some(Self { boot: uuid(&value["boot"])?, name: job.or(point)?, job: kind, commits })
    }
}
