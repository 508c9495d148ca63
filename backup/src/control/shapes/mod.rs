//! The shapes of what commands take and answer, one room a subject; `commands` says which command has which.

pub(super) mod answers;
pub(super) mod bitmaps;
pub(super) mod exports;
pub(super) mod jobs;
pub(super) mod nodes;
