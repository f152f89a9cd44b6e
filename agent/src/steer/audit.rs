//! The audit: what the kernel has against what the agent believes.
//!
//! Each difference is put right where it is found, or says why it couldn't be. It is compared every
//! [`AUDIT_INTERVAL`], and at once for a pod of which the kernel tells that something has changed.
//! Nothing here belongs to a withdrawal or a take-over, during which another agent writes the same
//! things: the caller leaves such pods and times out.

use std::{collections::HashMap, time::Duration};

use super::{Enrolment, Steering, inherited::Inherited, listener_map, lock};
use crate::model::WorkloadId;

/// How often everything is compared.
pub const AUDIT_INTERVAL: Duration = Duration::from_secs(5);

/// What was found other than it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A program isn't attached, isn't the agent's, or another one comes before it.
    Program,
    /// A pin, record or note on the bpffs.
    Pin,
    /// The rule that sends steered packets to the local stack.
    Rule,
    /// A route of the steering table.
    Route,
    /// `accept_local`, or the loopback is down.
    Loopback,
    /// A listener isn't in the map, or doesn't listen.
    Listener,
    /// An entry of the pod map.
    Entry,
    /// A rule of an opt-out or a probe.
    OptOut,
    /// What the kernel is to refuse, of Services.
    Refusal,
    /// An address of the netns that the agent hadn't heard of, or one of the workload's that isn't
    /// there.
    Address,
    /// The netns of the workload is gone, or another one stands at its path.
    Netns,
    /// The agent's own entries: its cgroup, the number of its workers.
    Agent,
}

impl Kind {
    pub const ALL: [Self; 12] = [
        Self::Program,
        Self::Pin,
        Self::Rule,
        Self::Route,
        Self::Loopback,
        Self::Listener,
        Self::Entry,
        Self::OptOut,
        Self::Refusal,
        Self::Address,
        Self::Netns,
        Self::Agent,
    ];

    /// The word for metrics and the log.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::Pin => "pin",
            Self::Rule => "rule",
            Self::Route => "route",
            Self::Loopback => "loopback",
            Self::Listener => "listener",
            Self::Entry => "entry",
            Self::OptOut => "opt_out",
            Self::Refusal => "refusal",
            Self::Address => "address",
            Self::Netns => "netns",
            Self::Agent => "agent",
        }
    }
}

/// One difference, and what became of it.
#[derive(Debug)]
pub struct Difference {
    /// None: it is the node's.
    pub workload: Option<WorkloadId>,
    pub kind: Kind,
    pub what: String,
    /// Why it couldn't be put right.
    pub failure: Option<String>,
}

impl Difference {
    pub(super) fn new<E: std::fmt::Display>(
        workload: Option<&WorkloadId>,
        kind: Kind,
        what: impl Into<String>,
        healed: Result<(), E>,
    ) -> Self {
        Self {
            workload: workload.cloned(),
            kind,
            what: what.into(),
            failure: healed.err().map(|error| error.to_string()),
        }
    }
}

impl Steering {
    /// Compares what is one for the whole node: the agent's own entries, the maps' pins, and
    /// entries of pods that nobody knows.
    pub fn audit_node(&self) -> Vec<Difference> {
        let mut found = Vec::new();
        if self.charge.is_missing() {
            let what = "the note of who is in charge was gone";
            found.push(Difference::new(None, Kind::Pin, what, self.charge.take()));
        }
        let mut programs = lock(&self.programs);
        for (name, healed) in programs.mend_map_pins() {
            let what = format!("the map {name} wasn't pinned");
            found.push(Difference::new(None, Kind::Pin, what, healed));
        }
        let maps = programs.maps();
        if maps.agents.get(&self.cgroup.id.0, 0).is_err() {
            let healed = maps.agents.insert(self.cgroup.id.0, 1, 0);
            let what = "the agent's cgroup wasn't in AGENTS";
            found.push(Difference::new(None, Kind::Agent, what, healed));
        }
        let workers = u32::from(self.workers);
        match maps.workers.get(&0, 0) {
            Ok(known) if known != workers => {
                let healed = maps.workers.set(0, workers, 0);
                let what = format!("WORKERS said {known}");
                found.push(Difference::new(None, Kind::Agent, what, healed));
            }
            _ => {}
        }
        drop(programs);
        found.extend(self.audit_refusals());
        found
    }

    /// Compares what the maps hold of these pods, and of pods that nobody knows.
    pub fn audit_entries<'a>(
        &self,
        enrolments: impl Iterator<Item = &'a Enrolment>,
    ) -> Vec<Difference> {
        let (mut entries, listeners) = {
            let mut programs = lock(&self.programs);
            let listeners = listener_map::present(&mut programs);
            (Inherited::all(programs.maps()), listeners)
        };
        let mut found = Vec::new();
        for enrolment in enrolments {
            let entries = entries.remove(&enrolment.pod().id).unwrap_or_default();
            found.extend(enrolment.audit_entries(&entries, &listeners));
        }
        let books = self.books();
        entries.retain(|pod, _| !books.numbers.contains(pod));
        drop(books);
        found.extend(self.forget_strangers(entries));
        found
    }

    fn forget_strangers(&self, strangers: HashMap<u32, Inherited>) -> Vec<Difference> {
        let mut programs = lock(&self.programs);
        let forget = |(pod, entries): (u32, Inherited)| {
            entries.remove(programs.maps());
            listener_map::remove(&mut programs, pod, self.workers);
            let what = format!("entries of a pod {pod} that there isn't");
            Difference::new::<String>(None, Kind::Entry, what, Ok(()))
        };
        strangers.into_iter().map(forget).collect()
    }
}
