//! A named network namespace, and working inside it.
//!
//! Never entered with `ip netns exec`, which remounts /sys and so hides cgroups and bpffs, but by
//! `setns` on a thread or in a child before its exec.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
};

use crate::wait::eventually;

/// Where named network namespaces stand.
pub(crate) const FOLDER: &str = "/run/netns";

/// A network namespace under `/run/netns`, removed when dropped.
///
/// No descriptor of it is kept, so that it ends when its last process does.
#[derive(Debug)]
pub struct Netns {
    name: String,
    path: PathBuf,
    /// Whether the name was taken away, and may be another namespace's by now.
    removed: AtomicBool,
}

impl Netns {
    /// Makes one with its loopback up.
    pub(crate) fn create(name: &str) -> Result<Self> {
        let netns = Self::create_all(&[name])?.remove(0);
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Makes many, each with its loopback down.
    pub(crate) fn create_all(names: &[impl AsRef<str>]) -> Result<Vec<Self>> {
        let names = names.iter().map(AsRef::as_ref);
        let lines: Vec<String> = names
            .clone()
            .map(|name| format!("netns add {name}\n"))
            .collect();
        ip(&[], &lines.concat())?;
        let netns = |name: &str| Self {
            name: name.to_owned(),
            path: Path::new(FOLDER).join(name),
            removed: AtomicBool::new(false),
        };
        Ok(names.map(netns).collect())
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a thread that is in this namespace: sockets that it makes stay there.
    ///
    /// The thread stays in the cgroup of this process. Panics when the namespace is gone.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let netns = File::open(&self.path)
                    .unwrap_or_else(|error| panic!("{}: {error}", self.path.display()));
                setns(&netns, CloneFlags::CLONE_NEWNET)
                    .unwrap_or_else(|error| panic!("setns {}: {error}", self.path.display()));
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs lines of `ip -batch` in this namespace. The first that fails ends it with an error.
    pub fn ip(&self, lines: &str) -> Result<()> {
        ip(&["-n", &self.name], lines)
    }

    /// Sets sysctls of this namespace, named as paths under `/proc/sys/net`.
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.enter(|| {
            for (key, value) in settings {
                fs::write(Path::new("/proc/sys/net").join(key), value)
                    .with_context(|| format!("setting net/{key} to {value}"))?;
            }
            Ok(())
        })
    }

    /// Waits until no IPv6 address is tentative: the kernel settles them in the background, even
    /// where it doesn't look for duplicates.
    pub(crate) fn wait_addresses_settled(&self) -> Result<()> {
        const TENTATIVE: u32 = 0x40;
        let what = format!("the addresses of {} to settle", self.name);
        eventually(&what, Duration::from_secs(5), || {
            self.enter(|| {
                let table = fs::read_to_string("/proc/thread-self/net/if_inet6");
                // Address, interface, prefix, scope, flags and name.
                table.unwrap_or_default().lines().all(|line| {
                    let flags = line.split_ascii_whitespace().nth(4).unwrap_or_default();
                    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & TENTATIVE == 0)
                })
            })
        })
    }

    /// Takes the name away. The namespace itself lives on for as long as something is in it.
    pub(crate) fn remove(&self) {
        if !self.removed.swap(true, Ordering::Relaxed) {
            remove_named(&self.path);
        }
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Runs lines of `ip -batch`.
fn ip(arguments: &[&str], lines: &str) -> Result<()> {
    let mut ip = Command::new("ip")
        .args(arguments)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("`ip` can't be run: install iproute2")?;
    if let Some(mut stdin) = ip.stdin.take() {
        stdin.write_all(lines.as_bytes()).context("writing to ip")?;
    }
    let done = ip.wait_with_output()?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("ip {}: {said}in:\n{lines}", arguments.join(" "));
    }
    Ok(())
}

/// Unmounts and deletes a name under `/run/netns`. One that is gone already is no error.
pub(crate) fn remove_named(path: &Path) {
    // Fails where the name was never mounted or is gone, which is what is wanted.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}
