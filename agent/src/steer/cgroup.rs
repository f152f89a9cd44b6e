//! The agent's own cgroup, by which the eBPF programs know its packets.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// What the names of agents' cgroups begin with.
const PREFIX: &str = "malla-agent-";

/// Why the agent can't have a cgroup of its own.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error(
        "{path} is not on a cgroup v2 file system: mount cgroup2, and set the node's `cgroup` to a \
         folder of it"
    )]
    NotCgroup2 { path: PathBuf },
    #[error(
        "{path} is the root of the cgroup hierarchy, which every process may be in: set the \
         node's `cgroup` to a folder below it"
    )]
    Root { path: PathBuf },
    #[error("can't {what} {path}: {source}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// Id of a cgroup v2: its inode (kernel 5.5 and later).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupId(pub u64);

/// The cgroup that this process has moved into.
#[derive(Debug)]
pub struct OwnCgroup {
    pub id: CgroupId,
    pub path: PathBuf,
    /// Its place in the hierarchy, as the kernel tells it.
    place: String,
}

impl OwnCgroup {
    /// Where this process is now, if somebody has moved it away: the sockets that it makes there
    /// are taken for an app's.
    pub fn left_for(&self) -> Option<String> {
        let place = place().unwrap_or_default();
        (place != self.place).then_some(place)
    }
}

/// A cgroup that no other agent has: in containers, all of them have the same process id.
fn make_child(parent: &Path) -> Result<PathBuf, CgroupError> {
    for number in 0_u32.. {
        let name = format!("{PREFIX}{}-{number}", std::process::id());
        let child = parent.join(name);
        match fs::create_dir(&child) {
            Ok(()) => return Ok(child),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(source) => {
                return Err(CgroupError::Io {
                    what: "make the agent's cgroup",
                    path: child,
                    source,
                });
            }
        }
    }
    unreachable!("there are fewer processes than numbers")
}

/// This process's place in the hierarchy of cgroups v2.
fn place() -> io::Result<String> {
    let table = fs::read_to_string("/proc/self/cgroup")?;
    let place = table.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(place.unwrap_or_default().to_owned())
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Io { what, path, source }
}

/// Checks that an agent can have a child of this folder.
pub fn check(parent: &Path) -> Result<(), CgroupError> {
    let kind = nix::sys::statfs::statfs(parent)
        .map_err(|errno| io("open the node's cgroup", parent)(errno.into()))?;
    if kind.filesystem_type() != nix::sys::statfs::CGROUP2_SUPER_MAGIC {
        return Err(CgroupError::NotCgroup2 {
            path: parent.to_owned(),
        });
    }
    // Only the root of the hierarchy has no cgroup.type.
    if !parent.join("cgroup.type").exists() {
        return Err(CgroupError::Root {
            path: parent.to_owned(),
        });
    }
    Ok(())
}

/// The cgroup that all others of this hierarchy are below.
pub fn root_above(cgroup: &Path) -> PathBuf {
    let is_cgroup = |path: &&Path| {
        let kind = nix::sys::statfs::statfs(*path);
        kind.is_ok_and(|kind| kind.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
    };
    let above = cgroup.ancestors().take_while(is_cgroup);
    above.last().unwrap_or(cgroup).to_owned()
}

/// Moves this process into a new child of `parent`, before it makes any socket: a socket keeps
/// the cgroup that it was made in.
pub fn enter_child_of(parent: &Path) -> Result<OwnCgroup, CgroupError> {
    check(parent)?;
    remove_empty_children(parent);
    let child = make_child(parent)?;
    let procs = child.join("cgroup.procs");
    fs::write(&procs, "0").map_err(io("move the agent into", &procs))?;
    let inode = fs::metadata(&child).map_err(io("read", &child))?.ino();
    let place = place().map_err(io("read", Path::new("/proc/self/cgroup")))?;
    Ok(OwnCgroup {
        id: CgroupId(inode),
        path: child,
        place,
    })
}

/// Cgroups of agents that are gone. One that lives isn't empty, and stays.
fn remove_empty_children(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for entry in entries.flatten() {
        if is_agents(&entry.path()) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Ids of the cgroups of all agents of the node, this one's included.
pub fn living_agents(parent: &Path) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| is_agents(&entry.path()))
        .filter(|entry| has_processes(&entry.path()))
        .filter_map(|entry| entry.metadata().ok())
        .map(|metadata| metadata.ino())
        .collect()
}

/// Whether a cgroup is one that an agent has made for itself, by its name.
pub fn is_agents(cgroup: &Path) -> bool {
    let name = cgroup.file_name().unwrap_or_default();
    name.to_string_lossy().starts_with(PREFIX)
}

/// The processes in a cgroup.
pub fn processes(cgroup: &Path) -> Vec<u32> {
    let list = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    list.lines().filter_map(|line| line.parse().ok()).collect()
}

fn has_processes(cgroup: &Path) -> bool {
    let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
    events.lines().any(|line| line == "populated 1")
}
