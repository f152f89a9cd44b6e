//! Services and the state of their endpoints.

use super::document::{Endpoint, Service, ServicePort};
use crate::{
    model::{self, Mesh},
    proxy::Balance,
};

/// All Services of the mesh, by namespace and name.
pub fn services(mesh: &Mesh, balance: &Balance) -> Vec<Service> {
    let mut services: Vec<Service> = mesh
        .services
        .values()
        .map(|service| self::service(service, mesh, balance))
        .collect();
    services.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    services
}

fn service(service: &model::Service, mesh: &Mesh, balance: &Balance) -> Service {
    let ports = service.ports.iter().map(|port| ServicePort {
        name: port.name.clone(),
        port: port.port,
        target_port: port.target.to_string(),
        app_protocol: port.app_protocol.clone(),
    });
    let endpoints = service.endpoints.iter();
    let affinity = service.client_ip_affinity;
    Service {
        id: service.id.clone(),
        addresses: service.addresses.clone(),
        ports: ports.collect(),
        publish_not_ready_addresses: service.publish_not_ready_addresses,
        traffic_distribution: service.traffic_distribution,
        session_affinity_timeout: affinity
            .map(|timeout| humantime::format_duration(timeout).to_string()),
        endpoints: endpoints
            .map(|endpoint| self::endpoint(endpoint, mesh, balance))
            .collect(),
    }
}

fn endpoint(endpoint: &model::Endpoint, mesh: &Mesh, balance: &Balance) -> Endpoint {
    let workload = endpoint.workload.as_ref();
    let known = workload.and_then(|id| mesh.workloads.get(id));
    let meshed = known.filter(|workload| workload.meshed);
    Endpoint {
        addresses: endpoint.addresses.clone(),
        workload: workload.map(ToString::to_string),
        node: Some(endpoint.node.clone()).filter(|node| !node.is_empty()),
        state: endpoint.state,
        identity: meshed.map(|workload| workload.identity.to_string()),
        ports: endpoint.ports.clone(),
        connections: balance.connections(&endpoint.addresses, &endpoint.ports),
    }
}
