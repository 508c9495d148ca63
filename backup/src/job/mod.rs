//! Jobs: long work that a command starts and clients watch, steer and wait for.
//!
//! `control` prepares the [`Work`] (a [`Backup`], a [`Populate`]), puts its freeze in force together with everything else of a transaction, and hands it
//! to [`Jobs`]. From there on a thread of the job's own copies, and whatever ends it (its work, an error, a command, a
//! sibling's failure) goes through `life`. Rooms: `state` (the two tables), `policy` (what an error leads to), `work`
//! (what kinds there are), `backup` and `populate` (the work itself), `order` (what
//! a job begins with), `entry` (one job), `registry` (who is there, verbs), `locked` (how they begin), `queries`, `error`, `life` (from `created` to `null`),
//! `keeping` and `ended` (what goes on, or does not, after a kill), `events`.
//!
//! Invariants: a state changes only as the table in `state` allows, and each change is told once, in order; a bitmap
//! leaves its freeze in the same commit that takes the point's gate away, one commit for a whole group; `concluded` is
//! told only after the target is durable and closed and that commit is in force.

pub mod backup;
mod ended;
mod entry;
mod error;
mod events;
mod keeping;
mod life;
mod locked;
mod order;
pub mod policy;
pub mod populate;
mod queries;
mod registry;
pub mod state;
mod work;

pub use backup::{Backup, BitmapMode, Content, Destination, Failure, Hold};
pub(crate) use ended::Ended;
pub use error::JobError;
pub(crate) use life::commit_until_done;
pub use locked::{Locked, Retry};
pub(crate) use order::well_formed;
pub use order::{NewJob, Reservation, Settings};
pub use policy::{OnError, OnFailure};
pub use populate::{Older, Pattern, Populate};
pub use registry::Jobs;
pub use state::{Status, Verb};
pub use work::{Kind, Work};
