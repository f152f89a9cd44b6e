//! Plain data: what the mesh is made of. No socket, no clock, no lock.
//!
//! A [`Mesh`] is one immutable snapshot that a discovery source made and checked. Whoever uses it
//! may rely on: every address belongs to at most one workload or Service, every enrolled workload has a
//! netns path and a node that exists, and every setting is resolved (workload beats namespace
//! beats default).

mod probes;
mod service;
mod settings;
mod spiffe;

use std::{collections::HashMap, fmt, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

pub use malla_common::{Reason, ports};
pub use probes::{Ask, Probe, Probes};
pub use service::{
    Endpoint, EndpointCounts, EndpointState, Service, ServiceId, ServicePort, Target, TargetPort,
    TrafficDistribution,
};
pub use settings::{
    Accelerate, EgressMode, FailMode, InterfaceMode, MtlsMode, NestedMode, PortRange, Settings,
};
pub use spiffe::SpiffeId;

/// One consistent view of the mesh.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mesh {
    pub trust_domain: String,
    pub identity: IdentityConfig,
    pub nodes: HashMap<String, Arc<Node>>,
    pub workloads: HashMap<WorkloadId, Arc<Workload>>,
    pub services: HashMap<ServiceId, Arc<Service>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    by_service_address: HashMap<IpAddr, Arc<Service>>,
}

impl Mesh {
    /// Indexes workloads and Services by address. The caller has checked that addresses are unique.
    pub fn new(
        trust_domain: String,
        identity: IdentityConfig,
        nodes: impl IntoIterator<Item = Node>,
        workloads: impl IntoIterator<Item = Workload>,
        services: impl IntoIterator<Item = Service>,
    ) -> Self {
        let mut mesh = Self {
            trust_domain,
            identity,
            ..Self::default()
        };
        for node in nodes {
            mesh.nodes.insert(node.name.clone(), Arc::new(node));
        }
        for workload in workloads {
            let workload = Arc::new(workload);
            for address in &workload.addresses {
                mesh.by_address.insert(*address, Arc::clone(&workload));
            }
            mesh.workloads.insert(workload.id.clone(), workload);
        }
        for service in services {
            let service = Arc::new(service);
            for address in &service.addresses {
                mesh.by_service_address
                    .insert(*address, Arc::clone(&service));
            }
            mesh.services.insert(service.id.clone(), service);
        }
        mesh
    }

    /// This snapshot with the `Arc`s of `previous` for what is equal in both, so that whoever
    /// compares snapshots finds what didn't change by its pointer.
    #[must_use]
    pub fn sharing_with(mut self, previous: &Self) -> Self {
        for (name, node) in &mut self.nodes {
            if let Some(old) = previous.nodes.get(name).filter(|old| *old == node) {
                *node = Arc::clone(old);
            }
        }
        for (id, workload) in &mut self.workloads {
            if let Some(old) = previous.workloads.get(id).filter(|old| *old == workload) {
                *workload = Arc::clone(old);
                for address in &workload.addresses {
                    self.by_address.insert(*address, Arc::clone(workload));
                }
            }
        }
        for (id, service) in &mut self.services {
            if let Some(old) = previous.services.get(id).filter(|old| *old == service) {
                *service = Arc::clone(old);
                for address in &service.addresses {
                    self.by_service_address
                        .insert(*address, Arc::clone(service));
                }
            }
        }
        self
    }

    /// The workload that owns `address`, given in its canonical form (an IPv4 address is never
    /// looked up as IPv4-mapped IPv6).
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// The Service that has `address`, in its canonical form, as a cluster address.
    pub fn service_at(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.by_service_address.get(&address)
    }

    /// The enrolled workloads of one node.
    pub fn enrolled_on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a Arc<Workload>> {
        self.workloads
            .values()
            .filter(move |w| w.node == node && w.is_enrolled())
    }
}

/// How workloads get their certificates from the embedded CA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityConfig {
    /// Folder of trust anchor and issuer. Made by the first agent that needs it.
    pub directory: PathBuf,
    pub certificate_lifetime: Duration,
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self {
            directory: PathBuf::from("/var/lib/malla/identity"),
            certificate_lifetime: Duration::from_hours(24),
        }
    }
}

/// Where each node has a folder of its name for its agent's unix socket, unless it says another.
pub const RUNTIME_FOLDERS: &str = "/run/malla";

/// A machine that runs one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    pub addresses: Vec<IpAddr>,
    /// Folder of the node's cgroup (v2). The agent makes a child of it for itself.
    pub cgroup: PathBuf,
    /// Folder on a bpffs where links and maps are pinned, one for each node.
    pub bpffs: PathBuf,
    /// Folder of the agent's unix socket, one for each node.
    pub runtime: PathBuf,
}

/// Namespace and name of a workload (a pod): unique in the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadId {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for WorkloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub id: WorkloadId,
    pub identity: Arc<SpiffeId>,
    pub node: String,
    /// Path of the pod's network namespace, on its node. Absent where the pod isn't enrolled.
    pub netns: Option<PathBuf>,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<WorkloadPort>,
    pub probes: Probes,
    pub labels: Vec<(String, String)>,
    /// Whether the pod is part of the mesh: it has an identity and its agent steers its traffic.
    pub meshed: bool,
    /// Whether Services send it connections.
    pub ready: bool,
    /// Whether it takes connections where a Service has no ready endpoint.
    pub serving: bool,
    pub settings: Settings,
}

impl Workload {
    /// Whether an agent has to steer this pod's traffic.
    pub fn is_enrolled(&self) -> bool {
        self.meshed && self.netns.is_some()
    }

    /// Whether what an enrolment is made of is the same. The order of addresses means nothing.
    pub fn has_same_enrolment(&self, other: &Self) -> bool {
        let addresses = |workload: &Self| {
            let mut addresses = workload.addresses.clone();
            addresses.sort_unstable();
            addresses
        };
        self.netns == other.netns
            && self.identity == other.identity
            && addresses(self) == addresses(other)
    }

    /// Whether `client` reaches `port` of this workload through its agent, under mutual TLS.
    pub fn serves_mesh_to(&self, client: IpAddr, port: u16) -> bool {
        self.meshed
            && !self.settings.skips_inbound_port(port)
            && !self.settings.skips_inbound_from(client)
    }
}

/// A port that a workload declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadPort {
    pub name: Option<String>,
    pub port: u16,
}
