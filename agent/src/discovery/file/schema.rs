//! The shape of the mesh file, as serde reads it and as `malla schema` prints it.
//!
//! Only shape: a value of these types has the right fields of the right kinds, and the doc comments
//! here become the descriptions of the JSON schema. What the values mean is checked in
//! [`super::check()`], so addresses, durations and port ranges stay text here: that way a bad one is
//! reported beside all other mistakes instead of ending the parse.

mod values;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;

pub(super) use values::{At, DurationText, PortText, PortsText};

use crate::model::{
    Accelerate, EgressMode, FailMode, InterfaceMode, MtlsMode, NestedMode, TrafficDistribution,
};

/// The JSON schema of the mesh file, indented, made from the types of this module.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(MeshFile);
    format!("{:#}\n", schema.as_value())
}

/// A malla mesh: its nodes, its workloads and their settings.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct MeshFile {
    /// The trust domain of every identity in the mesh. Default: `cluster.local`.
    pub(super) trust_domain: Option<At<String>>,
    /// Where certificates come from and how long they live.
    #[serde(default)]
    pub(super) identity: IdentitySection,
    /// The machines that run an agent. `malla agent --node NAME` says which one it is.
    pub(super) nodes: Vec<At<NodeEntry>>,
    /// Settings of every workload. Those of its namespace and its own go first, field by field.
    pub(super) settings: Option<SettingsSection>,
    /// Settings by namespace.
    #[serde(default)]
    pub(super) namespaces: Vec<At<NamespaceEntry>>,
    /// The pods that the mesh knows.
    pub(super) workloads: Vec<At<WorkloadEntry>>,
    /// Names for sets of endpoints, with addresses and ports that stand for them.
    #[serde(default)]
    pub(super) services: Vec<At<ServiceEntry>>,
}

/// Where certificates come from and how long they live.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct IdentitySection {
    /// Absolute path of the folder of trust anchor and issuer, made by the first agent that needs
    /// it. Default: `/var/lib/malla/identity`.
    pub(super) directory: Option<At<String>>,
    /// How long a workload's certificate is valid. Default: `24h`.
    pub(super) certificate_lifetime: Option<At<DurationText>>,
}

/// A machine that runs one agent.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NodeEntry {
    /// Unique name of the node (an RFC 1123 subdomain).
    pub(super) name: At<String>,
    /// The node's own IP addresses, at least one.
    #[schemars(with = "Vec<IpAddr>")]
    pub(super) addresses: At<Vec<At<String>>>,
    /// Absolute path of the node's cgroup (v2) folder. The agent makes a child of it for itself.
    pub(super) cgroup: At<String>,
    /// Absolute path of a folder on a bpffs, where the agent pins links and maps.
    pub(super) bpffs: At<String>,
    /// Absolute path of the folder of the agent's unix socket, made where it isn't there, for its
    /// owner alone. Default: `/run/malla/NAME`.
    pub(super) runtime: Option<At<String>>,
}

/// Workloads, read by themselves.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WorkloadsOnly {
    pub(super) workloads: Vec<At<WorkloadEntry>>,
}

/// Services, read by themselves.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ServicesOnly {
    pub(super) services: Vec<At<ServiceEntry>>,
}

/// What is wanted of a file that may be bad elsewhere.
#[derive(Debug, Deserialize)]
pub(super) struct NodesOnly {
    pub(super) nodes: Vec<NodeFolders>,
}

/// Where the agents of a node keep what outlives them, and are found.
#[derive(Debug, Deserialize)]
pub struct NodeFolders {
    pub name: String,
    pub cgroup: PathBuf,
    pub bpffs: PathBuf,
    /// None: the default, which hangs on the name.
    pub runtime: Option<PathBuf>,
}

/// The settings of one namespace.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct NamespaceEntry {
    /// Name of the namespace (an RFC 1123 label).
    pub(super) name: At<String>,
    /// Settings of the namespace's workloads. A workload's own go first, field by field.
    pub(super) settings: Option<SettingsSection>,
}

