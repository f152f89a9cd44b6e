//! Who owns which bed, and what dead owners left behind.
//!
//! A bed's owner holds a lock on the file `owner` in the bed's folder. The kernel gives the lock
//! back when the owner dies, however it dies, so whatever bears the name of a bed whose lock is
//! free is a leftover.

use std::{
    fmt,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};

use crate::{cgroup, netns, wait::eventually};

/// What every bed's name begins with.
pub const PREFIX: &str = "malla-bed-";

/// The environment variable that names the bed of each process that a bed starts.
pub(crate) const MARK: &str = "MALLA_BED";

/// Folders of beds, and the lock that orders making and removing them.
const FOLDER: &str = "/run/malla-testbed";

/// Where a bpffs is looked for, and mounted when there is none.
const BPFFS: &str = "/sys/fs/bpf";

/// A bed's name, and the claim to it.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(crate) bed: String,
    pub(crate) folder: PathBuf,
    pub(crate) cgroup: PathBuf,
    pub(crate) bpffs: PathBuf,
    _owner: Flock<File>,
}

impl Claim {
    /// Removes what dead owners left, and claims a new name that contains `name`.
    pub(crate) fn new(name: &str) -> Result<Self> {
        static SEQUENCE: AtomicU32 = AtomicU32::new(1);
        ensure!(
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'),
            "`{name}` can't name a bed: letters, digits and `-` only"
        );
        let _order = lock_folder()?;
        mount_bpffs()?;
        remove_dead(&living_beds()?)?;
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        let bed = format!("{PREFIX}{name}-{}-{sequence}", process::id());
        let folder = Path::new(FOLDER).join(&bed);
        fs::create_dir(&folder).with_context(|| format!("folder {}", folder.display()))?;
        let owner = File::create(folder.join("owner"))?;
        let owner = Flock::lock(owner, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, errno)| errno)
            .context("locking a new bed")?;
        let cgroup = cgroup::mount_point()?.join(&bed);
        let bpffs = Path::new(BPFFS).join(&bed);
        Ok(Self {
            bed,
            folder,
            cgroup,
            bpffs,
            _owner: owner,
        })
    }
}

impl Drop for Claim {
    /// Removes all that bears the bed's name: the rest of the bed may have failed half-way.
    fn drop(&mut self) {
        let Ok(_order) = lock_folder() else { return };
        for leftover in all().into_iter().filter(|left| left.belongs_to(&self.bed)) {
            if let Err(error) = leftover.remove() {
                eprintln!("{leftover} is left: {error:#}");
            }
        }
    }
}

/// One thing that bears malla's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Leftover {
    Process { pid: i32, bed: String },
    Pin(PathBuf),
    Netns(PathBuf),
    Cgroup(PathBuf),
    Interface(String),
    Folder(PathBuf),
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, bed } => write!(f, "process {pid} of {bed}"),
            Self::Pin(path) => write!(f, "pins {}", path.display()),
            Self::Netns(path) => write!(f, "network namespace {}", path.display()),
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Interface(name) => write!(f, "interface {name}"),
            Self::Folder(path) => write!(f, "folder {}", path.display()),
        }
    }
}

impl Leftover {
    fn name(&self) -> &str {
        match self {
            Self::Process { bed, .. } => bed,
            Self::Interface(name) => name,
            Self::Pin(path) | Self::Netns(path) | Self::Cgroup(path) | Self::Folder(path) => path
                .file_name()
                .and_then(|name| name.to_str())
                .unwrap_or_default(),
        }
    }

    fn belongs_to(&self, bed: &str) -> bool {
        let rest = self.name().strip_prefix(bed);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    }

