//! Descriptors: an agent's, compared with the sockets that the kernel knows, and this process's own
//! limit.

use std::{collections::HashSet, fs};

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{agent::Agent, netns::Netns};

impl Agent {
    /// How many descriptors it has open, without the links of its programs: they take the places of
    /// filters, which have no descriptor, in its own time after the start.
    pub fn open_descriptors(&self) -> Result<usize> {
        let folder = format!("/proc/{}/fd", self.process().pid());
        let mut open = 0;
        for entry in fs::read_dir(&folder).context(folder)? {
            // What was closed meanwhile counts as before: whoever asks then asks again.
            let target = fs::read_link(entry?.path()).unwrap_or_default();
            open += usize::from(target.as_os_str() != "anon_inode:bpf_link");
        }
        Ok(open)
    }

    /// How many of its sockets are none of the TCP sockets that the kernel lists in `netnses`:
    /// sockets of other kinds, and what it holds of connections that are dead.
    pub fn sockets_outside<'a>(
        &self,
        netnses: impl IntoIterator<Item = &'a Netns>,
    ) -> Result<usize> {
        let mut held = HashSet::new();
        for entry in fs::read_dir(format!("/proc/{}/fd", self.process().pid()))? {
            // It may have been closed meanwhile.
            let target = fs::read_link(entry?.path()).unwrap_or_default();
            let target = target.to_string_lossy();
            let inode = target.strip_prefix("socket:[");
            held.extend(inode.and_then(|rest| rest.strip_suffix(']')?.parse::<u64>().ok()));
        }
        for netns in netnses {
            let tables = netns.enter(|| {
                let read = |table| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
                ["tcp", "tcp6"].map(|table| read(table).unwrap_or_default())
            });
            for line in tables.iter().flat_map(|table| table.lines()) {
                let inode = line.split_ascii_whitespace().nth(9);
                if let Some(inode) = inode.and_then(|word| word.parse().ok()) {
                    held.remove(&inode);
                }
            }
        }
        Ok(held.len())
    }
}

/// Lets this process have as many descriptors as it may: those of both ends of many connections.
pub fn allow_many_descriptors() -> Result<()> {
    allow_descriptors(0).map(drop)
}

/// Lets this process, and what it starts, have `wanted` descriptors where it may raise its hard limit that
/// far, and as many as it may where not. How many that is.
pub fn allow_descriptors(wanted: u64) -> Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = hard.max(wanted);
    // That needs CAP_SYS_RESOURCE, which root may lack in a container.
    if setrlimit(Resource::RLIMIT_NOFILE, raised, raised).is_ok() {
        return Ok(raised);
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}