/// One pod.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct WorkloadEntry {
    /// Name of the pod, unique in its namespace (an RFC 1123 subdomain).
    pub(super) name: At<String>,
    /// Namespace of the pod (an RFC 1123 label). Default: `default`.
    pub(super) namespace: Option<At<String>>,
    /// Service account of the pod: with the namespace, its identity. Default: `default`.
    pub(super) service_account: Option<At<String>>,
    /// Name of the node that the pod runs on. Absent: on none of this mesh's nodes.
    pub(super) node: Option<At<String>>,
    /// Absolute path of the pod's network namespace on its node. Needed by a meshed pod that has
    /// a node.
    pub(super) netns: Option<At<String>>,
    /// The pod's IP addresses, at least one.
    #[schemars(with = "Vec<IpAddr>")]
    pub(super) addresses: At<Vec<At<String>>>,
    /// Ports that the pod declares.
    #[serde(default)]
    pub(super) ports: Vec<PortEntry>,
    /// What the kubelet asks of the pod's containers, from an address of its node. In strict mode too
    /// it reaches the app, and nothing else from there does.
    #[serde(default)]
    pub(super) probes: Vec<At<ProbeEntry>>,
    /// Labels of the pod.
    #[serde(default)]
    pub(super) labels: BTreeMap<String, String>,
    /// Whether the pod is part of the mesh.
    #[serde(default)]
    pub(super) mesh: MeshMode,
    /// Whether Services send connections to the pod. Default: true.
    pub(super) ready: Option<bool>,
    /// Whether a Service without any ready endpoint sends connections to the pod though it isn't
    /// ready, as one does that terminates in good order. Default: as `ready`.
    pub(super) serving: Option<bool>,
    /// The pod's own settings.
    pub(super) settings: Option<SettingsSection>,
}

/// Whether a pod is part of the mesh.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum MeshMode {
    /// The pod has an identity, and its agent steers its traffic.
    #[default]
    Enabled,
    /// The pod is a known peer without identity.
    Disabled,
}

/// A port that a pod declares.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PortEntry {
    /// Name of the port, unique in its pod (an RFC 1123 label).
    pub(super) name: Option<At<String>>,
    /// The TCP port, 1 to 65535.
    #[schemars(range(min = 1))]
    pub(super) port: At<u16>,
}

/// One probe of a container: exactly one of the fields.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ProbeEntry {
    /// A GET request.
    pub(super) http_get: Option<HttpGetEntry>,
    /// A connection that is opened and closed.
    pub(super) tcp_socket: Option<TcpSocketEntry>,
    /// A health check as gRPC's health checking protocol has it, without TLS.
    pub(super) grpc: Option<GrpcEntry>,
}

/// A GET request.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct HttpGetEntry {
    /// Path of the request, with its query where it has one: no other one passes. Default: `/`.
    pub(super) path: Option<At<String>>,
    /// Number or name of the port.
    pub(super) port: At<PortText>,
}

/// A connection that is opened and closed.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct TcpSocketEntry {
    /// Number or name of the port.
    pub(super) port: At<PortText>,
}

/// A health check as gRPC's health checking protocol has it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct GrpcEntry {
    /// Number or name of the port.
    pub(super) port: At<PortText>,
    /// The service that is asked for. Default: the server as a whole.
    pub(super) service: Option<At<String>>,
}

