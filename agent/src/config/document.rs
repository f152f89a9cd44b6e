//! The shape of `/config`: what the agent believes, section by section. Plain data for serde;
//! nothing secret is in any of it.

use std::{
    collections::BTreeMap,
    fmt::Display,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, SystemTime},
};

use serde::{Serialize, Serializer};

use super::{
    acceleration::{Acceleration, AccelerationInForce},
    probes::Probe,
};
use crate::model::{
    Accelerate, EgressMode, EndpointState, FailMode, InterfaceMode, MtlsMode, NestedMode,
    PortRange, ServiceId, Settings, TrafficDistribution, WorkloadId,
};

/// The whole of `/config`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Document {
    pub node: String,
    pub version: &'static str,
    pub pid: u32,
    pub mesh: MeshFile,
    pub workloads: Vec<Workload>,
    /// Workloads of this node that can't be enrolled.
    pub refused: Vec<Refused>,
    pub services: Vec<Service>,
    pub tunnels: Vec<Tunnel>,
    /// Pods of this node that speak to each other through memory.
    pub neighbours: Vec<Neighbour>,
    /// The last connections that ended or were refused, the newest first.
    pub ended: Vec<Ended>,
    pub certificates: Certificates,
    pub ledger: Ledger,
    pub audit: Audit,
    pub acceleration: Acceleration,
}

/// How the mesh file was read.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct MeshFile {
    pub path: PathBuf,
    /// Whether the file as it is now is in force.
    pub in_force: bool,
    #[serde(serialize_with = "time")]
    pub last_good: SystemTime,
    pub last_refusal: Option<Refusal>,
}

/// A state of the mesh file that was refused.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    #[serde(serialize_with = "time")]
    pub at: SystemTime,
    pub reason: &'static str,
    /// The problems, one a line.
    pub report: String,
}

/// A pod that is enrolled.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    #[serde(rename = "workload", serialize_with = "text")]
    pub id: WorkloadId,
    pub identity: String,
    /// The pod's number in the kernel's maps.
    pub number: u32,
    pub netns: PathBuf,
    pub netns_inode: u64,
    /// All of its netns, as the kernel has them.
    pub addresses: Vec<IpAddr>,
    pub interfaces: Vec<Interface>,
    pub listener_ports: ListenerPorts,
    pub settings: SettingsInForce,
    pub probes: Vec<Probe>,
    /// Where probes come from: this node's own addresses. Empty without any.
    pub probes_from: Vec<IpAddr>,
    pub acceleration: AccelerationInForce,
    pub degraded: Vec<Degraded>,
    /// Connections and tunnels that live.
    pub connections: u32,
    /// How long it may still keep them, where it is leaving the mesh.
    pub leaving_within_seconds: Option<u64>,
}

/// An interface of a pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    pub index: u32,
    pub name: String,
    pub steered: bool,
    /// Why it isn't.
    pub failure: Option<String>,
}

/// Where the agent listens in a pod.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerPorts {
    pub outbound: u16,
    pub inbound: u16,
    pub mesh: u16,
}

/// Why a pod isn't served as it should be.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Degraded {
    pub reason: &'static str,
    pub what: String,
}

/// A workload that can't be enrolled.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    #[serde(serialize_with = "text")]
    pub workload: WorkloadId,
    pub why: String,
}

/// A workload's settings, named and written as in the mesh file.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SettingsInForce {
    mtls: MtlsMode,
    mtls_by_port: Vec<PortMtlsInForce>,
    egress: EgressMode,
    egress_allow_subnets: Vec<String>,
    fail_mode: FailMode,
    nested: NestedMode,
    interfaces: InterfaceMode,
    accelerate: Accelerate,
    skip_outbound_ports: Vec<String>,
    skip_inbound_ports: Vec<String>,
    skip_outbound_subnets: Vec<String>,
    skip_inbound_subnets: Vec<String>,
    dial_ports: String,
    mesh_connect_timeout: String,
    connect_timeout: String,
    idle_timeout: String,
    max_connections: u32,
}

#[derive(Debug, Serialize)]
struct PortMtlsInForce {
    ports: String,
    mode: MtlsMode,
}

