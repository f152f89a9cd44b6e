//! The enrolment of one pod: what is set up in its netns, kept true while it lives, and taken
//! away when it is withdrawn.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use arc_swap::ArcSwap;
use malla_common::{Address, ListenerKey, Role};
use tokio::task::JoinHandle;

use super::{
    Steering,
    dial_ports::DialPorts,
    listeners::{self, ListenerPorts, PodListeners},
    lock,
    netns::Netns,
    network::{Changes, Interface, Network, NetworkError},
    programs::{self, Hook, Programs, ProgramsError},
    routes::Routes,
    rules::PodRules,
};
use crate::model::{InterfaceMode, Settings, Workload, WorkloadId};

/// Why a pod can't be enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("can't open its netns {path}: {source}")]
    Netns { path: PathBuf, source: io::Error },
    #[error("its netns {0} is the agent's own: a pod on the host network can't be meshed")]
    HostNetns(PathBuf),
    #[error("its netns {path} is that of {owner} already")]
    SharedNetns { path: PathBuf, owner: WorkloadId },
    #[error("its address {address} isn't in its netns {path}, which has {found:?}")]
    AddressAbsent {
        address: IpAddr,
        path: PathBuf,
        found: Vec<IpAddr>,
    },
    #[error("no port is left for the agent's listeners beside the pod's own")]
    NoPort,
    #[error("can't listen in its netns: {0} (does the app listen on port 15008?)")]
    Listen(io::Error),
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Programs(#[from] ProgramsError),
    #[error("the agent already has as many pods as its maps hold")]
    TooMany,
}

impl EnrolError {
    /// The word for metrics.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Netns { .. } => "netns",
            Self::HostNetns(_) => "host_netns",
            Self::SharedNetns { .. } => "shared_netns",
            Self::AddressAbsent { .. } => "address_absent",
            Self::NoPort => "no_port",
            Self::Listen(_) => "listen",
            Self::Network(_) => "network",
            Self::Programs(_) => "programs",
            Self::TooMany => "too_many",
        }
    }
}

/// What the workers need of an enrolled pod.
#[derive(Debug)]
pub struct Pod {
    pub id: u32,
    pub netns: Netns,
    pub home: Arc<Netns>,
    pub listener_ports: ListenerPorts,
    pub dial_ports: DialPorts,
    pub(super) routes: Routes,
    addresses: ArcSwap<HashSet<IpAddr>>,
}

impl Pod {
    /// Whether `address` is one of the pod's netns, as the kernel says.
    pub fn owns(&self, address: IpAddr) -> bool {
        self.addresses.load().contains(&address)
    }
}

/// A pod that is steered. Dropping it ends the watch and leaves the pod closed.
pub struct Enrolment {
    workload: WorkloadId,
    pod: Arc<Pod>,
    state: Arc<Mutex<State>>,
    network: Arc<Network>,
    programs: Arc<Mutex<Programs>>,
    pins: PathBuf,
    watch: JoinHandle<()>,
}

/// What is in force, to be compared with what should be.
#[derive(Debug, Default)]
struct State {
    rules: PodRules,
    interface_mode: InterfaceMode,
    /// Addresses that stand in the pod map.
    addresses: HashSet<IpAddr>,
    /// Interfaces that are steered, and those that can't be.
    steered: HashMap<u32, bool>,
}

