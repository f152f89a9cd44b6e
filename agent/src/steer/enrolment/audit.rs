//! The audit of one pod: each part is compared with what the kernel has, and put right.

use std::{collections::HashSet, io, net::IpAddr, sync::Arc, time::Duration};

use malla_common::{Address, ListenerKey, acceleration::Tag};

use super::{Enrolment, Inner};
use crate::{
    model::WorkloadId,
    steer::{
        attach::{self, Hook},
        audit::{Difference, Kind},
        inherited::Inherited,
        listener_map,
        listeners::{self, PodListeners},
        lock,
        network::LOOPBACK,
        on_blocking_thread,
        programs::ProgramsError,
        record::Record,
        routing,
    },
};

/// How long a message of the kernel may be under way before what it tells counts as missed.
const MESSAGE_LAG: Duration = Duration::from_millis(50);

/// What an audit of one pod came to.
#[derive(Debug, Default)]
pub struct Audited {
    pub differences: Vec<Difference>,
    /// New listeners that take the place of dead ones, a set for each worker.
    pub listeners: Option<Vec<PodListeners>>,
}

impl Audited {
    fn found<E: std::fmt::Display>(
        &mut self,
        workload: &WorkloadId,
        kind: Kind,
        what: impl Into<String>,
        healed: Result<(), E>,
    ) {
        self.differences
            .push(Difference::new(Some(workload), kind, what, healed));
    }
}

impl Enrolment {
    /// Compares what is in the pod's netns and folder. `declared` are the workload's addresses.
    pub async fn audit(&self, declared: &[IpAddr]) -> Audited {
        let mut audited = Audited::default();
        let inner = &self.inner;
        inner.audit_record(self, &mut audited);
        inner.audit_addresses(declared, &mut audited).await;
        inner.audit_programs(&mut audited).await;
        inner.audit_routing(&mut audited).await;
        inner.audit_listeners(&mut audited);
        audited
    }

    /// Compares the pod's entries in the maps with `entries`, which they hold now, and with the keys
    /// of the `listeners` that are there.
    pub fn audit_entries(
        &self,
        entries: &Inherited,
        listeners: &HashSet<ListenerKey>,
    ) -> Vec<Difference> {
        let inner = &self.inner;
        let mut audited = Audited::default();
        let strange: Vec<IpAddr> = {
            let state = inner.state();
            let strange = entries.addresses.difference(&state.addresses);
            strange.copied().collect()
        };
        for address in strange {
            let mut programs = lock(&inner.programs);
            if programs
                .maps()
                .pods
                .remove(&Address::from(address))
                .is_err()
            {
                // Of an address that has gone since the entries were read.
                continue;
            }
            let what = format!("{address} stood in the pod map");
            audited.found::<String>(&inner.workload, Kind::Entry, what, Ok(()));
        }
        if !inner.has_entries() {
            let what = "entries of the pod map were missing or other ones";
            audited.found(&inner.workload, Kind::Entry, what, inner.write_entries());
        }
        let state = inner.state();
        if !state.rules.has_same_rules(&entries.rules) {
            let healed = state
                .rules
                .replace(&entries.rules, lock(&inner.programs).maps());
            let what = "the opt-outs or probes in the maps were other ones";
            audited.found(&inner.workload, Kind::OptOut, what, healed);
        }
        drop(state);
        let own = inner.listeners();
        let workers = u16::try_from(own.len()).unwrap_or(u16::MAX);
        // Dead ones are for the audit of the pod to replace.
        let live = own.iter().all(PodListeners::listen);
        if live && !listener_map::is_whole(listeners, inner.pod.id, workers) {
            let healed = listener_map::insert(&mut lock(&inner.programs), inner.pod.id, &own);
            let what = "listeners were missing in the map";
            audited.found(&inner.workload, Kind::Listener, what, healed);
        }
        audited.differences
    }

