//! A pod that is steered: its interfaces and addresses are followed while it lives, and what was set
//! up is taken away when it is withdrawn.

mod audit;
mod degradation;
mod interfaces;

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use malla_common::{Address, PodEntry, acceleration::Tag, pod_flags, ports};
use tokio::{sync::Notify, task::JoinHandle};

pub use self::degradation::Degradation;
use self::interfaces::Interfaces;
use super::{
    attach::{Attacher, Hook},
    diag,
    enrol::{EnrolError, netns_error},
    events::{Event, Events},
    inherited::Inherited,
    listener_map,
    listeners::PodListeners,
    lock,
    network::{Changes, LOOPBACK, Network},
    on_blocking_thread,
    pod::Pod,
    programs::{self, Programs, ProgramsError},
    record::Record,
    rules::PodRules,
    withdraw,
};
use crate::model::{Accelerate, InterfaceMode, Workload, WorkloadId};

/// A pod that is steered. Dropping it ends the watch and leaves the pod closed.
pub struct Enrolment {
    inner: Arc<Inner>,
    /// What follows the pod's network, and what replaces its filters.
    tasks: [JoinHandle<()>; 2],
}

struct Inner {
    workload: WorkloadId,
    pod: Arc<Pod>,
    network: Network,
    programs: Arc<Mutex<Programs>>,
    attacher: Attacher,
    /// Held while programs are attached, whoever waits for it.
    attaching: Arc<tokio::sync::Mutex<()>>,
    has_filters: Notify,
    pins: PathBuf,
    record: Record,
    /// What the workers accept from, for the case that another agent's have taken their place in
    /// the map and are gone.
    listeners: Mutex<Vec<PodListeners>>,
    events: Events,
    state: Mutex<State>,
}

/// What was made for a pod.
pub(super) struct Made {
    pub network: Network,
    pub pins: PathBuf,
    pub record: Record,
    pub listeners: Vec<PodListeners>,
}

/// What is in force, to be compared with what should be.
#[derive(Debug, Default)]
struct State {
    rules: PodRules,
    /// Addresses that stand in the pod map.
    addresses: HashSet<IpAddr>,
    interfaces: Interfaces,
    /// Of what the pod's app and the agent open to each other.
    tag: Tag,
    /// What the last audit couldn't put right.
    unhealed: Vec<String>,
}

impl Drop for Enrolment {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Enrolment {
    /// A pod of which nothing is set up yet but what was inherited.
    pub(super) fn new(
        workload: WorkloadId,
        pod: &Arc<Pod>,
        programs: Arc<Mutex<Programs>>,
        attacher: Attacher,
        made: Made,
        inherited: Inherited,
        events: Events,
    ) -> Self {
        let state = State {
            rules: inherited.rules,
            addresses: inherited.addresses,
            ..State::default()
        };
        let inner = Inner {
            workload,
            pod: Arc::clone(pod),
            network: made.network,
            programs,
            attacher,
            attaching: Arc::default(),
            has_filters: Notify::new(),
            pins: made.pins,
            record: made.record,
            listeners: Mutex::new(made.listeners),
            events,
            state: Mutex::new(state),
        };
        Self {
            inner: Arc::new(inner),
            tasks: std::array::from_fn(|_| tokio::spawn(std::future::ready(()))),
        }
    }

    pub fn workload(&self) -> &WorkloadId {
        &self.inner.workload
    }

    pub fn pod(&self) -> &Arc<Pod> {
        &self.inner.pod
    }

    pub(super) fn network(&self) -> &Network {
        &self.inner.network
    }

    /// Makes the folder of pins and writes the record that an agent to come will want.
    pub(super) fn make_folder(&self) -> Result<(), ProgramsError> {
        let pins = &self.inner.pins;
        programs::make_folder(pins)?;
        let written = self.inner.record.write(pins);
        written.map_err(|source| ProgramsError::Pin {
            path: pins.clone(),
            source,
        })?;
        let event = Event::Pod(self.inner.pod.id);
        self.inner.events.watch(pins, event);
        Ok(())
    }

    /// Attaches what chooses the listeners, and what brings steered packets to them.
    pub(super) async fn attach(&self) -> Result<(), EnrolError> {
        let inner = Arc::clone(&self.inner);
        let attached = self.inner.while_attaching(move || {
            let (attacher, pod, pins) = (&inner.attacher, &inner.pod, &inner.pins);
            attacher.attach_lookup(&pod.netns, pins)?;
            let attach = || inner.attach(Hook::Loopback, "lo", LOOPBACK);
            let entered = pod.netns.enter(&pod.home, attach);
            Ok(entered.map_err(netns_error(Path::new("lo")))??)
        });
        attached.await
    }

    /// Puts changed settings in force for new connections.
    pub fn update(&self, workload: &Workload) -> Result<(), ProgramsError> {
        self.inner.update(workload)
    }

    /// Lets the pod's new connections pass. Those that are steered stay so until the withdrawal.
    pub fn let_pass(&self) -> Result<(), ProgramsError> {
        self.inner.state().rules.flags |= pod_flags::WITHDRAWN;
        self.inner.write_entries()
    }