impl Drop for Enrolment {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Steering {
    /// Enrols a pod: its traffic goes to the listeners that are handed back, one set for each
    /// worker. When it fails the pod is left as it was, or closed.
    pub async fn enrol(
        &mut self,
        workload: &Workload,
    ) -> Result<(Enrolment, Vec<PodListeners>), EnrolError> {
        let path = workload.netns.as_deref().unwrap_or(Path::new(""));
        let netns = Netns::open(path).map_err(|source| EnrolError::Netns {
            path: path.to_owned(),
            source,
        })?;
        if netns.id() == self.home.id() {
            return Err(EnrolError::HostNetns(path.to_owned()));
        }
        if let Some(owner) = self.netns_owners.get(&netns.id())
            && *owner != workload.id
        {
            return Err(EnrolError::SharedNetns {
                path: path.to_owned(),
                owner: owner.clone(),
            });
        }
        let (network, changes) = Network::open(&netns, &self.home)?;
        let found = network.addresses().await?;
        if let Some(address) = workload
            .addresses
            .iter()
            .find(|address| !found.contains(address))
        {
            let (address, path) = (*address, path.to_owned());
            return Err(EnrolError::AddressAbsent {
                address,
                path,
                found,
            });
        }

        let id = self
            .pod_number(&workload.addresses)
            .ok_or(EnrolError::TooMany)?;
        let (listener_ports, listeners) = self.listen(&netns, workload)?;
        let taken = taken_ports(&netns, &self.home);
        let declared: Vec<u16> = workload.ports.iter().map(|port| port.port).collect();
        let range = workload.settings.dial_ports;
        let dial_ports = netns
            .enter(&self.home, || {
                DialPorts::new(range, |port| {
                    listener_ports.contains(port)
                        || declared.contains(&port)
                        || taken.contains(&port)
                })
            })
            .and_then(|result| result)
            .map_err(|source| EnrolError::Netns {
                path: path.to_owned(),
                source,
            })?;
        let pod = Arc::new(Pod {
            id,
            netns,
            home: Arc::clone(&self.home),
            listener_ports,
            dial_ports,
            routes: Routes::default(),
            addresses: ArcSwap::default(),
        });

        let pins = self
            .links
            .join(pin_name(&workload.id.namespace))
            .join(pin_name(&workload.id.name));
        programs::make_folder(&pins)?;
        let enrolment = Enrolment {
            workload: workload.id.clone(),
            pod: Arc::clone(&pod),
            state: Arc::default(),
            network: Arc::new(network),
            programs: Arc::clone(&self.programs),
            pins,
            watch: tokio::spawn(std::future::ready(())),
        };
        enrolment.network.route_steered().await?;
        // What an earlier agent left under this number is replaced, not kept.
        enrolment.state().rules = PodRules::in_force(id, lock(&self.programs).maps());
        enrolment.update(&workload.settings)?;
        {
            let mut programs = lock(&self.programs);
            insert_listeners(&mut programs, id, &listeners)?;
            programs.attach_lookup(&pod.netns, &enrolment.pins)?;
            pod.netns
                .enter(&self.home, || {
                    programs.attach(Hook::Loopback, "lo", 1, &enrolment.pins)
                })
                .map_err(|source| EnrolError::Netns {
                    path: path.to_owned(),
                    source,
                })??;
        }
        enrolment.refresh().await?;
        self.netns_owners
            .insert(pod.netns.id(), workload.id.clone());
        Ok((enrolment.watched(changes), listeners))
    }

    /// The number that an earlier agent gave to this pod, which its pinned state knows it by, or
    /// the next free one.
    fn pod_number(&self, addresses: &[IpAddr]) -> Option<u32> {
        let mut programs = lock(&self.programs);
        let pods = &programs.maps().pods;
        if let Some(entry) = addresses
            .iter()
            .find_map(|address| pods.get(&Address::from(*address), 0).ok())
        {
            return Some(entry.pod);
        }
        let used: HashSet<u32> = pods.iter().flatten().map(|(_, entry)| entry.pod).collect();
        (1..u32::MAX).find(|number| !used.contains(number))
    }

    fn listen(
        &self,
        netns: &Netns,
        workload: &Workload,
    ) -> Result<(ListenerPorts, Vec<PodListeners>), EnrolError> {
        let declared: Vec<u16> = workload.ports.iter().map(|port| port.port).collect();
        let workers = self.workers;
        netns
            .enter(&self.home, || {
                let ephemeral = listeners::ephemeral_ports();
                let dial = workload.settings.dial_ports;
                let ports = listeners::choose_ports(&ephemeral, &declared, dial)
                    .ok_or(EnrolError::NoPort)?;
                let listeners = (0..workers)
                    .map(|_| listeners::bind(ports))
                    .collect::<io::Result<Vec<_>>>()
                    .map_err(EnrolError::Listen)?;
                Ok((ports, listeners))
            })
            .map_err(EnrolError::Listen)?
    }

