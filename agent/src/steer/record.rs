//! What is kept of each pod beside its pinned links, so that an agent that comes later can adopt
//! the pod or restore its plain networking.
//!
//! A pod's pins stand in a folder of their own, `LINKS/NAMESPACE/NAME/INODE` with the inode of its
//! netns: a netns that takes another's place under the same name is another pod. The record is a
//! symbolic link whose target is the text, since a bpffs holds no ordinary file.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::netns::NetnsId;
use crate::model::WorkloadId;

/// Name of the record in a pod's folder.
const NAME: &str = "record";
/// Where the next record stands until it takes the place of the one before.
const NEXT: &str = "record_next";

/// What is known of a pod that was enrolled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The number that the maps know it by.
    pub pod: u32,
    /// Whether `accept_local` of its loopback was set before the enrolment.
    pub accept_local: bool,
    pub netns: NetnsId,
    /// Where its netns was found.
    pub path: PathBuf,
}

impl Record {
    /// None where there is none, or one that can't be read.
    pub fn read(folder: &Path) -> Option<Self> {
        let target = fs::read_link(folder.join(NAME)).ok()?;
        Self::parse(target.to_str()?)
    }

    /// Whether its netns is still where it was found.
    pub fn netns_is_there(&self) -> bool {
        NetnsId::at(&self.path).is_ok_and(|id| id == self.netns)
    }

    pub fn write(&self, folder: &Path) -> io::Result<()> {
        let next = folder.join(NEXT);
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        symlink(self.to_text(), &next)?;
        fs::rename(next, folder.join(NAME))
    }

    fn to_text(&self) -> String {
        let (accept_local, path) = (u8::from(self.accept_local), self.path.display());
        format!("{} {accept_local} {} {path}", self.pod, self.netns)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.splitn(4, ' ');
        Some(Self {
            pod: words.next()?.parse().ok().filter(|pod| *pod != 0)?,
            accept_local: words.next()? == "1",
            netns: words.next()?.parse().ok()?,
            path: words.next()?.into(),
        })
    }
}

/// The folder of the pins of a workload's pod in `netns`.
pub fn folder(links: &Path, workload: &WorkloadId, netns: NetnsId) -> PathBuf {
    folder_of(links, workload).join(netns.inode.to_string())
}

/// The folders of every pod that had this workload's name.
pub fn folders(links: &Path, workload: &WorkloadId) -> Vec<PathBuf> {
    entries(&folder_of(links, workload))
}

/// Every pod's folder, with the workload that it was.
pub fn all(links: &Path) -> Vec<(WorkloadId, PathBuf)> {
    let mut found = Vec::new();
    for namespace in entries(links) {
        for name in entries(&namespace) {
            let workload = WorkloadId {
                namespace: name_of_pin(&namespace),
                name: name_of_pin(&name),
            };
            found.extend(
                entries(&name)
                    .into_iter()
                    .map(|pod| (workload.clone(), pod)),
            );
        }
    }
    found
}

/// Removes a pod's folder with all pins in it, and its parents where they are empty then.
pub fn remove(folder: &Path) {
    let _ = fs::remove_dir_all(folder);
    for parent in folder.ancestors().skip(1).take(2) {
        // Fails where another pod is in it, which is wanted.
        let _ = fs::remove_dir(parent);
    }
}

fn folder_of(links: &Path, workload: &WorkloadId) -> PathBuf {
    links
        .join(pin_name(&workload.namespace))
        .join(pin_name(&workload.name))
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// bpffs allows no dots in names; neither does a Kubernetes name have an underscore.
fn pin_name(name: &str) -> String {
    name.replace('.', "_")
}

fn name_of_pin(pin: &Path) -> String {
    let name = pin.file_name().unwrap_or_default();
    name.to_string_lossy().replace('_', ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pins_name_reads_back() {
        let pin = Path::new("/links").join(pin_name("web.v1-0"));
        assert_eq!(name_of_pin(&pin), "web.v1-0");
    }

    #[test]
    fn a_record_reads_back_and_garbage_is_none() {
        let record = Record {
            pod: 7,
            accept_local: true,
            netns: "4:4026531840".parse().unwrap(),
            path: "/run/netns/a pod".into(),
        };
        assert_eq!(Record::parse(&record.to_text()), Some(record));
        for garbage in ["", "7", "0 1 4:4 /x", "7 1 four /x", "7 1 4:4"] {
            assert_eq!(Record::parse(garbage), None, "{garbage}");
        }
    }
}
