//! An authority and a certificate for each node, for the proxies that malla is compared with.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

/// Files of a node's certificate, its key, both in one, and the authority's certificate.
#[derive(Debug)]
pub(super) struct Certificate {
    pub(super) chain: PathBuf,
    pub(super) key: PathBuf,
    pub(super) both: PathBuf,
    pub(super) authority: PathBuf,
}

/// Makes an authority: `ca.pem` and `ca.key`.
pub(super) fn make(folder: &Path) -> Result<()> {
    openssl(folder, "ca", "/CN=ca", &[])
}

impl Certificate {
    /// One of the folder's authority, for a node's name.
    pub(super) fn make(folder: &Path, node: &str) -> Result<Self> {
        let name = format!("subjectAltName=DNS:{node}");
        let signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", &name];
        openssl(folder, node, &format!("/CN={node}"), &signed)?;
        let file = |ending: &str| folder.join(format!("{node}{ending}"));
        let made = Self {
            chain: file(".pem"),
            key: file(".key"),
            both: file("-both.pem"),
            authority: folder.join("ca.pem"),
        };
        fs::write(
            &made.both,
            [fs::read(&made.chain)?, fs::read(&made.key)?].concat(),
        )?;
        Ok(made)
    }
}

/// Makes `name.pem` with a P-256 key in `name.key`.
fn openssl(folder: &Path, name: &str, subject: &str, more: &[&str]) -> Result<()> {
    let mut command = Command::new("openssl");
    command.current_dir(folder);
    command.args(["req", "-x509", "-nodes", "-days", "2"]);
    command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]);
    command.args(["-subj", subject, "-out", &format!("{name}.pem")]);
    command.args(["-keyout", &format!("{name}.key")]);
    let done = command.args(more).output().context("running openssl")?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "openssl: {}: {said}", done.status);
    Ok(())
}
