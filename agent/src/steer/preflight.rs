//! What steering needs of the machine, told in one sentence where it is missing.

use std::path::{Path, PathBuf};

/// Something that the machine lacks, with the fix.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    #[error(
        "the agent lacks {0}: run it as root, or grant the container {0} (securityContext.capabilities)"
    )]
    Capability(&'static str),
    #[error("the kernel is {found}, malla needs {needed} or later: upgrade the node's kernel")]
    Kernel { found: String, needed: &'static str },
    #[error(
        "the kernel has no BTF (/sys/kernel/btf/vmlinux is missing): use a kernel built with \
         CONFIG_DEBUG_INFO_BTF=y"
    )]
    Btf,
    #[error(
        "{0} is not on a bpffs: run `mount -t bpf bpf /sys/fs/bpf`, or set the node's `bpffs` to \
         a folder of one"
    )]
    Bpffs(PathBuf),
    #[error("can't make the folder {path} for pins: {source}")]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Bits of linux/capability.h with their names.
const CAPABILITIES: [(u32, &str); 4] = [
    (39, "CAP_BPF"),
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (21, "CAP_SYS_ADMIN"),
];

/// `sk_lookup` came with 5.9, socket storage for TC with 5.9, BPF ring buffers with 5.8; 5.15 is
/// the oldest with all fixes that the programs rely on, 6.1 the oldest that is tested.
const OLDEST: (u32, u32) = (6, 1);

/// Checks everything that can be checked before anything is loaded.
pub fn check(bpffs: &Path) -> Result<(), Missing> {
    privileges()?;
    kernel(&kernel_release())?;
    btf()?;
    folder(bpffs)
}

/// The kernel's own name for itself, such as `6.18.2`.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Checks that the kernel describes its types, which the programs are adapted to as they load.
pub fn btf() -> Result<(), Missing> {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        Ok(())
    } else {
        Err(Missing::Btf)
    }
}

/// Checks that this process may do what steering takes.
pub fn privileges() -> Result<(), Missing> {
    capabilities(&std::fs::read_to_string("/proc/self/status").unwrap_or_default())
}

fn capabilities(status: &str) -> Result<(), Missing> {
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    for (bit, name) in CAPABILITIES {
        if effective & (1 << bit) == 0 {
            return Err(Missing::Capability(name));
        }
    }
    Ok(())
}

/// Checks that a kernel of this release has all that the programs rely on.
pub fn kernel(release: &str) -> Result<(), Missing> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= OLDEST => Ok(()),
        _ => Err(Missing::Kernel {
            found: release.to_owned(),
            needed: "6.1",
        }),
    }
}

/// Checks that a folder is on a bpffs, or would be if it were made.
pub fn on_bpffs(bpffs: &Path) -> Result<(), Missing> {
    let existing = bpffs
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let on_bpffs = nix::sys::statfs::statfs(existing)
        .is_ok_and(|kind| kind.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC);
    if on_bpffs {
        Ok(())
    } else {
        Err(Missing::Bpffs(bpffs.to_owned()))
    }
}

/// Makes the node's own folder, which nobody but root may open.
fn folder(bpffs: &Path) -> Result<(), Missing> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};

    on_bpffs(bpffs)?;
    let error = |source| Missing::Folder {
        path: bpffs.to_owned(),
        source,
    };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(bpffs)
        .map_err(error)?;
    std::fs::set_permissions(bpffs, std::fs::Permissions::from_mode(0o700)).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_capability_is_named() {
        assert!(capabilities("Name:\tx\nCapEff:\t000001ffffffffff\n").is_ok());
        let without_bpf = format!("CapEff:\t{:016x}", !(1_u64 << 39));
        let error = capabilities(&without_bpf).unwrap_err().to_string();
        assert!(error.contains("CAP_BPF"), "{error}");
    }

    #[test]
    fn an_old_kernel_is_refused_by_its_number() {
        for release in ["6.1.0-28-amd64", "6.18.44-fc-v782", "7.0"] {
            assert!(kernel(release).is_ok(), "{release}");
        }
        for release in ["5.15.0-100-generic", "4.19", "", "x"] {
            assert!(kernel(release).is_err(), "{release}");
        }
    }
}
