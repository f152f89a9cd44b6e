//! An agent that a bed has started.

use std::{process::ExitStatus, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    metrics::Metrics,
    node::Node,
    process::{Command, Process},
    wait::until,
};

/// How long an agent may take until it is ready.
/// By emulation the kernel takes 20 s alone to verify the programs of two agents.
const START_LIMIT: Duration = Duration::from_secs(90);

/// How many lines of an agent's log an error shows.
const LOG_LINES: usize = 40;

/// One agent process. Dropping it kills it.
#[derive(Debug)]
pub struct Agent {
    node: Arc<Node>,
    process: Process,
}

impl Agent {
    pub(crate) fn start(node: &Arc<Node>, command: Command) -> Result<Self> {
        let process = command.spawn()?;
        Ok(Self {
            node: Arc::clone(node),
            process,
        })
    }

    /// Waits until the agent says that it is ready. The error shows its log.
    pub fn wait_ready(&self) -> Result<()> {
        let what = format!("the agent of node {} to be ready", self.node.name());
        let ready = until(&what, START_LIMIT, || {
            let ready = self.node.get("/ready").is_ok_and(|r| r.status == 200);
            let ended = !self.process.is_running();
            (ready || ended).then_some(!ended)
        });
        match ready {
            Ok(true) => Ok(()),
            Ok(false) => bail!(
                "the agent of node {} ended at start:\n{}",
                self.node.name(),
                self.log_tail()
            ),
            Err(error) => Err(error.context(self.log_tail())),
        }
    }

    /// Waits until the agent is in charge of its node's pods. The error shows its log.
    pub(crate) fn wait_in_charge(&self) -> Result<()> {
        let what = format!("the agent of node {} to be in charge", self.node.name());
        let waited = until(&what, START_LIMIT, || {
            let in_charge = self.log().contains("in charge of the node's pods");
            let ended = !self.process.is_running();
            (in_charge || ended).then_some(!ended)
        });
        match waited {
            Ok(true) => Ok(()),
            Ok(false) => bail!("it ended at start:\n{}", self.log_tail()),
            Err(error) => Err(error.context(self.log_tail())),
        }
    }

    /// Waits until it has ended by itself.
    pub fn wait_ended(&self, limit: Duration) -> Result<ExitStatus> {
        let ended = self.process.wait(limit);
        ended.with_context(|| self.log_tail())
    }

    pub fn metrics(&self) -> Result<Metrics> {
        let response = self.node.get("/metrics")?;
        ensure!(
            response.status == 200,
            "/metrics answered {}",
            response.status
        );
        Ok(Metrics::parse(&response.body))
    }

    /// What it has logged so far, but perhaps for lines of the last moment: a thread of its own writes
    /// them. A test waits for those that it expects.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The last lines of the log, headed by whose it is.
    pub(crate) fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
        format!("log of agent {}:\n{}", self.node.name(), tail.join("\n"))
    }

    pub fn process(&self) -> &Process {
        &self.process
    }

    pub fn is_running(&self) -> bool {
        self.process.is_running()
    }

    /// Kills it without notice.
    pub fn kill9(&self) {
        self.process.kill9();
    }

    /// Asks it to end (SIGTERM) and waits for that, at most 30 s.
    pub fn stop(&self) -> Result<ExitStatus> {
        let stopped = self.process.stop(START_LIMIT);
        stopped.with_context(|| self.log_tail())
    }
}
