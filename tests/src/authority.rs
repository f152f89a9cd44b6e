//! Trust anchors, issuers and revocation lists as an operator makes and places them.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{bed::Testbed, hbone};

/// A trust anchor, or an issuer under one, with its key.
#[derive(Debug)]
pub struct Authority {
    /// Without the endings `.crt` and `.key`.
    path: PathBuf,
}

impl Authority {
    /// A trust anchor that is valid for so long from now on.
    pub fn anchor(bed: &Testbed, name: &str, life: Duration) -> Result<Self> {
        let path = bed.folder().join(format!("anchor-{name}"));
        make("anchor", &path, &["--name", name, &until(life)])?;
        Ok(Self { path })
    }

    /// An issuer that this anchor has signed.
    pub fn issuer(&self, name: &str, life: Duration) -> Result<Self> {
        let path = self.path.with_file_name(format!("issuer-{name}"));
        let under = format!("--under={}", self.path.display());
        make("issuer", &path, &["--name", name, &until(life), &under])?;
        Ok(Self { path })
    }

    /// The certificate, as PEM.
    pub fn certificate(&self) -> Result<String> {
        read(&self.path.with_extension("crt"))
    }

    /// The key, as PEM.
    pub fn key(&self) -> Result<String> {
        read(&self.path.with_extension("key"))
    }

    /// A list of this authority that revokes the certificates with these numbers, in hexadecimal
    /// digits, as PEM: made as the README says.
    pub fn list(&self, serials: &[String]) -> Result<String> {
        let entries = serials.iter().map(|serial| {
            format!("R\t491231235959Z\t260101000000Z\t{serial}\tunknown\t/CN=revoked\n")
        });
        let file = |ending| self.path.with_extension(ending);
        let (index, settings, list) = (file("index"), file("cnf"), file("crl.pem"));
        fs::write(&index, entries.collect::<String>())?;
        let database = format!("database={}", index.display());
        let text = format!("[ca]\ndefault_ca=c\n[c]\n{database}\ndefault_md=sha256\n");
        fs::write(&settings, text)?;
        let made = Command::new("openssl")
            .args(["ca", "-gencrl", "-crldays", "30", "-config"])
            .arg(&settings)
            .arg("-cert")
            .arg(file("crt"))
            .arg("-keyfile")
            .arg(file("key"))
            .arg("-out")
            .arg(&list)
            .output()
            .context("openssl can't be run")?;
        let said = String::from_utf8_lossy(&made.stderr);
        ensure!(made.status.success(), "openssl ca: {said}");
        read(&list)
    }
}

fn until(life: Duration) -> String {
    format!("--until=-{}", life.as_secs_f64())
}

fn make(kind: &str, path: &Path, arguments: &[&str]) -> Result<()> {
    let mut all = vec![kind.to_owned(), path.display().to_string()];
    all.extend(arguments.iter().map(ToString::to_string));
    hbone::run_tool("authority.py", &all)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// The identity folder of a bed's agents, which changes as the kubelet changes a mounted secret:
/// each version is a folder, and `..data` points to the one in force.
#[derive(Debug)]
pub struct IdentityVolume {
    folder: PathBuf,
    versions: u32,
}

impl IdentityVolume {
    pub fn new(bed: &Testbed) -> Result<Self> {
        let folder = hbone::identity_folder(bed);
        fs::create_dir_all(&folder)?;
        Ok(Self {
            folder,
            versions: 0,
        })
    }

    /// Replaces all files in one step.
    pub fn put(&mut self, files: &[(&str, &str)]) -> Result<()> {
        self.versions += 1;
        let version = format!("..{}", self.versions);
        let place = self.folder.join(&version);
        fs::create_dir(&place)?;
        for (name, content) in files {
            fs::write(place.join(name), content)?;
            let link = self.folder.join(name);
            if !link.is_symlink() {
                symlink(Path::new("..data").join(name), link)?;
            }
        }
        let next = self.folder.join("..data_tmp");
        symlink(version, &next)?;
        fs::rename(next, self.folder.join("..data")).context("swapping ..data")
    }
}
