//! What the kernel has at a hook against what should be there.

use std::path::Path;

use aya::programs::{ProgramInfo, SchedClassifier};

use super::{Attacher, Hook, is_note};
use crate::steer::{
    audit::Kind,
    links::{self, LinkInfo},
    netns::Netns,
    programs::LOOKUP,
};

impl Attacher {
    /// What is wrong with a hook of an interface in the calling thread's netns. `filter` is the
    /// program of the agent's filter there.
    pub fn fault(
        &self,
        hook: Hook,
        interface: &str,
        index: u32,
        pins: &Path,
        filter: Option<u32>,
    ) -> Option<(Kind, String)> {
        let name = hook.program();
        let pin = pins.join(format!("{index}_{name}"));
        match filter {
            Some(id) if self.is_own(name, id) => {
                (!is_note(&pin)).then(|| (Kind::Pin, "its filter wasn't noted".to_owned()))
            }
            Some(other) => {
                let what = format!("the filter of program {other} is in its place");
                Some((Kind::Program, what))
            }
            None if is_note(&pin) => Some((Kind::Program, "its filter was gone".to_owned())),
            None => self
                .link_fault(name, index.into(), &pin)
                .or_else(|| self.order_fault(hook, interface)),
        }
    }

    /// What is wrong with the program of a netns.
    pub fn lookup_fault(&self, netns: &Netns, pins: &Path) -> Option<(Kind, String)> {
        self.link_fault(LOOKUP, netns.id().inode, &pins.join(LOOKUP))
    }

    /// Whether the agent's program is attached to a hook by a link, and another one before it.
    pub(super) fn order_fault(&self, hook: Hook, interface: &str) -> Option<(Kind, String)> {
        let attached = attached(hook, interface);
        let is_own = |id: &u32| self.is_own(hook.program(), *id);
        let first = attached.first().filter(|first| !is_own(first))?;
        let is_behind = attached.iter().any(is_own);
        is_behind.then(|| (Kind::Program, format!("program {first} was before it")))
    }

    /// What is wrong with the link that is to be pinned at `pin` and to attach this agent's program
    /// `name` to `target` (an interface's index or a netns's inode).
    pub(super) fn link_fault(
        &self,
        name: &'static str,
        target: u64,
        pin: &Path,
    ) -> Option<(Kind, String)> {
        let link = match links::read(pin) {
            Ok(link) => link,
            Err(error) => return Some((Kind::Pin, format!("no link is pinned: {error}"))),
        };
        if link.target == 0 {
            return Some((Kind::Program, "it was detached".to_owned()));
        }
        (!self.is_right(link, name, target)).then(|| {
            let what = format!("program {} is attached in its place", link.program);
            (Kind::Program, what)
        })
    }

    pub(super) fn is_right(&self, link: LinkInfo, name: &'static str, target: u64) -> bool {
        self.is_own(name, link.program) && u64::from(link.target) == target
    }

    fn is_own(&self, name: &'static str, id: u32) -> bool {
        self.loaded.get(name).is_ok_and(|program| program.id == id)
    }
}

/// The programs that links attach to a hook, in their order.
fn attached(hook: Hook, interface: &str) -> Vec<u32> {
    let programs = SchedClassifier::query_tcx(interface, hook.attach_type());
    let (_, programs) = programs.unwrap_or_default();
    let ids = programs.iter().map(ProgramInfo::id);
    ids.collect()
}
