//! A pod that is steered: its interfaces and addresses are followed while it lives, and what was set
//! up is taken away when it is withdrawn.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use malla_common::{Address, PodEntry, pod_flags, ports};
use tokio::task::JoinHandle;

use super::{
    attach::{self, Attached, Attacher, Hook},
    diag,
    enrol::{EnrolError, netns_error},
    inherited::Inherited,
    listener_map,
    listeners::PodListeners,
    lock,
    netns::NetnsId,
    network::{Changes, Interface, LOOPBACK, Network},
    on_blocking_thread,
    pod::Pod,
    programs::{self, Programs, ProgramsError},
    record::Record,
    rules::PodRules,
    withdraw,
};
use crate::model::{InterfaceMode, Settings, WorkloadId};

/// How long a pod lives with filters before links take their place: many don't live for long.
const UNTIL_LINKS: Duration = Duration::from_secs(3);
/// How long the node's networks are left in peace after one pod's filters were replaced, for which
/// nobody could change a network for some 24 ms.
const REST_OF_NETWORK: Duration = Duration::from_millis(100);

/// Why a pod isn't served as it should be, though it is enrolled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Degradation {
    /// An interface can't be steered and was set down.
    InterfaceRefused,
    /// An interface can't be steered and was left as it is.
    InterfaceUnsteered,
    /// The app listens on the mesh port: it isn't reached there from outside the pod.
    MeshPort,
}

impl Degradation {
    pub const ALL: [Self; 3] = [
        Self::InterfaceRefused,
        Self::InterfaceUnsteered,
        Self::MeshPort,
    ];

    /// The word for metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InterfaceRefused => "interface_refused",
            Self::InterfaceUnsteered => "interface_unsteered",
            Self::MeshPort => "mesh_port",
        }
    }
}

/// A pod that is steered. Dropping it ends the watch and leaves the pod closed.
pub struct Enrolment {
    inner: Arc<Inner>,
    watch: JoinHandle<()>,
}

struct Inner {
    workload: WorkloadId,
    pod: Arc<Pod>,
    network: Network,
    programs: Arc<Mutex<Programs>>,
    attacher: Attacher,
    /// Held while programs are attached, whoever waits for it.
    attaching: Arc<tokio::sync::Mutex<()>>,
    pins: PathBuf,
    record: Record,
    /// What the workers accept from, for the case that another agent's have taken their place in
    /// the map and are gone.
    listeners: Vec<PodListeners>,
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
    interface_mode: InterfaceMode,
    /// Addresses that stand in the pod map.
    addresses: HashSet<IpAddr>,
    /// Interfaces by index.
    interfaces: HashMap<u32, Steered>,
    /// What hangs on a filter, and is to hang on a link.
    filters: Vec<Filter>,
}

/// A program that is a filter for now.
#[derive(Debug)]
struct Filter {
    hook: Hook,
    interface: String,
    index: u32,
}

/// What became of an interface.
#[derive(Debug)]
struct Steered {
    name: String,
    /// The kind that it had then; that of a TUN interface can change.
    ethernet: Option<bool>,
    /// Why its programs couldn't be attached.
    failure: Option<String>,
    /// Whether steered packets to link-local addresses find their way. The kernel forgets that
    /// when the interface is set down.
    routed: bool,
}

