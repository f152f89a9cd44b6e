//! A pod that is steered: its interfaces and addresses are followed while it lives, and what was set
//! up is taken away when it is withdrawn.

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use malla_common::Address;
use tokio::task::JoinHandle;

use super::{
    enrol::EnrolError,
    lock,
    network::{Changes, Interface, Network},
    pod::Pod,
    programs::{Hook, Programs, ProgramsError},
    rules::PodRules,
};
use crate::model::{InterfaceMode, Settings, WorkloadId};

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
impl Enrolment {
    /// A pod of which nothing is set up yet.
    pub(super) fn new(
        workload: WorkloadId,
        pod: &Arc<Pod>,
        network: Network,
        programs: Arc<Mutex<Programs>>,
        pins: PathBuf,
    ) -> Self {
        Self {
            workload,
            pod: Arc::clone(pod),
            state: Arc::default(),
            network: Arc::new(network),
            programs,
            pins,
            watch: tokio::spawn(std::future::ready(())),
        }
    }

    /// Takes `rules` for what an earlier agent left in the maps: it is replaced, not kept.
    pub(super) fn assume(&self, rules: PodRules) {
        self.state().rules = rules;
    }

    pub(super) fn pins(&self) -> &Path {
        &self.pins
    }

    pub(super) fn network(&self) -> &Network {
        &self.network
    }

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
    pub(super) async fn refresh(&self) -> Result<(), EnrolError> {
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
    pub(super) fn watched(mut self, mut changes: Changes) -> Self {
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

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
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