/// One Service.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServiceEntry {
    /// Name of the Service, unique in its namespace (an RFC 1123 label).
    pub(super) name: At<String>,
    /// Namespace of the Service and of the workloads that it selects. Default: `default`.
    pub(super) namespace: Option<At<String>>,
    /// The Service's cluster addresses, of one family or of both. Needed unless it is headless.
    #[serde(default)]
    #[schemars(with = "Vec<IpAddr>")]
    pub(super) addresses: Vec<At<String>>,
    /// Whether it has no cluster address: clients learn of its endpoints and dial them themselves.
    #[serde(default)]
    pub(super) headless: bool,
    /// The Service's ports. Needed unless it is headless.
    #[serde(default)]
    pub(super) ports: Vec<At<ServicePortEntry>>,
    /// Labels of the workloads that are its endpoints: those that have all of them.
    #[serde(default)]
    pub(super) selector: BTreeMap<String, String>,
    /// Its endpoints, where it has no selector.
    #[serde(default)]
    pub(super) endpoints: Vec<At<EndpointEntry>>,
    /// Whether endpoints get connections that aren't ready.
    #[serde(default)]
    pub(super) publish_not_ready_addresses: bool,
    /// Which endpoints come first. Default: none.
    pub(super) traffic_distribution: Option<TrafficDistribution>,
    /// Whether a client keeps its endpoint. Default: `None`.
    #[serde(default)]
    pub(super) session_affinity: SessionAffinity,
    /// How long a client keeps its endpoint after its last connection, with `ClientIP`. Default:
    /// `3h`.
    pub(super) session_affinity_timeout: Option<At<DurationText>>,
}

/// Whether a Service's client keeps its endpoint.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
pub(super) enum SessionAffinity {
    /// Each connection goes to an endpoint of its own.
    #[default]
    None,
    /// All connections of one client address go to one endpoint while it is ready.
    ClientIP,
}

/// A port of a Service.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct ServicePortEntry {
    /// Name of the port, unique in its Service (an RFC 1123 label). Needed where there are several.
    pub(super) name: Option<At<String>>,
    /// The TCP port that clients dial, 1 to 65535.
    #[schemars(range(min = 1))]
    pub(super) port: At<u16>,
    /// The port of the endpoints: a number, or a name that their workloads declare. Default: the
    /// same as `port`.
    pub(super) target_port: Option<At<PortText>>,
    /// What is spoken on the port, such as `http` or `kubernetes.io/h2c`.
    pub(super) app_protocol: Option<String>,
}

/// An endpoint of a Service without selector.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct EndpointEntry {
    /// The endpoint's addresses, at most one of each family. They may be a workload's.
    #[schemars(with = "Vec<IpAddr>")]
    pub(super) addresses: At<Vec<At<String>>>,
    /// Whether it takes connections. Default: as its workload, else true.
    pub(super) ready: Option<bool>,
    /// Whether it takes connections where no endpoint is ready. Default: as its workload where it
    /// has that one's `ready`, else as `ready`.
    pub(super) serving: Option<bool>,
}

