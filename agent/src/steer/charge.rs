//! Which of a node's agents is in charge of its pods.
//!
//! Several may live at once: one that takes over, the one in charge, and any number of old ones
//! that carry what they carried before. Each is known by its cgroup. Two links in the node's bpffs
//! folder name the one in charge and the next; they go with the machine's boot, as all pins do.

use std::{
    fs, io,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use super::cgroup::{self, CgroupId};

const HOLDER: &str = "in_charge";
const NEXT: &str = "next";
/// What the name of a note begins with until it is written.
const UNFINISHED: &str = "note_";

/// This agent's view of who is in charge.
#[derive(Debug)]
pub struct Charge {
    holder: PathBuf,
    next: PathBuf,
    cgroups: PathBuf,
    own: CgroupId,
}

impl Charge {
    /// `bpffs` and `cgroups` are the node's folders, `own` is this agent's cgroup.
    pub fn new(bpffs: &Path, cgroups: &Path, own: CgroupId) -> Self {
        Self {
            holder: bpffs.join(HOLDER),
            next: bpffs.join(NEXT),
            cgroups: cgroups.to_owned(),
            own,
        }
    }

    /// The agent in charge, if one lives.
    pub fn holder(bpffs: &Path, cgroups: &Path) -> Option<u64> {
        living(&bpffs.join(HOLDER), cgroups)
    }

    /// The agents that are or were in charge, or about to be.
    pub fn named(bpffs: &Path) -> impl Iterator<Item = u64> {
        [HOLDER, NEXT]
            .into_iter()
            .filter_map(|note| named(&bpffs.join(note)))
    }

    /// Whether a file of the node's bpffs folder is a note of who is in charge, by its name.
    pub fn is_note(name: &str) -> bool {
        [HOLDER, NEXT].contains(&name) || name.starts_with(UNFINISHED)
    }

    /// Says that this agent is about to take charge.
    pub fn announce(&self) -> io::Result<()> {
        self.write(&self.next)
    }

    pub fn take(&self) -> io::Result<()> {
        self.write(&self.holder)?;
        if named(&self.next) == Some(self.own.0) {
            fs::remove_file(&self.next)?;
        }
        Ok(())
    }

    pub fn is_own(&self) -> bool {
        named(&self.holder) == Some(self.own.0)
    }

    /// Whether another agent has taken over.
    pub fn is_lost(&self) -> bool {
        named(&self.holder).is_some_and(|holder| holder != self.own.0)
    }

    /// Whether nobody is named: somebody has removed the note.
    pub fn is_missing(&self) -> bool {
        named(&self.holder).is_none()
    }

    /// Leaves nobody in charge, unless another has taken over.
    pub fn give_up(&self) {
        if self.is_own() {
            let _ = fs::remove_file(&self.holder);
        }
    }

    /// The other agents that live on this node.
    pub fn others(&self) -> Vec<u64> {
        let mut living = cgroup::living_agents(&self.cgroups);
        living.retain(|agent| *agent != self.own.0);
        living
    }

    /// Whether another agent lives that is about to take charge.
    pub fn has_successor(&self) -> bool {
        living(&self.next, &self.cgroups).is_some_and(|next| next != self.own.0)
    }

    /// Whether an agent was about to take charge and has died.
    pub fn lost_successor(&self) -> bool {
        named(&self.next).is_some_and(|next| next != self.own.0) && !self.has_successor()
    }

    /// Removes the note of a successor that has died.
    pub fn forget_successor(&self) {
        // Another may have announced itself by now.
        if self.lost_successor() {
            let _ = fs::remove_file(&self.next);
        }
    }

    fn write(&self, note: &Path) -> io::Result<()> {
        let new = format!("{UNFINISHED}{}", self.own.0);
        let new = self.holder.with_file_name(new);
        let _ = fs::remove_file(&new);
        symlink(self.own.0.to_string(), &new)?;
        fs::rename(&new, note)
    }
}

fn named(note: &Path) -> Option<u64> {
    fs::read_link(note).ok()?.to_str()?.parse().ok()
}

fn living(note: &Path, cgroups: &Path) -> Option<u64> {
    named(note).filter(|agent| cgroup::living_agents(cgroups).contains(agent))
}