impl From<&Settings> for SettingsInForce {
    fn from(settings: &Settings) -> Self {
        let port = |range: &PortRange| {
            if range.first == range.last {
                range.first.to_string()
            } else {
                format!("{}-{}", range.first, range.last)
            }
        };
        let ports = |ranges: &[PortRange]| ranges.iter().map(port).collect();
        let subnets = |nets: &[ipnet::IpNet]| nets.iter().map(ToString::to_string).collect();
        let duration = |duration| humantime::format_duration(duration).to_string();
        Self {
            mtls: settings.mtls,
            mtls_by_port: settings
                .mtls_by_port
                .iter()
                .map(|(range, mode)| PortMtlsInForce {
                    ports: port(range),
                    mode: *mode,
                })
                .collect(),
            egress: settings.egress,
            egress_allow_subnets: subnets(&settings.egress_allow_subnets),
            fail_mode: settings.fail_mode,
            nested: settings.nested,
            interfaces: settings.interfaces,
            accelerate: settings.accelerate,
            skip_outbound_ports: ports(&settings.skip_outbound_ports),
            skip_inbound_ports: ports(&settings.skip_inbound_ports),
            skip_outbound_subnets: subnets(&settings.skip_outbound_subnets),
            skip_inbound_subnets: subnets(&settings.skip_inbound_subnets),
            dial_ports: port(&settings.dial_ports),
            mesh_connect_timeout: duration(settings.mesh_connect_timeout),
            connect_timeout: duration(settings.connect_timeout),
            idle_timeout: settings.idle_timeout.map_or("never".to_owned(), duration),
            max_connections: settings.max_connections,
        }
    }
}

/// A Service of the mesh.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    #[serde(rename = "service", serialize_with = "text")]
    pub id: ServiceId,
    pub addresses: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub publish_not_ready_addresses: bool,
    pub traffic_distribution: Option<TrafficDistribution>,
    /// How long a client keeps its endpoint. None: it doesn't.
    pub session_affinity_timeout: Option<String>,
    pub endpoints: Vec<Endpoint>,
}

/// A port of a Service.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    pub name: Option<String>,
    pub port: u16,
    pub target_port: String,
    pub app_protocol: Option<String>,
}

/// An endpoint of a Service.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    pub addresses: Vec<IpAddr>,
    pub workload: Option<String>,
    /// None: on none of the mesh's nodes.
    pub node: Option<String>,
    pub state: EndpointState,
    /// What connections to it are secured by. None: plaintext.
    pub identity: Option<String>,
    /// Where each port of the Service leads. None: it hasn't that port.
    pub ports: Vec<Option<u16>>,
    /// Connections of this agent to it, of all Services.
    pub connections: u32,
}

/// A tunnel that is open.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Tunnel {
    pub direction: &'static str,
    /// The workload of this node.
    pub workload: Option<String>,
    /// The other end.
    pub peer: SocketAddr,
    /// What the other end has proved to be.
    pub identity: String,
    /// Connections in it.
    pub streams: usize,
    #[serde(serialize_with = "seconds")]
    pub age_seconds: Duration,
}

/// A pair of pods of this node, of one worker.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Neighbour {
    pub source: Option<String>,
    pub destination: Option<String>,
    /// The destination's that is dialled.
    pub address: IpAddr,
    /// What the network says: `asked`, `allowed`, or the reason why the pair is over.
    pub network: &'static str,
    /// Whether new connections go through memory. Else they take a tunnel.
    pub takes_connections: bool,
    /// Connections that go through memory.
    pub connections: usize,
}

/// Connections that ended alike: the same ends, for the same reason.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ended {
    /// When the last one did.
    #[serde(serialize_with = "time")]
    pub at: SystemTime,
    pub direction: &'static str,
    pub source: IpAddr,
    /// What the client dialled.
    pub destination: SocketAddr,
    /// Absent: in good order.
    pub reason: Option<&'static str>,
    pub times: u64,
}

/// Certificates and what they hang on.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificates {
    pub workloads: Vec<Certificate>,
    pub authority: Vec<AuthorityPart>,
}

/// A workload's certificate.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    pub identity: String,
    #[serde(serialize_with = "time")]
    pub expires: SystemTime,
}

