//! A named network namespace, and working inside it.
//!
//! Never entered with `ip netns exec`, which remounts /sys and so hides cgroups and bpffs, but by
//! `setns` on a thread or in a child before its exec.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
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
}

impl Netns {
    pub(crate) fn create(name: String) -> Result<Self> {
        let done = Command::new("ip").args(["netns", "add", &name]).output();
        let done = done.context("`ip` can't be run: install iproute2")?;
        ensure!(
            done.status.success(),
            "ip netns add {name}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        let path = Path::new(FOLDER).join(&name);
        let netns = Self { name, path };
        netns.ip("link set lo up")?;
        Ok(netns)
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
        let mut ip = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
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
            bail!("ip in {}: {said}in:\n{lines}", self.name);
        }
        Ok(())
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
        remove_named(&self.path);
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Unmounts and deletes a name under `/run/netns`. One that is gone already is no error.
pub(crate) fn remove_named(path: &Path) {
    // Fails where the name was never mounted or is gone, which is what is wanted.
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}
