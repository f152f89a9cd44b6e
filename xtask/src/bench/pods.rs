//! What a meshed pod takes of the node's memory.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context, Result};
use malla_testbed::{Crowd, PodSpec, Testbed};

use super::usage;

const PODS: u16 = 100;
/// Those that are enrolled before it is measured.
const FIRST: u16 = 10;

/// How long a node is left alone before its memory is read: programs that were replaced, and what
/// the start has freed, are given back some seconds later.
const REST: Duration = Duration::from_secs(12);

/// KiB of each of a hundred pods, in the agent and in the kernel: what they take beyond being
/// there, which an agent that doesn't know them yet shows. It has served a few before: what it takes
/// to enrol any pod at all, such as the program's pages for that, isn't theirs.
pub(super) fn memory_of_each(malla: &Path) -> Result<f64> {
    let mut crowd = Crowd::new(Testbed::new("bench")?.with_agent_program(malla), 0)?;
    crowd.start()?;
    let node = crowd.node.clone();
    let spec = |n| PodSpec::new(format!("pod-{n}")).account(format!("account-{n}"));
    let first = crowd.bed.pods(&node, (0..FIRST).map(spec))?;
    first.iter().try_for_each(|pod| crowd.wait_steered(pod))?;
    let pods = crowd
        .bed
        .untold(|bed| bed.pods(&node, (FIRST..FIRST + PODS).map(spec)))?;
    let agent = crowd.agent().process().pid();
    thread::sleep(REST);
    let before = used(agent)?;
    crowd.bed.write_mesh()?;
    pods.iter().try_for_each(|pod| crowd.wait_steered(pod))?;
    thread::sleep(REST);
    Ok((used(agent)? - before) / f64::from(PODS) / 1024.0)
}

/// Slab caches of files that were looked at, which fill and empty with whatever else runs.
const FILES: &[&str] = &["buffer_head", "dentry", "radix_tree_node", "extent_status"];

/// The agent's memory and the kernel's, in bytes. Maps and programs of BPF are in what the kernel
/// has allocated by pages, and those by processor; sockets in slabs.
fn used(agent: i32) -> Result<f64> {
    let (memory, slabs) = ("/proc/meminfo", "/proc/slabinfo");
    let memory = fs::read_to_string(memory).context(memory)?;
    let slabs = fs::read_to_string(slabs).context(slabs)?;
    let pages = kib(&memory, "VmallocUsed")? + kib(&memory, "Percpu")?;
    // Memory fits into 52 bits.
    #[expect(clippy::cast_precision_loss)]
    let bytes = (usage::rss(&[agent])? + pages * 1024 + slab_bytes(&slabs)) as f64;
    Ok(bytes)
}

fn kib(meminfo: &str, name: &str) -> Result<u64> {
    let mut lines = meminfo.lines();
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    number.with_context(|| format!("no {name} in /proc/meminfo"))
}

/// What the slabs take that aren't of files: objects times their size.
fn slab_bytes(slabinfo: &str) -> u64 {
    let sizes = slabinfo.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let &[name, _, objects, size, ..] = fields.as_slice() else {
            return None;
        };
        let is_of_files = FILES.contains(&name)
            || name.starts_with("kmalloc-rcl")
            || (name.ends_with("inode_cache") && name != "sock_inode_cache");
        let bytes = objects.parse::<u64>().ok()? * size.parse::<u64>().ok()?;
        (!is_of_files).then_some(bytes)
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slabs_are_counted_but_for_those_of_files() {
        let text = "slabinfo - version: 2.1\n\
                    # name <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>\n\
                    ext4_inode_cache  290000 299376   1176   27    8 : tunables\n\
                    sock_inode_cache     100    200    832   39    8 : tunables\n\
                    TCPv6                 10     12   2368   13    8 : tunables\n";
        assert_eq!(slab_bytes(text), 200 * 832 + 12 * 2368);
    }

    #[test]
    fn memory_is_found_by_its_name() {
        let text = "VmallocTotal:   34359738367 kB\nVmallocUsed:       34864 kB\n";
        assert_eq!(kib(text, "VmallocUsed").unwrap(), 34864);
        assert!(kib(text, "Percpu").is_err());
    }
}