/// A trust anchor, issuer or revocation list.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuthorityPart {
    pub object: &'static str,
    pub subject: String,
    pub path: PathBuf,
    #[serde(serialize_with = "time")]
    pub begins: SystemTime,
    #[serde(serialize_with = "time")]
    pub expires: SystemTime,
}

/// What audits have found, which compare what the kernel has with what the agent believes.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Audit {
    pub last_whole: Option<WholeAudit>,
    /// Differences that stand because they couldn't be put right.
    pub unhealed: usize,
    /// The last differences, the newest at the end.
    pub recent: Vec<AuditDifference>,
}

/// An audit of everything.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WholeAudit {
    #[serde(serialize_with = "time")]
    pub ended: SystemTime,
    pub took_seconds: f64,
}

/// A difference that an audit found.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct AuditDifference {
    #[serde(serialize_with = "time")]
    pub at: SystemTime,
    /// None: it is the node's.
    pub workload: Option<String>,
    pub kind: &'static str,
    pub what: String,
    /// Why it couldn't be put right.
    pub failure: Option<String>,
}

/// What the agent has open, and what the kernel says of it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Ledger {
    pub descriptors: Descriptors,
    pub workloads: Vec<WorkloadLedger>,
    pub differences: Vec<Difference>,
    /// Why the kernel couldn't be asked; the rest is empty then.
    pub failure: Option<String>,
}

/// All of the agent's descriptors.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptors {
    /// As the kernel has them.
    pub open: usize,
    /// Those that are entered, by what they are for.
    pub entered: BTreeMap<&'static str, usize>,
    /// Those from the agent's start that are still open, by the kernel's kind.
    pub from_start: BTreeMap<String, usize>,
}

/// The agent's sockets and tasks of one workload.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkloadLedger {
    #[serde(serialize_with = "text")]
    pub workload: WorkloadId,
    pub tasks: u32,
    /// Sockets by what they are for.
    pub sockets: BTreeMap<&'static str, usize>,
    pub believed: Sockets,
    /// None where the kernel couldn't be asked.
    pub kernel: Option<Sockets>,
    /// Connections that are open here and over for the kernel, which no longer lists them.
    pub closed: usize,
    /// What the kernel has more than is believed.
    pub difference: Option<SocketsDifference>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Sockets {
    pub listeners: usize,
    pub connections: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct SocketsDifference {
    pub listeners: i64,
    pub connections: i64,
}

/// A descriptor in which ledger and kernel differ.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    #[serde(rename = "difference")]
    pub how: &'static str,
    pub kind: String,
    pub workload: Option<String>,
    pub descriptor: i32,
    pub identity: String,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    /// How long it has been there at each look; under traffic there are always some of 0.
    #[serde(serialize_with = "seconds")]
    pub for_seconds: Duration,
}

fn time<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

fn text<S: Serializer>(id: &impl Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}

fn seconds<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(duration.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_written_as_in_the_mesh_file() {
        let strict = PortRange {
            first: 80,
            last: 81,
        };
        let settings = Settings {
            mtls_by_port: vec![(strict, MtlsMode::Strict)],
            skip_inbound_ports: vec![PortRange {
                first: 25,
                last: 25,
            }],
            skip_outbound_subnets: vec!["10.0.0.0/8".parse().unwrap()],
            ..Settings::default()
        };
        let shown = serde_json::to_value(SettingsInForce::from(&settings)).unwrap();
        assert_eq!(
            shown,
            serde_json::json!({
                "mtls": "permissive",
                "mtlsByPort": [{"ports": "80-81", "mode": "strict"}],
                "egress": "any",
                "egressAllowSubnets": [],
                "failMode": "closed",
                "nested": "refuse",
                "interfaces": "refuse",
                "accelerate": "auto",
                "skipOutboundPorts": [],
                "skipInboundPorts": ["25"],
                "skipOutboundSubnets": ["10.0.0.0/8"],
                "skipInboundSubnets": [],
                "dialPorts": "10000-32000",
                "meshConnectTimeout": "5s",
                "connectTimeout": "5s",
                "idleTimeout": "never",
                "maxConnections": 20000,
            })
        );
    }
}
