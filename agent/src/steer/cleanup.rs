//! Taking away all that agents leave on purpose on a node, when none is to come.
//!
//! Knows no configuration: everything that is to be undone stands on the node's bpffs folder.

use std::{
    collections::HashSet,
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use aya::maps::{HashMap as BpfHashMap, Map, MapData};

use super::{
    attach, cgroup,
    charge::Charge,
    netns::Netns,
    network::Network,
    preflight,
    record::{self, Record},
    withdraw::{self, reopen},
};
use crate::model::WorkloadId;

/// Why a node isn't cleaned up.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    #[error(transparent)]
    Missing(#[from] preflight::Missing),
    #[error(
        "an agent of this node lives (processes {processes:?}): end it first, and wait until it has \
         drained (`kill -TERM`, or `systemctl stop`)"
    )]
    AgentLives { processes: Vec<u32> },
    #[error("can't open this process's own network namespace: {0}")]
    Home(io::Error),
    #[error("can't remove {path}: {source}")]
    Remove { path: PathBuf, source: io::Error },
}

/// Something that was there, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cleaned {
    /// A pod has its plain networking back.
    Pod {
        workload: WorkloadId,
        netns: PathBuf,
    },
    /// A pod's netns isn't to be found: its programs are detached, what else is in it goes with it.
    LostPod {
        workload: WorkloadId,
        netns: PathBuf,
    },
    /// Maps and notes are removed.
    Folder(PathBuf),
    /// An agent's cgroup is removed.
    Cgroup(PathBuf),
    /// What no agent has made stays.
    Stays(PathBuf),
}

impl fmt::Display for Cleaned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { workload, netns } => write!(
                f,
                "removed programs, rules, routes and sysctls of pod {workload} in {}",
                netns.display()
            ),
            Self::LostPod { workload, netns } => write!(
                f,
                "removed the links of pod {workload}, whose network namespace {} is gone",
                netns.display()
            ),
            Self::Folder(path) => write!(f, "removed maps and records in {}", path.display()),
            Self::Cgroup(path) => write!(f, "removed the empty cgroup {}", path.display()),
            Self::Stays(path) => write!(f, "left {}, which no agent has made", path.display()),
        }
    }
}

/// Takes away whatever agents have left in a node's bpffs folder and in what that tells of. Done
/// again, it finds nothing. `cgroups` is the node's, where it is known.
pub async fn cleanup(bpffs: &Path, cgroups: Option<&Path>) -> Result<Vec<Cleaned>, CleanupError> {
    preflight::privileges()?;
    let agents = agents(bpffs, cgroups);
    let processes: Vec<u32> = agents.iter().flat_map(|a| cgroup::processes(a)).collect();
    if !processes.is_empty() {
        return Err(CleanupError::AgentLives { processes });
    }
    let home = Arc::new(Netns::current().map_err(CleanupError::Home)?);
    let mut cleaned = Vec::new();
    for (workload, folder) in record::all(&bpffs.join("links")) {
        cleaned.extend(clean_pod(workload, &folder, &home).await);
    }
    cleaned.extend(remove_folder(bpffs)?);
    for agent in agents {
        if fs::remove_dir(&agent).is_ok() {
            cleaned.push(Cleaned::Cgroup(agent));
        }
    }
    Ok(cleaned)
}

/// Folders on any bpffs in which an agent has left something.
pub fn folders() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = folders_on("bpf")
        .filter(|folder| folder.join("maps").is_dir() && folder.join("links").is_dir())
        .collect();
    found.sort();
    found.dedup();
    found
}

async fn clean_pod(workload: WorkloadId, folder: &Path, home: &Arc<Netns>) -> Option<Cleaned> {
    let record = Record::read(folder);
    let Some(record) = record else {
        attach::detach_links(folder);
        record::remove(folder);
        return None;
    };
    let netns = record.path.clone();
    // Its name may be gone while it lives.
    let found = reopen(&record).or_else(|| Netns::of_a_process(record.netns));
    if let Some(found) = found {
        let network = Network::of(&Arc::new(found), home);
        let restored = withdraw::restore(folder, &record, &network).await;
        return restored.then_some(Cleaned::Pod { workload, netns });
    }
    attach::detach_links(folder);
    record::remove(folder);
    Some(Cleaned::LostPod { workload, netns })
}

/// Removes what agents keep in the node's folder, then the folder and its parents where they are
/// empty, as an agent makes them.
fn remove_folder(bpffs: &Path) -> Result<Vec<Cleaned>, CleanupError> {
    let mut cleaned = Vec::new();
    let Ok(entries) = fs::read_dir(bpffs) else {
        return Ok(cleaned);
    };
    let mut is_ours = false;
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let removed = match name.to_string_lossy().as_ref() {
            "maps" | "links" => fs::remove_dir_all(&path),
            note if Charge::is_note(note) => fs::remove_file(&path),
            _ => {
                cleaned.push(Cleaned::Stays(path));
                continue;
            }
        };
        removed.map_err(|source| CleanupError::Remove { path, source })?;
        is_ours = true;
    }
    if is_ours {
        cleaned.insert(0, Cleaned::Folder(bpffs.to_owned()));
    }
    for folder in bpffs.ancestors() {
        // Fails where something is in it, and where the bpffs ends.
        if fs::remove_dir(folder).is_err() {
            break;
        }
    }
    Ok(cleaned)
}

/// The cgroups of the node's agents: those that its maps and notes name, and those in its folder.
fn agents(bpffs: &Path, cgroups: Option<&Path>) -> Vec<PathBuf> {
    let mut named: HashSet<u64> = Charge::named(bpffs).collect();
    for layout in fs::read_dir(bpffs.join("maps"))
        .into_iter()
        .flatten()
        .flatten()
    {
        named.extend(agents_in(&layout.path().join("AGENTS")));
    }
    let mut found: Vec<PathBuf> = folders_on("cgroup2")
        .filter(|folder| cgroup::is_agents(folder))
        .filter(|folder| {
            let is_named = fs::metadata(folder).is_ok_and(|data| named.contains(&data.ino()));
            is_named || folder.parent() == cgroups
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

/// The ids in a pinned map of agents.
fn agents_in(pin: &Path) -> Vec<u64> {
    let map = MapData::from_pin(pin).map(Map::HashMap);
    let map = map.and_then(BpfHashMap::<_, u64, u32>::try_from);
    map.map(|map| map.keys().flatten().collect())
        .unwrap_or_default()
}

/// All folders on file systems of a kind, wherever they are mounted.
fn folders_on(kind: &str) -> impl Iterator<Item = PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let folder = words.next()?;
        (words.next()? == kind).then(|| PathBuf::from(folder))
    });
    let mut next: Vec<PathBuf> = mounts.collect();
    let mut found = Vec::new();
    while let Some(folder) = next.pop() {
        let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
        next.extend(
            entries
                .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                .map(|entry| entry.path()),
        );
        found.push(folder);
    }
    found.into_iter()
}
