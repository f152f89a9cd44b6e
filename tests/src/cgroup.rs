//! cgroup v2 folders: found, made, emptied and removed.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::wait::eventually;

/// Where the cgroup v2 tree is mounted: `/sys/fs/cgroup`, or below it beside v1 controllers.
pub(crate) fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut words = line.split(' ');
            let (_, folder, kind) = (words.next()?, words.next()?, words.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(folder))
        })
        .context("no cgroup v2 is mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// Makes a cgroup, with its parents.
pub(crate) fn create(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cgroup {}", folder.display()))
}

/// Kills every process in a cgroup and below, and waits until none is left.
pub(crate) fn kill_all(folder: &Path) -> Result<()> {
    match fs::write(folder.join("cgroup.kill"), "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        done => done.with_context(|| format!("killing cgroup {}", folder.display()))?,
    }
    let what = format!("cgroup {} to be empty", folder.display());
    eventually(&what, Duration::from_secs(10), || {
        fs::read_to_string(folder.join("cgroup.events"))
            .map_or(true, |events| events.lines().any(|l| l == "populated 0"))
    })
}

/// Kills what is in a cgroup and removes it with all below it.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    kill_all(folder)?;
    remove_tree(folder).with_context(|| format!("removing cgroup {}", folder.display()))
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(folder)
}