    /// Accelerates what the app and the agent open to each other from now on, or doesn't any more.
    pub fn accelerate(&self, mode: Accelerate) -> Result<(), ProgramsError> {
        self.inner.accelerate(match mode {
            Accelerate::Off | Accelerate::Auto => Tag::Plain,
            Accelerate::Safe => Tag::Receives,
            Accelerate::Full => Tag::Both,
        })
    }

    /// Whether the pod's netns is still where the workload has it.
    pub fn netns_is_there(&self) -> bool {
        self.inner.record.netns_is_there()
    }

    /// What is known of the pod without its enrolment.
    pub fn record(&self) -> Record {
        self.inner.record.clone()
    }

    /// Puts the listeners back into the map where they are missing: another agent had begun to take
    /// over, and died. Whether they were.
    pub fn reopen(&self) -> Result<bool, ProgramsError> {
        let inner = &self.inner;
        let listeners = inner.listeners();
        let workers = u16::try_from(listeners.len()).unwrap_or(u16::MAX);
        let pod = inner.pod.id;
        let present = listener_map::present(&mut lock(&inner.programs));
        if inner.has_entries() && listener_map::is_whole(&present, pod, workers) {
            return Ok(false);
        }
        inner.write_entries()?;
        listener_map::insert(&mut lock(&inner.programs), pod, &listeners)?;
        Ok(true)
    }

    /// Makes the kernel's state that of the pod's present interfaces and addresses.
    pub(super) async fn refresh(&self) -> Result<(), EnrolError> {
        self.inner.refresh().await
    }

    /// Follows the pod's interfaces and addresses from now on.
    pub(super) fn watched(mut self, mut changes: Changes) -> Self {
        let inner = Arc::clone(&self.inner);
        let watch = tokio::spawn(async move {
            while changes.next().await.is_some() {
                if let Err(error) = inner.refresh().await {
                    tracing::warn!(workload = %inner.workload, %error, "can't follow a pod's network");
                }
                inner.events.send(Event::Pod(inner.pod.id));
            }
        });
        let replace = tokio::spawn(Arc::clone(&self.inner).replace_filters());
        self.tasks = [watch, replace];
        self
    }

    fn stop(&self) {
        for task in &self.tasks {
            task.abort();
        }
    }

    /// The pod's interfaces: index, name, and why it isn't steered where it isn't.
    pub fn interfaces(&self) -> Vec<(u32, String, Option<String>)> {
        let state = self.inner.state();
        let interfaces = state.interfaces.steered.iter();
        interfaces
            .map(|(index, found)| (*index, found.name.clone(), found.failure.clone()))
            .collect()
    }

    /// Why the pod is degraded now, with what a human wants to know of it.
    pub fn degradations(&self) -> BTreeMap<Degradation, String> {
        let mut found = BTreeMap::new();
        let state = self.inner.state();
        let unsteered = match state.interfaces.mode {
            InterfaceMode::Refuse => Degradation::InterfaceRefused,
            InterfaceMode::Allow => Degradation::InterfaceUnsteered,
        };
        for interface in state.interfaces.steered.values() {
            if let Some(failure) = &interface.failure {
                found.insert(unsteered, format!("{}: {failure}", interface.name));
            }
        }
        if !state.unhealed.is_empty() {
            found.insert(Degradation::Unhealed, state.unhealed.join("; "));
        }
        let pod = &self.inner.pod;
        if pod.listener_ports.mesh != ports::MESH {
            let listening = pod.netns.enter(&pod.home, diag::listening_ports);
            let listening = listening.and_then(|ports| ports).unwrap_or_default();
            if listening.contains(&ports::MESH) {
                let what = format!("its app listens on port {}", ports::MESH);
                found.insert(Degradation::MeshPort, what);
            }
        }
        found
    }

    /// Restores plain networking: detaches, removes rules, routes and map entries.
    pub(super) async fn withdraw(self) {
        // They must not undo what is undone here, nor what they have begun come afterwards.
        self.stop();
        let inner = &self.inner;
        let _attaching = inner.attaching.lock().await;
        inner.attacher.release(&inner.pins);
        // Where it isn't done, the pod stays closed, and the next agent does it from its record.
        let _ = withdraw::restore(&inner.pins, &inner.record, &inner.network).await;
        let mut state = inner.state();
        let entries = Inherited {
            addresses: std::mem::take(&mut state.addresses),
            rules: std::mem::take(&mut state.rules),
        };
        entries.remove(lock(&inner.programs).maps());
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<PodListeners>> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, workload: &Workload) -> Result<(), ProgramsError> {
        let mut state = self.state();
        let mut rules = PodRules::new(self.pod.id, workload);
        let mut programs = lock(&self.programs);
        let maps = programs.maps();
        let before = state.rules.clone();
        // Should it fail half-way, some of each may stand.
        state.rules.absorb(&rules);
        rules
            .replace(&before, maps)
            .map_err(|source| ProgramsError::Map {
                name: "PORT_RULES",
                source,
            })?;
        rules.flags |= state.rules.flags & pod_flags::ACCELERATED;
        let entry = rules.entry(&self.pod);
        for address in &state.addresses {
            insert_address(&mut programs, *address, entry)?;
        }
        state.rules = rules;
        state.interfaces.mode = workload.settings.interfaces;
        Ok(())
    }

