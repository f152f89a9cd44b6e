//! A folder that changes as the kubelet changes a mounted secret.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::TestAuthority;

/// Each version is a folder of its own; `..data` points to the one in force.
#[derive(Debug)]
pub(in crate::identity) struct Volume {
    directory: PathBuf,
    versions: u32,
}

impl Volume {
    pub(in crate::identity) fn new(directory: PathBuf) -> Self {
        fs::create_dir_all(&directory).unwrap();
        Self {
            directory,
            versions: 0,
        }
    }

    pub(in crate::identity) fn path(&self) -> &Path {
        &self.directory
    }

    /// Replaces all files in one step.
    pub(in crate::identity) fn put(&mut self, files: &[(&str, &str)]) {
        self.versions += 1;
        let version = format!("..{}", self.versions);
        let folder = self.directory.join(&version);
        fs::create_dir(&folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), content).unwrap();
            let link = self.directory.join(name);
            if !link.is_symlink() {
                symlink(Path::new("..data").join(name), link).unwrap();
            }
        }
        let next = self.directory.join("..data_tmp");
        symlink(version, &next).unwrap();
        fs::rename(next, self.directory.join("..data")).unwrap();
    }

    /// `issuer` with its key, under `anchors`.
    pub(in crate::identity) fn put_pair(
        &mut self,
        anchors: &[&TestAuthority],
        issuer: &TestAuthority,
    ) {
        let anchors: String = anchors.iter().map(|anchor| anchor.pem()).collect();
        self.put(&[
            ("ca.crt", &anchors),
            ("issuer.crt", &issuer.pem()),
            ("issuer.key", &issuer.key_pem()),
        ]);
    }
}
