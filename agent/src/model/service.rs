//! Services: names for sets of endpoints, and the addresses that stand for them.

use std::{
    collections::BTreeSet,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::WorkloadId;

/// Namespace and name of a Service: unique in the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceId {
    pub namespace: String,
    pub name: String,
}

impl fmt::Display for ServiceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which endpoints a Service's clients go to while there are any of that kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
pub enum TrafficDistribution {
    /// Those on the client's own node, the nearest there are.
    PreferClose,
    /// Those on the client's own node.
    PreferSameNode,
}

/// Where a port of a Service leads on its endpoints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    Number(u16),
    /// The port that each endpoint's workload declares under this name.
    Name(String),
}

impl fmt::Display for TargetPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(port) => port.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// Whether an endpoint takes connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndpointState {
    Ready,
    /// Not ready, and still serving, as a pod does that terminates: only where none is ready.
    Serving,
    NotReady,
}

/// One of those that a Service's connections go to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Of both families, each at most one place in the balancing of its family.
    pub addresses: Vec<IpAddr>,
    pub workload: Option<WorkloadId>,
    /// Empty where it is on none of the mesh's nodes.
    pub node: String,
    pub state: EndpointState,
    /// For each port of the Service, in its order. `None`: it hasn't that port.
    pub ports: Vec<Option<u16>>,
}

/// How many endpoints a port of a Service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndpointCounts {
    /// Those that get connections.
    pub ready: usize,
    pub pending: usize,
}

/// A place that a connection can go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub address: SocketAddr,
    /// Which of the Service's endpoints it is.
    pub endpoint: usize,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    pub name: Option<String>,
    pub port: u16,
    pub target: TargetPort,
    pub app_protocol: Option<String>,
    v4: Vec<Target>,
    v6: Vec<Target>,
}

impl ServicePort {
    pub fn new(
        name: Option<String>,
        port: u16,
        target: TargetPort,
        app_protocol: Option<String>,
    ) -> Self {
        Self {
            name,
            port,
            target,
            app_protocol,
            v4: Vec::new(),
            v6: Vec::new(),
        }
    }

    /// What takes connections now, of one family: ready endpoints, else those that still serve.
    pub fn targets(&self, v4: bool) -> &[Target] {
        if v4 { &self.v4 } else { &self.v6 }
    }
}

/// One Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub id: ServiceId,
    /// Its name in the cluster's DNS.
    pub host: String,
    /// Cluster addresses. None of a headless one: its clients dial the endpoints themselves.
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    /// All endpoints count as ready.
    pub publish_not_ready_addresses: bool,
    pub traffic_distribution: Option<TrafficDistribution>,
    /// A client keeps its endpoint, until it has come no more for so long.
    pub client_ip_affinity: Option<Duration>,
    pub endpoints: Vec<Endpoint>,
}

impl Service {
    /// Lays the ports' targets out, from the endpoints.
    #[must_use]
    pub fn with_endpoints(mut self, endpoints: Vec<Endpoint>) -> Self {
        for (place, port) in self.ports.iter_mut().enumerate() {
            let of_state = |state, v4: bool| -> Vec<Target> {
                let all = endpoints.iter().enumerate();
                let chosen = all.filter(|(_, endpoint)| endpoint.state == state);
                let target = |(index, endpoint): (usize, &Endpoint)| {
                    let port = (*endpoint.ports.get(place)?)?;
                    let mut addresses = endpoint.addresses.iter();
                    let address = addresses.find(|address| address.is_ipv4() == v4)?;
                    Some(Target {
                        address: SocketAddr::new(*address, port),
                        endpoint: index,
                    })
                };
                chosen.filter_map(target).collect()
            };
            let usable = |v4| {
                let ready = of_state(EndpointState::Ready, v4);
                if ready.is_empty() {
                    of_state(EndpointState::Serving, v4)
                } else {
                    ready
                }
            };
            (port.v4, port.v6) = (usable(true), usable(false));
        }
        self.endpoints = endpoints;
        self
    }

    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == number)
    }

    /// The endpoints of a port. None where there is no such port.
    pub fn endpoint_counts(&self, number: u16) -> Option<EndpointCounts> {
        let place = self.ports.iter().position(|port| port.port == number)?;
        let port = &self.ports[place];
        let targets = port.v4.iter().chain(&port.v6);
        let ready: BTreeSet<usize> = targets.map(|target| target.endpoint).collect();
        let have = |endpoint: &&Endpoint| endpoint.ports.get(place).is_some_and(Option::is_some);
        let all = self.endpoints.iter().filter(have).count();
        Some(EndpointCounts {
            ready: ready.len(),
            pending: all.saturating_sub(ready.len()),
        })
    }

    /// Whether a client on `node` goes to this target before others.
    pub fn prefers(&self, target: Target, node: &str) -> bool {
        self.traffic_distribution.is_some()
            && !node.is_empty()
            && self
                .endpoints
                .get(target.endpoint)
                .is_some_and(|endpoint| endpoint.node == node)
    }
}
