//! The enrolment of one pod: what is checked, and what is set up in its netns.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs, io,
    net::IpAddr,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use malla_common::{Address, ListenerKey, Role};

use super::{
    Steering,
    dial_ports::DialPorts,
    enrolment::Enrolment,
    listeners::{self, ListenerPorts, PodListeners},
    lock,
    netns::Netns,
    network::{Network, NetworkError},
    pod::Pod,
    programs::{self, Hook, Programs, ProgramsError},
    routes::Routes,
    rules::PodRules,
};
use crate::model::{Workload, WorkloadId};

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
        let programs = Arc::clone(&self.programs);
        let enrolment = Enrolment::new(workload.id.clone(), &pod, network, programs, pins);
        enrolment.network().route_steered().await?;
        enrolment.assume(PodRules::in_force(id, lock(&self.programs).maps()));
        enrolment.update(&workload.settings)?;
        {
            let mut programs = lock(&self.programs);
            insert_listeners(&mut programs, id, &listeners)?;
            programs.attach_lookup(&pod.netns, enrolment.pins())?;
            pod.netns
                .enter(&self.home, || {
                    programs.attach(Hook::Loopback, "lo", 1, enrolment.pins())
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
    let map = &mut programs.maps().listeners;
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