    /// Notes what couldn't be put right.
    pub fn set_unhealed<'a>(&self, differences: impl Iterator<Item = &'a Difference>) {
        let unhealed = differences.filter_map(|difference| {
            let failure = difference.failure.as_ref()?;
            let kind = difference.kind.as_str();
            Some(format!("{kind}: {}: {failure}", difference.what))
        });
        self.inner.state().unhealed = unhealed.collect();
    }
}

impl Inner {
    fn audit_record(&self, enrolment: &Enrolment, audited: &mut Audited) {
        if Record::read(&self.pins).as_ref() != Some(&self.record) {
            let what = "the record of the pod was gone or another one";
            audited.found(&self.workload, Kind::Pin, what, enrolment.make_folder());
        }
    }

    async fn audit_addresses(self: &Arc<Self>, declared: &[IpAddr], audited: &mut Audited) {
        let heard = |now: &HashSet<IpAddr>| **self.pod.addresses.load() == *now;
        let mut now = match self.addresses().await {
            Ok(now) => now,
            Err(error) => return self.cannot_look(Kind::Address, &error, audited),
        };
        if !heard(&self.own_of(&now)) {
            tokio::time::sleep(MESSAGE_LAG).await;
            now = self.addresses().await.unwrap_or(now);
            if !heard(&self.own_of(&now)) {
                let healed = self.refresh().await;
                let what = "the pod's addresses were other ones than the kernel had told";
                audited.found(&self.workload, Kind::Address, what, healed);
            }
        }
        for address in declared.iter().filter(|address| !now.contains(address)) {
            let what = format!("{address} of the workload");
            let absent = Err("isn't in the pod's netns any more: put it back, or correct the file");
            audited.found(&self.workload, Kind::Address, what, absent);
        }
    }

    async fn addresses(&self) -> Result<HashSet<IpAddr>, crate::steer::network::NetworkError> {
        Ok(self.network.addresses().await?.into_iter().collect())
    }

    async fn audit_programs(self: &Arc<Self>, audited: &mut Audited) {
        let names: Vec<(u32, String, bool)> = {
            let state = self.state();
            let steered = state.interfaces.steered.iter();
            steered
                .filter(|(_, interface)| interface.failure.is_none())
                .filter_map(|(index, interface)| {
                    Some((*index, interface.name.clone(), interface.ethernet?))
                })
                .collect()
        };
        let mut hooks = vec![(LOOPBACK, "lo".to_owned(), Hook::Loopback)];
        for (index, name, ethernet) in names {
            hooks.push((index, name.clone(), Hook::Ingress { ethernet }));
            hooks.push((index, name, Hook::Egress { ethernet }));
        }
        // Filters may be about to be replaced by links.
        let turn = Arc::clone(&self.attaching).lock_owned().await;
        let mut filters = Vec::new();
        for (index, _, hook) in &hooks {
            let filter = if attach::is_filter(*hook, *index, &self.pins) {
                self.network.filter(*index, *hook).await
            } else {
                None
            };
            filters.push(filter);
        }
        let inner = Arc::clone(self);
        let mend = move || {
            let _turn = turn;
            inner.mend_programs(&hooks, &filters)
        };
        match on_blocking_thread(mend).await {
            Ok(differences) => audited.differences.extend(differences),
            Err(error) => self.cannot_look(Kind::Program, &error, audited),
        }
    }