    fn accelerate(&self, tag: Tag) -> Result<(), ProgramsError> {
        {
            let listeners = self.listeners();
            let mut state = self.state();
            if state.tag == tag {
                return Ok(());
            }
            for set in &*listeners {
                self.pod.dial_tag.tags().set(&*set.outbound, tag);
            }
            self.pod.dial_tag.change(tag);
            state.tag = tag;
            if tag == Tag::Plain {
                state.rules.flags &= !pod_flags::ACCELERATED;
            } else {
                state.rules.flags |= pod_flags::ACCELERATED;
            }
        }
        self.write_entries()
    }

    /// Whether the pod's entries are as this agent wrote them.
    fn has_entries(&self) -> bool {
        let state = self.state();
        let mut programs = lock(&self.programs);
        let pods = &programs.maps().pods;
        let entry = state.rules.entry(&self.pod);
        let mut addresses = state.addresses.iter();
        addresses.all(|address| pods.get(&Address::from(*address), 0).ok() == Some(entry))
    }

    /// Writes the pod's entries anew, which also say where its listeners are.
    fn write_entries(&self) -> Result<(), ProgramsError> {
        let state = self.state();
        let mut programs = lock(&self.programs);
        let entry = state.rules.entry(&self.pod);
        let mut addresses = state.addresses.iter();
        addresses.try_for_each(|address| insert_address(&mut programs, *address, entry))
    }

    /// Runs `job`, and nothing else that attaches programs to this pod meanwhile.
    async fn while_attaching<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        let turn = Arc::clone(&self.attaching).lock_owned().await;
        // It goes on to its end even if nobody waits for that any more.
        on_blocking_thread(move || {
            let _turn = turn;
            job()
        })
        .await
    }

    async fn refresh(self: &Arc<Self>) -> Result<(), EnrolError> {
        let addresses = self.network.addresses().await?.into_iter().collect();
        let interfaces = self.network.interfaces().await?;
        let new = {
            let mut state = self.state();
            let mut programs = lock(&self.programs);
            self.follow_addresses(&mut state, &mut programs, &addresses)?;
            state.interfaces.forget_others(&interfaces);
            let known = &state.interfaces.steered;
            let new = interfaces.iter();
            let new = new.filter(|interface| !known.contains_key(&interface.index));
            new.cloned().collect::<Vec<_>>()
        };
        if !new.is_empty() {
            let inner = Arc::clone(self);
            self.while_attaching(move || inner.attach_to(&new)).await;
        }
        let (refused, unrouted) = self.state().interfaces.sort_out(&interfaces);
        for interface in refused {
            self.network.set_down(interface).await?;
        }
        for interface in unrouted {
            match self.network.route_link_local(interface).await {
                Ok(()) => {
                    let steered = &mut self.state().interfaces.steered;
                    if let Some(steered) = steered.get_mut(&interface.index) {
                        steered.routed = true;
                    }
                }
                // It may be gone or down again; the next change tells.
                Err(error) => {
                    tracing::debug!(workload = %self.workload, interface = interface.name, %error, "no link-local route");
                }
            }
        }
        Ok(())
    }

    fn follow_addresses(
        &self,
        state: &mut State,
        programs: &mut Programs,
        addresses: &HashSet<IpAddr>,
    ) -> Result<(), ProgramsError> {
        let addresses = own_addresses(programs, self.pod.id, addresses);
        let entry = state.rules.entry(&self.pod);
        for address in state.addresses.extract_if(|a| !addresses.contains(a)) {
            let _ = programs.maps().pods.remove(&Address::from(address));
        }
        for address in &addresses {
            if !state.addresses.contains(address) {
                insert_address(programs, *address, entry)?;
                // At once: if the next one fails, this one has to go too.
                state.addresses.insert(*address);
            }
        }
        self.pod.addresses.store(Arc::new(addresses));
        Ok(())
    }

    /// Those of `addresses` that are this pod's.
    fn own_of(&self, addresses: &HashSet<IpAddr>) -> HashSet<IpAddr> {
        own_addresses(&mut lock(&self.programs), self.pod.id, addresses)
    }
}

/// Without addresses that another pod holds, which stay its own: they may be those of a bridge
/// which both have, or ones that an app with `CAP_NET_ADMIN` took.
fn own_addresses(
    programs: &mut Programs,
    pod: u32,
    addresses: &HashSet<IpAddr>,
) -> HashSet<IpAddr> {
    let own = addresses.iter().filter(|address| {
        let holder = programs.maps().pods.get(&Address::from(**address), 0);
        holder.map_or(true, |entry| entry.pod == pod)
    });
    own.copied().collect()
}

fn insert_address(
    programs: &mut Programs,
    address: IpAddr,
    entry: PodEntry,
) -> Result<(), ProgramsError> {
    let pods = &mut programs.maps().pods;
    pods.insert(Address::from(address), entry, 0)
        .map_err(|source| ProgramsError::Map {
            name: "PODS",
            source,
        })
}