    /// Forgets a pod that was withdrawn or is gone.
    pub fn forget(&mut self, workload: &WorkloadId) {
        self.netns_owners.retain(|_, owner| owner != workload);
    }
}

fn insert_listeners(
    programs: &mut Programs,
    pod: u32,
    listeners: &[PodListeners],
) -> Result<(), ProgramsError> {
    let maps = programs.maps();
    for set in listeners {
        maps.listener_pods
            .insert(&set.mesh, pod, 0)
            .map_err(|source| ProgramsError::Map {
                name: "LISTENER_PODS",
                source,
            })?;
    }
    let map = &mut maps.listeners;
    // Slot 0 says that all are there, so it comes last.
    for (slot, set) in (0_u16..)
        .zip(listeners)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
    {
        for (role, listener) in [
            (Role::Outbound, &set.outbound),
            (Role::Inbound, &set.inbound),
            (Role::Mesh, &set.mesh),
        ] {
            map.insert(ListenerKey::new(pod, role, slot), listener.as_raw_fd(), 0)
                .map_err(|source| ProgramsError::Map {
                    name: "LISTENERS",
                    source,
                })?;
        }
    }
    Ok(())
}

impl Enrolment {
    pub fn pod(&self) -> &Arc<Pod> {
        &self.pod
    }

    /// Puts changed settings in force for new connections.
    pub fn update(&self, settings: &Settings) -> Result<(), ProgramsError> {
        let mut state = self.state();
        let rules = PodRules::new(self.pod.id, settings);
        let mut programs = lock(&self.programs);
        let maps = programs.maps();
        rules
            .replace(&state.rules, maps)
            .map_err(|source| ProgramsError::Map {
                name: "PORT_RULES",
                source,
            })?;
        let entry = rules.entry(self.pod.id);
        for address in &state.addresses {
            maps.pods
                .insert(Address::from(*address), entry, 0)
                .map_err(|source| ProgramsError::Map {
                    name: "PODS",
                    source,
                })?;
        }
        state.rules = rules;
        state.interface_mode = settings.interfaces;
        Ok(())
    }

    /// Makes the kernel's state that of the pod's present interfaces and addresses.
    async fn refresh(&self) -> Result<(), EnrolError> {
        refresh(
            &self.pod,
            &self.network,
            &self.programs,
            &self.state,
            &self.pins,
        )
        .await
    }

    /// Follows the pod's interfaces and addresses from now on.
    fn watched(mut self, mut changes: Changes) -> Self {
        let (pod, network) = (Arc::clone(&self.pod), Arc::clone(&self.network));
        let (programs, state) = (Arc::clone(&self.programs), Arc::clone(&self.state));
        let (pins, workload) = (self.pins.clone(), self.workload.clone());
        self.watch = tokio::spawn(async move {
            while changes.next().await.is_some() {
                if let Err(error) = refresh(&pod, &network, &programs, &state, &pins).await {
                    tracing::warn!(%workload, %error, "can't follow a pod's network");
                }
            }
        });
        self
    }