    /// Compares the programs of `hooks` (an interface's index and name) and attaches those that
    /// should be there. `filters` are the programs of the agent's filters at these hooks.
    fn mend_programs(
        &self,
        hooks: &[(u32, String, Hook)],
        filters: &[Option<u32>],
    ) -> io::Result<Vec<Difference>> {
        let (attacher, pod, pins) = (&self.attacher, &self.pod, &self.pins);
        let workload = Some(&self.workload);
        let mut differences = Vec::new();
        pod.netns.enter(&pod.home, || {
            for ((index, name, hook), filter) in hooks.iter().zip(filters) {
                let fault = attacher.fault(*hook, name, *index, pins, *filter);
                let Some((kind, fault)) = fault else {
                    continue;
                };
                match self.attach(*hook, name, *index) {
                    // An interface that has gone meanwhile is no difference.
                    Err(error) if error.is_gone() => {}
                    mended => {
                        let what = format!("{} on {name}: {fault}", hook.program());
                        differences.push(Difference::new(workload, kind, what, mended));
                    }
                }
            }
        })?;
        if let Some((kind, fault)) = attacher.lookup_fault(&pod.netns, pins) {
            let mended = attacher.attach_lookup(&pod.netns, pins);
            let what = format!("the choice of listeners: {fault}");
            differences.push(Difference::new(workload, kind, what, mended));
        }
        Ok(differences)
    }

    async fn audit_routing(self: &Arc<Self>, audited: &mut Audited) {
        let (has_v6, link_locals) = {
            let state = self.state();
            let interfaces = state.interfaces.steered.iter();
            let routed = interfaces.filter(|(_, interface)| interface.routed);
            let link_locals: Vec<u32> = routed.map(|(index, _)| *index).collect();
            (state.addresses.iter().any(IpAddr::is_ipv6), link_locals)
        };
        let accepts = self
            .pod
            .netns
            .enter(&self.pod.home, routing::accepts_local)
            .unwrap_or(true);
        let mut faults = match self.network.routing_faults(has_v6, &link_locals).await {
            Ok(faults) => faults,
            Err(error) => return self.cannot_look(Kind::Route, &error, audited),
        };
        if !accepts {
            faults.push((Kind::Loopback, "accept_local was off".to_owned()));
        }
        if faults.is_empty() {
            return;
        }
        // What is lost with the loopback or an interface is set up anew with it.
        for interface in self.state().interfaces.steered.values_mut() {
            interface.routed = false;
        }
        let mut healed = self
            .network
            .route_steered()
            .await
            .map_err(|error| error.to_string());
        if healed.is_ok() {
            healed = self.refresh().await.map_err(|error| error.to_string());
        }
        for (kind, what) in faults {
            audited.found(&self.workload, kind, what, healed.clone());
        }
    }

    fn audit_listeners(&self, audited: &mut Audited) {
        let dead = self.listeners().iter().any(|set| !set.listen());
        if dead {
            let new = self.replace_listeners();
            let what = "a listener of the agent had been closed by somebody else";
            let healed = new.map(|new| audited.listeners = Some(new));
            audited.found(&self.workload, Kind::Listener, what, healed);
        }
    }

    /// Makes listeners on the same ports, and puts them in the place of the old ones.
    fn replace_listeners(&self) -> Result<Vec<PodListeners>, ReplaceError> {
        let workers = u16::try_from(self.listeners().len()).unwrap_or(u16::MAX);
        let (pod, ports) = (&self.pod, self.pod.listener_ports);
        let bind = || listeners::bind_to(workers, ports);
        let new = pod.netns.enter(&pod.home, bind).and_then(|new| new)?;
        let kept = new.iter().map(PodListeners::try_clone);
        let kept: Vec<_> = kept.collect::<io::Result<_>>()?;
        {
            let mut programs = lock(&self.programs);
            listener_map::tag(&mut programs, pod.id, &new)?;
            listener_map::insert(&mut programs, pod.id, &new)?;
        }
        *self.listeners() = kept;
        // The next look tags them as the old ones were.
        self.state().tag = Tag::Plain;
        Ok(new)
    }

    fn cannot_look(&self, kind: Kind, error: &dyn std::fmt::Display, audited: &mut Audited) {
        let what = "can't be compared";
        audited.found(&self.workload, kind, what, Err(error));
    }
}

#[derive(Debug, thiserror::Error)]
enum ReplaceError {
    #[error("can't listen again: {0}")]
    Listen(#[from] io::Error),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
}