impl Drop for Enrolment {
    fn drop(&mut self) {
        self.watch.abort();
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
            pins: made.pins,
            record: made.record,
            listeners: made.listeners,
            state: Mutex::new(state),
        };
        Self {
            inner: Arc::new(inner),
            watch: tokio::spawn(std::future::ready(())),
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
        })
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
    pub fn update(&self, settings: &Settings) -> Result<(), ProgramsError> {
        self.inner.update(settings)
    }

    /// Lets the pod's new connections pass. Those that are steered stay so until the withdrawal.
    pub fn let_pass(&self) -> Result<(), ProgramsError> {
        self.inner.state().rules.flags |= pod_flags::WITHDRAWN;
        self.inner.write_entries()
    }

    /// Whether the pod's netns is still where the workload has it.
    pub fn netns_is_there(&self) -> bool {
        let there = NetnsId::at(&self.inner.record.path);
        there.is_ok_and(|id| id == self.inner.record.netns)
    }

    /// Puts the listeners back into the map where they are missing: another agent had begun to take
    /// over, and died. Whether they were.
    pub fn reopen(&self) -> Result<bool, ProgramsError> {
        let inner = &self.inner;
        let workers = u16::try_from(inner.listeners.len()).unwrap_or(u16::MAX);
        let pod = inner.pod.id;
        if inner.has_entries() && listener_map::is_whole(&mut lock(&inner.programs), pod, workers) {
            return Ok(false);
        }
        inner.write_entries()?;
        listener_map::insert(&mut lock(&inner.programs), pod, &inner.listeners)?;
        Ok(true)
    }

    /// Makes the kernel's state that of the pod's present interfaces and addresses.
    pub(super) async fn refresh(&self) -> Result<(), EnrolError> {
        self.inner.refresh().await
    }

    /// Follows the pod's interfaces and addresses from now on.
    pub(super) fn watched(mut self, mut changes: Changes) -> Self {
        let inner = Arc::clone(&self.inner);
        self.watch = tokio::spawn(async move {
            loop {
                let has_filters = !inner.state().filters.is_empty();
                tokio::select! {
                    change = changes.next() => {
                        if change.is_none() {
                            return;
                        }
                        if let Err(error) = inner.refresh().await {
                            tracing::warn!(workload = %inner.workload, %error, "can't follow a pod's network");
                        }
                    }
                    () = inner.replace_filters(), if has_filters => {}
                }
            }
        });
        self
    }

    /// Why the pod is degraded now, with what a human wants to know of it.
    pub fn degradations(&self) -> BTreeMap<Degradation, String> {
        let mut found = BTreeMap::new();
        let state = self.inner.state();
        let unsteered = match state.interface_mode {
            InterfaceMode::Refuse => Degradation::InterfaceRefused,
            InterfaceMode::Allow => Degradation::InterfaceUnsteered,
        };
        for interface in state.interfaces.values() {
            if let Some(failure) = &interface.failure {
                found.insert(unsteered, format!("{}: {failure}", interface.name));
            }
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
        // The watch must not undo what is undone here, nor what it has begun come afterwards.
        self.watch.abort();
        let inner = &self.inner;
        let _attaching = inner.attaching.lock().await;
        let pod = &inner.pod;
        withdraw::restore(
            &inner.pins,
            &inner.record,
            &pod.netns,
            &pod.home,
            &inner.network,
        )
        .await;
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

    fn update(&self, settings: &Settings) -> Result<(), ProgramsError> {
        let mut state = self.state();
        let rules = PodRules::new(self.pod.id, settings);
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
        let entry = rules.entry(&self.pod);
        for address in &state.addresses {
            insert_address(&mut programs, *address, entry)?;
        }
        state.rules = rules;
        state.interface_mode = settings.interfaces;
        Ok(())
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
            self.follow_addresses(&mut state, &mut programs, addresses)?;
            state.forget_others(&interfaces);
            let new = interfaces.iter();
            let new = new.filter(|interface| !state.interfaces.contains_key(&interface.index));
            new.cloned().collect::<Vec<_>>()
        };
        if !new.is_empty() {
            let inner = Arc::clone(self);
            self.while_attaching(move || inner.attach_to(&new)).await;
        }
        let (refused, unrouted) = self.state().sort_out(&interfaces);
        for interface in refused {
            self.network.set_down(interface).await?;
        }
        for interface in unrouted {
            match self.network.route_link_local(interface).await {
                Ok(()) => {
                    if let Some(steered) = self.state().interfaces.get_mut(&interface.index) {
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
        mut addresses: HashSet<IpAddr>,
    ) -> Result<(), ProgramsError> {
        // An address that another pod holds stays its own: it may be that of a bridge which both
        // have, or one that an app with CAP_NET_ADMIN took.
        addresses.retain(|address| {
            let other = programs.maps().pods.get(&Address::from(*address), 0);
            other.map_or(true, |entry| entry.pod == self.pod.id)
        });
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

    /// Attaches to interfaces, and notes what became of them.
    fn attach_to(&self, interfaces: &[Interface]) {
        for interface in interfaces {
            let attached = self.attach_both(interface);
            let failure = attached.err().map(|error| error.to_string());
            if let Some(error) = &failure {
                tracing::warn!(workload = %self.workload, interface = interface.name, error, "an interface can't be steered");
            }
            let steered = Steered {
                name: interface.name.clone(),
                ethernet: interface.ethernet,
                failure,
                routed: false,
            };
            self.state().interfaces.insert(interface.index, steered);
        }
    }

    fn attach_both(&self, interface: &Interface) -> Result<(), AttachError> {
        let ethernet = interface.ethernet.ok_or(AttachError::Kind)?;
        let attach = |hook| self.attach(hook, &interface.name, interface.index);
        let entered = self.pod.netns.enter(&self.pod.home, || {
            attach(Hook::Ingress { ethernet })?;
            attach(Hook::Egress { ethernet })
        });
        Ok(entered.map_err(AttachError::Enter)??)
    }

    /// To be called in the pod's netns.
    fn attach(&self, hook: Hook, interface: &str, index: u32) -> Result<(), ProgramsError> {
        let attached = self.attacher.attach(hook, interface, index, &self.pins)?;
        if attached == Attached::ForNow {
            self.state().filters.push(Filter {
                hook,
                interface: interface.to_owned(),
                index,
            });
        }
        Ok(())
    }

    /// Puts links into the place of filters, after a while and when it is this pod's turn.
    async fn replace_filters(self: &Arc<Self>) {
        tokio::time::sleep(UNTIL_LINKS).await;
        let _turn = self.attacher.replacing.lock().await;
        let inner = Arc::clone(self);
        let done = self.while_attaching(move || inner.replace_filters_now());
        for index in done.await {
            if attach::has_own_qdisc(&self.pins, index) && self.network.remove_qdisc(index).await {
                attach::forget_qdisc(&self.pins, index);
            }
        }
        tokio::time::sleep(REST_OF_NETWORK).await;
    }

    /// Returns the interfaces that have no filter any more.
    fn replace_filters_now(&self) -> HashSet<u32> {
        let filters = std::mem::take(&mut self.state().filters);
        let mut done: HashSet<u32> = filters.iter().map(|filter| filter.index).collect();
        let entered = self.pod.netns.enter(&self.pod.home, || {
            for Filter {
                hook,
                interface,
                index,
            } in filters
            {
                let replaced = self
                    .attacher
                    .replace_filter(hook, &interface, index, &self.pins);
                if let Err(error) = replaced {
                    // The filter does as well. It may also be gone with its interface.
                    tracing::info!(workload = %self.workload, %error, "a filter stays");
                    done.remove(&index);
                }
            }
        });
        // A netns that can't be entered is about to go.
        entered.map(|()| done).unwrap_or_default()
    }
}

impl State {
    /// Forgets interfaces that are gone, or of another kind now.
    fn forget_others(&mut self, interfaces: &[Interface]) {
        self.interfaces.retain(|index, steered| {
            let mut same = interfaces.iter().filter(|i| i.index == *index);
            same.any(|i| i.ethernet == steered.ethernet)
        });
        let has = |index| index == LOOPBACK || self.interfaces.contains_key(&index);
        self.filters.retain(|filter| has(filter.index));
    }

    /// What is to be set down, and what has no link-local route.
    fn sort_out<'a>(
        &mut self,
        interfaces: &'a [Interface],
    ) -> (Vec<&'a Interface>, Vec<&'a Interface>) {
        let (mut refused, mut unrouted) = (Vec::new(), Vec::new());
        for interface in interfaces {
            let Some(steered) = self.interfaces.get_mut(&interface.index) else {
                continue;
            };
            if steered.failure.is_some() {
                // The first time, and whenever it is set up again.
                if interface.up && self.interface_mode == InterfaceMode::Refuse {
                    refused.push(interface);
                }
                continue;
            }
            steered.routed &= interface.up;
            if interface.up && !steered.routed {
                unrouted.push(interface);
            }
        }
        (refused, unrouted)
    }
}

/// Why an interface can't be steered.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error("the kind of the interface isn't known")]
    Kind,
    #[error("can't enter the netns: {0}")]
    Enter(std::io::Error),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
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
