//! Debian packages that the tasks need.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// What tests, demo and bench run in their pods, and what they need around them.
pub(crate) const FOR_TESTS: &[&str] = &[
    "bpftool",
    "curl",
    "haproxy",
    "iperf3",
    "iproute2",
    "iputils-ping",
    "mariadb-client-core",
    "mariadb-server-core",
    "nftables",
    "nginx",
    "openssh-client",
    "openssh-server",
    "openssl",
    "postgresql",
    "python3-aiosmtpd",
    "python3-cryptography",
    "python3-h2",
    "python3-jsonschema",
    "python3-yaml",
    "redis-server",
    "redis-tools",
    "tcpdump",
    "wrk",
];

/// The VM, and what its initramfs and its kernel's modules take.
pub(crate) const FOR_VM: &[&str] = &[
    "busybox-static",
    "cpio",
    "iproute2",
    "kmod",
    "qemu-system-x86",
    "xz-utils",
];

/// What the bench runs, and what it needs around that.
pub(crate) const FOR_BENCH: &[&str] = &[
    "curl",
    "haproxy",
    "iperf3",
    "iproute2",
    "nghttp2-client",
    "nginx",
    "openssl",
    "wrk",
];

/// Installs those of `packages` that are missing, and says so with the reason.
pub(crate) fn ensure(packages: &[&str], why: &str) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| !is_installed(package))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names = missing.join(" ");
    if shell::find("apt-get").is_none() {
        bail!("{why} needs what Debian's packages {names} have, and there is no apt-get here");
    }
    println!("Installing {names}: {why} needs them.");
    if !all_known(&missing) {
        apt_get(&["update"])?;
    }
    let mut arguments = vec!["install", "--no-install-recommends"];
    arguments.extend(missing);
    apt_get(&arguments).with_context(|| format!("installing {names} (as root?)"))
}

/// The version of an installed package.
pub(crate) fn version(package: &str) -> Option<String> {
    shell::ask("dpkg-query", &["-W", "-f=${Version}", package])
}

fn is_installed(package: &str) -> bool {
    let status = shell::ask("dpkg-query", &["-W", "-f=${db:Status-Status}", package]);
    status.as_deref() == Some("installed")
}

/// Whether apt has a version of each package in its lists, which on a fresh machine are empty.
fn all_known(packages: &[&str]) -> bool {
    packages.iter().all(|package| {
        let known = shell::ask("apt-cache", &["show", "--no-all-versions", package]);
        known.is_some_and(|text| !text.is_empty())
    })
}

fn apt_get(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    shell::run(command.args(["-y", "-qq"]).args(arguments))
}