/// What can be chosen for a workload. A field that is left out is taken from the next level:
/// workload, namespace, mesh, default.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct SettingsSection {
    /// What becomes of clients without identity. Default: `permissive`.
    pub(super) mtls: Option<MtlsMode>,
    /// The same for single ports, such as `[{ports: 8080, mode: strict}]`. Their order doesn't
    /// matter. Default: none.
    pub(super) mtls_by_port: Option<Vec<PortMtls>>,
    /// Where the app may connect to. Default: `any`.
    pub(super) egress: Option<EgressMode>,
    /// Networks outside of the mesh that the app may connect to with `egress: mesh-only`, such as
    /// `10.9.0.0/16`. Default: none.
    pub(super) egress_allow_subnets: Option<Vec<At<String>>>,
    /// What becomes of new connections while no agent lives. Default: `closed`.
    pub(super) fail_mode: Option<FailMode>,
    /// What becomes of connections from network namespaces inside the pod. Default: `refuse`.
    pub(super) nested: Option<NestedMode>,
    /// What becomes of an interface that can't be steered. Default: `refuse`.
    pub(super) interfaces: Option<InterfaceMode>,
    /// How far connections between the app and its agent are taken past the network stack. `full`
    /// asks of the app that it reads with non-blocking sockets, and not by splice(2). Default: `auto`.
    pub(super) accelerate: Option<Accelerate>,
    /// Ports that the app dials without the mesh. Default: none.
    pub(super) skip_outbound_ports: Option<Vec<At<PortsText>>>,
    /// Ports of the app that never reach the agent. Default: none.
    pub(super) skip_inbound_ports: Option<Vec<At<PortsText>>>,
    /// Networks that the app dials without the mesh, such as `10.9.0.0/16`. Default: none.
    pub(super) skip_outbound_subnets: Option<Vec<At<String>>>,
    /// Networks whose clients reach the app without the mesh. Default: none.
    pub(super) skip_inbound_subnets: Option<Vec<At<String>>>,
    /// Source ports that the agent uses towards the app, at least 1000. Default: `10000-32000`.
    pub(super) dial_ports: Option<At<PortsText>>,
    /// Limit for opening a connection to a meshed peer or to the app. Default: `1s`.
    pub(super) mesh_connect_timeout: Option<At<DurationText>>,
    /// Limit for opening a connection to an unmeshed destination. Default: `5s`.
    pub(super) connect_timeout: Option<At<DurationText>>,
    /// A connection without a byte in either direction for so long is reset. `never` turns it off
    /// where a wider level sets it. Default: `never`.
    pub(super) idle_timeout: Option<At<DurationText>>,
    /// Connections that the pod may have at once, tunnels from other agents among them, at least
    /// 1; one more is reset. Default: 20000.
    #[schemars(range(min = 1))]
    pub(super) max_connections: Option<At<u32>>,
}

/// What becomes of clients without identity on some ports.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct PortMtls {
    /// A port of the app, or a range of them.
    pub(super) ports: At<PortsText>,
    /// What clients without identity meet there.
    pub(super) mode: MtlsMode,
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    /// Calls `seen` with the name of each property in the schema and its schema.
    fn each_property(schema: &Value, seen: &mut impl FnMut(&str, &Value)) {
        match schema {
            Value::Object(fields) => {
                if let Some(Value::Object(properties)) = fields.get("properties") {
                    for (name, property) in properties {
                        seen(name, property);
                    }
                }
                fields.values().for_each(|field| each_property(field, seen));
            }
            Value::Array(items) => items.iter().for_each(|item| each_property(item, seen)),
            _ => {}
        }
    }

    #[test]
    fn the_schema_describes_every_field() {
        let schema: Value = serde_json::from_str(&json_schema()).unwrap();
        let mut names = Vec::new();
        each_property(&schema, &mut |name, property| {
            let description = property["description"].as_str().unwrap_or_default();
            assert!(description.ends_with('.'), "{name}: {property}");
            names.push(name.to_owned());
        });
        names.sort_unstable();
        names.dedup();
        assert_eq!(
            names.join(" "),
            "accelerate addresses appProtocol bpffs certificateLifetime cgroup connectTimeout dialPorts \
             directory egress egressAllowSubnets endpoints failMode grpc headless httpGet \
             identity idleTimeout interfaces labels maxConnections mesh meshConnectTimeout mode \
             mtls mtlsByPort name namespace namespaces nested netns node nodes path port ports \
             probes publishNotReadyAddresses ready runtime selector service serviceAccount \
             services serving sessionAffinity sessionAffinityTimeout settings skipInboundPorts \
             skipInboundSubnets skipOutboundPorts skipOutboundSubnets targetPort tcpSocket \
             trafficDistribution trustDomain workloads"
        );
    }

    #[test]
    fn the_schema_says_what_is_needed_and_refuses_the_unknown() {
        let schema: Value = serde_json::from_str(&json_schema()).unwrap();
        assert_eq!(
            schema["required"],
            serde_json::json!(["nodes", "workloads"])
        );
        assert_eq!(schema["additionalProperties"], Value::Bool(false));
    }
}
