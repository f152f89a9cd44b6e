//! The kernel that tests run on, where they differ by it.

use std::fs;

/// The first kernel that tells what a socket has read, without which nothing is accelerated.
pub const ACCELERATES: (u32, u32) = (6, 3);
/// The first with links for programs of interfaces. They take the place of filters after a while.
pub const LINKS: (u32, u32) = (6, 6);
/// The first whose verifier has room for the programs with their log.
pub const TAKES_LOGS: (u32, u32) = (6, 7);

/// Whether it asks the agent's program before anything is taken from a file: Debian's are built so,
/// unless their machine was started with other security modules.
pub fn asks_programs() -> bool {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    let modules = read("/sys/kernel/security/lsm");
    cfg!(target_arch = "x86_64")
        && read("/proc/version").contains("Debian")
        && modules.trim().split(',').any(|name| name == "bpf")
}

/// The first two numbers of its release.
///
/// # Panics
///
/// Where the kernel doesn't tell them.
pub fn release() -> (u32, u32) {
    let release =
        fs::read_to_string("/proc/sys/kernel/osrelease").expect("every kernel has a release");
    numbers(&release).expect("a release begins with two numbers")
}

/// The first two numbers of a release, as `uname -r` says it.
pub fn numbers(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(['.', '-', '+']).map(str::parse);
    let mut next = || numbers.next().and_then(Result::ok);
    next().zip(next())
}
