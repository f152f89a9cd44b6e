//! What the kubelet asks a pod's containers, and where it asks from.

use std::net::IpAddr;

/// The probes of one workload. None by default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Probes {
    /// The addresses that they come from. Others may come from there too.
    pub from: Vec<IpAddr>,
    pub list: Vec<Probe>,
}

/// One probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub port: u16,
    pub ask: Ask,
}

/// What a probe asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    /// Whether something listens.
    TcpSocket,
    /// `GET` with exactly this path and query.
    HttpGet { path: String },
    /// The standard health check of gRPC, of this service. Empty: of the server as a whole.
    Grpc { service: String },
}

impl Probes {
    /// What is asked on `port` by who comes from `client`. Nothing where no probe comes from there.
    pub fn asked(&self, client: IpAddr, port: u16) -> impl Iterator<Item = &Ask> {
        let comes = self.from.contains(&client);
        let on_port = self.list.iter().filter(move |probe| probe.port == port);
        on_port.filter(move |_| comes).map(|probe| &probe.ask)
    }
}
