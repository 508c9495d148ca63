//! Waiting for jobs: by their events, and with a progress bar if somebody looks.
//!
//! The connection that starts a job also hears its events, in order with the replies. So a job that is listed no more
//! and was not heard to end had ended before this connection was made.

use std::collections::BTreeMap;
use std::time::Duration;

use blkmark_backup::qmp::{Client, Event};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::failure::Failure;
use super::output::{Output, printable};
use super::query;

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    Completed,
    Failed(String),
    Cancelled,
}

#[derive(Default)]
struct Watched {
    end: Option<End>,
    aborting: bool,
    bar: Option<ProgressBar>,
}

/// Jobs that are waited for.
pub(super) struct Wait {
    jobs: BTreeMap<String, Watched>,
}

impl Wait {
    /// Jobs by their ids.
    pub(super) fn new(ids: impl IntoIterator<Item = String>) -> Wait {
        Wait { jobs: ids.into_iter().map(|id| (id, Watched::default())).collect() }
    }

    /// Waits until all have ended, and tells how: the failure is that of the job that made the others fail.
    pub(super) fn run(mut self, client: &mut Client, output: &Output) -> Result<(), Failure> {
        let bars = output.shows_progress().then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        // Events tell the end; asking in between moves the bar, and notices a job whose end nobody told.
        let pause = Duration::from_millis(if bars.is_some() { 200 } else { 2000 });
        while self.is_waiting() {
            self.look(client, bars.as_ref())?;
            while self.is_waiting() && client.wait_event(pause, |event| self.hear(event))?.is_some() {}
        }
        for job in self.jobs.values() {
            match (&job.bar, &job.end) {
                (Some(bar), Some(End::Completed)) => bar.finish(),
                // It stays where the job got to.
                (Some(bar), _) => bar.abandon(),
                (None, _) => {}
            }
        }
        self.report(output)
    }

    fn is_waiting(&self) -> bool {
        self.jobs.values().any(|job| job.end.is_none())
    }

    fn report(self, output: &Output) -> Result<(), Failure> {
        let mut failure: Option<(bool, Failure)> = None;
        let mut ends = Vec::new();
        for (job, watched) in self.jobs {
            let (is_cause, outcome) = match watched.end {
                Some(End::Completed) | None => {
                    ends.push(json!({ "job": job, "result": "completed" }));
                    continue;
                }
                Some(End::Failed(error)) => (true, format!("failed: {error}")),
                Some(End::Cancelled) => (false, "was cancelled".to_owned()),
            };
            if failure.as_ref().is_none_or(|(was_cause, _)| is_cause && !was_cause) {
                failure = Some((is_cause, Failure::Job { job, outcome }));
            }
        }
        match failure {
            Some((_, failure)) => Err(failure),
            None => {
                output.done(&json!({ "return": ends }));
                Ok(())
            }
        }
    }

    /// Takes an event in. True: it ended one of the jobs.
    fn hear(&mut self, event: &Event) -> bool {
        let data = &event.data;
        let id = data["device"].as_str().or_else(|| data["id"].as_str()).unwrap_or_default();
        let Some(job) = self.jobs.get_mut(id).filter(|job| job.end.is_none()) else { return false };
        let end = match (event.name.as_str(), data["status"].as_str()) {
            ("BLOCK_JOB_COMPLETED", _) => ended(&data["error"]),
            ("BLOCK_JOB_CANCELLED", _) => End::Cancelled,
            ("JOB_STATUS_CHANGE", Some("aborting")) => {
                job.aborting = true;
                return false;
            }
            // Only jobs that are no block jobs get here without one of the events above.
            ("JOB_STATUS_CHANGE", Some("null")) if job.aborting => End::Failed("it was aborted".into()),
            ("JOB_STATUS_CHANGE", Some("null")) => End::Completed,
            _ => return false,
        };
        job.end = Some(end);
        true
    }

    /// Asks how far the jobs are.
    fn look(&mut self, client: &mut Client, bars: Option<&MultiProgress>) -> Result<(), Failure> {
        let listed = client.execute("query-jobs", Value::Null)?;
        // Whatever had happened when this was answered has arrived by now, and only has to be taken in.
        while client.wait_event(Duration::ZERO, |event| self.hear(event))?.is_some() {}
        for (id, job) in self.jobs.iter_mut().filter(|(_, job)| job.end.is_none()) {
            let Some(found) = listed.as_array().and_then(|jobs| jobs.iter().find(|found| found["id"] == **id)) else {
                return Err(Failure::Failed(format!("Job '{id}' not found")));
            };
            let status = found["status"].as_str().unwrap_or_default();
            if status == "concluded" {
                job.end = Some(ended(&found["error"]));
            }
            if let Some(bars) = bars {
                let bar = job.bar.get_or_insert_with(|| bars.add(new_bar(id)));
                let (done, total) = query::progress(found);
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(if status == "running" { String::new() } else { printable(status) });
            }
        }
        Ok(())
    }
}

fn ended(error: &Value) -> End {
    error.as_str().map_or(End::Completed, |error| End::Failed(error.to_owned()))
}

fn new_bar(id: &str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_prefix(printable(id));
    let template =
        "{prefix} [{bar:30}] {percent:>3} % {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {msg}";
    // The template is fixed; were it wrong, the plain bar would do.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value) -> Event {
        Event { name: name.into(), data }
    }

    #[test]
    fn the_first_end_counts_and_other_jobs_are_not_heard() {
        let mut wait = Wait::new(["a".to_owned()]);
        assert!(!wait.hear(&event("BLOCK_JOB_COMPLETED", json!({ "device": "b" }))));
        assert!(!wait.hear(&event("JOB_STATUS_CHANGE", json!({ "id": "a", "status": "aborting" }))));
        assert!(wait.hear(&event("BLOCK_JOB_COMPLETED", json!({ "device": "a", "error": "No space" }))));
        assert!(!wait.hear(&event("JOB_STATUS_CHANGE", json!({ "id": "a", "status": "null" }))));
        assert_eq!(wait.jobs["a"].end, Some(End::Failed("No space".into())));
    }

    #[test]
    fn of_a_failed_group_the_job_that_failed_is_named() {
        let mut wait = Wait::new(["a".to_owned(), "b".to_owned(), "c".to_owned()]);
        wait.hear(&event("BLOCK_JOB_CANCELLED", json!({ "device": "a" })));
        wait.hear(&event("BLOCK_JOB_COMPLETED", json!({ "device": "b", "error": "No space" })));
        wait.hear(&event("BLOCK_JOB_CANCELLED", json!({ "device": "c" })));
        let failure = wait.report(&Output::new(false)).unwrap_err();
        assert_eq!(failure.to_string(), "job 'b' failed: No space");
    }
}
