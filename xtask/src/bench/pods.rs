//! What a meshed pod takes of the node's memory.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use malla_testbed::{Crowd, PodSpec, Testbed};

use super::usage;

const PODS: u16 = 100;

/// How long a node is left alone before its memory is read: programs that were replaced, and what
/// the start has freed, are given back some seconds later.
const REST: Duration = Duration::from_secs(12);

/// KiB of each of a hundred pods, in the agent and in the kernel: what they take beyond being
/// there, which an agent that doesn't know them yet shows.
pub(super) fn memory_of_each(malla: &Path) -> Result<f64> {
    let mut crowd = Crowd::new(Testbed::new("bench")?.with_agent_program(malla), 0)?;
    crowd.start()?;
    let node = crowd.node.clone();
    let spec = |n| PodSpec::new(format!("pod-{n}")).account(format!("account-{n}"));
    let pods = crowd
        .bed
        .untold(|bed| bed.pods(&node, (0..PODS).map(spec)))?;
    let agent = crowd.agent().process().pid();
    thread::sleep(REST);
    let before = used(agent)?;
    crowd.bed.write_mesh()?;
    pods.iter().try_for_each(|pod| crowd.wait_steered(pod))?;
    thread::sleep(REST);
    Ok((used(agent)? - before) / f64::from(PODS) / 1024.0)
}

/// The agent's memory and the kernel's, in bytes. Maps and programs of BPF are in what the kernel
/// has allocated by pages, and those by processor.
fn used(agent: i32) -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib = |name: &str| {
        let mut lines = text.lines();
        let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number =
            line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok());
        number.with_context(|| format!("no {name} in /proc/meminfo"))
    };
    let kernel = kib("Slab")? + kib("VmallocUsed")? + kib("Percpu")?;
    // Memory fits into 52 bits.
    #[expect(clippy::cast_precision_loss)]
    let agent = usage::rss(&[agent])? as f64;
    Ok(agent + kernel * 1024.0)
}
