//! Orders on the control socket, with what they may have meant if no answer came: the daemon may die in the middle.

use anyhow::{Context, Result};
use blkmark_backup::qmp::{ClientError, QmpError};
use serde_json::Value;

use super::bounds::Bounds;
use super::world::Torture;

/// What came of an order.
#[derive(Debug)]
pub enum Answer {
    /// It was done.
    Done(Value),
    /// It was refused, and nothing was done.
    Refused(QmpError),
    /// The daemon died: it was done, or it was not.
    Lost,
}

impl Torture {
    /// Gives an order.
    pub fn order(&mut self, command: &str, arguments: Value) -> Result<Answer> {
        Ok(self.order_at_an_instant(command, arguments, &[])?.0)
    }

    /// An order that has to be done, unless the daemon dies: whether it was.
    pub fn must(&mut self, command: &str, arguments: Value) -> Result<Option<Value>> {
        match self.order(command, arguments.clone())? {
            Answer::Done(value) => Ok(Some(value)),
            Answer::Refused(error) => anyhow::bail!("{command} {arguments} was refused: {}", error.desc),
            Answer::Lost => Ok(None),
        }
    }

    /// Gives an order that falls on an instant of these disks; what they may have held then.
    pub fn order_at_an_instant(
        &mut self,
        command: &str,
        arguments: Value,
        disks: &[usize],
    ) -> Result<(Answer, Vec<(usize, Bounds)>)> {
        self.catch_up()?;
        let begin = |disk: &usize| (*disk, Bounds::begin(*disk as u8, &self.served[*disk].model));
        let mut bounds: Vec<_> = disks.iter().map(begin).collect();
        let text = arguments.to_string();
        let answer = match self.qmp.as_mut() {
            None => Answer::Lost,
            Some(qmp) => match qmp.client().execute(command, arguments) {
                Ok(value) => Answer::Done(value),
                Err(ClientError::Refused(error)) => Answer::Refused(error),
                Err(ClientError::Closed | ClientError::Io(_)) => Answer::Lost,
                Err(error) => return Err(error).with_context(|| format!("{command} {text}")),
            },
        };
        match &answer {
            Answer::Done(_) if command.starts_with("query") || command.starts_with("x-debug") => {}
            Answer::Done(_) => self.log.say(format_args!("{command} {text}")),
            Answer::Refused(error) => self.log.say(format_args!("{command} {text} was refused: {}", error.desc)),
            Answer::Lost => {
                self.log.say(format_args!("{command} {text} got no answer"));
                // Only once it is dead is it certain that nothing comes of the order any more.
                self.qmp = None;
                if let Some(daemon) = self.daemon.as_mut() {
                    daemon.wait(crate::process::GIVE_UP).context("the daemon hung up and did not end")?;
                }
            }
        }
        self.take(&mut bounds)?;
        Ok((answer, bounds))
    }
}