    /// Restores plain networking: detaches, removes rules, routes and map entries.
    pub async fn withdraw(self) {
        self.watch.abort();
        let _ = fs::remove_dir_all(&self.pins);
        self.network.unroute_steered().await;
        let state = self.state();
        let mut programs = lock(&self.programs);
        let maps = programs.maps();
        for address in &state.addresses {
            let _ = maps.pods.remove(&Address::from(*address));
        }
        let _ = PodRules::default().replace(&state.rules, maps);
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

async fn refresh(
    pod: &Pod,
    network: &Network,
    programs: &Mutex<Programs>,
    state: &Mutex<State>,
    pins: &Path,
) -> Result<(), EnrolError> {
    let mut addresses: HashSet<IpAddr> = network.addresses().await?.into_iter().collect();
    let interfaces = network.interfaces().await?;
    let (mut refused, mut steered) = (Vec::new(), Vec::new());
    {
        let mut state = state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut programs = lock(programs);
        let map = |source| ProgramsError::Map {
            name: "PODS",
            source,
        };
        let entry = state.rules.entry(pod.id);
        // An address that another pod holds stays its own: it may be that of a bridge which both
        // have, or one that an app with CAP_NET_ADMIN took.
        addresses.retain(|address| {
            let other = programs.maps().pods.get(&Address::from(*address), 0);
            other.map_or(true, |entry| entry.pod == pod.id)
        });
        for address in addresses.difference(&state.addresses) {
            programs
                .maps()
                .pods
                .insert(Address::from(*address), entry, 0)
                .map_err(map)?;
        }
        for address in state.addresses.difference(&addresses) {
            let _ = programs.maps().pods.remove(&Address::from(*address));
        }
        pod.addresses.store(Arc::new(addresses.clone()));
        state.addresses = addresses;

        state
            .steered
            .retain(|index, _| interfaces.iter().any(|i| i.index == *index));
        for interface in &interfaces {
            match state.steered.get(&interface.index) {
                Some(true) => continue,
                Some(false) => {
                    // Set up again.
                    if interface.up && state.interface_mode == InterfaceMode::Refuse {
                        refused.push(interface.clone());
                    }
                    continue;
                }
                None => {}
            }
            let attached = attach(pod, &mut programs, interface, pins);
            if let Err(error) = &attached {
                tracing::warn!(interface = interface.name, %error, "an interface can't be steered");
                if state.interface_mode == InterfaceMode::Refuse {
                    refused.push(interface.clone());
                }
            }
            if attached.is_ok() {
                steered.push(interface.clone());
            }
            state.steered.insert(interface.index, attached.is_ok());
        }
    }
    for interface in refused {
        network.set_down(&interface).await?;
    }
    for interface in steered {
        network.route_link_local(&interface).await?;
    }
    Ok(())
}

fn attach(
    pod: &Pod,
    programs: &mut Programs,
    interface: &Interface,
    pins: &Path,
) -> Result<(), EnrolError> {
    let ethernet = interface.ethernet.ok_or_else(|| EnrolError::Netns {
        path: PathBuf::from(&interface.name),
        source: io::Error::other("the kind of the interface isn't known"),
    })?;
    let (name, index) = (&interface.name, interface.index);
    pod.netns
        .enter(&pod.home, || {
            programs.attach(Hook::Ingress { ethernet }, name, index, pins)?;
            programs.attach(Hook::Egress { ethernet }, name, index, pins)
        })
        .map_err(|source| EnrolError::Netns {
            path: PathBuf::from(name),
            source,
        })??;
    Ok(())
}

/// Ports that the pod's sockets are bound to now, for the agent to keep clear of.
fn taken_ports(netns: &Netns, home: &Netns) -> HashSet<u16> {
    let read = || {
        ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
            .into_iter()
            .filter_map(|path| fs::read_to_string(path).ok())
            .flat_map(|table| local_ports(&table))
            .collect()
    };
    netns.enter(home, read).unwrap_or_default()
}

/// The local ports of a table like /proc/net/tcp: `sl: ADDRESS:PORT …`, in hexadecimal.
fn local_ports(table: &str) -> Vec<u16> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1)?.rsplit(':').next())
        .filter_map(|port| u16::from_str_radix(port, 16).ok())
        .collect()
}

/// bpffs allows no dots in names; neither does a Kubernetes name have an underscore.
fn pin_name(name: &str) -> String {
    name.replace('.', "_")
}

pub(super) fn name_of_pin(pin: &OsStr) -> String {
    pin.to_string_lossy().replace('_', ".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_ports_are_read_from_the_kernels_table() {
        let table = "  sl  local_address rem_address   st\n   \
                     0: 0100007F:1F90 00000000:0000 0A 00000000:00000000\n   \
                     1: 00000000000000000000000000000000:0016 00:0 0A\n";
        assert_eq!(local_ports(table), [8080, 22]);
    }

    #[test]
    fn a_pins_name_reads_back() {
        assert_eq!(name_of_pin(OsStr::new(&pin_name("web.v1-0"))), "web.v1-0");
    }
}