    fn remove(&self) -> Result<()> {
        match self {
            Self::Process { pid, .. } => {
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
                let what = format!("{self} to end");
                eventually(&what, Duration::from_secs(5), || has_ended(*pid))
            }
            Self::Pin(path) | Self::Folder(path) => match fs::remove_dir_all(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                done => done.with_context(|| path.display().to_string()),
            },
            Self::Netns(path) => {
                netns::remove_named(path);
                Ok(())
            }
            Self::Cgroup(path) => cgroup::remove(path),
            Self::Interface(_) => Ok(()),
        }
    }
}

/// All that bears malla's name and belongs to no living bed. A BPF link lives by a pin or by a
/// process, and both are in it.
pub fn list() -> Result<Vec<Leftover>> {
    let _order = lock_folder()?;
    let living = living_beds()?;
    let mut found = all();
    found.retain(|left| !living.iter().any(|bed| left.belongs_to(bed)));
    Ok(found)
}

/// Removes what beds of dead owners left behind, and says what it was.
pub fn remove() -> Result<Vec<Leftover>> {
    let _order = lock_folder()?;
    remove_dead(&living_beds()?)
}

fn remove_dead(living: &[String]) -> Result<Vec<Leftover>> {
    let mut dead = all();
    dead.retain(|left| {
        left.name().starts_with(PREFIX) && !living.iter().any(|bed| left.belongs_to(bed))
    });
    for leftover in &dead {
        leftover.remove()?;
    }
    Ok(dead)
}

/// What bears malla's name, in the order in which it can be removed.
fn all() -> Vec<Leftover> {
    let mut found = processes();
    let named = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let named = entries.filter(|e| e.file_name().to_string_lossy().starts_with("malla"));
        named.map(|entry| entry.path()).collect()
    };
    if let Ok(cgroups) = cgroup::mount_point() {
        found.extend(named(&cgroups).into_iter().map(Leftover::Cgroup));
    }
    found.extend(named(Path::new(BPFFS)).into_iter().map(Leftover::Pin));
    let namespaces = named(Path::new(netns::FOLDER)).into_iter();
    found.extend(namespaces.map(Leftover::Netns));
    let interfaces = named(Path::new("/sys/class/net")).into_iter();
    found.extend(interfaces.filter_map(|path| {
        let name = path.file_name()?.to_str()?.to_owned();
        Some(Leftover::Interface(name))
    }));
    // The folder goes last: its lock is what the rest belongs to.
    found.extend(named(Path::new(FOLDER)).into_iter().map(Leftover::Folder));
    found
}

/// Processes that a bed started, found by their environment wherever they have moved to.
fn processes() -> Vec<Leftover> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
        let bed = environment
            .split(|byte| *byte == 0)
            .find_map(|variable| variable.strip_prefix(MARK.as_bytes())?.strip_prefix(b"="))?;
        let bed = String::from_utf8_lossy(bed).into_owned();
        Some(Leftover::Process { pid, bed })
    })
    .collect()
}

fn has_ended(pid: i32) -> bool {
    // The third field of stat is the state; the name before it may contain anything but `)`.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| {
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with(['Z', 'X']))
    })
}

fn living_beds() -> Result<Vec<String>> {
    let mut living = Vec::new();
    for entry in fs::read_dir(FOLDER)?.flatten() {
        let Ok(owner) = File::open(entry.path().join("owner")) else {
            continue;
        };
        if let Err((_, Errno::EWOULDBLOCK)) = Flock::lock(owner, FlockArg::LockExclusiveNonblock) {
            living.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(living)
}

fn lock_folder() -> Result<Flock<File>> {
    ensure!(
        geteuid().is_root(),
        "network namespaces, cgroups and eBPF need root: run this as root"
    );
    fs::create_dir_all(FOLDER).with_context(|| format!("folder {FOLDER}"))?;
    let path = Path::new(FOLDER).join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("locking {}", path.display()))
}

fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
    let line = format!(" {BPFFS} bpf ");
    if mounts.lines().any(|mount| mount.contains(&line)) {
        return Ok(());
    }
    let none: Option<&str> = None;
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none)
        .with_context(|| format!("mounting a bpffs at {BPFFS}"))
}
