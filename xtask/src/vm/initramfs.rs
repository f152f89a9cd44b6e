//! The first files of the guest: busybox, the modules for its root, and the two scripts.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{shell, workspace};

use super::{kernel::Kernel, script::Script};

/// What the root takes: the machine's files by 9p, and memory above them.
const MODULES: &[&str] = &["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// Debian's statically linked one.
const BUSYBOX: &str = "/bin/busybox";

/// Packs the files and returns the archive.
pub(super) fn build(kernel: &Kernel, script: &Script) -> Result<PathBuf> {
    let folder = workspace::target()
        .join("vm")
        .join(format!("initramfs-{}", kernel.release));
    let context = || format!("making {}", folder.display());
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(context)?;
    }
    for part in ["bin", "modules"] {
        fs::create_dir_all(folder.join(part)).with_context(context)?;
    }
    fs::copy(BUSYBOX, folder.join("bin/busybox")).with_context(context)?;
    let init = folder.join("init");
    fs::write(&init, include_str!("init.sh")).with_context(context)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).with_context(context)?;
    let modules = kernel.modules();
    fs::write(
        folder.join("guest"),
        script.text(&modules.display().to_string()),
    )
    .with_context(context)?;
    for (place, path) in kernel.closure(MODULES)?.iter().enumerate() {
        let bytes = module(path)?;
        // The shell takes them in the order of their names.
        fs::write(folder.join(format!("modules/{place:02}.ko")), bytes).with_context(context)?;
    }
    let archive = folder.with_extension("cpio");
    let pack = "find . | cpio --quiet -o -H newc";
    let file = fs::File::create(&archive).with_context(context)?;
    let status = Command::new("sh")
        .args(["-c", pack])
        .current_dir(&folder)
        .stdin(Stdio::null())
        .stdout(file)
        .status()
        .with_context(context)?;
    ensure!(
        status.success(),
        "`{pack}` in {}: {status}",
        folder.display()
    );
    Ok(archive)
}

/// A module as busybox loads it: newer kernels' are compressed.
fn module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        let mut xz = Command::new("xz");
        return shell::output(xz.arg("-dc").arg(path));
    }
    fs::read(path).with_context(|| path.display().to_string())
}
