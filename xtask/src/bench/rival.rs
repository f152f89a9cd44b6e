//! A proxy that malla is compared with: started on a node, and waited for.

use std::ffi::OsStr;

use anyhow::{Context, Result};
use malla_testbed::{Node, Process, until};

use super::scene::{Pins, START_LIMIT};

/// Starts it where proxies run, and waits until it answers at `health`, which is on the node.
pub(super) fn start(
    node: &Node,
    arguments: &[&OsStr],
    health: &str,
    pins: Pins,
) -> Result<Process> {
    let process = node.command(arguments).on_cpu(pins.proxies).spawn()?;
    until(&format!("an answer at {health}"), START_LIMIT, || {
        let ready = node.run(["curl", "--silent", "--fail", health]).is_ok();
        (ready || !process.is_running()).then_some(ready)
    })
    .and_then(|ready| ready.then_some(()).context("it ended at its start"))
    .with_context(|| process.log())?;
    Ok(process)
}
