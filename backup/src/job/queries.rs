//! What queries show of jobs: those that are there, and behind them those that ended with the process before.

use super::Jobs;
use super::ended::Ended;
use super::registry::lock;
use super::state::Status;
use serde_json::{Map, Value, json};

impl Jobs {
    /// `query-jobs`.
    pub fn query(&self) -> Value {
        let inner = lock(&self.inner);
        let shown = inner.entries.iter().map(|entry| {
            let (offset, len) = entry.progress();
            let mut info = Map::new();
            info.insert("id".into(), entry.id().into());
            info.insert("type".into(), entry.kind.name().into());
            info.insert("status".into(), entry.status.name().into());
            info.insert("current-progress".into(), offset.into());
            info.insert("total-progress".into(), len.into());
            if entry.status == Status::Concluded && entry.held.is_some() {
                info.insert("kept".into(), true.into());
            }
            if let Some(error) = &entry.error {
                info.insert("error".into(), error.clone().into());
            }
            Value::Object(info)
        });
        shown.chain(self.ended().iter().map(Ended::info)).collect()
    }

    /// `query-block-jobs`.
    pub fn query_block(&self) -> Value {
        let inner = lock(&self.inner);
        let shown = inner.entries.iter().map(|entry| {
            let (offset, len) = entry.progress();
            let mut info = json!({
                "type": entry.kind.name(),
                "device": entry.id(),
                "len": len,
                "offset": offset,
                "busy": entry.status == Status::Running,
                "paused": entry.user_paused,
                "speed": entry.speed,
                "max-guest-latency": entry.settings.guest_latency.as_micros() as u64,
                "io-status": entry.io_status.name(),
                "ready": false,
                "status": entry.status.name(),
                "auto-finalize": entry.settings.auto_finalize,
                "auto-dismiss": entry.settings.auto_dismiss,
            });
            if let Some(error) = &entry.error {
                info["error"] = error.clone().into();
            }
            info
        });
        shown.chain(self.ended().iter().map(Ended::block_info)).collect()
    }
}
